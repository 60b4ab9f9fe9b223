/* SPDX-License-Identifier: Apache-2.0
 *
 * specialist_targets.c: which voxels a generalist is asked for, per sample and foreground class c.
 *
 *     top = max P_c;  th = threshold if top >= threshold, else top / 2 if top >= p_min, else skip
 *     target = {P_c >= th},  region = {H(P) / ln C <= tau_p};  everywhere if th < threshold
 *     spread = max |sum_c P_c - 1| (NaN where one is), max(0, -min P): is it a distribution at all?
 *
 * prob [B, C, S], F = C - 1 -> target, region [B, F, S], skip [B, F], spread [B, 2]; both masks of
 * a skipped class are empty. tau_p >= 1 restricts nothing and costs no logarithm. Memory: every
 * probability is read once (float: 4 bytes) and 2 F / C bytes are written for it: the one sweep
 * takes it that a class reaches the threshold, and what belongs to others is written again.
 * Numerics: float; -sum p ln p with 0 ln 0 = 0 is good to about 3e-7, so only voxels that close to
 * tau_p can differ from exact arithmetic; what is NaN or negative is in no region. Deterministic:
 * maxima and voxels do not depend on order.
 */
#include "lanes.h"

typedef struct job {
    const ss_specialist_targets_args *a;
    int64_t items; /* of SS_BLOCK voxels, per sample */
    float high;    /* the threshold, rounded up */
    float limit;   /* tau_p ln C */
    float *top;    /* [B, items, C], then folded into item 0 */
    float *spread; /* [B, items, 2], then folded into the output */
} job;

/* What is found in a block beside its masks; `off` has the bits of a number that is not negative,
 * which order as numbers do, NaN above all. */
typedef struct found {
    float low;
    int32_t off;
} found;

/* Where an item lies: n voxels of sample b from voxel `first` on, and in the masks of its class 1.
 */
typedef struct place {
    int64_t b, first, n;
    uint8_t *target, *region;
} place;

static place place_of(const job *j, int64_t item) {
    const ss_specialist_targets_args *a = j->a;
    const int64_t voxels = a->prob.shape[2];
    place at = {.b = item / j->items, .first = item % j->items * SS_BLOCK};
    at.n = voxels - at.first < SS_BLOCK ? voxels - at.first : SS_BLOCK;
    at.target = (uint8_t *)a->target.data + at.b * a->F * voxels + at.first;
    at.region = (uint8_t *)a->region.data + at.b * a->F * voxels + at.first;
    return at;
}

static const float *load(const job *j, int64_t b, int64_t c, int64_t begin, int64_t n,
                         float *buffer) {
    const int64_t *s = j->a->prob.shape;
    return ss_load_f32(&j->a->prob, (b * s[1] + c) * s[2] + begin, n, buffer);
}

/* -p ln p, 0 for 0; NaN stays. */
static inline float entropy_of(float p) {
    float floored = p < 1.17549435e-38f ? 1.17549435e-38f : p;
    return -p * ss_log_bounded(floored);
}

static inline int32_t off_by(float sum) {
    return (int32_t)(ss_f32_bits(sum - 1.0f) & 0x7fffffffu);
}

/* Region and spread in one loop, for few classes that lie in memory as floats, `apart` from each
 * other; to be inlined with a number of classes that is known. */
static inline found take_few(const float *p, int64_t apart, int64_t n, float limit,
                             uint8_t *restrict region, const int32_t classes, const int entropies) {
    float low = 0.0f;
    int32_t off = 0;
    _Pragma("omp simd reduction(max : off) reduction(min : low)") for (int64_t i = 0; i < n; ++i) {
        float least = p[i], sum = p[i], entropy = entropies ? entropy_of(p[i]) : 0.0f;
        for (int32_t c = 1; c < classes; ++c) {
            const float v = p[c * apart + i];
            least = v < least ? v : least;
            sum += v;
            entropy += entropies ? entropy_of(v) : 0.0f;
        }
        const int32_t bits = off_by(sum);
        low = least < low ? least : low;
        off = bits > off ? bits : off;
        if (entropies) {
            region[i] = (uint8_t)((entropy <= limit) & (least >= 0.0f));
        }
    }
    return (found){low, off};
}

