/* SPDX-License-Identifier: Apache-2.0
 *
 * voxel_loss.cu: any sum of losses on the same logits in one forward and one backward sweep.
 *
 * Every loss is a function of a few sums over voxels (per term, sample and class):
 *
 *     Dice      I = sum m p q, Z = sum m p^2 (linear: m p), Y = sum m q^2 (m q), W = sum m
 *     others    num = sum m d, den = sum m a_y (or sum m), W = sum m
 *               d: CE lse z - z_y, MSE sum_c (p - q)^2, KL sum_c q ln(q / p), entropy -sum_c p ln p
 *
 * Launches forward: a sweep for each group of terms that has one of its own, one for all others;
 * they write the sums of each chunk. Then their sum in chunk order -> stats [terms, B, C, 4] and,
 * in the same launch if they are few, values [terms, B, C].
 * Backward: derivatives of the values by the sums, as the factors of a group (voxel_loss.cuh); then
 * one sweep dz = p (g - <p, g>) + direct terms. Many class weights (terms C > 112) travel in
 * launches of their own, since a graph must hold them. Least traffic per voxel: forward C logits,
 * label and weight, backward the same and C gradients; what the kernels here read is small.
 * Numerics: sums over chunks, losses and derivatives in double. Deterministic: chunks are decided
 * by the problem, and one thread adds every 32nd. On the CPU a wrong label or a negative weight is
 * an error; here such a voxel has weight 0 and is counted (forward). registers <= 64
 */
#include "voxel_loss.cuh"

#define FIELDS 17 /* numbers per term before its class weights: ops.def */
#define THREADS 128
#define LETTER 448   /* class weights in one launch */
#define AT_ONCE 2048 /* values that the last block of the fold makes, too */

/* What values and derivatives need to know of a term. */
typedef struct rule {
    int64_t first, last, row;
    double smoothing, nr, dr, min_weight;
    double a_sum; /* of the class weights that Dice counts */
    int8_t kind, include_background, squared, batch, jaccard, reduction, pooled;
    int8_t group;
    int8_t few; /* its sums come from a sweep of its group */
} rule;

typedef struct rules {
    int64_t B, C, S;
    int64_t chunks[2], rows[2]; /* of voxel_loss_any.cu and of groups' sweeps */
    int32_t activation, terms, groups;
    const double *part[2], *far;
    double *stats;
    rule of[VL_TERMS];
    double near[VL_NEAR];
} rules;
static_assert(sizeof(rules) <= 4000, "arguments of a kernel, with room for pointers");

typedef struct plan {
    vl_job job; /* with all terms */
    rules rule;
    vl_term group[VL_TERMS];
    const ss_tensor *targets, *weights;
    const double *params;
} plan;

/* ---- terms from numbers ---------------------------------------------------------------------- */

static ss_status bad_params(ss_exec *x, const char *what, int64_t term, double got) {
    return ss_cuda_fail(x, SS_INVALID, "params: term %lld: expected %s, got %g", (long long)term,
                        what, got);
}

/* A whole number in lo..hi as it came through a list of doubles. */
static bool whole(double v, double lo, double hi) {
    return v >= lo && v <= hi && v == floor(v);
}

static int64_t count_of(const ss_tensor *t) {
    int64_t n = 1;
    for (int32_t d = 0; d < t->ndim; ++d) {
        n *= t->shape[d];
    }
    return n;
}

static int64_t size_of(int32_t dtype) {
    switch (dtype) {
    case SS_BOOL:
    case SS_U8:
    case SS_I8:
        return 1;
    case SS_U16:
    case SS_I16:
    case SS_F16:
    case SS_BF16:
        return 2;
    case SS_U32:
    case SS_I32:
    case SS_F32:
        return 4;
    default:
        return 8;
    }
}

