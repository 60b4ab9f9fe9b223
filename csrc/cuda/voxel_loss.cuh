/* SPDX-License-Identifier: Apache-2.0
 *
 * voxel_loss.cuh: what the files of the voxel losses share: terms as numbers, reading of voxels.
 *
 * voxel_loss.cu       terms from numbers, losses from sums, derivatives by the sums, the operators
 * voxel_loss_few.cu   the sweeps over the voxels for softmax over 2 to 4 classes
 * voxel_loss_many.cu  the same for 5 to 16 classes: labels, and all gradients
 * voxel_loss_any.cu   the sweeps for any sum of terms and any number of classes
 *
 * Terms that have target, voxel weights and samples in common are a group. Its gradient is one
 * formula with factors that are sums over its terms:
 *
 *     h_c = m (p_c (u q_c + v p_c + e + f lost_c) - a q_c - d),  lost_c = -ln p_c
 *
 * A job goes to a sweep by value, so it has to fit into the 4 KiB that every GPU takes.
 */
#ifndef SS_CUDA_VOXEL_LOSS_CUH
#define SS_CUDA_VOXEL_LOSS_CUH

#include "device.cuh"

#define VL_TERMS 32
#define VL_NEAR 112 /* class weights of all terms that travel with the job */

enum { VL_CE, VL_DICE, VL_MSE, VL_KL, VL_ENTROPY };
enum { VL_SOFTMAX, VL_SIGMOID, VL_NONE };
enum { VL_VOXEL, VL_ELEMENT, VL_SAMPLE, VL_SUM };

/* What a sweep needs to know of a term (forward) or of a group (backward: no kind). */
typedef struct vl_term {
    const void *target; /* a distribution; NULL: labels, or no target at all */
    int64_t first, last;
    double smoothing;
    int64_t row;  /* its first row of sums: Dice has one per class, others one */
    int8_t dtype; /* of the distribution */
    int8_t kind, slot, hard, squared;
    int8_t owner;   /* the first term of its slot: it counts faults */
    int8_t number;  /* of the term among all: where its class weights are */
    int8_t entropy; /* a group with a factor f */
} vl_term;

/* Labels and voxel weights that terms have in common; all of them cover the same samples. */
typedef struct vl_slot {
    const void *label, *weight; /* or NULL */
    int64_t ignore;
    int8_t label_dtype, weight_dtype, ignores;
    int8_t inside;      /* the ignored label is a class */
    int8_t label_bytes; /* of one */
    int8_t ignores_raw; /* whether the ignored label can occur, and as which bits
                           (to 32) */
    int32_t raw;
} vl_slot;

typedef struct vl_job {
    const void *logits;
    void *dlogits;
    int64_t B, C, S;
    int64_t chunks; /* per sample */
    int64_t rows;   /* of sums of a chunk */
    int32_t dtype, activation, terms;
    int32_t wide;       /* four voxels are one access everywhere (voxel_loss_few.cu) */
    double *part;       /* forward: [B, chunks, rows, 4] */
    const void *factor; /* backward: [groups, B, C, 8] u v e f a d 0 0 in the type
                           of computing */
    const double *far;  /* class weights [terms, C] if there are too many to be near */
    unsigned long long *faults;
    uint32_t *done; /* forward: a number to be set to 0 for the launch that follows */
    vl_term term[VL_TERMS];
    vl_slot slot[VL_TERMS];
    double near[VL_NEAR];
} vl_job;
static_assert(sizeof(vl_job) <= 4096, "arguments of a kernel");

/* The sweeps for anything: their chunk, and launches. */
int64_t ss_vl_any_chunk(void);
ss_status ss_vl_any_forward(ss_exec *x, const vl_job *j);
ss_status ss_vl_any_backward(ss_exec *x, const vl_job *j);

/* A group for a forward sweep of its own, softmax over VL_MANY classes or fewer: labels with
 * cross entropy, Dice or both; or, for VL_FEW, a distribution (or none, for entropy) with one
 * term of each kind. */
