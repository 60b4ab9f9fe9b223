/* SPDX-License-Identifier: Apache-2.0
 *
 * voxel_loss.cuh: what the files of the voxel losses share: terms as numbers, reading of voxels.
 *
 * voxel_loss.cu      terms from numbers, losses from sums, derivatives by the sums, the operators
 * voxel_loss_any.cu  the sweeps over the voxels for any sum of terms and any number of classes
 *
 * A job goes to a sweep by value, so it has to fit into the 4 KiB that every GPU takes.
 */
#ifndef SS_CUDA_VOXEL_LOSS_CUH
#define SS_CUDA_VOXEL_LOSS_CUH

#include "device.cuh"

#define VL_TERMS 32
#define VL_NEAR 144 /* class weights of all terms that travel with the job */

enum { VL_CE, VL_DICE, VL_MSE, VL_KL, VL_ENTROPY };
enum { VL_SOFTMAX, VL_SIGMOID, VL_NONE };
enum { VL_VOXEL, VL_ELEMENT, VL_SAMPLE, VL_SUM };

/* What a sweep needs to know of a term. */
typedef struct vl_term {
    const void *target; /* a distribution; NULL: labels, or no target at all */
    int64_t first, last;
    double smoothing;
    int64_t row;  /* its first row of sums: Dice has one per class, others one */
    int8_t dtype; /* of the distribution */
    int8_t kind, slot, hard, squared;
    int8_t owner; /* the first term of its slot: it counts faults */
} vl_term;

/* Labels and voxel weights that terms have in common; all of them cover the same samples. */
typedef struct vl_slot {
    const void *label, *weight; /* or NULL */
    int64_t ignore;
    int8_t label_dtype, weight_dtype, ignores;
} vl_slot;

typedef struct vl_job {
    const void *logits;
    void *dlogits;
    int64_t B, C, S;
    int64_t chunks; /* per sample */
    int64_t rows;   /* of sums of a chunk */
    int32_t dtype, activation, terms, reserved;
    double *part;       /* forward: [B, chunks, rows, 4] */
    const void *factor; /* backward: [terms, B, C, 4] u, v, e, 0 in the type of computing */
    const double *far;  /* class weights [terms, C] if there are too many to be near */
    unsigned long long *faults;
    vl_term term[VL_TERMS];
    vl_slot slot[VL_TERMS];
    double near[VL_NEAR];
} vl_job;
static_assert(sizeof(vl_job) <= 4096, "arguments of a kernel");

/* The sweeps for anything: their chunk, and launches. */
int64_t ss_vl_any_chunk(void);
ss_status ss_vl_any_forward(ss_exec *x, const vl_job *j);
ss_status ss_vl_any_backward(ss_exec *x, const vl_job *j);

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

/* A label as a number of 64 bits; those of u64 beyond come out negative: no class. */
SS_DEVICE int64_t vl_label(const void *p, int32_t dtype, int64_t i) {
    SS_FOR_INT(dtype, I, return static_cast<int64_t>(ss_load<I>(p, i)));
    return -1;
}

/* The class of a label, -1 if it is ignored or none, which *faults then counts. */
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