static ss_status check_numbers(ss_exec *x, const plan *p, int64_t i, const double *f,
                               int64_t targets, int64_t weights) {
    if (!whole(f[0], VL_CE, VL_ENTROPY)) {
        return bad_params(x, "a kind of 0 to 4", i, f[0]);
    }
    if (f[0] == VL_ENTROPY ? f[1] != -1.0 : !whole(f[1], 0, (double)targets - 1)) {
        return bad_params(x, "the index of a target", i, f[1]);
    }
    if (!whole(f[2], -1, (double)weights - 1)) {
        return bad_params(x, "the index of a weight, or -1", i, f[2]);
    }
    if (!whole(f[3], 0, (double)p->job.B - 1) || !whole(f[4], f[3] + 1, (double)p->job.B)) {
        return bad_params(x, "samples of the batch", i, f[3]);
    }
    if (!whole(f[14], VL_VOXEL, VL_SUM)) {
        return bad_params(x, "a reduction of 0 to 3", i, f[14]);
    }
    const int32_t activation = p->job.activation;
    if (activation != VL_SOFTMAX &&
        (f[0] == VL_KL || f[0] == VL_ENTROPY || (f[0] == VL_CE && activation == VL_NONE))) {
        return bad_params(x, "a kind that fits the activation", i, f[0]);
    }
    return SS_OK;
}

/* Whether a target is labels or a distribution; refuses what is neither. */
static ss_status look_at_target(ss_exec *x, const plan *p, vl_term *t, int32_t index) {
    const ss_tensor *q = &p->targets[index];
    const int64_t voxels = (t->last - t->first) * p->job.S, n = count_of(q);
    const bool floating = q->dtype >= SS_F16;
    t->hard = !(n == voxels * p->job.C && (p->job.C > 1 || floating));
    if (t->hard && (n != voxels || floating)) {
        return ss_cuda_fail(x, SS_INVALID,
                            "targets[%d]: expected integer labels of %lld voxels or a "
                            "distribution of %lld values, got %lld values of another kind",
                            (int)index, (long long)voxels, (long long)(voxels * p->job.C),
                            (long long)n);
    }
    t->target = t->hard ? nullptr : q->data;
    t->dtype = (int8_t)q->dtype;
    return SS_OK;
}

/* How the ignored label looks in memory: its low bits as far as the dtype has them. */
static void find_raw(vl_slot *s) {
    const int64_t bits = 8 * size_of(s->label_dtype), i = s->ignore;
    const bool is_signed =
        s->label_dtype == SS_I8 || s->label_dtype == SS_I16 || s->label_dtype == SS_I32;
    s->label_bytes = (int8_t)(bits / 8);
    s->raw = bits < 32 ? (int32_t)((uint64_t)i & (((uint64_t)1 << bits) - 1)) : (int32_t)i;
    bool fits = true; /* into 64 bits everything does, and INT32_MIN stands for
                         what is larger */
    if (bits < 64) {
        const int64_t least = is_signed ? -((int64_t)1 << (bits - 1)) : 0;
        fits = i >= least && i - least < (int64_t)1 << bits;
    }
    s->ignores_raw = s->ignores && fits;
}

/* Finds or makes the slot of a term that is number i. */
static ss_status choose_slot(ss_exec *x, plan *p, int32_t i, const double *f) {
    vl_job *j = &p->job;
    vl_term *t = &j->term[i];
    vl_slot s = {};
    const int64_t voxels = (t->last - t->first) * j->S;
    if (t->hard) {
        const ss_tensor *label = &p->targets[(int32_t)f[1]];
        s.label = label->data;
        s.label_dtype = (int8_t)label->dtype;
        s.ignores = f[5] != 0.0 && whole(f[6], -0x1p31, 0x1p31 - 1.0);
        s.ignore = s.ignores ? (int64_t)f[6] : 0;
        find_raw(&s);
        s.inside = s.ignores && s.ignore >= 0 && s.ignore < (j->C == 1 ? 2 : j->C);
    }
    if (f[2] >= 0.0) {
        const ss_tensor *weight = &p->weights[(int32_t)f[2]];
        s.weight = weight->data;
        s.weight_dtype = (int8_t)weight->dtype;
        const int64_t n = count_of(weight);
        if (n != voxels) {
            return ss_cuda_fail(x, SS_INVALID, "weights[%d]: expected %lld values, got %lld",
                                (int)f[2], (long long)voxels, (long long)n);
        }
    }
    t->owner = 1;
    t->slot = (int8_t)i;
    for (int32_t k = 0; k < i && t->owner; ++k) {
        const vl_slot *o = &j->slot[j->term[k].slot];
        if (o->label == s.label && o->weight == s.weight && o->ignores == s.ignores &&
            o->ignore == s.ignore && o->label_dtype == s.label_dtype &&
            o->weight_dtype == s.weight_dtype && j->term[k].first == t->first &&
            j->term[k].last == t->last) {
            t->owner = 0;
            t->slot = j->term[k].slot;
        }
    }
    j->slot[i] = s; /* unused if there was such a one before */
    return SS_OK;
}