/* The same for anything, class by class. */
static found take_many(const job *j, int64_t b, int64_t first, int64_t n, uint8_t *restrict region,
                       int entropies) {
    float buffer[SS_BLOCK], sum[SS_BLOCK], least[SS_BLOCK], entropy[SS_BLOCK];
    for (int64_t c = 0; c < j->a->prob.shape[1]; ++c) {
        const float *restrict p = load(j, b, c, first, n, buffer);
        if (c == 0) {
            memcpy(sum, p, (size_t)n * sizeof *sum);
            memcpy(least, p, (size_t)n * sizeof *least);
            memset(entropy, 0, (size_t)n * sizeof *entropy);
        } else {
            SS_SIMD
            for (int64_t i = 0; i < n; ++i) {
                sum[i] += p[i];
                least[i] = p[i] < least[i] ? p[i] : least[i];
            }
        }
        if (entropies) {
            SS_SIMD
            for (int64_t i = 0; i < n; ++i) {
                entropy[i] += entropy_of(p[i]);
            }
        }
    }
    float low = 0.0f;
    int32_t off = 0;
    _Pragma("omp simd reduction(max : off) reduction(min : low)") for (int64_t i = 0; i < n; ++i) {
        const int32_t bits = off_by(sum[i]);
        low = least[i] < low ? least[i] : low;
        off = bits > off ? bits : off;
    }
    if (entropies) {
        SS_SIMD
        for (int64_t i = 0; i < n; ++i) {
            region[i] = (uint8_t)((entropy[i] <= j->limit) & (least[i] >= 0.0f));
        }
    }
    return (found){low, off};
}

static found take_block(const job *j, int64_t b, int64_t first, int64_t n, uint8_t *region) {
    const ss_specialist_targets_args *a = j->a;
    const int64_t classes = a->prob.shape[1], voxels = a->prob.shape[2];
    const int entropies = a->tau_p < 1.0;
    if (a->prob.dtype != SS_F32 || classes > 4) {
        return take_many(j, b, first, n, region, entropies);
    }
    const float *p = (const float *)a->prob.data + b * classes * voxels + first;
#define TAKE(c)                                                                                    \
    (entropies ? take_few(p, voxels, n, j->limit, region, c, 1)                                    \
               : take_few(p, voxels, n, j->limit, region, c, 0))
    return classes == 2 ? TAKE(2) : classes == 3 ? TAKE(3) : TAKE(4);
#undef TAKE
}

/* Writes {P_c >= th} and returns max P_c; -inf where all are NaN. */
static float take_class(const float *restrict p, int64_t n, float th, uint8_t *restrict target) {
    float top = -INFINITY;
    _Pragma("omp simd reduction(max : top)") for (int64_t i = 0; i < n; ++i) {
        top = p[i] > top ? p[i] : top;
        target[i] = p[i] >= th;
    }
    return top;
}

static void sweep(void *ctx, int64_t begin, int64_t end, int32_t thread) {
    const job *j = ctx;
    const ss_specialist_targets_args *a = j->a;
    const int64_t classes = a->prob.shape[1], voxels = a->prob.shape[2];
    float buffer[SS_BLOCK];
    (void)thread;
    for (int64_t item = begin; item < end; ++item) {
        const place at = place_of(j, item);
        const found f = take_block(j, at.b, at.first, at.n, at.region);
        j->spread[2 * item] = ss_bits_f32((uint32_t)f.off);
        j->spread[2 * item + 1] = 0.0f - f.low;
        if (a->tau_p >= 1.0) {
            memset(at.region, 1, (size_t)at.n);
        }
        for (int64_t c = 1; c < classes; ++c) {
            const float *p = load(j, at.b, c, at.first, at.n, buffer);
            uint8_t *target = at.target + (c - 1) * voxels;
            j->top[item * classes + c] = take_class(p, at.n, j->high, target);
            if (c > 1) {
                memcpy(at.region + (c - 1) * voxels, at.region, (size_t)at.n);
            }
        }
    }
}

