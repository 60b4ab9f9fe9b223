/* SPDX-License-Identifier: Apache-2.0
 *
 * voxel_loss.c: any sum of losses on the same logits in one forward and one backward sweep.
 *
 * Every loss is a function of a few sums over voxels (per term, sample and class):
 *
 *     Dice      I = sum m p q, Z = sum m p^2 (linear: m p), Y = sum m q^2 (m q), W = sum m
 *     others    num = sum m d, den = sum m a_y (or sum m), W = sum m
 *               d: CE lse z - z_y, MSE sum_c (p - q)^2, KL sum_c q ln(q / p), entropy -sum_c p ln p
 *
 * The forward sweep makes the sums; the losses follow from them here, in double. The backward sweep
 * gets the derivatives of the losses by the sums and writes dlogits once: per voxel and class
 * dz = p (g - <p, g>) + direct terms. Least traffic per voxel: forward C logits, label and weight;
 * backward the same and C gradients. Only samples that a term covers are read.
 * Determinism: sums over chunks of fixed size, folded in order; no dependence on threads.
 */
#include "voxel_loss.h"

static ss_status bad_params(ss_exec *x, const char *what, int64_t term, double got) {
    return ss_fail(x, SS_INVALID, "params: term %lld: expected %s, got %g", (long long)term, what,
                   got);
}

/* A whole number in lo..hi as it came through a list of doubles. */
static int whole(double v, double lo, double hi) {
    return v >= lo && v <= hi && v == floor(v);
}

static ss_status check_target(ss_exec *x, vl_plan *p, vl_term *t) {
    const ss_tensor *q = &p->targets[t->target];
    int64_t voxels = (t->last - t->first) * p->S;
    int floating = q->dtype >= SS_F16;
    int64_t n = ss_count(q);
    t->hard = !(n == voxels * p->C && (p->C > 1 || floating));
    if (t->hard && (n != voxels || floating)) {
        return ss_fail(x, SS_INVALID,
                       "targets[%d]: expected integer labels of %lld voxels or a distribution of "
                       "%lld values, got %lld values of dtype %s",
                       (int)t->target, (long long)voxels, (long long)(voxels * p->C), (long long)n,
                       ss_dtype_name(q->dtype));
    }
    return SS_OK;
}

static ss_status check_weight(ss_exec *x, const vl_plan *p, const vl_term *t) {
    int64_t voxels = (t->last - t->first) * p->S;
    int64_t n = ss_count(&p->weights[t->weight]);
    if (n != voxels) {
        return ss_fail(x, SS_INVALID, "weights[%d]: expected %lld values, got %lld", (int)t->weight,
                       (long long)voxels, (long long)n);
    }
    return SS_OK;
}

/* Finds or makes the slot of a term. */
static void choose_slot(vl_plan *p, vl_term *t, int64_t ignore) {
    vl_slot s = {t->hard ? t->target : -1, t->weight, t->hard ? ignore : INT64_MIN, t->first,
                 t->last};
    for (int32_t i = 0; i < p->n_slots; ++i) {
        const vl_slot *o = &p->slot[i];
        if (o->target == s.target && o->weight == s.weight && o->ignore == s.ignore &&
            o->first == s.first && o->last == s.last) {
            t->slot = i;
            return;
        }
    }
    t->slot = p->n_slots;
    p->slot[p->n_slots++] = s;
}

static ss_status read_term(ss_exec *x, vl_plan *p, int64_t i, const double *f, int64_t n_targets,
                           int64_t n_weights) {
    vl_term *t = &p->term[i];
    if (!whole(f[0], VL_CE, VL_ENTROPY)) {
        return bad_params(x, "a kind of 0 to 4", i, f[0]);
    }
    t->kind = (int32_t)f[0];
    double most_targets = (double)n_targets - 1;
    if (t->kind == VL_ENTROPY ? f[1] != -1.0 : !whole(f[1], 0, most_targets)) {
        return bad_params(x, "the index of a target", i, f[1]);
    }
    if (!whole(f[2], -1, (double)n_weights - 1)) {
        return bad_params(x, "the index of a weight, or -1", i, f[2]);
    }
    if (!whole(f[3], 0, (double)p->B - 1) || !whole(f[4], f[3] + 1, (double)p->B)) {
        return bad_params(x, "samples of the batch", i, f[3]);
    }
    if (!whole(f[14], VL_VOXEL, VL_SUM)) {
        return bad_params(x, "a reduction of 0 to 3", i, f[14]);
    }
    if (p->activation != VL_SOFTMAX && (t->kind == VL_KL || t->kind == VL_ENTROPY ||
                                        (t->kind == VL_CE && p->activation == VL_NONE))) {
        return bad_params(x, "a kind that fits the activation", i, f[0]);
    }
    t->target = (int32_t)f[1];
    t->weight = (int32_t)f[2];
    t->first = (int64_t)f[3];
    t->last = (int64_t)f[4];
    int64_t ignore = f[5] != 0.0 && whole(f[6], -0x1p53, 0x1p53) ? (int64_t)f[6] : INT64_MIN;
    /* Binary cross entropy knows neither smoothing nor class weights, as the reference. */
    t->smoothing = t->kind == VL_CE && p->activation == VL_SOFTMAX ? f[7] : 0.0;
    t->include_background = f[8] != 0.0;
    t->squared = f[9] != 0.0;
    t->batch = f[10] != 0.0;
    t->jaccard = f[11] != 0.0;
    t->nr = f[12];
    t->dr = f[13];
    t->reduction = (int32_t)f[14];
    t->min_weight = f[15];
    t->pooled = f[16] != 0.0;
    t->a = f + VL_FIELDS;
    ss_status status = t->target < 0 ? SS_OK : check_target(x, p, t);
    status = status == SS_OK && t->weight >= 0 ? check_weight(x, p, t) : status;
    choose_slot(p, t, ignore);
    return status;
}