/* Finds or makes the group of a term. Entropy, which has no target, goes with any. */
static int32_t choose_group(plan *p, const vl_term *t) {
    int32_t i = 0;
    for (; i < p->rule.groups; ++i) {
        const vl_term *o = &p->group[i];
        if (o->slot == t->slot && (o->target == t->target || !o->target || !t->target)) {
            break;
        }
    }
    vl_term *g = &p->group[i];
    if (i == p->rule.groups) {
        *g = *t;
        ++p->rule.groups;
    } else if (t->target) {
        g->target = t->target;
        g->dtype = t->dtype;
    }
    g->entropy |= t->kind == VL_ENTROPY;
    return i;
}

static ss_status read_term(ss_exec *x, plan *p, int32_t i, const double *f, int64_t targets,
                           int64_t weights) {
    SS_TRY(check_numbers(x, p, i, f, targets, weights));
    vl_term *t = &p->job.term[i];
    rule *r = &p->rule.of[i];
    t->kind = r->kind = (int8_t)f[0];
    t->first = r->first = (int64_t)f[3];
    t->last = r->last = (int64_t)f[4];
    const bool smooth = t->kind == VL_CE && p->job.activation == VL_SOFTMAX;
    t->smoothing = r->smoothing = smooth ? f[7] : 0.0;
    r->include_background = f[8] != 0.0;
    t->squared = r->squared = f[9] != 0.0;
    r->batch = f[10] != 0.0;
    r->jaccard = f[11] != 0.0;
    r->nr = f[12];
    r->dr = f[13];
    r->reduction = (int8_t)f[14];
    r->min_weight = f[15];
    r->pooled = f[16] != 0.0;
    for (int64_t c = r->include_background ? 0 : 1; c < p->job.C; ++c) {
        r->a_sum += f[FIELDS + c];
    }
    t->number = (int8_t)i;
    if (f[1] >= 0.0) {
        SS_TRY(look_at_target(x, p, t, (int32_t)f[1]));
    }
    SS_TRY(choose_slot(x, p, i, f));
    r->group = (int8_t)choose_group(p, t);
    return SS_OK;
}

template <typename A> static ss_status make_plan(ss_exec *x, plan *p, const A *a) {
    vl_job *j = &p->job;
    j->logits = a->logits.data;
    j->dtype = a->logits.dtype;
    j->B = a->logits.shape[0];
    j->C = a->logits.shape[1];
    j->S = a->logits.shape[2];
    j->activation = (int32_t)a->activation;
    j->terms = (int32_t)a->terms;
    p->targets = a->targets.at;
    p->weights = a->weights.at;
    p->params = a->params.at;
    const int64_t row = FIELDS + j->C;
    if (j->C > INT32_MAX / 2 || a->params.n != a->terms * row) {
        return ss_cuda_fail(x, SS_INVALID,
                            "params: expected %lld numbers for each of %lld terms, got %lld",
                            (long long)row, (long long)a->terms, (long long)a->params.n);
    }
    if (j->activation == VL_SOFTMAX && j->C < 2) {
        return ss_cuda_fail(x, SS_INVALID,
                            "logits: expected at least 2 channels for softmax, got 1");
    }
    for (int32_t i = 0; i < j->terms; ++i) {
        SS_TRY(read_term(x, p, i, p->params + i * row, a->targets.n, a->weights.n));
    }
    rules *r = &p->rule;
    r->B = j->B;
    r->C = j->C;
    r->S = j->S;
    r->activation = j->activation;
    r->terms = j->terms;
    return SS_OK;
}

