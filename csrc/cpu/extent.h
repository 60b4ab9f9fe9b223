/* SPDX-License-Identifier: Apache-2.0
 *
 * extent.h: smallest box around the voxels of a mask, found line by line.
 *
 * A line is a run of the last axis, numbered z * H + y; work is cut into items of SS_LINES lines.
 * Along the last axis an item counts hits per column in bytes, which cannot overflow within
 * SS_LINES lines; columns give both the number of hits and the first and last column.
 */
#ifndef SS_CPU_EXTENT_H
#define SS_CPU_EXTENT_H

#include "lanes.h"

#define SS_LINES 128 /* < 256: what a byte can count */
#define SS_SKIP 8    /* lines that are looked at together first: mostly there is nothing in them */

typedef struct extent {
    int64_t count;
    int64_t lo[3]; /* inclusive; meaningful only if count > 0 */
    int64_t hi[3];
} extent;

static inline extent extent_empty(void) {
    return (extent){0, {INT64_MAX, INT64_MAX, INT64_MAX}, {-1, -1, -1}};
}

static inline void extent_include(extent *e, int32_t axis, int64_t i) {
    e->lo[axis] = i < e->lo[axis] ? i : e->lo[axis];
    e->hi[axis] = i > e->hi[axis] ? i : e->hi[axis];
}

static inline void extent_line(extent *e, int64_t line, int64_t height) {
    extent_include(e, 0, line / height);
    extent_include(e, 1, line % height);
}

/* Takes over the byte counters of an item's columns. */
static inline void extent_columns(extent *e, const uint8_t *columns, int64_t width) {
    int64_t count = 0;
    _Pragma("omp simd reduction(+ : count)") for (int64_t w = 0; w < width; ++w) {
        count += columns[w];
    }
    if (count == 0) {
        return;
    }
    int64_t first = 0, last = width - 1;
    while (!columns[first]) {
        ++first;
    }
    while (!columns[last]) {
        --last;
    }
    e->count += count;
    extent_include(e, 2, first);
    extent_include(e, 2, last);
}

static inline void extent_join(extent *e, const extent *other) {
    if (other->count == 0) {
        return;
    }
    e->count += other->count;
    for (int32_t axis = 0; axis < 3; ++axis) {
        extent_include(e, axis, other->lo[axis]);
        extent_include(e, axis, other->hi[axis]);
    }
}

/* Whether any of n bytes is not 0. */
static inline int ss_any(const uint8_t *restrict a, int64_t n) {
    uint8_t any = 0;
    _Pragma("omp simd reduction(| : any)") for (int64_t i = 0; i < n; ++i) {
        any |= a[i];
    }
    return any != 0;
}

/* Whether any of n bytes differs. */
static inline int ss_differ(const uint8_t *restrict a, const uint8_t *restrict b, int64_t n) {
    uint8_t any = 0;
    _Pragma("omp simd reduction(| : any)") for (int64_t i = 0; i < n; ++i) {
        any |= a[i] ^ b[i];
    }
    return any != 0;
}

static inline int64_t ss_items(int64_t n, int64_t size) {
    return n / size + (n % size != 0);
}

#endif
