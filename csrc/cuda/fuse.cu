/* SPDX-License-Identifier: Apache-2.0
 *
 * fuse.cu: S sources -> mean, hard label, confidence, uncertainty and weight map, in one pass.
 *
 *     pbar = sum_s r_lab_s p^s,  mu = sum_s r_unc_s p^s,  H(p) = -sum_c p_c ln max(p_c + o, 1e-7)
 *     var = sum_c sum_s r_unc_s (p^s_c - mu_c)^2,  ent = H(mu),  mi = H(mu) - sum_s r_unc_s H(p^s)
 *     u = var / (1 - 1/C), ent / ln C or mi / ln C, clipped to 0..1
 *     weight = exp(-kappa u), 1 - u, 1[u <= tau_u], (max pbar - 1/C) / (1 - 1/C) clipped, or 1
 *
 * Sources [B, C, V], probabilities or logits. One channel is the foreground of two classes, and two
 * logits are one sigmoid: one row. A thread has N voxels: those of 16 bytes of results where V and
 * all addresses are multiples of that, else voxels a block's width apart. The kernels:
 *     k_fuse            probabilities of any C, and one row of logits: class by class, so that
 *                       nothing is kept per class; 3 or 4 sources in flight
 *     k_fuse_sigmoids   the means of one row of logits, where no var and no mi is wanted
 *     k_fuse_softmax    up to 16 classes of logits (two means or float64: 8): sums in registers,
 *                       source by source, one exponential per logit
 *     k_fuse_many       more classes: first every source's largest logit and sum of exponentials,
 *                       in shared memory; then class by class
 *
 * Memory: each source that has weight is read once (k_fuse_many: three times, one of them from L2
 * at best); each wanted output is written once. 4 bytes per voxel, source and row, or 2; 4 bytes
 * per voxel and row of an output, 1 of labels. No workspace, one launch.
 *
 * Weights are read where they are: a block begins with its sample's two columns of them and makes a
 * list of the sources that count in shared memory. What is no weight (below 0, above 2, NaN) is
 * taken for 0, a column is divided by its sum, and a sample has no source if one column is 0. The
 * CPU refuses all of these; here the sample counts as one fault.
 *
 * Numerics: the CPU's functions, and its sums over differences from the source of largest weight in
 * its order (csrc/cpu/fuse.c says what that is good for). So pbar, and with it labels, are the same
 * bits, except that (1) where foreground logits have two means, both are summed four sources at a
 * time, which are other four than the CPU's: 4e-7; (2) beside a logit that is not finite the CPU
 * sums a block of voxels by single sigmoids, and this kernel a thread's: 4e-7. The var and mi of
 * several rows are summed class by class, on the CPU source by source: S C roundings of partial
 * sums below 1 each way, at random 2e-6 for S C = 1000; weight exp adds a factor kappa. float64
 * sources are computed in double, where exp and log are CUDA's: 1e-14. Deterministic: a voxel is
 * the work of one thread. registers <= 128
 */
#include "device.cuh"

#define THREADS 256
#define MANY_THREADS 128
#define MANY_SLOTS ((SS_MAX_SHARED - 5120) / 8 / MANY_THREADS) /* there is room for, and a list */

enum { UNC_VAR, UNC_ENT, UNC_MI };
enum { WEIGHT_EXP, WEIGHT_LINEAR, WEIGHT_GATE, WEIGHT_CONF, WEIGHT_NONE };

/* All that a kernel has to know, by value, but for the weights. R: float or double. */
template <typename R> struct fuse_job {
    const void *source[SS_MAX_LIST];
    uint8_t dtype[SS_MAX_LIST]; /* of sources */
    const double *r[2];         /* [S, B], for labels and for doubt; NULL: equal ones */
    unsigned long long *faults;
    R *mean, *confidence, *u, *weight; /* NULL: not wanted */
    uint8_t *label;
    int64_t B, C, V;
    uint32_t chunks;               /* blocks per sample */
    int32_t S;                     /* sources */
    int32_t rows;                  /* that are summed: C, or 1 for two classes as one foreground */
    int32_t all;                   /* the dtype of all sources; -1: they differ */
    int32_t vector;                /* memory takes 16 bytes at a time */
    int8_t logits, sigmoids, pair; /* pair: the mean of one row has two channels */
    int8_t unc, weighting, need_u, need_mean, gated;
    int32_t ignore;
    R scale, offset, tau_c, tau_u, rate, chance;
};
static_assert(sizeof(fuse_job<double>) <= 4096, "more than every CUDA takes as arguments");

/* The sources that count in a block's sample, in shared memory. An entry is a source that has
 * weight; references, the sources of largest weight, are none unless `sigmoids`. */
template <typename R> struct fuse_list {
    double column[2][SS_MAX_LIST]; /* the weights of all sources, for labels and for doubt */
    double sum[2];
    int32_t ref[2];                           /* -1: no source has weight */
    R r_unc[SS_MAX_LIST], r_lab[SS_MAX_LIST]; /* of entries */
    uint8_t entry[SS_MAX_LIST];               /* its source */
    int32_t n, ref_u, ref_l;
    bool two; /* means; if not, mu is all: r_unc are the weights of the one that is needed */
    bool known;
};
static_assert(sizeof(fuse_list<double>) + MANY_SLOTS * 8 * MANY_THREADS <= SS_MAX_SHARED,
              "a list and k_fuse_many's own must fit");

/* What a thread works on: N voxels `step` apart of sample b. */
template <typename R> struct fuse_place {
    const fuse_list<R> &list;
    int64_t b, v;
    int32_t step;
};

/* What runs along over the classes. */
template <typename R, int N> struct fuse_state {
    R doubt[N]; /* u before it is scaled */
    R conf[N];
    int32_t label[N];
};

/* ---- the sources that count --------------------------------------------------------------------
 */

/* Reads both columns of sample b; a thread's share of what is no weight. */
template <typename R>
SS_DEVICE int read_columns(const fuse_job<R> &j, int64_t b, fuse_list<R> *list) {
    int faults = 0;
    for (int i = (int)threadIdx.x; i < 2 * j.S; i += (int)blockDim.x) {
        const int which = i < j.S ? 0 : 1, s = i - which * j.S;
        const double *table = j.r[which];
        const double v = table ? table[s * j.B + b] : 1.0 / (double)j.S;
        const bool right = v >= 0 && v <= 2;
        list->column[which][s] = right ? v : 0.0;
        faults |= !right;
    }
    return faults;
}