/* ---- class weights --------------------------------------------------------------------------- */

typedef struct letter {
    double v[LETTER];
} letter;

SS_KERNEL void k_voxel_loss_weights(const letter l, double *to, int32_t n) {
    for (int32_t i = threadIdx.x; i < n; i += THREADS) {
        to[i] = l.v[i];
    }
}

/* Class weights go with the job if there are few, else to `far`, which has room for them. */
static ss_status post_weights(ss_exec *x, plan *p, double *far) {
    const int64_t C = p->job.C, n = p->job.terms * C;
    if (n <= VL_NEAR) {
        for (int64_t i = 0; i < n; ++i) {
            p->job.near[i] = p->rule.near[i] = p->params[i / C * (FIELDS + C) + FIELDS + i % C];
        }
        return SS_OK;
    }
    p->job.far = p->rule.far = far;
    for (int64_t from = 0; from < n; from += LETTER) {
        letter l = {};
        const int64_t some = n - from < LETTER ? n - from : LETTER;
        for (int64_t k = 0; k < some; ++k) {
            const int64_t i = from + k;
            l.v[k] = p->params[i / C * (FIELDS + C) + FIELDS + i % C];
        }
        SS_TRY(SS_LAUNCH(x, 1, THREADS, 0, (k_voxel_loss_weights), l, far + from, some));
    }
    return SS_OK;
}

static int64_t far_weights(int64_t terms, int64_t classes) {
    return terms * classes > VL_NEAR ? terms * classes : 0;
}

/* ---- sums over chunks, losses from them, and derivatives ------------------------------------- */

SS_DEVICE double weight_of(const rules &r, int64_t i, int64_t c) {
    return r.far ? r.far[i * r.C + c] : r.near[i * r.C + c];
}

/* What a term's class loss is multiplied by: a_c / sum a, and 1 / samples if it is per sample. */
SS_DEVICE double dice_factor(const rules &r, int64_t i, int64_t c) {
    const rule &t = r.of[i];
    if ((c == 0 && !t.include_background) || t.a_sum == 0.0) {
        return 0.0;
    }
    const double a = weight_of(r, i, c);
    if (!t.pooled) {
        return a;
    }
    return a / t.a_sum / (t.batch ? 1.0 : (double)(t.last - t.first));
}

/* One class of one Dice group (samples b0..b1-1 together): loss, and its derivatives by I and Z. */
SS_DEVICE double dice_class(const rules &r, int64_t i, const double *stats, int64_t b0, int64_t b1,
                            int64_t c, double *by) {
    const rule &t = r.of[i];
    double s0 = 0.0, s1 = 0.0, s2 = 0.0, s3 = 0.0;
    for (int64_t b = b0; b < b1; ++b) {
        const double *s = stats + ((i * r.B + b) * r.C + c) * 4;
        s0 += s[0];
        s1 += s[1];
        s2 += s[2];
        s3 += s[3];
    }
    const double two = t.jaccard ? 2.0 : 1.0;
    const double den = two * (s1 + s2 - (t.jaccard ? s0 : 0.0)) + t.dr;
    const double factor = dice_factor(r, i, c);
    by[0] = by[1] = 0.0;
    if (s3 == 0.0 || den == 0.0 || factor == 0.0) {
        return 0.0;
    }
    const double dice = (2.0 * s0 + t.nr) / den;
    by[0] = factor * (-2.0 - (t.jaccard ? 2.0 * dice : 0.0)) / den;
    by[1] = factor * two * dice / den;
    return factor * (1.0 - dice);
}

SS_DEVICE bool is_kept(const rules &r, const rule &t, const double *s) {
    return !(s[2] < t.min_weight * (double)r.S) && s[1] != 0.0;
}

