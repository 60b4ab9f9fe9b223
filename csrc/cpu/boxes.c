/* SPDX-License-Identifier: Apache-2.0
 *
 * boxes.c: the bounding box of every mask of a batch.
 *
 *     lo = min index, hi = max index (inclusive) per axis;  side = hi - lo + 1
 *     box = (max(lo - margin side, 0), min(hi + margin side, size - 1)), all lo first, then all hi
 *
 * mask [N, D, H, W] -> box [N, 6] in array order, found [N]; an empty mask gives zeros and false.
 * Memory: 1 byte read per voxel, nothing else. Numerics: integers, then one double expression
 * rounded to float. Deterministic: items of SS_LINES lines have boxes of their own, whose union
 * does not depend on the order.
 */
#include "extent.h"

typedef struct job {
    const ss_boxes_args *a;
    int64_t items; /* per mask */
    uint8_t *columns;
    extent *found;
} job;

/* Adds one line to the column counters; true if it has a voxel. */
static int add_line(const uint8_t *restrict m, int64_t width, uint8_t *restrict columns) {
    uint8_t any = 0;
    _Pragma("omp simd reduction(| : any)") for (int64_t w = 0; w < width; ++w) {
        uint8_t hit = m[w] != 0;
        columns[w] = (uint8_t)(columns[w] + hit);
        any |= hit;
    }
    return any;
}

static void scan(void *ctx, int64_t begin, int64_t end, int32_t thread) {
    const job *j = ctx;
    const int64_t *s = j->a->mask.shape;
    const int64_t lines = s[1] * s[2], width = s[3];
    uint8_t *columns = j->columns + thread * width;
    for (int64_t item = begin; item < end; ++item) {
        int64_t n = item / j->items;
        int64_t first = item % j->items * SS_LINES;
        int64_t last = first + SS_LINES < lines ? first + SS_LINES : lines;
        const uint8_t *m = (const uint8_t *)j->a->mask.data + n * lines * width;
        extent e = extent_empty();
        memset(columns, 0, (size_t)width);
        for (int64_t line = first; line < last; line += SS_SKIP) {
            int64_t stop = line + SS_SKIP < last ? line + SS_SKIP : last;
            if (!ss_any(m + line * width, (stop - line) * width)) {
                continue;
            }
            for (int64_t k = line; k < stop; ++k) {
                if (add_line(m + k * width, width, columns)) {
                    extent_line(&e, k, s[2]);
                }
            }
        }
        extent_columns(&e, columns, width);
        j->found[item] = e;
    }
}

static void write_box(const ss_boxes_args *a, int64_t n, const extent *e) {
    float *box = (float *)a->box.data + 6 * n;
    ((uint8_t *)a->found.data)[n] = e->count > 0;
    for (int32_t axis = 0; axis < 3; ++axis) {
        double lo = 0.0, hi = 0.0;
        if (e->count > 0) {
            double most = (double)(a->mask.shape[axis + 1] - 1);
            double grow = a->margin * (double)(e->hi[axis] - e->lo[axis] + 1);
            lo = (double)e->lo[axis] - grow;
            hi = (double)e->hi[axis] + grow;
            lo = lo < 0.0 ? 0.0 : lo;
            hi = hi > most ? most : hi;
        }
        box[axis] = (float)lo;
        box[axis + 3] = (float)hi;
    }
}

ss_status SS_CPU(boxes)(ss_exec *x, const ss_boxes_args *a) {
    const int64_t *s = a->mask.shape;
    job j = {.a = a, .items = ss_items(s[1] * s[2], SS_LINES)};
    const int64_t items = s[0] * j.items;
    const int64_t grain = 1 + (int64_t)(1 << 14) / (SS_LINES * s[3]);
    const int32_t threads = ss_parallel_threads(x, items, grain);
    j.columns = ss_scratch(x, threads * s[3], 1);
    j.found = ss_scratch(x, items, sizeof(extent));
    if (j.columns && j.found) {
        ss_parallel_for(x, items, grain, scan, &j);
        for (int64_t n = 0; n < s[0]; ++n) {
            extent e = extent_empty();
            for (int64_t i = 0; i < j.items; ++i) {
                extent_join(&e, &j.found[n * j.items + i]);
            }
            write_box(a, n, &e);
        }
    }
    int failed = !j.columns || !j.found;
    ss_scratch_free(j.columns);
    ss_scratch_free(j.found);
    return failed ? SS_NO_MEMORY : SS_OK;
}
