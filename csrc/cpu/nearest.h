/* SPDX-License-Identifier: Apache-2.0
 *
 * nearest.h: nearest points between two sets of grid points, as between two surfaces; nearest.c.
 */
#ifndef SS_CPU_NEAREST_H
#define SS_CPU_NEAREST_H

#include "lanes.h"

/* Grid points as bits: row (z, y) has `words` words, bit x of a row is the point (z, y, x). */
typedef struct ss_bits {
    uint64_t *row;
    int64_t d, h, words;
} ss_bits;

/* Points sorted into cells of 8x8x8, empty cells left out. Each cell's points are padded to a
 * multiple of 8 by repeating the last one. */
typedef struct ss_cloud {
    int64_t cells;
    int64_t points;   /* without padding */
    double *at[3];    /* coordinates z, y, x in voxels */
    double *weight;   /* of each point; NULL if they all weigh 1 */
    double *distance; /* squared, to the other cloud; filled by nearest_search */
    double *lo[3];    /* tight bounds of each cell, padded to a multiple of 8 cells */
    double *hi[3];
    int64_t *start; /* cells + 1 of them */
    int64_t *count;
    void *memory[2];
} ss_cloud;

/* Collects the set bits; `cloud` is zeroed first. Free with cloud_free, whatever it returned. */
ss_status SS_CPU(cloud_build)(ss_exec *x, const ss_bits *bits, int weighted, ss_cloud *cloud);
void SS_CPU(cloud_free)(ss_cloud *cloud);

/* Bytes of scratch that one thread of nearest_search needs for searching `p`. */
int64_t SS_CPU(nearest_room)(const ss_cloud *p);
/* Squared distances from the points in cells begin..end-1 of q to the nearest point of p. */
void SS_CPU(nearest_search)(const ss_cloud *q, const ss_cloud *p, const double *spacing,
                            int64_t begin, int64_t end, void *room);

#endif