/* What num of sample b is multiplied by to give its part of the loss. */
SS_DEVICE double voxel_factor(const rules &r, int64_t i, const double *stats, int64_t b) {
    const rule &t = r.of[i];
    double factor = t.kind == VL_ENTROPY ? 1.0 / log((double)r.C) : 1.0;
    const bool binary = t.kind == VL_CE && r.activation == VL_SIGMOID;
    if (t.reduction == VL_SUM) {
        return factor;
    }
    if (t.reduction == VL_ELEMENT || binary || (t.reduction == VL_SAMPLE && t.kind == VL_MSE)) {
        factor /= (double)r.C;
    }
    const double *s = stats + (i * r.B + b) * r.C * 4;
    double den = s[1];
    if (t.pooled) { /* over all samples: their den, or how many are kept */
        double all = 0.0, kept = 0.0;
        for (int64_t k = t.first; k < t.last; ++k) {
            const double *o = stats + (i * r.B + k) * r.C * 4;
            all += o[1];
            kept += is_kept(r, t, o) ? 1.0 : 0.0;
        }
        den = t.reduction == VL_SAMPLE ? den * kept : all;
    }
    if (t.reduction == VL_SAMPLE && !is_kept(r, t, s)) {
        return 0.0;
    }
    return den == 0.0 ? 0.0 : factor / den;
}

/* The value of one class of one sample and term, or of all samples together in the first. Exactly 0
 * without a voxel that counts, even if num is NaN. */
SS_DEVICE double value_of(const rules &r, int64_t at) {
    const int64_t c = at % r.C, b = at / r.C % r.B, i = at / r.C / r.B;
    const rule &t = r.of[i];
    if (b < t.first || b >= t.last) {
        return 0.0;
    }
    if (t.kind != VL_DICE) {
        const double k = c == 0 ? voxel_factor(r, i, r.stats, b) : 0.0;
        return k == 0.0 ? 0.0 : k * r.stats[at * 4];
    }
    double by[2];
    return t.batch && b > t.first ? 0.0
                                  : dice_class(r, i, r.stats, b, t.batch ? t.last : b + 1, c, by);
}

SS_KERNEL void __launch_bounds__(THREADS) k_voxel_loss_values(const rules r, double *values) {
    const int64_t at = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (at < r.terms * r.B * r.C) {
        values[at] = value_of(r, at);
    }
}

/* One block per term, sample and class: stats [terms, B, C, 4]. The last block to be done goes on
 * with the values, unless they are NULL: many values are a launch of their own. */
SS_KERNEL void __launch_bounds__(THREADS)
    k_voxel_loss_fold(const rules r, uint32_t *done, double *values) {
    SS_SHARED double room[THREADS];
    SS_SHARED int32_t last;
    const int64_t at = blockIdx.x, c = at % r.C, b = at / r.C % r.B;
    const rule &t = r.of[at / r.C / r.B];
    const int k = threadIdx.x % 4;
    double sum = 0.0;
    if (t.first <= b && b < t.last && (t.kind == VL_DICE || c == 0)) {
        const int64_t chunks = r.chunks[t.few], rows = r.rows[t.few];
        const double *part = r.part[t.few] + (b * chunks * rows + t.row + c) * 4 + k;
        for (int64_t i = threadIdx.x / 4; i < chunks; i += THREADS / 4) {
            sum += part[i * rows * 4];
        }
    }
    room[threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.x < 4) {
        for (int i = 1; i < THREADS / 4; ++i) {
            sum += room[4 * i + k];
        }
        r.stats[at * 4 + k] = sum;
    }
    if (!values) {
        return;
    }
    __syncthreads();
    if (threadIdx.x == 0) { /* as in ss_group_barrier: its fences stand for the whole block */
        __threadfence();    /* this block's stats before `done`, */
        last = atomicAdd(done, 1u) == gridDim.x - 1;
        __threadfence(); /* and those of the others behind it */
    }
    __syncthreads();
    if (last) {
        for (int64_t i = threadIdx.x; i < r.terms * r.B * r.C; i += THREADS) {
            values[i] = value_of(r, i);
        }
    }
}

