/* SPDX-License-Identifier: Apache-2.0
 *
 * specialist_targets.c: which voxels a generalist is asked for, per sample and foreground class c.
 *
 *     top = max P_c;  th = threshold if top >= threshold, else top / 2 if top >= p_min, else skip
 *     target = {P_c >= th},  region = {H(P) / ln C <= tau_p};  everywhere if th < threshold
 *
 * prob [B, C, S], F = C - 1 -> target, region [B, F, S], skip [B, F]; both masks of a skipped class
 * are empty. tau_p >= 1 restricts nothing and costs no logarithm. Memory: 8 bytes read (float, two
 * sweeps) and 2 F / C written per probability. Numerics: float; -sum p ln p with 0 ln 0 = 0 is good
 * to about 3e-7, so only voxels that close to tau_p can differ from exact arithmetic; NaN is in no
 * mask. Deterministic: maxima and voxels do not depend on order.
 */
#include "lanes.h"

typedef struct job {
    const ss_specialist_targets_args *a;
    int64_t items; /* of SS_BLOCK voxels, per sample */
    float *top;    /* [B, items, C], then folded into item 0 */
} job;

static int64_t block_length(const job *j, int64_t begin) {
    int64_t left = j->a->prob.shape[2] - begin;
    return left < SS_BLOCK ? left : SS_BLOCK;
}

static const float *load(const job *j, int64_t b, int64_t c, int64_t begin, int64_t n,
                         float *buffer) {
    const int64_t *s = j->a->prob.shape;
    return ss_load_f32(&j->a->prob, (b * s[1] + c) * s[2] + begin, n, buffer);
}

static void maxima(void *ctx, int64_t begin, int64_t end, int32_t thread) {
    const job *j = ctx;
    const int64_t classes = j->a->prob.shape[1];
    float buffer[SS_BLOCK];
    (void)thread;
    for (int64_t item = begin; item < end; ++item) {
        int64_t first = item % j->items * SS_BLOCK;
        int64_t n = block_length(j, first);
        for (int64_t c = 1; c < classes; ++c) {
            const float *p = load(j, item / j->items, c, first, n, buffer);
            float top = -INFINITY;
            _Pragma("omp simd reduction(max : top)") for (int64_t i = 0; i < n; ++i) {
                top = p[i] > top ? p[i] : top;
            }
            j->top[item * classes + c] = top;
        }
    }
}

/* Threshold of a class from its maximum; NaN if it is to be skipped. */
static float threshold_for(const ss_specialist_targets_args *a, float top) {
    if ((double)top >= a->threshold) {
        float th = (float)a->threshold;
        return (double)th < a->threshold ? nextafterf(th, INFINITY) : th;
    }
    return (double)top >= a->p_min ? 0.5f * top : NAN;
}

static void block_entropy(const job *j, int64_t b, int64_t first, int64_t n, float *restrict h) {
    float buffer[SS_BLOCK];
    memset(h, 0, (size_t)n * sizeof(float));
    for (int64_t c = 0; c < j->a->prob.shape[1]; ++c) {
        const float *restrict p = load(j, b, c, first, n, buffer);
        SS_SIMD
        for (int64_t i = 0; i < n; ++i) {
            float term = p[i] * ss_logf(p[i]);
            h[i] -= p[i] == 0.0f ? 0.0f : term;
        }
    }
}

static void masks(void *ctx, int64_t begin, int64_t end, int32_t thread) {
    const job *j = ctx;
    const ss_specialist_targets_args *a = j->a;
    const int64_t classes = a->prob.shape[1], voxels = a->prob.shape[2];
    const float limit = (float)(a->tau_p * log((double)classes));
    float buffer[SS_BLOCK], h[SS_BLOCK];
    (void)thread;
    for (int64_t item = begin; item < end; ++item) {
        int64_t b = item / j->items, first = item % j->items * SS_BLOCK;
        int64_t n = block_length(j, first);
        if (a->tau_p < 1.0) {
            block_entropy(j, b, first, n, h);
        }
        for (int64_t c = 1; c < classes; ++c) {
            const float *restrict p = load(j, b, c, first, n, buffer);
            const float th = threshold_for(a, j->top[b * j->items * classes + c]);
            int64_t at = (b * a->F + c - 1) * voxels + first;
            uint8_t *restrict target = (uint8_t *)a->target.data + at;
            uint8_t *restrict region = (uint8_t *)a->region.data + at;
            SS_SIMD
            for (int64_t i = 0; i < n; ++i) {
                target[i] = p[i] >= th; /* false for NaN: skipped */
            }
            if (a->tau_p >= 1.0 || th != th || (double)th < a->threshold) {
                memset(region, th == th, (size_t)n);
                continue;
            }
            SS_SIMD
            for (int64_t i = 0; i < n; ++i) {
                region[i] = h[i] <= limit;
            }
        }
    }
}

ss_status SS_CPU(specialist_targets)(ss_exec *x, const ss_specialist_targets_args *a) {
    const int64_t *s = a->prob.shape;
    if (s[1] < 2 || a->F != s[1] - 1) {
        return ss_fail(x, SS_INVALID,
                       "prob: expected [B, C, ...] with C = F + 1 = %lld, got C = %lld",
                       (long long)a->F + 1, (long long)s[1]);
    }
    job j = {.a = a, .items = s[2] / SS_BLOCK + (s[2] % SS_BLOCK != 0)};
    j.top = ss_scratch(x, s[0] * j.items * s[1], sizeof(float));
    if (!j.top) {
        return SS_NO_MEMORY;
    }
    ss_parallel_for(x, s[0] * j.items, 16, maxima, &j);
    for (int64_t b = 0; b < s[0]; ++b) {
        float *top = j.top + b * j.items * s[1];
        for (int64_t c = 1; c < s[1]; ++c) {
            for (int64_t i = 1; i < j.items; ++i) {
                float v = top[i * s[1] + c];
                top[c] = v > top[c] ? v : top[c];
            }
            float th = threshold_for(a, top[c]);
            ((uint8_t *)a->skip.data)[b * a->F + c - 1] = th != th;
        }
    }
    ss_parallel_for(x, s[0] * j.items, 16, masks, &j);
    ss_scratch_free(j.top);
    return SS_OK;
}