/* Threshold of a class from its maximum; NaN if it is to be skipped. */
static float threshold_for(const job *j, float top) {
    if ((double)top >= j->a->threshold) {
        return j->high;
    }
    return (double)top >= j->a->p_min ? 0.5f * top : NAN;
}

/* Both masks again, for classes that do not reach the threshold. */
static void again(void *ctx, int64_t begin, int64_t end, int32_t thread) {
    const job *j = ctx;
    const ss_specialist_targets_args *a = j->a;
    const int64_t classes = a->prob.shape[1], voxels = a->prob.shape[2];
    float buffer[SS_BLOCK];
    (void)thread;
    for (int64_t item = begin; item < end; ++item) {
        const place at = place_of(j, item);
        for (int64_t c = 1; c < classes; ++c) {
            const float top = j->top[at.b * j->items * classes + c], th = threshold_for(j, top);
            if ((double)top >= a->threshold) {
                continue;
            }
            const float *p = load(j, at.b, c, at.first, at.n, buffer);
            /* NaN, of a class that is skipped, takes no voxel. */
            (void)take_class(p, at.n, th, at.target + (c - 1) * voxels);
            memset(at.region + (c - 1) * voxels, th == th, (size_t)at.n);
        }
    }
}

/* Folds what the items found; returns whether a class does not reach the threshold. */
static int fold(const job *j) {
    const ss_specialist_targets_args *a = j->a;
    const int64_t classes = a->prob.shape[1];
    int low = 0;
    for (int64_t b = 0; b < a->prob.shape[0]; ++b) {
        float *top = j->top + b * j->items * classes;
        float *spread = (float *)a->spread.data + 2 * b;
        const float *own = j->spread + 2 * b * j->items;
        memcpy(spread, own, 2 * sizeof *spread);
        for (int64_t i = 1; i < j->items; ++i) {
            for (int64_t c = 1; c < classes; ++c) {
                float v = top[i * classes + c];
                top[c] = v > top[c] ? v : top[c];
            }
            spread[0] = own[2 * i] <= spread[0] || spread[0] != spread[0] ? spread[0] : own[2 * i];
            spread[1] = own[2 * i + 1] > spread[1] ? own[2 * i + 1] : spread[1];
        }
        for (int64_t c = 1; c < classes; ++c) {
            float th = threshold_for(j, top[c]);
            low |= !((double)top[c] >= a->threshold);
            ((uint8_t *)a->skip.data)[b * a->F + c - 1] = th != th;
        }
    }
    return low;
}

ss_status SS_CPU(specialist_targets)(ss_exec *x, const ss_specialist_targets_args *a) {
    const int64_t *s = a->prob.shape;
    if (s[1] < 2 || a->F != s[1] - 1) {
        return ss_fail(x, SS_INVALID,
                       "prob: expected [B, C, ...] with C = F + 1 = %lld, got C = %lld",
                       (long long)a->F + 1, (long long)s[1]);
    }
    job j = {.a = a, .items = s[2] / SS_BLOCK + (s[2] % SS_BLOCK != 0)};
    j.high = (float)a->threshold;
    j.high = (double)j.high < a->threshold ? nextafterf(j.high, INFINITY) : j.high;
    j.limit = (float)(a->tau_p * log((double)s[1]));
    j.top = ss_scratch(x, s[0] * j.items * s[1], sizeof(float));
    j.spread = ss_scratch(x, s[0] * j.items, 2 * sizeof(float));
    ss_status status = j.top && j.spread ? SS_OK : SS_NO_MEMORY;
    if (status == SS_OK) {
        ss_parallel_for(x, s[0] * j.items, 16, sweep, &j);
        if (fold(&j)) {
            ss_parallel_for(x, s[0] * j.items, 16, again, &j);
        }
    }
    ss_scratch_free(j.top);
    ss_scratch_free(j.spread);
    return status;
}