/* Adds a term's part to the factors u v e f a d of its group. */
SS_DEVICE void add_factors(const rules &r, int64_t i, const double *stats, const double *grad,
                           int64_t b, int64_t c, double *f) {
    const rule &t = r.of[i];
    if (t.kind == VL_DICE) {
        const int64_t b0 = t.batch ? t.first : b, b1 = t.batch ? t.last : b + 1;
        double by[2], g = grad[(i * r.B + b0) * r.C + c];
        (void)dice_class(r, i, stats, b0, b1, c, by);
        f[0] += by[0] * g;
        f[1] += t.squared ? 2.0 * (by[1] * g) : 0.0;
        f[2] += t.squared ? 0.0 : by[1] * g;
        return;
    }
    const double u = voxel_factor(r, i, stats, b) * grad[(i * r.B + b) * r.C];
    const bool weighted = t.kind == VL_CE && r.activation == VL_SOFTMAX;
    const double a = weighted ? u * weight_of(r, i, c) : u;
    f[0] += t.kind == VL_MSE ? -2.0 * u : 0.0;
    f[1] += t.kind == VL_MSE ? 2.0 * u : 0.0;
    f[3] += t.kind == VL_ENTROPY ? u : 0.0;
    f[4] += t.kind == VL_KL || t.kind == VL_CE ? a * (1.0 - t.smoothing) : 0.0;
    f[5] += t.kind == VL_CE ? a * t.smoothing / (double)r.C : 0.0;
}

/* Factors [groups, B, C, 8] of the gradient; one thread per group, sample and class. */
template <typename R>
SS_KERNEL void __launch_bounds__(THREADS)
    k_voxel_loss_factors(const rules r, const double *stats, const double *grad, R *factor) {
    const int64_t at = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    const int64_t c = at % r.C, b = at / r.C % r.B, group = at / r.C / r.B;
    if (group >= r.groups) {
        return;
    }
    double f[6] = {0.0, 0.0, 0.0, 0.0, 0.0, 0.0};
    for (int32_t i = 0; i < r.terms; ++i) {
        const rule &t = r.of[i];
        if (t.group == group && t.first <= b && b < t.last) {
            add_factors(r, i, stats, grad, b, c, f);
        }
    }
    for (int k = 0; k < 8; ++k) {
        factor[8 * at + k] = k < 6 ? (R)f[k] : R(0);
    }
}

/* ---- what up to 16 classes have sweeps for --------------------------------------------------- */

/* Four elements in one access, or in two if they are of 8 bytes. */
static bool is_wide(const void *p, int32_t dtype) {
    const uintptr_t bytes = size_of(dtype) < 4 ? 4 * (uintptr_t)size_of(dtype) : 16;
    return (uintptr_t)p % bytes == 0;
}

static bool is_wide(const plan *p, const vl_term *g) {
    const vl_slot *s = &p->job.slot[g->slot];
    return p->job.S % 4 == 0 && is_wide(p->job.logits, p->job.dtype) &&
           is_wide(s->label, s->label_dtype) && is_wide(s->weight, s->weight_dtype) &&
           is_wide(g->target, g->dtype);
}

static bool is_short(int32_t dtype) {
    return dtype == SS_F16 || dtype == SS_BF16 || dtype == SS_F32;
}

/* Whether the sweeps of voxel_loss_few.cu and voxel_loss_many.cu can read what a group has. */
static bool is_readable(const plan *p, const vl_term *g) {
    const vl_job *j = &p->job;
    const vl_slot *s = &j->slot[g->slot];
    return j->activation == VL_SOFTMAX && j->C <= VL_MANY && is_short(j->dtype) &&
           (!g->target || is_short(g->dtype)) &&
           (!s->weight || is_short(s->weight_dtype) || s->weight_dtype <= SS_U8) &&
           !(s->ignores && s->ignore == INT32_MIN && s->label_bytes == 8);
}

/* Whether there is a forward sweep for a group: one term of a kind at most, and labels have
 * cross entropy without smoothing, and Dice. */
static bool has_sweep(const plan *p, int32_t group) {
    int seen[5] = {0, 0, 0, 0, 0};
    bool simple = true;
    for (int32_t i = 0; i < p->job.terms; ++i) {
        const vl_term *t = &p->job.term[i];
        if (p->rule.of[i].group == group) {
            simple &= seen[t->kind]++ == 0;
            simple &= t->hard ? t->kind == VL_DICE || (t->kind == VL_CE && t->smoothing == 0.0)
                              : p->job.C <= VL_FEW;
        }
    }
    return simple && is_readable(p, &p->group[group]);
}