/* The CPU's sum, in its order, and the first source of largest weight. */
template <typename R>
SS_DEVICE int sum_column(const fuse_job<R> &j, int which, fuse_list<R> *list) {
    double sum = 0, most = 0;
    int ref = -1;
    for (int s = 0; s < j.S; ++s) {
        const double v = list->column[which][s];
        sum += v;
        ref = v > most ? s : ref;
        most = v > most ? v : most;
    }
    list->sum[which] = sum;
    list->ref[which] = ref;
    return ref >= 0 && !(sum > 1 - 1e-4 && sum < 1 + 1e-4);
}

/* Whether a source is one of the list; its weights there. A reference differs from itself by
 * nothing. */
template <typename R>
SS_DEVICE bool is_entry(const fuse_job<R> &j, const fuse_list<R> &list, bool two, int s,
                        double *lab, double *unc) {
    const int mu = j.need_u ? 1 : 0;
    *lab = two && (j.sigmoids || s != list.ref[0]) ? list.column[0][s] : 0.0;
    *unc = j.sigmoids || s != list.ref[mu] ? list.column[mu][s] : 0.0;
    return *lab > 0 || *unc > 0;
}

/* The list of sample b. All threads take part. */
template <typename R>
SS_DEVICE void list_sources(const fuse_job<R> &j, int64_t b, bool first, fuse_list<R> *list) {
    int faults = read_columns(j, b, list);
    __syncthreads();
    if (threadIdx.x == 0) {
        faults |= sum_column(j, 0, list);
    }
    if (threadIdx.x == blockDim.x - 1) {
        faults |= sum_column(j, 1, list);
    }
    __syncthreads();
    const bool known = list->ref[0] >= 0 && list->ref[1] >= 0;
    if (first) { /* of the sample's blocks */
        faults |= (list->ref[0] < 0) != (list->ref[1] < 0);
        if (__syncthreads_or(faults) && j.faults && threadIdx.x == 0) {
            atomicAdd(j.faults, 1ull);
        }
    }
    bool same = true;
    for (int s = (int)threadIdx.x; known && s < j.S; s += (int)blockDim.x) {
        const double lab = list->column[0][s] / list->sum[0];
        const double unc = list->column[1][s] / list->sum[1];
        list->column[0][s] = lab;
        list->column[1][s] = unc;
        same = same && lab == unc;
    }
    const bool two = !__syncthreads_and(same) && j.need_u && j.need_mean;
    for (int s = (int)threadIdx.x; s < j.S; s += (int)blockDim.x) {
        double lab, unc;
        int n = 0;
        for (int k = 0; k < s; ++k) {
            n += is_entry(j, *list, two, k, &lab, &unc);
        }
        if (is_entry(j, *list, two, s, &lab, &unc)) {
            list->r_lab[n] = (R)lab;
            list->r_unc[n] = (R)unc;
            list->entry[n++] = (uint8_t)s;
        }
        if (s == j.S - 1) {
            list->n = n;
            list->two = two;
            list->known = known;
            list->ref_u = list->ref[j.need_u ? 1 : 0];
            list->ref_l = list->ref[0];
        }
    }
    __syncthreads();
}

template <typename R>
SS_DEVICE fuse_place<R> place_of(const fuse_job<R> &j, int n, fuse_list<R> *list) {
    const uint32_t sample = blockIdx.x / j.chunks, chunk = blockIdx.x - sample * j.chunks;
    const int64_t start = (int64_t)chunk * blockDim.x * n;
    list_sources(j, sample, chunk == 0, list);
    return {*list, (int64_t)sample, start + (j.vector ? (int64_t)threadIdx.x * n : threadIdx.x),
            j.vector ? 1 : (int32_t)blockDim.x};
}

/* ---- arithmetic: the CPU's ---------------------------------------------------------------------
 */

SS_DEVICE float fuse_exp(float x) {
    return ss_expf(x);
}
SS_DEVICE double fuse_exp(double x) {
    return exp(x);
}
SS_DEVICE float fuse_exp2(float x) {
    return ss_exp2_bounded(x);
}
SS_DEVICE double fuse_exp2(double x) {
    return exp2(x);
}
SS_DEVICE float fuse_log(float x) {
    return ss_log_bounded(x);
}
SS_DEVICE double fuse_log(double x) {
    return log(x);
}
SS_DEVICE float fuse_sigmoid(float x) {
    return x == x ? ss_sigmoidf(x) : x;
}
SS_DEVICE double fuse_sigmoid(double x) {
    return 1.0 / (1.0 + exp(-x));
}

/* 0..1; NaN stays */
template <typename R> SS_DEVICE R inside(R x) {
    x = x < (R)0 ? (R)0 : x;
    return x > (R)1 ? (R)1 : x;
}

/* e / sum, rounded as a division is, from inverse = 1 / sum: with fused operations the remainder
 * is exact. */
SS_DEVICE float divided(float e, float sum, float inverse) {
    float q = e * inverse;
    return fmaf(fmaf(-q, sum, e), inverse, q);
}
SS_DEVICE double divided(double e, double sum, double) {
    return e / sum;
}

template <typename R> SS_DEVICE R p_log_p(R p, R offset) {
    R x = p + offset;
    return p * fuse_log(x > (R)1e-7 ? x : (R)1e-7);
}

/* A row's part of the entropy. */
template <typename R> SS_DEVICE R entropy_of(const fuse_job<R> &j, R p) {
    R t = p_log_p(p, j.offset);
    if (j.rows == 1) {
        t += p_log_p((R)1 - p, j.offset);
    }
    return -t;
}

/* Two channels: the softmax's second one. m - m is 0, or NaN for a logit of +inf. */
template <typename R> SS_DEVICE R softmax_of_two(R z0, R z1) {
    R m = z0 > z1 ? z0 : z1;
    return fuse_sigmoid(z1 - z0) + (m - m);
}

/* 1 + 2^y with |y| cut at 30, y given as bits: the sigmoid is 0 or 1 there but for 1e-9, and a
 * product of four of these is far from infinity. */
