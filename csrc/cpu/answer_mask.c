/* SPDX-License-Identifier: Apache-2.0
 *
 * answer_mask.c: what an answer calls foreground, and whether it says anything, in one sweep.
 *
 *     mask = {z > 0},   span = (min z, max z) per row, both NaN where a z is NaN
 *
 * logits [N, S] -> mask [N, S], span [N, 2]. An answer whose span is no pair of finite numbers, or
 * is one number twice, says nothing. Memory: 4 bytes read (float) and 1 written per voxel.
 * Numerics: comparisons alone, in float. Deterministic: extremes do not depend on order.
 */
#include "lanes.h"

typedef struct job {
    const ss_answer_mask_args *a;
    int64_t items; /* of SS_BLOCK voxels, per row */
    float *span;   /* [N, items, 2] */
} job;

#define EXTREMES _Pragma("omp simd reduction(min : low) reduction(max : high) reduction(| : bad)")

static void take_block(const float *restrict z, int64_t n, uint8_t *restrict mask, float *span) {
    float low = INFINITY, high = -INFINITY;
    int32_t bad = 0;
    EXTREMES
    for (int64_t i = 0; i < n; ++i) {
        low = z[i] < low ? z[i] : low;
        high = z[i] > high ? z[i] : high;
        bad |= z[i] != z[i];
        mask[i] = z[i] > 0.0f;
    }
    span[0] = bad ? NAN : low;
    span[1] = bad ? NAN : high;
}

static void sweep(void *ctx, int64_t begin, int64_t end, int32_t thread) {
    const job *j = ctx;
    const int64_t voxels = j->a->logits.shape[1];
    float buffer[SS_BLOCK];
    (void)thread;
    for (int64_t item = begin; item < end; ++item) {
        const int64_t first = item % j->items * SS_BLOCK;
        const int64_t n = voxels - first < SS_BLOCK ? voxels - first : SS_BLOCK;
        const int64_t at = item / j->items * voxels + first;
        take_block(ss_load_f32(&j->a->logits, at, n, buffer), n, (uint8_t *)j->a->mask.data + at,
                   j->span + 2 * item);
    }
}

ss_status SS_CPU(answer_mask)(ss_exec *x, const ss_answer_mask_args *a) {
    const int64_t rows = a->logits.shape[0], voxels = a->logits.shape[1];
    job j = {.a = a, .items = voxels / SS_BLOCK + (voxels % SS_BLOCK != 0)};
    j.span = ss_scratch(x, rows * j.items, 2 * sizeof(float));
    if (!j.span) {
        return SS_NO_MEMORY;
    }
    ss_parallel_for(x, rows * j.items, 16, sweep, &j);
    for (int64_t row = 0; row < rows; ++row) {
        const float *own = j.span + 2 * row * j.items;
        float low = own[0], high = own[1];
        for (int64_t i = 1; i < j.items; ++i) {
            low = own[2 * i] >= low || low != low ? low : own[2 * i];
            high = own[2 * i + 1] <= high || high != high ? high : own[2 * i + 1];
        }
        /* 0 and -0 are equal, and which of them is found depends on order: 0 it is. */
        ((float *)a->span.data)[2 * row] = low + 0.0f;
        ((float *)a->span.data)[2 * row + 1] = high + 0.0f;
    }
    ss_scratch_free(j.span);
    return SS_OK;
}
