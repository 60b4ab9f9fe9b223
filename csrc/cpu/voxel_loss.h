/* SPDX-License-Identifier: Apache-2.0
 *
 * voxel_loss.h: the plan that all voxel loss files share: terms as numbers, checked once per call.
 *
 * voxel_loss.c      plan, losses from sums, derivatives by the sums, the two operators
 * voxel_loss_sweep.h  one sweep over the voxels, forward or backward, for any sum of terms;
 * compiled in float (voxel_loss_f32.c) and in double (voxel_loss_f64.c, for float64 logits)
 * voxel_loss_rows.h   its blocks: reading, activation
 * voxel_loss_fused.h  usual sums of terms for 2 to 4 classes in one loop (float)
 * voxel_loss_pair.h   two classes, no weights on labels: the fastest (float)
 * voxel_loss_many.h   the same for cross entropy and Dice of 3 to 32 classes (float)
 * voxel_loss_few.h    its loops for 3 and 4 classes
 */
#ifndef SS_CPU_VOXEL_LOSS_H
#define SS_CPU_VOXEL_LOSS_H

#include "lanes.h"

#define VL_TERMS 32
#define VL_FIELDS 17
#define VL_CHUNK 16384 /* voxels of one item of work: sums are folded in double, in this order */

enum { VL_CE, VL_DICE, VL_MSE, VL_KL, VL_ENTROPY };
enum { VL_SOFTMAX, VL_SIGMOID, VL_NONE };
enum { VL_VOXEL, VL_ELEMENT, VL_SAMPLE, VL_SUM };

typedef struct vl_term {
    int32_t kind;
    int32_t target; /* index into the plan's targets, -1: none */
    int32_t weight;
    int32_t hard; /* labels, not a distribution */
    int32_t slot;
    int32_t include_background, squared, batch, jaccard, reduction, pooled;
    int64_t first, last;
    double smoothing, nr, dr, min_weight;
    const double *a; /* class weights */
} vl_term;

/* Labels and weights of a block are read once for all terms that share them. */
typedef struct vl_slot {
    int32_t target; /* -1 if there are no labels to read */
    int32_t weight;
    int64_t ignore; /* INT64_MIN: nothing is ignored */
    int64_t first, last;
} vl_slot;

typedef struct vl_plan {
    const ss_tensor *logits;
    const ss_tensor *targets;
    const ss_tensor *weights;
    int64_t B, C, S;
    int32_t activation;
    int32_t n_terms;
    int32_t n_slots;
    vl_term term[VL_TERMS];
    vl_slot slot[VL_TERMS];
} vl_plan;

/* Sums [terms, B, C, 4] over all voxels: Dice I, Z, Y, W per class; others num, den, W, 0. */
ss_status SS_CPU(vl_forward_f32)(ss_exec *x, const vl_plan *p, double *sums);
ss_status SS_CPU(vl_forward_f64)(ss_exec *x, const vl_plan *p, double *sums);
/* dlogits from the derivatives [terms, B, C, 2] by num, or by I and Z. */
ss_status SS_CPU(vl_backward_f32)(ss_exec *x, const vl_plan *p, const double *by,
                                  const ss_tensor *dlogits);
ss_status SS_CPU(vl_backward_f64)(ss_exec *x, const vl_plan *p, const double *by,
                                  const ss_tensor *dlogits);

/* Channel c stands for this label: a single channel is the foreground's. */
static inline int32_t vl_label(const vl_plan *p, int64_t c) {
    return (int32_t)c + (p->C == 1);
}

static inline int vl_covers(const vl_term *t, int64_t b) {
    return t->first <= b && b < t->last;
}

#endif