SS_DEVICE float denominator(uint32_t y) {
    int32_t a = (int32_t)(y & 0x7fffffffu);
    a = a < 0x41f00000 ? a : 0x41f00000;
    return 1.0f + ss_exp2_inside(ss_bits_f32((uint32_t)a | (y & 0x80000000u)));
}

/* ---- what comes out ----------------------------------------------------------------------------
 */

/* N numbers of an output whose voxel p.v is element `at`; labels are bytes. */
template <int N, typename R, typename T>
SS_DEVICE void put(const fuse_job<R> &j, const fuse_place<R> &p, T *out, int64_t at, const T *v) {
    if constexpr (N > 1) {
        if (j.vector) {
            if constexpr (sizeof(T) == 1) {
                uint32_t word = 0;
#pragma unroll
                for (int k = 0; k < N; ++k) {
                    word |= (uint32_t)v[k] << 8 * k;
                }
                if constexpr (N == 4) {
                    *reinterpret_cast<uint32_t *>(out + at) = word;
                } else {
                    *reinterpret_cast<uint16_t *>(out + at) = (uint16_t)word;
                }
            } else {
                ss_vec16<T> piece;
#pragma unroll
                for (int k = 0; k < N; ++k) {
                    piece.v[k] = v[k];
                }
                ss_store16(out + at, piece);
            }
            return;
        }
    }
#pragma unroll
    for (int k = 0; k < N; ++k) {
        if (p.v + k * p.step < j.V) {
            out[at + k * p.step] = v[k];
        }
    }
}

/* The mean of class c: confidence and label so far, and out with it. */
template <int N, typename R>
SS_DEVICE void take_mean(const fuse_job<R> &j, const fuse_place<R> &p, int64_t c, const R *mean,
                         fuse_state<R, N> *s) {
#pragma unroll
    for (int k = 0; k < N; ++k) {
        const R x = mean[k];
        if (j.rows == 1) {
            s->conf[k] = x > (R)0.5 ? x : (R)1 - x;
            s->label[k] = x > (R)0.5;
        } else { /* strictly larger: ties go to the smallest class; NaN is taken and stays */
            const bool take = c == 0 || x > s->conf[k] || x != x;
            s->conf[k] = take ? x : s->conf[k];
            s->label[k] = take ? (int32_t)c : s->label[k];
        }
    }
    if (!j.mean) {
        return;
    }
    if (!j.pair) {
        put<N>(j, p, j.mean, (p.b * j.rows + c) * j.V + p.v, mean);
        return;
    }
    R other[N];
#pragma unroll
    for (int k = 0; k < N; ++k) {
        other[k] = (R)1 - mean[k];
    }
    put<N>(j, p, j.mean, 2 * p.b * j.V + p.v, other);
    put<N>(j, p, j.mean, (2 * p.b + 1) * j.V + p.v, mean);
}

template <typename R> SS_DEVICE R weight_of(const fuse_job<R> &j, R u, R conf) {
    switch (j.weighting) {
    case WEIGHT_EXP:
        return u == u ? fuse_exp2(u * j.rate) : u;
    case WEIGHT_LINEAR:
        return (R)1 - u;
    case WEIGHT_GATE: /* NaN + 0 keeps a NaN that the comparison would lose */
        return (u <= j.tau_u ? (R)1 : (R)0) + (u - u);
    case WEIGHT_CONF:
        return inside((conf - j.chance) * ((R)1 / ((R)1 - j.chance)));
    default:
        return (R)1;
    }
}

/* Everything but the mean, which take_mean has stored. */
template <int N, typename R>
SS_DEVICE void finish(const fuse_job<R> &j, const fuse_place<R> &p, const fuse_state<R, N> &s) {
    R u[N], weight[N];
    uint8_t label[N];
#pragma unroll
    for (int k = 0; k < N; ++k) {
        u[k] = inside(s.doubt[k] * j.scale);
        bool keep = s.conf[k] >= j.tau_c && (!j.gated || u[k] <= j.tau_u);
        label[k] = (uint8_t)(keep ? s.label[k] : j.ignore);
    }
    const int64_t at = p.b * j.V + p.v;
    if (j.label) {
        put<N>(j, p, j.label, at, label);
    }
    if (j.confidence) {
        put<N>(j, p, j.confidence, at, s.conf);
    }
    if (j.u) {
        put<N>(j, p, j.u, at, u);
    }
    if (j.weight) {
#pragma unroll
        for (int k = 0; k < N; ++k) {
            weight[k] = weight_of(j, u[k], s.conf[k]);
        }
        put<N>(j, p, j.weight, at, weight);
    }
}

/* Nothing is known about this sample: uniform distribution, u = 1, weight 0, label ignored. */
template <int N, typename R> SS_DEVICE void unknown(const fuse_job<R> &j, const fuse_place<R> &p) {
    R chance[N], one[N], zero[N];
    uint8_t label[N];
#pragma unroll
    for (int k = 0; k < N; ++k) {
        chance[k] = j.chance;
        one[k] = (R)1;
        zero[k] = (R)0;
        label[k] = (uint8_t)j.ignore;
    }
    const int64_t at = p.b * j.V + p.v, rows = j.pair ? 2 : j.rows;
    for (int64_t c = 0; j.mean && c < rows; ++c) {
        put<N>(j, p, j.mean, (p.b * rows + c) * j.V + p.v, chance);
    }
    if (j.label) {
        put<N>(j, p, j.label, at, label);
    }
    if (j.confidence) {
        put<N>(j, p, j.confidence, at, chance);
    }
    if (j.u) {
        put<N>(j, p, j.u, at, one);
    }
    if (j.weight) {
        put<N>(j, p, j.weight, at, zero);
    }
}

/* ---- sources -----------------------------------------------------------------------------------
 */

/* In place of a dtype: every source has its own. */
struct fuse_mixed {};

/* Runs a statement with T as the dtype of the sources: float64 for all or for none. */
#define FUSE_FOR_DTYPE(j, R, T, ...)                                                               \
    if constexpr (sizeof(R) == 8) {                                                                \
        typedef double T;                                                                          \
        __VA_ARGS__;                                                                               \
    } else {                                                                                       \
        switch ((j).all) {                                                                         \
            SS_CASE_OF(SS_F16, ss_half, T, __VA_ARGS__)                                            \
            SS_CASE_OF(SS_BF16, ss_bfloat, T, __VA_ARGS__)                                         \
            SS_CASE_OF(SS_F32, float, T, __VA_ARGS__)                                              \
        default: {                                                                                 \
            typedef fuse_mixed T;                                                                  \
            __VA_ARGS__;                                                                           \
        }                                                                                          \
        }                                                                                          \
    }