static ss_status make_plan(ss_exec *x, vl_plan *p, const ss_tensor *logits, const ss_list *targets,
                           const ss_list *weights, const ss_doubles *params, int64_t activation,
                           int64_t terms) {
    memset(p, 0, sizeof *p);
    p->logits = logits;
    p->targets = targets->at;
    p->weights = weights->at;
    p->B = logits->shape[0];
    p->C = logits->shape[1];
    p->S = logits->shape[2];
    p->activation = (int32_t)activation;
    p->n_terms = (int32_t)terms;
    int64_t row = VL_FIELDS + p->C;
    if (p->C > INT32_MAX / 2 || params->n != terms * row) {
        return ss_fail(x, SS_INVALID,
                       "params: expected %lld numbers for each of %lld terms, got %lld",
                       (long long)row, (long long)terms, (long long)params->n);
    }
    if (p->activation == VL_SOFTMAX && p->C < 2) {
        return ss_fail(x, SS_INVALID, "logits: expected at least 2 channels for softmax, got 1");
    }
    for (int64_t i = 0; i < terms; ++i) {
        ss_status status = read_term(x, p, i, params->at + i * row, targets->n, weights->n);
        if (status != SS_OK) {
            return status;
        }
    }
    return SS_OK;
}

/* ---- losses from sums, and their derivatives ------------------------------------------------ */

/* What a term's class loss is multiplied by: a_c / sum a, and 1 / samples if it is per sample. */
static double dice_factor(const vl_plan *p, const vl_term *t, int64_t c) {
    double sum = 0.0;
    for (int64_t k = t->include_background ? 0 : 1; k < p->C; ++k) {
        sum += t->a[k];
    }
    if ((c == 0 && !t->include_background) || sum == 0.0) {
        return 0.0;
    }
    if (!t->pooled) {
        return t->a[c];
    }
    return t->a[c] / sum / (t->batch ? 1.0 : (double)(t->last - t->first));
}

/* One class of one Dice group (samples b0..b1-1 together): loss, and its derivatives by I and Z. */
static double dice_class(const vl_plan *p, const vl_term *t, const double *sums, int64_t b0,
                         int64_t b1, int64_t c, double *by) {
    double s[4] = {0.0, 0.0, 0.0, 0.0};
    for (int64_t b = b0; b < b1; ++b) {
        for (int k = 0; k < 4; ++k) {
            s[k] += sums[(b * p->C + c) * 4 + k];
        }
    }
    double two = t->jaccard ? 2.0 : 1.0;
    double den = two * (s[1] + s[2] - (t->jaccard ? s[0] : 0.0)) + t->dr;
    double factor = dice_factor(p, t, c);
    by[0] = by[1] = 0.0;
    if (s[3] == 0.0 || den == 0.0 || factor == 0.0) {
        return 0.0;
    }
    double dice = (2.0 * s[0] + t->nr) / den;
    by[0] = factor * (-2.0 - (t->jaccard ? 2.0 * dice : 0.0)) / den;
    by[1] = factor * two * dice / den;
    return factor * (1.0 - dice);
}

