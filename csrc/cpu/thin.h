/* SPDX-License-Identifier: Apache-2.0
 *
 * thin.h: depths in regions that are nowhere deeper than 3 voxels, by bits: rims and noise.
 *
 * With d2 a voxel's squared distance to the nearest one outside the region, d2 > t iff all voxels
 * within sqrt(t) of it are in the region. By lines of the last axis, all of whose voxels at once:
 *
 *     E_t(z, y) = AND over (dz, dy) of H_r(z + dz, y + dy),  r = floor(sqrt(t - dz^2 - dy^2))
 *
 * where H_r(z, y) are the voxels of line (z, y) whose r neighbours to either side are in the region
 * as well. t runs over the values that d2 can have, up to 9, and a line is done when it is empty.
 */
#ifndef SS_CPU_THIN_H
#define SS_CPU_THIN_H

#include "bits.h"
#include "lanes.h"

#define THIN_RADIUS 3
#define THIN_LEVELS 8
#define THIN_DEEP 10   /* the depth of a line with a voxel of d2 > 9 */
#define THIN_COUNTS 3  /* voxels with d2 > 0, 1, 2 */
#define THIN_STEPS 96  /* more than there are */
#define THIN_WORDS 256 /* of a line at most */

static const int32_t thin_value[THIN_LEVELS + 1] = {0, 1, 2, 3, 4, 5, 6, 8, 9};

typedef struct thin_step {
    int32_t dz, dy, r;
} thin_step;

typedef struct thin {
    int64_t shape[3], words; /* words of one line */
    uint64_t *bits;          /* per line H_0 .. H_3 */
    int32_t *count;          /* per line THIN_COUNTS numbers of voxels */
    uint8_t *depth;          /* per line: its largest d2, or THIN_DEEP */
    int32_t first[THIN_LEVELS + 1];
    thin_step step[THIN_STEPS];
} thin;

/* floor(sqrt(n)) for n up to 9, -1 for less than 0. */
static int32_t thin_root(int32_t n) {
    return n < 0 ? -1 : n < 1 ? 0 : n < 4 ? 1 : n < 9 ? 2 : 3;
}

/* Which lines to look at for E_t, beyond those for the value before t; in a plane if dims is 2. */
static void thin_plan(thin *t, int32_t dims) {
    const int32_t deep = dims == 3 ? THIN_RADIUS : 0;
    int32_t n = 0;
    for (int32_t level = 0; level < THIN_LEVELS; ++level) {
        t->first[level] = n;
        for (int32_t dz = -deep; dz <= deep; ++dz) {
            for (int32_t dy = -THIN_RADIUS; dy <= THIN_RADIUS; ++dy) {
                const int32_t beside = dz * dz + dy * dy;
                const int32_t r = thin_root(thin_value[level + 1] - beside);
                if (r > thin_root(thin_value[level] - beside)) {
                    t->step[n++] = (thin_step){dz, dy, r};
                }
            }
        }
    }
    t->first[THIN_LEVELS] = n;
}

static uint64_t *thin_line(const thin *t, int64_t line, int32_t r) {
    return t->bits + (line * (THIN_RADIUS + 1) + r) * t->words;
}

/* H_1 .. H_3 of a line from its H_0. */
static void thin_shrink(const thin *t, int64_t line) {
    for (int32_t r = 1; r <= THIN_RADIUS; ++r) {
        const uint64_t *from = thin_line(t, line, r - 1);
        uint64_t *to = thin_line(t, line, r);
        for (int64_t k = 0; k < t->words; ++k) {
            uint64_t before = from[k] << 1 | (k ? from[k - 1] >> 63 : 0);
            uint64_t after = from[k] >> 1 | (k + 1 < t->words ? from[k + 1] << 63 : 0);
            to[k] = from[k] & before & after;
        }
    }
}

/* e = E_t from the value before it; returns whether a voxel is left. */
static int thin_next(const thin *t, int64_t line, int32_t level, uint64_t *e) {
    const int64_t z = line / t->shape[1], y = line % t->shape[1];
    uint64_t any = 0;
    for (int32_t i = t->first[level]; i < t->first[level + 1]; ++i) {
        const thin_step s = t->step[i];
        if (z + s.dz < 0 || z + s.dz >= t->shape[0] || y + s.dy < 0 || y + s.dy >= t->shape[1]) {
            return 0;
        }
        const uint64_t *h = thin_line(t, line + s.dz * t->shape[1] + s.dy, s.r);
        any = 0;
        for (int64_t k = 0; k < t->words; ++k) {
            e[k] &= h[k];
            any |= e[k];
        }
        if (!any) {
            return 0;
        }
    }
    return 1;
}

static int32_t thin_count(const thin *t, const uint64_t *e) {
    int32_t n = 0;
    for (int64_t k = 0; k < t->words; ++k) {
        n += __builtin_popcountll(e[k]);
    }
    return n;
}

/* The depth of a line, and how many of its voxels are deeper than 0, 1, 2. */
static uint8_t thin_depth(const thin *t, int64_t line, int32_t count[THIN_COUNTS]) {
    uint64_t e[THIN_WORDS];
    memset(count, 0, THIN_COUNTS * sizeof *count);
    memcpy(e, thin_line(t, line, 0), (size_t)t->words * sizeof *e);
    if (!(count[0] = thin_count(t, e))) {
        return 0;
    }
    for (int32_t level = 0; level < THIN_LEVELS; ++level) {
        if (!thin_next(t, line, level, e)) {
            return (uint8_t)thin_value[level + 1];
        }
        if (level + 1 < THIN_COUNTS) {
            count[level + 1] = thin_count(t, e);
        }
    }
    return THIN_DEEP;
}

/* The column of voxel number `left` of those of a line with d2 > t, t = 0, 1 or 2. */
static int64_t thin_column(const thin *t, int64_t line, int32_t deeper, int64_t left) {
    uint64_t e[THIN_WORDS];
    memcpy(e, thin_line(t, line, 0), (size_t)t->words * sizeof *e);
    for (int32_t level = 0; level < deeper; ++level) {
        thin_next(t, line, level, e);
    }
    int64_t k = 0;
    for (; left >= __builtin_popcountll(e[k]); ++k) {
        left -= __builtin_popcountll(e[k]);
    }
    for (uint64_t word = e[k];; word &= word - 1) {
        if (left-- == 0) {
            return 64 * k + __builtin_ctzll(word);
        }
    }
}

#endif