template <typename T, typename R> SS_DEVICE R element(const fuse_job<R> &j, int s, int64_t at) {
    if constexpr (sizeof(T) > 1) {
        return (R)ss_load<T>(j.source[s], at);
    } else {
        switch (j.dtype[s]) {
        case SS_F16:
            return (R)ss_load<ss_half>(j.source[s], at);
        case SS_BF16:
            return (R)ss_load<ss_bfloat>(j.source[s], at);
        default:
            return (R)ss_load<float>(j.source[s], at);
        }
    }
}

/* N elements at once: 16 or (four of half precision) 8 bytes. */
template <typename T, int N> struct fuse_piece {
    union {
        uint4 all;
        uint2 half;
        T v[N];
    };
    SS_DEVICE fuse_piece from(const void *source, int64_t at) {
        const T *place = static_cast<const T *>(source) + at;
        fuse_piece u;
        if constexpr (N * sizeof(T) == 16) {
            u.all = *reinterpret_cast<const uint4 *>(place);
        } else {
            u.half = *reinterpret_cast<const uint2 *>(place);
        }
        return u;
    }
};

/* N numbers of each of the first `left` of COUNT sources, voxel p.v being element `at`. */
template <int COUNT, int N, typename T, typename R>
SS_DEVICE void load_batch(const fuse_job<R> &j, const fuse_place<R> &p, const int *s, int left,
                          int64_t at, R (*out)[N]) {
    if constexpr (sizeof(T) > 1 && N > 1) {
        if (j.vector) {
#pragma unroll
            for (int q = 0; q < COUNT; ++q) {
                if (q < left) {
                    const fuse_piece<T, N> u = fuse_piece<T, N>::from(j.source[s[q]], at);
#pragma unroll
                    for (int k = 0; k < N; ++k) {
                        out[q][k] = (R)ss_value(u.v[k]);
                    }
                }
            }
            return;
        }
    }
    int32_t voxel[N]; /* past the end: the first one again, and never stored */
#pragma unroll
    for (int k = 0; k < N; ++k) {
        voxel[k] = p.v + k * p.step < j.V ? k * p.step : 0;
    }
#pragma unroll
    for (int q = 0; q < COUNT; ++q) {
        if (q < left) {
#pragma unroll
            for (int k = 0; k < N; ++k) {
                out[q][k] = element<T>(j, s[q], at + voxel[k]);
            }
        }
    }
}

/* Sources are objects with N voxels per thread and, for BATCH of them in flight,
 *     fetch<COUNT>(s, slot, left, c, out)   class c of the first `left` of COUNT sources
 * The common case, lean for the sake of occupancy: probabilities of one dtype in pieces of memory,
 * which stay as they are until they are used; no mi. */
template <typename T> struct fuse_pieces {
    typedef ss_float<T> real;
    typedef T stored;
    enum { N = 4, BATCH = sizeof(T) == 4 ? 3 : 4, MI = 0 };
    const fuse_job<real> &j;
    const fuse_place<real> &p;

    template <int COUNT>
    __device__ __forceinline__ void fetch(const int *s, const int *, int left, int64_t c,
                                          T (*out)[N]) const {
        const int64_t at = (p.b * j.C + c) * j.V + p.v;
#pragma unroll
        for (int q = 0; q < COUNT; ++q) {
            if (q < left) {
                const fuse_piece<T, N> u = fuse_piece<T, N>::from(j.source[s[q]], at);
#pragma unroll
                for (int k = 0; k < N; ++k) {
                    out[q][k] = u.v[k];
                }
            }
        }
    }
};

/* All other probabilities, and one row of logits. */
template <typename R> struct fuse_any {
    typedef R real;
    typedef R stored;
    enum { N = 16 / sizeof(R), BATCH = sizeof(R) == 8 ? 4 : 3, MI = 1 };
    const fuse_job<R> &j;
    const fuse_place<R> &p;

    template <int COUNT>
    __device__ __forceinline__ void fetch(const int *s, const int *, int left, int64_t c,
                                          R (*out)[N]) const {
        const int64_t at = (p.b * j.C + c) * j.V + p.v;
        if (j.logits && j.C == 2) {
            R first[COUNT][N];
            FUSE_FOR_DTYPE(j, R, T, load_batch<COUNT, N, T>(j, p, s, left, at, first);
                           load_batch<COUNT, N, T>(j, p, s, left, at + j.V, out));
#pragma unroll
            for (int i = 0; i < COUNT * N; ++i) {
                R *z = &out[i / N][i % N];
                *z = i / N < left ? softmax_of_two(first[i / N][i % N], *z) : (R)0;
            }
            return;
        }
        FUSE_FOR_DTYPE(j, R, T, load_batch<COUNT, N, T>(j, p, s, left, at, out));
        if (j.logits) {
#pragma unroll
            for (int i = 0; i < COUNT * N; ++i) {
                R *z = &out[i / N][i % N];
                *z = i / N < left ? fuse_sigmoid(*z) : (R)0;
            }
        }
    }
};