/* Writes either values [B, C] or, from grad [B, C], derivatives by the sums [B, C, 2]. */
static void dice_term(const vl_plan *p, const vl_term *t, const double *sums, double *values,
                      const double *grad, double *by) {
    int64_t step = t->batch ? t->last - t->first : 1;
    for (int64_t b0 = t->first; b0 < t->last; b0 += step) {
        for (int64_t c = 0; c < p->C; ++c) {
            double d[2];
            double loss = dice_class(p, t, sums, b0, b0 + step, c, d);
            if (values) {
                values[b0 * p->C + c] = loss;
                continue;
            }
            for (int64_t b = b0; b < b0 + step; ++b) {
                by[(b * p->C + c) * 2] = d[0] * grad[b0 * p->C + c];
                by[(b * p->C + c) * 2 + 1] = d[1] * grad[b0 * p->C + c];
            }
        }
    }
}

static int is_kept(const vl_plan *p, const vl_term *t, const double *s) {
    return !(s[2] < t->min_weight * (double)p->S) && s[1] != 0.0;
}

/* What num of each sample is multiplied by to give its part of the loss. */
static void voxel_term(const vl_plan *p, const vl_term *t, const double *sums, double *values,
                       const double *grad, double *by) {
    double factor = t->kind == VL_ENTROPY ? 1.0 / log((double)p->C) : 1.0;
    int binary = t->kind == VL_CE && p->activation == VL_SIGMOID;
    if (t->reduction != VL_SUM && (t->reduction == VL_ELEMENT || binary ||
                                   (t->reduction == VL_SAMPLE && t->kind == VL_MSE))) {
        factor /= (double)p->C;
    }
    double all = 0.0;
    int64_t kept = 0;
    for (int64_t b = t->first; b < t->last; ++b) {
        all += sums[b * p->C * 4 + 1];
        kept += is_kept(p, t, sums + b * p->C * 4);
    }
    for (int64_t b = t->first; b < t->last; ++b) {
        const double *s = sums + b * p->C * 4;
        double den = t->reduction == VL_SAMPLE ? s[1] * (t->pooled ? (double)kept : 1.0)
                     : t->pooled               ? all
                                               : s[1];
        double k = den == 0.0 ? 0.0 : factor / den;
        k = t->reduction == VL_SAMPLE && !is_kept(p, t, s) ? 0.0 : k;
        k = t->reduction == VL_SUM ? factor : k;
        if (values) {
            values[b * p->C] = k == 0.0 ? 0.0 : k * s[0];
        } else {
            by[b * p->C * 2] = k * grad[b * p->C];
        }
    }
}

ss_status SS_CPU(voxel_loss_forward)(ss_exec *x, const ss_voxel_loss_forward_args *a) {
    vl_plan p;
    ss_status status =
        make_plan(x, &p, &a->logits, &a->targets, &a->weights, &a->params, a->activation, a->terms);
    if (status != SS_OK) {
        return status;
    }
    double *sums = a->stats.data;
    double *values = a->values.data;
    int64_t n = p.B * p.C;
    memset(sums, 0, (size_t)(p.n_terms * n * 4) * sizeof(double));
    memset(values, 0, (size_t)(p.n_terms * n) * sizeof(double));
    status = a->logits.dtype == SS_F64 ? SS_CPU(vl_forward_f64)(x, &p, sums)
                                       : SS_CPU(vl_forward_f32)(x, &p, sums);
    for (int32_t i = 0; status == SS_OK && i < p.n_terms; ++i) {
        (p.term[i].kind == VL_DICE ? dice_term : voxel_term)(&p, &p.term[i], sums + i * n * 4,
                                                             values + i * n, NULL, NULL);
    }
    return status;
}

ss_status SS_CPU(voxel_loss_backward)(ss_exec *x, const ss_voxel_loss_backward_args *a) {
    vl_plan p;
    ss_status status =
        make_plan(x, &p, &a->logits, &a->targets, &a->weights, &a->params, a->activation, a->terms);
    if (status != SS_OK) {
        return status;
    }
    int64_t n = p.B * p.C;
    double *by = ss_scratch(x, p.n_terms * n * 2, sizeof(double));
    if (!by) {
        return SS_NO_MEMORY;
    }
    memset(by, 0, (size_t)(p.n_terms * n * 2) * sizeof(double));
    const double *sums = a->stats.data;
    const double *grad = a->grad.data;
    for (int32_t i = 0; i < p.n_terms; ++i) {
        (p.term[i].kind == VL_DICE ? dice_term : voxel_term)(&p, &p.term[i], sums + i * n * 4, NULL,
                                                             grad + i * n, by + i * n * 2);
    }
    status = a->logits.dtype == SS_F64 ? SS_CPU(vl_backward_f64)(x, &p, by, &a->dlogits)
                                       : SS_CPU(vl_backward_f32)(x, &p, by, &a->dlogits);
    ss_scratch_free(by);
    return status;
}
