/* SPDX-License-Identifier: Apache-2.0
 *
 * edt.h: exact squared distances to the nearest 0-voxel, for kernels that need them on the way.
 *
 * `mask` is one C-contiguous [D, H, W] volume of bytes; voxels where it is 0 get 0. `border`: 0,
 * only voxels of the volume count; 1, everything outside the volume counts as 0-voxels; 2, only
 * what is outside along H and W does (2-D images, D = 1). Sides up to SS_EDT_SIDE; larger ones are
 * SS_INVALID. Threads as in `x`; from inside ss_parallel_for give a copy of `x` with threads = 1.
 */
#ifndef SS_CPU_EDT_H
#define SS_CPU_EDT_H

#include "../semisam.h"
#include "isa.h"

#define SS_EDT_FAR INT32_MAX /* no 0-voxel and no border */
#define SS_EDT_SIDE 16384    /* 3 * 16384^2 < 2^31 */

/* Unit spacing: exact integers, SS_EDT_FAR where there is no 0-voxel at all. */
ss_status SS_CPU(edt_unit)(ss_exec *x, const uint8_t *mask, const int64_t shape[3], int border,
                           int32_t *out);

/* With spacing (all three positive and finite): squared distances in float, +inf where there is
 * none. Relative error: see edt.c. */
ss_status SS_CPU(edt_spaced)(ss_exec *x, const uint8_t *mask, const int64_t shape[3],
                             const double spacing[3], int border, float *out);

#endif