/* Many classes of logits: exponentials anew for every class, since nothing is kept per class. */
template <typename R> struct fuse_classes {
    typedef R real;
    typedef R stored;
    enum { N = 1, BATCH = 4, MI = 1 };
    const fuse_job<R> &j;
    const fuse_place<R> &p;
    R *room; /* 8 bytes per slot and thread: largest logit and sum; float64: largest + ln sum */

    __device__ __forceinline__ R *of(int slot) const {
        return room + (slot * (int)blockDim.x + (int)threadIdx.x) * (8 / (int)sizeof(R));
    }

    /* The largest logit and the sum of the exponentials, as the CPU computes them. */
    template <typename T> __device__ __forceinline__ void look(int s, int slot) const {
        const int64_t at = p.b * j.C * j.V + p.v;
        R most = element<T>(j, s, at), sum = 0;
#pragma unroll 8
        for (int64_t c = 1; c < j.C; ++c) {
            R z = element<T>(j, s, at + c * j.V);
            most = z > most ? z : most;
        }
#pragma unroll 4
        for (int64_t c = 0; c < j.C; ++c) {
            sum += fuse_exp(element<T>(j, s, at + c * j.V) - most);
        }
        if constexpr (sizeof(R) == 8) {
            *of(slot) = most + log(sum);
        } else {
            of(slot)[0] = most;
            of(slot)[1] = sum;
        }
    }

    template <int COUNT>
    __device__ __forceinline__ void fetch(const int *s, const int *slot, int left, int64_t c,
                                          R (*out)[N]) const {
        FUSE_FOR_DTYPE(j, R, T,
                       load_batch<COUNT, N, T>(j, p, s, left, (p.b * j.C + c) * j.V + p.v, out));
#pragma unroll
        for (int q = 0; q < COUNT; ++q) {
            if (q >= left) {
                continue;
            }
            const R *softmax = of(slot[q]);
            if constexpr (sizeof(R) == 8) {
                out[q][0] = exp(out[q][0] - softmax[0]);
            } else {
                out[q][0] = fuse_exp(out[q][0] - softmax[0]) / softmax[1];
            }
        }
    }
};

/* ---- class by class ----------------------------------------------------------------------------
 */

/* Adds class c to the state: its sums over all sources, one batch after the other. */
template <typename S, typename R, int N>
SS_DEVICE void add_class(const fuse_job<R> &j, const fuse_place<R> &p, const S &source, int64_t c,
                         fuse_state<R, N> *state) {
    typename S::stored raw_u[1][N], raw_l[1][N];
    R ref_u[N], ref_l[N], mu[N], mean[N], spread[N], h_ref[N];
    const bool mi = S::MI && j.need_u && j.unc == UNC_MI;
    const int slot_u = p.list.n, slot_l = p.list.n + 1;
    source.template fetch<1>(&p.list.ref_u, &slot_u, 1, c, raw_u);
    if (p.list.two) {
        source.template fetch<1>(&p.list.ref_l, &slot_l, 1, c, raw_l);
    }
#pragma unroll
    for (int k = 0; k < N; ++k) {
        mu[k] = mean[k] = spread[k] = h_ref[k] = ref_l[k] = 0;
        ref_u[k] = ss_value(raw_u[0][k]);
        if (p.list.two) {
            ref_l[k] = ss_value(raw_l[0][k]);
        }
        if (mi) {
            h_ref[k] = entropy_of(j, ref_u[k]);
        }
    }
    for (int i = 0; i < p.list.n; i += S::BATCH) {
        typename S::stored x[S::BATCH][N];
        int s[S::BATCH], slot[S::BATCH];
        const int left = p.list.n - i;
#pragma unroll
        for (int q = 0; q < S::BATCH; ++q) {
            slot[q] = i + q;
            s[q] = p.list.entry[q < left ? i + q : 0];
        }
        source.template fetch<S::BATCH>(s, slot, left, c, x);
#pragma unroll
        for (int q = 0; q < S::BATCH; ++q) {
            if (q >= left) {
                continue;
            }
            const R r_unc = p.list.r_unc[i + q];
            const R r_lab = p.list.two ? p.list.r_lab[i + q] : (R)0;
            if (r_unc > 0) {
#pragma unroll
                for (int k = 0; k < N; ++k) {
                    const R value = ss_value(x[q][k]), d = value - ref_u[k], t = r_unc * d;
                    mu[k] += t;
                    if (mi) {
                        spread[k] += r_unc * (entropy_of(j, value) - h_ref[k]);
                    } else {
                        spread[k] += t * d;
                    }
                }
            }
            if (r_lab > 0) {
#pragma unroll
                for (int k = 0; k < N; ++k) {
                    mean[k] += r_lab * (ss_value(x[q][k]) - ref_l[k]);
                }
            }
        }
    }
#pragma unroll
    for (int k = 0; k < N; ++k) {
        const R sum = mu[k];
        mu[k] += ref_u[k];
        mean[k] = p.list.two ? mean[k] + ref_l[k] : mu[k];
        R part = spread[k] - sum * sum;
        if (j.need_u && j.unc != UNC_VAR) {
            part = entropy_of(j, mu[k]);
            part = mi ? (part - h_ref[k]) - spread[k] : part;
        }
        state->doubt[k] += part;
    }
    if (j.need_mean) {
        take_mean<N>(j, p, c, mean, state);
    }
}

template <int N, typename R> SS_DEVICE void start(fuse_state<R, N> *s) {
#pragma unroll
    for (int k = 0; k < N; ++k) {
        s->doubt[k] = s->conf[k] = 0;
        s->label[k] = 0;
    }
}

template <typename S, int BLOCKS>
SS_KERNEL void __launch_bounds__(THREADS, BLOCKS) k_fuse(fuse_job<typename S::real> j) {
    typedef typename S::real R;
    SS_SHARED fuse_list<R> list;
    const fuse_place<R> p = place_of(j, S::N, &list);
    if (p.v >= j.V) {
        return;
    }
    if (!p.list.known) {
        unknown<S::N>(j, p);
        return;
    }
    const S source = {j, p};
    fuse_state<R, S::N> state;
    start(&state);
    for (int64_t c = 0; c < j.rows; ++c) {
        add_class(j, p, source, c, &state);
    }
    finish<S::N>(j, p, state);
}

template <typename R> SS_KERNEL void __launch_bounds__(MANY_THREADS, 4) k_fuse_many(fuse_job<R> j) {
    SS_DYNAMIC_SHARED(R, room); /* a thread sees its own part alone: no barriers */
    SS_SHARED fuse_list<R> list;
    const fuse_place<R> p = place_of(j, 1, &list);
    if (p.v >= j.V) {
        return;
    }
    if (!p.list.known) {
        unknown<1>(j, p);
        return;
    }
    const fuse_classes<R> source = {j, p, room};
    for (int slot = 0; slot < p.list.n + (p.list.two ? 2 : 1); ++slot) {
        const int s =
            slot < p.list.n ? p.list.entry[slot] : (slot == p.list.n ? p.list.ref_u : p.list.ref_l);
        FUSE_FOR_DTYPE(j, R, T, source.template look<T>(s, slot));
    }
    fuse_state<R, 1> state;
    start(&state);
    for (int64_t c = 0; c < j.rows; ++c) {
        add_class(j, p, source, c, &state);
    }
    finish<1>(j, p, state);
}

