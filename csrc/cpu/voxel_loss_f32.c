/* SPDX-License-Identifier: Apache-2.0
 *
 * voxel_loss_f32.c: the sweeps of voxel_loss_sweep.h in float, for f16, bf16 and f32 logits.
 *
 * voxel_loss_pair.h and voxel_loss_many.h take the common losses of 2 and of 3 to 32 classes,
 * voxel_loss_fused.h more kinds of terms and voxel weights, voxel_loss_sweep.h everything. Formulas
 * and shapes are in voxel_loss.c: logits [B, C, S], sums [terms, B, C, 4], gradient [B, C, S].
 * Bytes per voxel: forward 4 C and the label, backward 8 C and the label; nothing is stored
 * between. Rounding: p is within 4 ulp of the exact softmax (ss_expf 1.3 ulp, one sum, one
 * division, one product); block sums of 1024 voxels in 16 lanes add at most 64 roundings,
 * everything beyond a block is double. Which loop runs depends on the data alone, never on threads.
 * Values and gradients are within 1e-5 of the float64 sweep.
 */
#if defined(__GNUC__) && !defined(__clang__) && defined(__AVX512F__)
/* With 32 registers gcc can mix the long chains of operations of these loops, so that fewer wait
 * for each other; on its own it leaves one after the other, as written. */
#pragma GCC optimize("schedule-insns", "sched-pressure")
#endif
#include "voxel_loss.h"

#define REAL float
#define VL_REAL_DTYPE SS_F32
#define VL_SIMD SS_SIMD
#define VL_EXP ss_expf
#define VL_LOG ss_logf
#define VL_NAME(name) SS_CPU(name##_f32)
#define VL_STORE ss_store_f32
#define VL_FUSED_FORWARD(k, sums) fused_forward(k, sums)
#define VL_FUSED_BACKWARD(k, by) fused_backward(k, by)

#define VL_PAIR_FORWARD(k, at, end, sums)                                                          \
    (p->C == 2 ? pair_forward : many_forward)(k, at, end, sums)
#define VL_PAIR_BACKWARD(k, at, end, by, out)                                                      \
    (p->C == 2 ? pair_backward : many_backward)(k, at, end, by, out)

#define VL_KEEP_IF keep_if

/* v or 0, by masking: gcc turns a select whose result is summed into a branch around the sum. */
static inline float keep_if(int32_t yes, float v) {
    return ss_bits_f32(ss_f32_bits(v) & (uint32_t)-yes);
}

struct vl_block;
static int fused_forward(struct vl_block *k, double *sums);
static int fused_backward(struct vl_block *k, const double *by);
static int64_t pair_forward(struct vl_block *k, int64_t offset, int64_t end, double *sums);
static int64_t pair_backward(struct vl_block *k, int64_t offset, int64_t end, const double *by,
                             const ss_tensor *out);
static int64_t many_forward(struct vl_block *k, int64_t offset, int64_t end, double *sums);
static int64_t many_backward(struct vl_block *k, int64_t offset, int64_t end, const double *by,
                             const ss_tensor *out);

#include "voxel_loss_rows.h"

#include "voxel_loss_sweep.h"

#include "voxel_loss_fused.h"

#include "voxel_loss_pair.h"

#include "voxel_loss_many.h"
