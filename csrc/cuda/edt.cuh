/* SPDX-License-Identifier: Apache-2.0
 *
 * edt.cuh: exact squared distances with unit spacing, for kernels that need them on the way.
 *
 * The caller marks sites (distance 0) as bits, one row of `ss_edt_words(w)` words per (n, z, y):
 * bit x % 32 of word x / 32 is voxel x, and bits from w on must be 0. The distance of every voxel
 * to the nearest site of its own volume comes back as an integer, SS_EDT_FAR where there is none.
 * border: 0, only voxels count; 1, everything outside the volume counts as sites; 2, only what is
 * outside along H and W does (2-D images, D = 1). RITM clicks: sites = ~error, border 1 (2 in 2-D).
 * For sides up to 1024 there is no workspace and `out` is written in place; longer ones take a
 * copy. Launches: 2, or 3 where H > SS_EDT_SHARED_SIDE.
 */
#ifndef SS_CUDA_EDT_CUH
#define SS_CUDA_EDT_CUH

#include "device.cuh"

#define SS_EDT_FAR INT32_MAX
#define SS_EDT_SIDE 16384 /* 3 * 16384^2 < 2^31; the caller refuses larger sides */
#define SS_EDT_SHARED_SIDE 1024

SS_BOTH int64_t ss_edt_words(int64_t w) {
    return (w + 31) / 32;
}

/* Takes what ss_cuda_edt_squared needs from the workspace (counts only if w has no base); pass the
 * result on as `room`. shape: N D H W. */
void *ss_cuda_edt_take(ss_carve *w, const int64_t shape[4]);

/* sites [N, D, H, words] -> out [N, D, H, W] on the stream of x. */
ss_status ss_cuda_edt_squared(ss_exec *x, void *room, const uint32_t *sites, const int64_t shape[4],
                              int border, int32_t *out);

#endif