/* ---- means of foreground logits ----------------------------------------------------------------
 */

/* sum_q r_q / d_q with one division: r0 / A + r1 / B = (r0 B + r1 A) / (A B), and so on. */
SS_DEVICE float sum_of_four(const float *r, const float *d) {
    const float ab = d[0] * d[1], cd = d[2] * d[3];
    const float above = (r[0] * d[1] + r[1] * d[0]) * cd + (r[2] * d[3] + r[3] * d[2]) * ab;
    return above / (ab * cd);
}

/* Both means, where nothing can cancel: no reference. False where a logit is not finite. */
template <int N>
SS_DEVICE bool means_of_logits(const fuse_job<float> &j, const fuse_place<float> &p, float *mu,
                               float *mean) {
    int32_t most = 0;
#pragma unroll
    for (int k = 0; k < N; ++k) {
        mu[k] = mean[k] = 0;
    }
    const int64_t at = p.b * j.C * j.V + p.v, other = j.C == 2 ? j.V : 0;
    for (int i = 0; i < p.list.n; i += 4) {
        float first[4][N], z[4][N], r_unc[4], r_lab[4];
        int s[4];
#pragma unroll
        for (int q = 0; q < 4; ++q) { /* the last batch: its first source again, for nothing */
            const bool there = i + q < p.list.n;
            const int e = there ? i + q : i;
            s[q] = p.list.entry[e];
            r_unc[q] = there ? p.list.r_unc[e] : 0.0f;
            r_lab[q] = there ? p.list.r_lab[e] : 0.0f;
        }
        FUSE_FOR_DTYPE(j, float, T, load_batch<4, N, T>(j, p, s, 4, at, first);
                       load_batch<4, N, T>(j, p, s, 4, at + other, z));
#pragma unroll
        for (int k = 0; k < N; ++k) {
            float d[4];
#pragma unroll
            for (int q = 0; q < 4; ++q) {
                const float z0 = j.C == 2 ? first[q][k] : 0.0f;
                const uint32_t y = ss_f32_bits((z[q][k] - z0) * -1.44269504f); /* of 2^, not e^ */
                const int32_t a = (int32_t)(y & 0x7fffffffu);
                most = a > most ? a : most;
                d[q] = denominator(y);
            }
            mu[k] += sum_of_four(r_unc, d);
            if (p.list.two) {
                mean[k] += sum_of_four(r_lab, d);
            }
        }
    }
    return most < 0x7f800000;
}

/* The same by the sigmoids themselves, one after the other, as the CPU does beside a logit that is
 * not finite. */
template <int N>
SS_DEVICE void means_of_sigmoids(const fuse_job<float> &j, const fuse_place<float> &p, float *mu,
                                 float *mean) {
    const fuse_any<float> source = {j, p};
    float ref_u[1][N], ref_l[1][N], x[1][N];
    source.fetch<1>(&p.list.ref_u, nullptr, 1, 0, ref_u);
    const int of_mean = p.list.two ? p.list.ref_l : p.list.ref_u;
    source.fetch<1>(&of_mean, nullptr, 1, 0, ref_l);
#pragma unroll
    for (int k = 0; k < N; ++k) {
        mu[k] = mean[k] = 0;
    }
    for (int e = 0; e < p.list.n; ++e) {
        const int s = p.list.entry[e];
        const float r_unc = s == p.list.ref_u ? 0.0f : p.list.r_unc[e];
        const float r_lab = p.list.two && s != p.list.ref_l ? p.list.r_lab[e] : 0.0f;
        source.fetch<1>(&s, nullptr, 1, 0, x);
#pragma unroll
        for (int k = 0; k < N; ++k) {
            mu[k] += r_unc > 0 ? r_unc * (x[0][k] - ref_u[0][k]) : 0.0f;
            mean[k] += r_lab > 0 ? r_lab * (x[0][k] - ref_l[0][k]) : 0.0f;
        }
    }
#pragma unroll
    for (int k = 0; k < N; ++k) {
        mu[k] += ref_u[0][k];
        mean[k] += ref_l[0][k];
    }
}

SS_KERNEL void __launch_bounds__(THREADS, 2) k_fuse_sigmoids(fuse_job<float> j) {
    enum { N = fuse_any<float>::N };
    SS_SHARED fuse_list<float> list;
    const fuse_place<float> p = place_of(j, N, &list);
    if (p.v >= j.V) {
        return;
    }
    if (!p.list.known) {
        unknown<N>(j, p);
        return;
    }
    float mu[N], mean[N];
    if (!means_of_logits<N>(j, p, mu, mean)) {
        means_of_sigmoids<N>(j, p, mu, mean);
    }
    fuse_state<float, N> state;
    start(&state);
#pragma unroll
    for (int k = 0; k < N; ++k) {
        mean[k] = p.list.two ? mean[k] : mu[k];
        if (j.need_u) {
            state.doubt[k] = entropy_of(j, mu[k]);
        }
    }
    if (j.need_mean) {
        take_mean<N>(j, p, 0, mean, &state);
    }
    finish<N>(j, p, state);
}

/* ---- source by source --------------------------------------------------------------------------
 */

/* A source's C <= MOST logits. */
template <int MOST, typename R>
SS_DEVICE void load_logits(const fuse_job<R> &j, const fuse_place<R> &p, int s, R *x) {
    const int64_t at = p.b * j.C * j.V + p.v;
    FUSE_FOR_DTYPE(
        j, R, T, _Pragma("unroll") for (int c = 0; c < MOST; ++c) {
            x[c] = c < (int)j.C ? element<T>(j, s, at + c * j.V) : (R)0;
        });
}

/* Their probabilities; 0 beyond C. */
template <int MOST, typename R> SS_DEVICE void softmax(const fuse_job<R> &j, R *x) {
    const int C = (int)j.C;
    R most = x[0], sum = 0;
#pragma unroll
    for (int c = 1; c < MOST; ++c) {
        most = c < C && x[c] > most ? x[c] : most;
    }
#pragma unroll
    for (int c = 0; c < MOST; ++c) {
        if (c < C) {
            x[c] = fuse_exp(x[c] - most);
            sum += x[c];
        }
    }
    const R inverse = (R)1 / sum;
#pragma unroll
    for (int c = 0; c < MOST; ++c) {
        x[c] = divided(x[c], sum, inverse);
    }
}