#define VL_FEW 4
#define VL_MANY 16
#define VL_CHUNK 8192 /* voxels of a block */
typedef struct vl_group {
    const void *logits, *target;
    int64_t C, S, first, last, chunks, rows;
    double *part;
    unsigned long long *faults; /* NULL: counted elsewhere */
    uint32_t *done;             /* as in vl_job */
    vl_slot slot;
    int64_t row[5]; /* of a term of each kind, -1: none */
    int32_t logits_dtype, dtype, wide, squared, weighted;
    double a[VL_MANY];                 /* class weights of cross entropy */
    float keep[VL_FEW], extra[VL_FEW]; /* r_c = keep q_c + extra of cross entropy */
} vl_group;

ss_status ss_vl_few_forward(ss_exec *x, const vl_group *g);
ss_status ss_vl_few_backward(ss_exec *x, const vl_job *j);
ss_status ss_vl_many_forward(ss_exec *x, const vl_group *g);
ss_status ss_vl_many_backward(ss_exec *x, const vl_job *j);

SS_BOTH bool vl_covers(const vl_term &t, int64_t b) {
    return t.first <= b && b < t.last;
}

SS_DEVICE double vl_class_weight(const vl_job &j, int32_t term, int64_t c) {
    const int64_t at = term * j.C + c;
    return j.far ? j.far[at] : j.near[at];
}

/* Element i of an array of any dtype in R. */
template <typename R> SS_DEVICE R vl_number(const void *p, int32_t dtype, int64_t i) {
    switch (dtype) {
    case SS_F16:
        return static_cast<R>(ss_load<ss_half>(p, i));
    case SS_BF16:
        return static_cast<R>(ss_load<ss_bfloat>(p, i));
    case SS_F32:
        return static_cast<R>(ss_load<float>(p, i));
    case SS_F64:
        return static_cast<R>(ss_load<double>(p, i));
    default:
        break;
    }
    SS_FOR_INT(dtype, I, return static_cast<R>(ss_load<I>(p, i)));
    return R(0);
}

/* The same for the three short floating types. */
SS_DEVICE float vl_short(const void *p, int32_t dtype, int64_t i) {
    if (dtype == SS_F32) {
        return ss_load<float>(p, i);
    }
    return dtype == SS_F16 ? ss_load<ss_half>(p, i) : ss_load<ss_bfloat>(p, i);
}

/* A label as a number of 64 bits; those of u64 beyond come out negative: no class. */
SS_DEVICE int64_t vl_label(const void *p, int32_t dtype, int64_t i) {
    SS_FOR_INT(dtype, I, return static_cast<int64_t>(ss_load<I>(p, i)));
    return -1;
}

/* The class of a label, -1 if it is ignored or none, which *faults then counts.
 */
SS_DEVICE int32_t vl_class(const vl_slot &s, int64_t label, int64_t classes, int32_t *faults) {
    const bool inside = label >= 0 && label < classes;
    const bool skip = s.ignores && label == s.ignore;
    *faults += !(inside || skip);
    return inside && !skip ? static_cast<int32_t>(label) : -1;
}

/* Class and weight of voxel i of a slot; weight 0 where ignored or faulty. */
template <typename R>
SS_DEVICE void vl_read_slot(const vl_slot &s, int64_t i, int64_t classes, int32_t *y, R *m,
                            int32_t *faults) {
    *y = s.label ? vl_class(s, vl_label(s.label, s.label_dtype, i), classes, faults) : 0;
    R w = s.weight ? vl_number<R>(s.weight, s.weight_dtype, i) : R(1);
    const bool negative = w < R(0);
    *faults += negative;
    *m = *y >= 0 && !negative ? w : R(0);
}

/* What a forward sweep does for the launch that follows. */
SS_DEVICE void vl_prepare(uint32_t *done) {
    if (blockIdx.x == 0 && threadIdx.x == 0) {
        *done = 0;
    }
}

/* Adds a block's faults, a number per thread, to the operator's counter. */
template <int THREADS> SS_DEVICE void vl_count_faults(unsigned long long *counter, int32_t faults) {
    if (!__syncthreads_or(faults) || !counter) {
        return;
    }
    for (int step = SS_WARP / 2; step > 0; step /= 2) {
        faults += __shfl_xor_sync(SS_ALL_LANES, faults, step);
    }
    if (threadIdx.x % SS_WARP == 0) {
        atomicAdd(counter, static_cast<unsigned long long>(faults));
    }
}

#endif
