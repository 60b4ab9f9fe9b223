/* SPDX-License-Identifier: Apache-2.0
 *
 * mask_logits.c: the mask prompt of a promptable model from a probability map.
 *
 *     out[n, cell] = clip(ln(m / (1 - m)), -10, 10),  m = mean of prob[n] over the cell
 *
 * Cells are those of adaptive average pooling: cell i of d covers floor(i D / d) up to, not
 * including, ceil((i + 1) D / d); for D = 4 d they are the 4-voxel cells that SAM's mask input has.
 * Memory: 4 bytes read per voxel, 4 written per cell. Numerics: sums in double in C order within a
 * cell, logarithm in double; NaN stays NaN. Deterministic: a cell is summed by one thread.
 */
#include "lanes.h"

typedef struct job {
    const ss_mask_logits_args *a;
} job;

static int64_t cell_begin(int64_t i, int64_t size, int64_t cells) {
    /* floor(i size / cells) without overflow: size = q cells + r */
    return i * (size / cells) + i * (size % cells) / cells;
}

static int64_t cell_end(int64_t i, int64_t size, int64_t cells) {
    int64_t next = i + 1;
    return next * (size / cells) + (next * (size % cells) + cells - 1) / cells;
}

static float cell_logit(const ss_mask_logits_args *a, int64_t n, int64_t i, int64_t j, int64_t k) {
    const int64_t *s = a->prob.shape;
    int64_t d0 = cell_begin(i, s[1], a->d), d1 = cell_end(i, s[1], a->d);
    int64_t h0 = cell_begin(j, s[2], a->h), h1 = cell_end(j, s[2], a->h);
    int64_t w0 = cell_begin(k, s[3], a->w), w1 = cell_end(k, s[3], a->w);
    double sum = 0.0;
    for (int64_t z = d0; z < d1; ++z) {
        for (int64_t y = h0; y < h1; ++y) {
            int64_t row = ((n * s[1] + z) * s[2] + y) * s[3];
            for (int64_t x = w0; x < w1; ++x) {
                sum += ss_at(&a->prob, row + x);
            }
        }
    }
    double mean = sum / (double)((d1 - d0) * (h1 - h0) * (w1 - w0));
    double logit = log(mean) - log1p(-mean);
    logit = logit < -10.0 ? -10.0 : logit;
    return (float)(logit > 10.0 ? 10.0 : logit);
}

static void rows(void *ctx, int64_t begin, int64_t end, int32_t thread) {
    const ss_mask_logits_args *a = ((const job *)ctx)->a;
    float *out = a->logits.data;
    (void)thread;
    for (int64_t r = begin; r < end; ++r) {
        int64_t j = r % a->h;
        int64_t i = r / a->h % a->d;
        int64_t n = r / a->h / a->d;
        for (int64_t k = 0; k < a->w; ++k) {
            out[r * a->w + k] = cell_logit(a, n, i, j, k);
        }
    }
}

ss_status SS_CPU(mask_logits)(ss_exec *x, const ss_mask_logits_args *a) {
    const int64_t *s = a->prob.shape;
    if (a->d > s[1] || a->h > s[2] || a->w > s[3]) {
        return ss_fail(
            x, SS_INVALID,
            "size: expected at most the input's (%lld, %lld, %lld), got (%lld, %lld, %lld)",
            (long long)s[1], (long long)s[2], (long long)s[3], (long long)a->d, (long long)a->h,
            (long long)a->w);
    }
    job j = {a};
    ss_parallel_for(x, s[0] * a->d * a->h, 64, rows, &j);
    return SS_OK;
}