template <int MOST, typename R> SS_DEVICE R entropy_of_all(const fuse_job<R> &j, const R *x) {
    R h = 0;
#pragma unroll
    for (int c = 0; c < MOST; ++c) {
        if (c < (int)j.C) {
            h += entropy_of(j, x[c]);
        }
    }
    return h;
}

/* MOST 16 is for one mean alone: two would not fit into the registers. */
template <int MOST, typename R>
SS_KERNEL void __launch_bounds__(THREADS, 2) k_fuse_softmax(fuse_job<R> j) {
    enum { LAB = MOST > 8 ? 1 : MOST, AHEAD = sizeof(R) == 4 };
    SS_SHARED fuse_list<R> list;
    const fuse_place<R> p = place_of(j, 1, &list);
    if (p.v >= j.V) {
        return;
    }
    if (!p.list.known) {
        unknown<1>(j, p);
        return;
    }
    const bool mi = j.need_u && j.unc == UNC_MI, two = LAB == MOST && p.list.two;
    R ref_u[MOST], ref_l[LAB], mu[MOST], mean[LAB], spread = 0, h_ref = 0;
    R x[MOST], next[MOST]; /* the next source is on its way while this one is computed */
    load_logits<MOST>(j, p, p.list.ref_u, ref_u);
    if (two) {
        load_logits<LAB>(j, p, p.list.ref_l, ref_l);
    }
    if (AHEAD && p.list.n > 0) {
        load_logits<MOST>(j, p, p.list.entry[0], next);
    }
    softmax<MOST>(j, ref_u);
    if (two) {
        softmax<LAB>(j, ref_l);
    }
#pragma unroll
    for (int c = 0; c < MOST; ++c) {
        mu[c] = mean[c % LAB] = 0;
    }
    if (mi) {
        h_ref = entropy_of_all<MOST>(j, ref_u);
    }
    for (int e = 0; e < p.list.n; ++e) {
        const R r_unc = p.list.r_unc[e], r_lab = two ? p.list.r_lab[e] : (R)0;
        if (AHEAD) {
#pragma unroll
            for (int c = 0; c < MOST; ++c) {
                x[c] = next[c];
            }
            if (e + 1 < p.list.n) {
                load_logits<MOST>(j, p, p.list.entry[e + 1], next);
            }
        } else {
            load_logits<MOST>(j, p, p.list.entry[e], x);
        }
        softmax<MOST>(j, x);
        if (r_unc > 0) {
#pragma unroll
            for (int c = 0; c < MOST; ++c) {
                if (c < (int)j.C) {
                    const R d = x[c] - ref_u[c], t = r_unc * d;
                    mu[c] += t;
                    spread += mi ? (R)0 : t * d;
                }
            }
            if (mi) {
                spread += r_unc * (entropy_of_all<MOST>(j, x) - h_ref);
            }
        }
        if (r_lab > 0) {
#pragma unroll
            for (int c = 0; c < LAB; ++c) {
                mean[c] += r_lab * (x[c] - ref_l[c]);
            }
        }
    }
    fuse_state<R, 1> state;
    start(&state);
#pragma unroll
    for (int c = 0; c < MOST; ++c) {
        if (c < (int)j.C) {
            spread -= mi ? (R)0 : mu[c] * mu[c];
            mu[c] += ref_u[c];
            const R pbar = two ? mean[c % LAB] + ref_l[c % LAB] : mu[c];
            if (j.need_mean) {
                take_mean<1>(j, p, c, &pbar, &state);
            }
        }
    }
    state.doubt[0] = spread;
    if (j.need_u && j.unc != UNC_VAR) {
        state.doubt[0] = entropy_of_all<MOST>(j, mu);
        if (mi) {
            state.doubt[0] = (state.doubt[0] - h_ref) - spread;
        }
    }
    finish<1>(j, p, state);
}

/* ---- checks: the CPU's, but for values
 * -------------------------------------------------------------------------
 */

static const char *name_of(int32_t dtype) {
    return dtype == SS_F64 ? "f64" : (dtype == SS_F32 ? "f32" : (dtype == SS_F16 ? "f16" : "bf16"));
}

static ss_status check(ss_exec *x, const ss_fuse_args *a) {
    const ss_tensor *first = a->sources.at;
    const int64_t S = a->sources.n, B = first->shape[0], C = first->shape[1], K = C == 1 ? 2 : C;
    const char *names[] = {"weights", "uncertainty_weights"};
    const ss_tensor *tables[] = {&a->weights, &a->uncertainty_weights};
    for (int i = 0; i < 2; ++i) {
        if (tables[i]->data && tables[i]->shape[0] != S) {
            return ss_cuda_fail(x, SS_INVALID,
                                "%s: expected shape (%lld, %lld), one per source and sample, got "
                                "(%lld, %lld)",
                                names[i], (long long)S, (long long)B,
                                (long long)tables[i]->shape[0], (long long)tables[i]->shape[1]);
        }
    }
    for (int64_t s = 1; s < S; ++s) {
        if ((first[s].dtype == SS_F64) != (first->dtype == SS_F64)) {
            return ss_cuda_fail(x, SS_WRONG_TYPE,
                                "sources: expected float64 for all or for none, got %s beside %s",
                                name_of(first[s].dtype), name_of(first->dtype));
        }
    }
    if (a->channels != C && !(a->channels == 2 && C == 1)) {
        return ss_cuda_fail(x, SS_INVALID,
                            "channels: expected %lld (or 2 for one-channel sources), got %lld",
                            (long long)C, (long long)a->channels);
    }
    if (a->want_label && a->ignore_index < K) {
        return ss_cuda_fail(x, SS_INVALID,
                            "ignore_index: expected a number from %lld to 255, got %lld",
                            (long long)K, (long long)a->ignore_index);
    }
    return SS_OK;
}

/* ---- launches ----------------------------------------------------------------------------------
 */