/* The launch of a group whose terms have their rows. */
static ss_status sweep_group(ss_exec *x, const plan *p, int32_t group) {
    const vl_job *j = &p->job;
    const rules *r = &p->rule;
    const vl_term *o = &p->group[group];
    vl_group g = {};
    g.logits = j->logits;
    g.logits_dtype = j->dtype;
    g.target = o->target;
    g.dtype = o->dtype;
    g.C = j->C;
    g.S = j->S;
    g.first = o->first;
    g.last = o->last;
    g.chunks = r->chunks[1];
    g.rows = r->rows[1];
    g.part = j->part; /* of groups */
    g.done = j->done;
    g.slot = j->slot[o->slot];
    g.wide = is_wide(p, o);
    g.weighted = g.slot.weight != nullptr;
    for (int k = 0; k < 5; ++k) {
        g.row[k] = -1;
    }
    for (int32_t i = 0; i < j->terms; ++i) {
        const vl_term *t = &j->term[i];
        if (r->of[i].group != group) {
            continue;
        }
        g.row[t->kind] = r->of[i].row;
        g.faults = t->owner ? j->faults : g.faults;
        g.squared = t->kind == VL_DICE ? t->squared : g.squared;
        for (int64_t c = 0; c < j->C && t->kind == VL_CE; ++c) {
            g.a[c] = p->params[i * (FIELDS + j->C) + FIELDS + c];
            g.weighted |= g.a[c] != g.a[0];
            if (j->C <= VL_FEW) {
                g.keep[c] = (float)(g.a[c] * (1.0 - t->smoothing));
                g.extra[c] = (float)(g.a[c] * t->smoothing / (double)j->C);
            }
        }
    }
    return j->C <= VL_FEW ? ss_vl_few_forward(x, &g) : ss_vl_many_forward(x, &g);
}

/* ---- the operators --------------------------------------------------------------------------- */

/* Rows of sums of a chunk, for a workspace that is laid out before anything has been checked. */
static int64_t rows_of(const ss_doubles *params, int64_t terms, int64_t classes) {
    int64_t rows = 0;
    for (int64_t i = 0; i < terms && (i + 1) * (FIELDS + classes) <= params->n; ++i) {
        rows += params->at[i * (FIELDS + classes)] == VL_DICE ? classes : 1;
    }
    return rows;
}

static int64_t chunks_of(int64_t voxels, int64_t chunk) {
    return (voxels + chunk - 1) / chunk;
}

typedef struct forward_pieces {
    double *part, *far;
    uint32_t *done; /* blocks of the fold; every sweep sets it to 0 */
} forward_pieces;

static void layout(ss_carve *w, const ss_voxel_loss_forward_args *a, forward_pieces *p) {
    const int64_t *s = a->logits.shape;
    const int64_t chunks = chunks_of(s[2], ss_vl_any_chunk());
    p->far = ss_take<double>(w, far_weights(a->terms, s[1]));
    p->done = ss_take<uint32_t>(w, 1);
    p->part = ss_take<double>(w, s[0] * chunks * rows_of(&a->params, a->terms, s[1]) * 4);
}

int64_t SS_CUDA_WORKSPACE(voxel_loss_forward)(const ss_voxel_loss_forward_args *a) {
    ss_carve w = {};
    forward_pieces p;
    layout(&w, a, &p);
    return ss_carved(&w);
}

/* Deals the terms to the sweeps: rows of both kinds. Leaves the general ones in `any`. */
static void deal(plan *p, vl_job *any) {
    any->terms = 0;
    for (int32_t i = 0; i < p->job.terms; ++i) {
        rule *r = &p->rule.of[i];
        r->few = has_sweep(p, r->group);
        r->row = p->rule.rows[r->few];
        p->rule.rows[r->few] += r->kind == VL_DICE ? p->job.C : 1;
        if (!r->few) {
            any->term[any->terms] = p->job.term[i];
            any->term[any->terms++].row = r->row;
        }
    }
    p->rule.chunks[0] = any->chunks = chunks_of(p->job.S, ss_vl_any_chunk());
    p->rule.chunks[1] = chunks_of(p->job.S, VL_CHUNK);
    any->rows = p->rule.rows[0];
}

