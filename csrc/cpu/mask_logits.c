/* SPDX-License-Identifier: Apache-2.0
 *
 * mask_logits.c: the mask prompt of a promptable model from a probability map.
 *
 *     out[n, cell] = clip(ln(m / (1 - m)), -10, 10),
 *     m = clip(mean of prob[n] over the cell, 0, 1)
 *
 * Cells are those of adaptive average pooling: cell i of d covers floor(i D / d) up to, not
 * including, ceil((i + 1) D / d); for D = 4 d they are the 4-voxel cells that SAM's mask input has.
 * prob [N, D, H, W] -> logits [N, d, h, w]. Memory: 4 bytes read per voxel (float), 4 written per
 * cell. A row of cells is summed line by line into one double per column, then column by column.
 * Numerics: sums in double; 1 - m in double; the two logarithms in float, 1 ulp each, so the result
 * is within 2e-6 of the exact one; NaN stays NaN. Deterministic: one thread sums a row of cells.
 */
#include "lanes.h"

typedef struct job {
    const ss_mask_logits_args *a;
    double *columns; /* per thread: sums of the input's columns */
    int64_t *edge;   /* begin and end of every cell of a row */
} job;

static int64_t cell_begin(int64_t i, int64_t size, int64_t cells) {
    /* floor(i size / cells) without overflow: size = q cells + r */
    return i * (size / cells) + i * (size % cells) / cells;
}

static int64_t cell_end(int64_t i, int64_t size, int64_t cells) {
    int64_t next = i + 1;
    return next * (size / cells) + (next * (size % cells) + cells - 1) / cells;
}

static void add_line(const ss_tensor *prob, int64_t offset, int64_t n, double *restrict columns) {
    float buffer[SS_BLOCK];
    if (prob->dtype == SS_F64) { /* near 1 a float would lose what 1 - m is made of */
        const double *restrict p = (const double *)prob->data + offset;
        SS_SIMD
        for (int64_t i = 0; i < n; ++i) {
            columns[i] += p[i];
        }
        return;
    }
    for (int64_t first = 0; first < n; first += SS_BLOCK) {
        int64_t m = n - first < SS_BLOCK ? n - first : SS_BLOCK;
        const float *restrict p = ss_load_f32(prob, offset + first, m, buffer);
        SS_SIMD
        for (int64_t i = 0; i < m; ++i) {
            columns[first + i] += (double)p[i];
        }
    }
}

/* Replaces means m and their complements 1 - m by clipped logits. */
static void logits(float *restrict mean, const float *restrict rest, int64_t n) {
    SS_SIMD
    for (int64_t i = 0; i < n; ++i) {
        float v = ss_logf(mean[i]) - ss_logf(rest[i]);
        v = v < -10.0f ? -10.0f : v;
        mean[i] = v > 10.0f ? 10.0f : v;
    }
}

/* One row of w cells from the column sums of `lines` lines. */
static void cell_row(const job *j, const double *columns, int64_t lines, float *out) {
    const int64_t cells = j->a->w;
    float rest[SS_BLOCK];
    for (int64_t first = 0; first < cells; first += SS_BLOCK) {
        int64_t n = cells - first < SS_BLOCK ? cells - first : SS_BLOCK;
        for (int64_t k = 0; k < n; ++k) {
            int64_t begin = j->edge[2 * (first + k)], end = j->edge[2 * (first + k) + 1];
            double sum = 0.0;
            for (int64_t i = begin; i < end; ++i) {
                sum += columns[i];
            }
            double mean = sum / (double)(lines * (end - begin));
            mean = mean < 0.0 ? 0.0 : mean; /* a map that was interpolated is outside by rounding */
            mean = mean > 1.0 ? 1.0 : mean;
            out[first + k] = (float)mean;
            rest[k] = (float)(1.0 - mean);
        }
        logits(out + first, rest, n);
    }
}

/* Asks for the line that the next row of cells has in this one's place: rows of cells are pieces of
 * pages, too short for the hardware to run ahead in. */
static void ask_for_line(const ss_tensor *prob, int64_t offset, int64_t n) {
    const int64_t size = (int64_t)ss_dtype_size(prob->dtype);
    const char *line = (const char *)prob->data + offset * size;
    for (int64_t byte = 0; byte < n * size; byte += 64) {
        __builtin_prefetch(line + byte);
    }
}

static void rows(void *ctx, int64_t begin, int64_t end, int32_t thread) {
    const job *work = ctx;
    const ss_mask_logits_args *a = work->a;
    const int64_t *s = a->prob.shape;
    double *columns = work->columns + thread * s[3];
    for (int64_t r = begin; r < end; ++r) {
        int64_t n = r / a->h / a->d, i = r / a->h % a->d, j = r % a->h;
        int64_t d0 = cell_begin(i, s[1], a->d), d1 = cell_end(i, s[1], a->d);
        int64_t h0 = cell_begin(j, s[2], a->h), h1 = cell_end(j, s[2], a->h);
        memset(columns, 0, (size_t)s[3] * sizeof(double));
        for (int64_t z = d0; z < d1; ++z) {
            for (int64_t y = h0; y < h1; ++y) {
                const int64_t line = ((n * s[1] + z) * s[2] + y) * s[3];
                ask_for_line(&a->prob, line + (h1 - h0) * s[3], s[3]);
                add_line(&a->prob, line, s[3], columns);
            }
        }
        cell_row(work, columns, (d1 - d0) * (h1 - h0), (float *)a->logits.data + r * a->w);
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
    const int64_t items = s[0] * a->d * a->h, grain = 32;
    job j = {.a = a};
    j.columns = ss_scratch(x, ss_parallel_threads(x, items, grain) * s[3], sizeof(double));
    j.edge = ss_scratch(x, a->w, 2 * sizeof(int64_t));
    if (j.columns && j.edge) {
        for (int64_t k = 0; k < a->w; ++k) {
            j.edge[2 * k] = cell_begin(k, s[3], a->w);
            j.edge[2 * k + 1] = cell_end(k, s[3], a->w);
        }
        ss_parallel_for(x, items, grain, rows, &j);
    }
    int failed = !j.columns || !j.edge;
    ss_scratch_free(j.columns);
    ss_scratch_free(j.edge);
    return failed ? SS_NO_MEMORY : SS_OK;
}