template <typename R> static fuse_job<R> job_of(const ss_exec *x, const ss_fuse_args *a) {
    fuse_job<R> j = {};
    const ss_tensor *t = a->sources.at;
    j.r[0] = (const double *)a->weights.data;
    j.r[1] = a->uncertainty_weights.data ? (const double *)a->uncertainty_weights.data : j.r[0];
    j.faults = SS_FAULTS_OF(x, fuse);
    j.S = (int32_t)a->sources.n;
    j.B = t->shape[0];
    j.C = t->shape[1];
    j.V = t->shape[2];
    const int64_t K = j.C == 1 ? 2 : j.C;
    const int from_u = a->want_weight && a->weighting <= WEIGHT_GATE;
    j.logits = a->logits != 0;
    j.rows = (int32_t)(j.C == 2 && a->logits ? 1 : j.C);
    j.pair = a->channels == 2 && j.rows == 1;
    j.unc = (int8_t)a->unc;
    j.weighting = (int8_t)a->weighting;
    j.gated = a->want_label && a->tau_u < 1;
    j.need_u = a->want_uncertainty || j.gated || from_u;
    j.need_mean = a->want_mean || a->want_label || a->want_confidence ||
                  (a->want_weight && a->weighting == WEIGHT_CONF);
    j.sigmoids = sizeof(R) == 4 && j.rows == 1 && a->logits && a->sources.n > 2 &&
                 !(j.need_u && a->unc != UNC_ENT);
    j.ignore = (int32_t)a->ignore_index;
    const double chance = 1.0 / (double)K;
    /* Both classes of a foreground row have the same variance. */
    const double var = (j.rows == 1 ? 2.0 : 1.0) / (1.0 - chance);
    j.scale = (R)(a->unc == UNC_VAR ? var : 1.0 / log((double)K));
    j.offset = (R)a->log_offset;
    j.tau_c = (R)a->tau_c;
    j.tau_u = (R)a->tau_u;
    j.rate = (R)(a->kappa * -1.4426950408889634); /* of 2^ instead of e^ */
    j.chance = (R)chance;
    j.mean = a->want_mean ? (R *)a->mean.data : nullptr;
    j.confidence = a->want_confidence ? (R *)a->confidence.data : nullptr;
    j.u = a->want_uncertainty ? (R *)a->uncertainty.data : nullptr;
    j.weight = a->want_weight ? (R *)a->weight.data : nullptr;
    j.label = a->want_label ? (uint8_t *)a->label.data : nullptr;
    j.all = t->dtype;
    for (int64_t s = 0; s < a->sources.n; ++s) {
        j.source[s] = t[s].data;
        j.dtype[s] = (uint8_t)t[s].dtype;
        j.all = t[s].dtype == t->dtype ? j.all : -1;
    }
    return j;
}

/* Whether N voxels of a thread are one piece of memory everywhere. */
template <typename R> static bool in_pieces(const fuse_job<R> &j, int64_t S, int N) {
    bool yes = N > 1 && j.all >= 0 && j.V % N == 0;
    for (int64_t s = 0; s < S; ++s) {
        yes = yes && ss_aligned16(j.source[s]);
    }
    return yes && ss_aligned16(j.mean) && ss_aligned16(j.confidence) && ss_aligned16(j.u) &&
           ss_aligned16(j.weight) && (uintptr_t)j.label % N == 0;
}

template <typename R> static ss_status launch(ss_exec *x, fuse_job<R> *j) {
    const int64_t S = j->S;
    int threads = THREADS, n = 16 / (int)sizeof(R);
    const bool softmax = j->logits && j->C > 2;
    const bool may_two = j->need_u && j->need_mean && j->r[0] != j->r[1];
    const bool many = softmax && j->C > (sizeof(R) == 8 || may_two ? 8 : 16);
    if (softmax) {
        n = 1;
    }
    if (many) {
        threads = S + 2 <= MANY_SLOTS ? MANY_THREADS : SS_WARP;
    }
    j->vector = in_pieces(*j, S, n);
    const bool pieces = j->vector && !j->logits && !(j->need_u && j->unc == UNC_MI);
    j->chunks = ss_blocks(j->V, threads * n);
    const unsigned blocks = (unsigned)(j->chunks * j->B);
    if (many) {
        return SS_LAUNCH(x, blocks, threads, (size_t)(S + 2) * threads * 8, (k_fuse_many<R>), *j);
    }
    if constexpr (sizeof(R) == 4) {
        if (softmax && j->C > 8) {
            return SS_LAUNCH(x, blocks, threads, 0, (k_fuse_softmax<16, R>), *j);
        }
    }
    if (softmax && j->C > 4) {
        return SS_LAUNCH(x, blocks, threads, 0, (k_fuse_softmax<8, R>), *j);
    }
    if (softmax) {
        return SS_LAUNCH(x, blocks, threads, 0, (k_fuse_softmax<4, R>), *j);
    }
    if constexpr (sizeof(R) == 4) {
        if (pieces && j->all == SS_F32) {
            return SS_LAUNCH(x, blocks, threads, 0, (k_fuse<fuse_pieces<float>, 4>), *j);
        }
        if (pieces && j->all == SS_F16) {
            return SS_LAUNCH(x, blocks, threads, 0, (k_fuse<fuse_pieces<ss_half>, 4>), *j);
        }
        if (pieces && j->all == SS_BF16) {
            return SS_LAUNCH(x, blocks, threads, 0, (k_fuse<fuse_pieces<ss_bfloat>, 4>), *j);
        }
    }
    if constexpr (sizeof(R) == 4) {
        if (j->sigmoids) {
            return SS_LAUNCH(x, blocks, threads, 0, (k_fuse_sigmoids), *j);
        }
    }
    return SS_LAUNCH(x, blocks, threads, 0, (k_fuse<fuse_any<R>, 2>), *j);
}

template <typename R> static ss_status run(ss_exec *x, const ss_fuse_args *a) {
    fuse_job<R> j = job_of<R>(x, a);
    return j.need_u || j.need_mean || j.weight ? launch(x, &j) : SS_OK;
}

ss_status SS_CUDA(fuse)(ss_exec *x, const ss_fuse_args *a) {
    SS_TRY(check(x, a));
    return a->sources.at[0].dtype == SS_F64 ? run<double>(x, a) : run<float>(x, a);
}

int64_t SS_CUDA_WORKSPACE(fuse)(const ss_fuse_args *a) {
    (void)a;
    return 0;
}