ss_status SS_CUDA(voxel_loss_forward)(ss_exec *x, const ss_voxel_loss_forward_args *a) {
    plan p = {};
    SS_TRY(make_plan(x, &p, a));
    ss_carve w = ss_carve_of(x);
    forward_pieces pieces;
    layout(&w, a, &pieces);
    SS_TRY(post_weights(x, &p, pieces.far));
    p.job.faults = SS_FAULTS_OF(x, voxel_loss_forward);
    p.job.done = pieces.done;
    vl_job any = p.job;
    deal(&p, &any);
    /* The few's chunks are the larger ones: both fit into what all would take as `any`. */
    any.part = pieces.part;
    p.job.part = pieces.part + any.B * any.chunks * any.rows * 4;
    p.rule.part[0] = any.part;
    p.rule.part[1] = p.job.part;
    p.rule.stats = (double *)a->stats.data;
    for (int32_t g = 0; g < p.rule.groups; ++g) {
        if (has_sweep(&p, g)) {
            SS_TRY(sweep_group(x, &p, g));
        }
    }
    if (any.terms > 0) {
        SS_TRY(ss_vl_any_forward(x, &any));
    }
    const int64_t n = a->terms * p.job.B * p.job.C;
    double *values = (double *)a->values.data, *at_once = n <= AT_ONCE ? values : nullptr;
    SS_TRY(SS_LAUNCH(x, ss_blocks(n, 1), THREADS, 0, (k_voxel_loss_fold), p.rule, pieces.done,
                     at_once));
    return SS_LAUNCH(x, at_once ? 0u : ss_blocks(n, THREADS), THREADS, 0, (k_voxel_loss_values),
                     p.rule, values);
}

typedef struct backward_pieces {
    double *far, *factor;
} backward_pieces;

static void layout(ss_carve *w, const ss_voxel_loss_backward_args *a, backward_pieces *p) {
    const int64_t *s = a->logits.shape;
    p->far = ss_take<double>(w, far_weights(a->terms, s[1]));
    p->factor = ss_take<double>(w, a->terms * s[0] * s[1] * 8); /* float: half of it */
}

int64_t SS_CUDA_WORKSPACE(voxel_loss_backward)(const ss_voxel_loss_backward_args *a) {
    ss_carve w = {};
    backward_pieces p;
    layout(&w, a, &p);
    return ss_carved(&w);
}

ss_status SS_CUDA(voxel_loss_backward)(ss_exec *x, const ss_voxel_loss_backward_args *a) {
    plan p = {};
    SS_TRY(make_plan(x, &p, a));
    ss_carve w = ss_carve_of(x);
    backward_pieces pieces;
    layout(&w, a, &pieces);
    SS_TRY(post_weights(x, &p, pieces.far));
    p.job.factor = pieces.factor;
    p.job.dlogits = a->dlogits.data;
    const double *stats = (const double *)a->stats.data, *grad = (const double *)a->grad.data;
    unsigned blocks = ss_blocks(p.rule.groups * p.job.B * p.job.C, THREADS);
    if (p.job.dtype == SS_F64) {
        SS_TRY(SS_LAUNCH(x, blocks, THREADS, 0, (k_voxel_loss_factors<double>), p.rule, stats, grad,
                         pieces.factor));
    } else {
        SS_TRY(SS_LAUNCH(x, blocks, THREADS, 0, (k_voxel_loss_factors<float>), p.rule, stats, grad,
                         (float *)(void *)pieces.factor));
    }
    bool few = true;
    p.job.wide = is_wide(p.job.dlogits, p.job.dtype);
    p.job.terms = p.rule.groups;
    for (int32_t i = 0; i < p.rule.groups; ++i) {
        p.job.term[i] = p.group[i];
        p.job.wide &= is_wide(&p, &p.group[i]);
        few &= is_readable(&p, &p.group[i]);
    }
    if (!few) {
        return ss_vl_any_backward(x, &p.job);
    }
    return p.job.C <= VL_FEW ? ss_vl_few_backward(x, &p.job) : ss_vl_many_backward(x, &p.job);
}
