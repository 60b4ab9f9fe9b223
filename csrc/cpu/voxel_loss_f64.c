/* SPDX-License-Identifier: Apache-2.0
 *
 * voxel_loss_f64.c: the sweeps of voxel_loss_sweep.h in double, for float64 logits.
 *
 * Formulas and shapes are in voxel_loss.c: logits [B, C, S], sums [terms, B, C, 4], gradient
 * [B, C, S]; 8 C bytes per voxel and the label forward, 16 C backward. It exists for gradcheck and
 * for exact comparisons: exp and log are the C library's, so its loops do not vectorise and it is
 * several times slower than float. Errors stay below 1e-14 relative. Determinism: blocks and chunks
 * of fixed size, folded in order.
 */
#include "voxel_loss.h"

#define REAL double
#define VL_REAL_DTYPE SS_F64
#define VL_SIMD
#define VL_EXP exp
#define VL_LOG log
#define VL_NAME(name) SS_CPU(name##_f64)
#define VL_KEEP_IF(yes, v) ((yes) ? (v) : 0.0)
#define VL_STORE store_f64
#define VL_FUSED_FORWARD(k, sums) 0
#define VL_FUSED_BACKWARD(k, by) 0
#define VL_PAIR_FORWARD(k, at, end, sums) 0
#define VL_PAIR_BACKWARD(k, at, end, by, out) 0

static void store_f64(const ss_tensor *t, int64_t offset, int64_t n, const double *src) {
    memcpy((double *)t->data + offset, src, (size_t)n * sizeof(double));
}

#include "voxel_loss_rows.h"

#include "voxel_loss_sweep.h"
