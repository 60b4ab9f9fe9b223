/* SPDX-License-Identifier: Apache-2.0
 *
 * voxel_loss_pair.h: two classes, the common losses, at the speed of memory (float).
 *
 * With d = z1 - z0, e = exp(-|d|) and r = 1 / (1 + e) the probabilities are r and e r, and
 * lse z - z_y = ln(1 + e) + (0 or |d|). Sums of ln(1 + e) are taken as the logarithm of a product:
 * 1 + e <= 2, so that 64 factors stay below 2^64, and one logarithm serves 64 voxels. The gradient
 * of any loss is dz1 = -dz0. Labels are read in the loop, in their own type.
 * Least traffic, 8 bytes of logits per voxel and pass, 1 to 8 of labels, 8 of gradient.
 * These loops take finite logits and labels 0 and 1 of weight 1: whatever else there is shows in
 * sums over a block (a sum of d, the union of all labels), and that block is left to the general
 * sweep. Errors: e within 2e-7 + 1e-7 |d| relative, each factor of the product 6e-8.
 * Determinism: 16 float lanes within a block, 16 double lanes over an item, folded in lane order.
 */

#define PAIR_BLOCK 1024
#define PAIR_AHEAD 512 /* voxels */
#define PAIR_SUMS 8

enum { SUM_LN, SUM_FAR, SUM_I0, SUM_I1, SUM_Z0, SUM_Z1, SUM_SOFT, SUM_WEIGHT };

typedef struct pair_rows {
    const float *z0, *z1, *q0, *q1;
    float *h0, *h1;
    const void *y;
    const float *w;      /* of the soft target; NULL: 1 */
    int square;          /* Dice, forward: sums of p^2 */
    float hit0, hit1;    /* backward: what multiplies p0 p1 for a label, */
    float by_p0, by_p1;  /* what p0 and p1 add to it, */
    float a0, a1;        /* CE by class, */
    float by_soft, by_h; /* squared error or KL, entropy */
} pair_rows;

typedef struct pair_lanes {
    double sum[PAIR_SUMS][SS_LANES];
    int64_t ones; /* labels that are 1 */
} pair_lanes;

/* e^-|d| for finite d. */
static inline float exp_minus_abs(float d) {
    int32_t a = (int32_t)(ss_f32_bits(d * 1.44269504f) | 0x80000000u);
    const int32_t least = (int32_t)0xc2fa0000u; /* -125; negative floats order as integers do not */
    a = a < least ? a : least;
    return ss_exp2_inside(ss_bits_f32((uint32_t)a));
}

static inline float blend(int32_t mask, float yes, float no) {
    return ss_bits_f32((ss_f32_bits(yes) & (uint32_t)mask) | (ss_f32_bits(no) & ~(uint32_t)mask));
}

static int all_finite(const float *lane) {
    float sum = 0.0f;
    for (int l = 0; l < SS_LANES; ++l) {
        sum += lane[l] - lane[l];
    }
    return sum == 0.0f;
}

static void add_lanes(double *restrict to, const float *restrict from) {
    SS_SIMD
    for (int l = 0; l < SS_LANES; ++l) {
        to[l] += (double)from[l];
    }
}

static void add_logs(double *restrict to, const float *restrict from) {
    float ln[SS_LANES];
    SS_SIMD
    for (int l = 0; l < SS_LANES; ++l) {
        ln[l] = ss_logf(from[l]);
    }
    add_lanes(to, ln);
}

/* Whether no label of a block is anything but 0 and 1; and how many are 1. */
static int are_binary(const int64_t *wide, const int32_t *narrow, const int32_t *ones,
                      int64_t *count) {
    int64_t all = 0;
    for (int l = 0; l < SS_LANES; ++l) {
        all |= wide[l] | narrow[l];
        *count += ones[l];
    }
    return (all & ~(int64_t)1) == 0;
}

/* Asks for what the lanes will read PAIR_AHEAD voxels later: with so many streams the hardware
 * alone comes too late wherever a page begins. */
static inline __attribute__((always_inline)) void pair_ahead(const float *row0, const float *row1,
                                                             int64_t i) {
    __builtin_prefetch(row0 + i + PAIR_AHEAD);
    __builtin_prefetch(row1 + i + PAIR_AHEAD);
}

/* The same for what they will write. */
static inline __attribute__((always_inline)) void pair_ahead_out(const float *row0,
                                                                 const float *row1, int64_t i) {
    __builtin_prefetch(row0 + i + PAIR_AHEAD, 1);
    __builtin_prefetch(row1 + i + PAIR_AHEAD, 1);
}

static inline __attribute__((always_inline)) void
pair_ahead_soft(const int USES, const int WEIGHTED, const pair_rows *k, int64_t i) {
    pair_ahead(k->z0, k->z1, i);
    if (USES & (HAS_MSE | HAS_KL)) {
        pair_ahead(k->q0, k->q1, i);
    }
    if (WEIGHTED) {
        __builtin_prefetch(k->w + i + PAIR_AHEAD);
    }
}

static inline __attribute__((always_inline)) void pair_ahead_labels(const int LONG, const void *y,
                                                                    int64_t i) {
    const char *at = (const char *)y + (i + PAIR_AHEAD) * (LONG ? 8 : 4);
    __builtin_prefetch(at);
    if (LONG) {
        __builtin_prefetch(at + 64);
    }
}

/* A label as 0 or 1, and its part of the union; LONG (64 bits) is a constant. */
#define PAIR_LABEL(LONG)                                                                           \
    int32_t y;                                                                                     \
    if (LONG) {                                                                                    \
        wide[l] |= ((const int64_t *)y_)[i + l];                                                   \
        y = (int32_t)((const int64_t *)y_)[i + l];                                                 \
    } else {                                                                                       \
        y = ((const int32_t *)y_)[i + l];                                                          \
        narrow[l] |= y;                                                                            \
    }

/* p0 and p1 of one voxel from both logits. */
#define PAIR_SOFTMAX                                                                               \
    const float d = z1[i + l] - z0[i + l];                                                         \
    far[l] += d;                                                                                   \
    const float e = exp_minus_abs(d);                                                              \
    const float s = 1.0f + e;                                                                      \
    const float r = 1.0f / s;                                                                      \
    const float er = e * r;                                                                        \
    const int32_t first = (int32_t)ss_f32_bits(d) >> 31; /* all ones where z0 is larger */         \
    const float p0 = blend(first, r, er);                                                          \
    const float p1 = blend(first, er, r);

static inline
    __attribute__((always_inline)) int pair_labels_forward(const int LONG, const int SQUARE,
                                                           int64_t n, const pair_rows *k,
                                                           pair_lanes *out) {
    const float *restrict z0 = k->z0, *restrict z1 = k->z1;
    const void *restrict y_ = k->y;
    float far[SS_LANES] = {0}, ce[SS_LANES] = {0}, product[SS_LANES];
    float i0[SS_LANES] = {0}, i1[SS_LANES] = {0}, n0[SS_LANES] = {0}, n1[SS_LANES] = {0};
    int64_t wide[SS_LANES] = {0};
    int32_t narrow[SS_LANES] = {0}, ones[SS_LANES] = {0};
    for (int l = 0; l < SS_LANES; ++l) {
        product[l] = 1.0f;
    }
    for (int64_t i = 0; i < n; i += SS_LANES) {
        pair_ahead(z0, z1, i);
        pair_ahead_labels(LONG, y_, i);
        SS_SIMD
        for (int l = 0; l < SS_LANES; ++l) {
            PAIR_SOFTMAX
            PAIR_LABEL(LONG)
            product[l] *= s;
            /* d or -d, and |d|: twice what the wrong class is ahead, or 0 */
            const float ahead = ss_bits_f32(ss_f32_bits(d) ^ ((uint32_t)y << 31));
            ce[l] += ahead + ss_bits_f32(ss_f32_bits(d) & 0x7fffffffu);
            i0[l] += ss_bits_f32(ss_f32_bits(p0) & ((uint32_t)y - 1u));
            i1[l] += ss_bits_f32(ss_f32_bits(p1) & (0u - (uint32_t)y));
            n0[l] += SQUARE ? p0 * p0 : p0;
            n1[l] += SQUARE ? p1 * p1 : p1;
            ones[l] += y;
        }
    }
    int64_t count = 0;
    if (!all_finite(far) || !are_binary(wide, narrow, ones, &count)) {
        return 0;
    }
    out->ones += count;
    add_logs(out->sum[SUM_LN], product);
    add_lanes(out->sum[SUM_FAR], ce);
    add_lanes(out->sum[SUM_I0], i0);
    add_lanes(out->sum[SUM_I1], i1);
    add_lanes(out->sum[SUM_Z0], n0);
    add_lanes(out->sum[SUM_Z1], n1);
    return 1;
}

static inline __attribute__((always_inline)) int pair_labels_backward(const int LONG, int64_t n,
                                                                      const pair_rows *k) {
    const float *restrict z0 = k->z0, *restrict z1 = k->z1;
    const void *restrict y_ = k->y;
    float *restrict h0 = k->h0, *restrict h1 = k->h1;
    const float hit0 = k->hit0, hit1 = k->hit1, a0 = k->a0, a1 = -k->a1;
    const float by_p0 = k->by_p0, by_p1 = k->by_p1;
    float far[SS_LANES] = {0};
    int64_t wide[SS_LANES] = {0};
    int32_t narrow[SS_LANES] = {0}, ones[SS_LANES] = {0};
    for (int64_t i = 0; i < n; i += SS_LANES) {
        pair_ahead(z0, z1, i);
        pair_ahead_out(h0, h1, i);
        pair_ahead_labels(LONG, y_, i);
        SS_SIMD
        for (int l = 0; l < SS_LANES; ++l) {
            PAIR_SOFTMAX
            PAIR_LABEL(LONG)
            const int32_t one = -(y & 1);
            const float hit = blend(one, hit1, hit0);
            const float ce = blend(one, a1, a0) * blend(one, p0, p1);
            const float g = (r * er) * (hit + (by_p1 * p1 - by_p0 * p0)) + ce;
            h0[i + l] = -g;
            h1[i + l] = g;
        }
    }
    int64_t count = 0;
    return all_finite(far) && are_binary(wide, narrow, ones, &count);
}

/* ln(1 + e) for e in 0..1: absolute error 1.5e-7. */
static inline float ln_one_plus(float e) {
    const float e2 = e * e;
    const float low = (e * 3.317982256e-01f - 4.998740554e-01f) * e + 9.999964237e-01f;
    const float high = (e * -6.452570669e-03f + 3.608435765e-02f) * e2 +
                       (e * -9.532223642e-02f + 1.676476449e-01f);
    return e * (low + (e2 * e) * (high * e - 2.407306582e-01f));
}

/* q ln q for finite q >= 0; 0 for q = 0. */
static inline float times_own_log(float q) {
    int32_t u = (int32_t)ss_f32_bits(q);
    u = u > 0x00800000 ? u : 0x00800000;
    return q * ss_log_bounded(ss_bits_f32((uint32_t)u));
}

static inline __attribute__((always_inline)) int pair_soft_forward(const int USES,
                                                                   const int WEIGHTED, int64_t n,
                                                                   const pair_rows *k,
                                                                   pair_lanes *out) {
    const float *restrict z0 = k->z0, *restrict z1 = k->z1;
    const float *restrict q0 = k->q0, *restrict q1 = k->q1, *restrict w_ = k->w;
    float far[SS_LANES] = {0}, soft[SS_LANES] = {0}, weight[SS_LANES] = {0}, h[SS_LANES] = {0};
    float product[SS_LANES];
    uint32_t sign[SS_LANES] = {0};
    for (int l = 0; l < SS_LANES; ++l) {
        product[l] = 1.0f;
    }
    for (int64_t i = 0; i < n; i += SS_LANES) {
        pair_ahead_soft(USES, WEIGHTED, k, i);
        SS_SIMD
        for (int l = 0; l < SS_LANES; ++l) {
            PAIR_SOFTMAX
            const float ahead = ss_bits_f32(ss_f32_bits(d) & 0x7fffffffu);
            float v = 0.0f;
            if (USES & HAS_MSE) {
                const float v0 = p0 - q0[i + l], v1 = p1 - q1[i + l];
                v = v0 * v0 + v1 * v1;
            }
            if (USES & HAS_KL) {
                const float t0 = q0[i + l], t1 = q1[i + l];
                sign[l] |= ss_f32_bits(t0) | ss_f32_bits(t1);
                v = (times_own_log(t0) + times_own_log(t1)) +
                    ((t0 + t1) * ln_one_plus(e) + blend(first, t1, t0) * ahead);
            }
            if (WEIGHTED) {
                const float w = w_[i + l];
                sign[l] |= ss_f32_bits(w);
                v *= w;
                weight[l] += w;
            }
            soft[l] += v;
            if (USES & HAS_ENTROPY) {
                product[l] *= s;
                h[l] += er * ahead;
            }
        }
    }
    uint32_t signs = 0;
    for (int l = 0; l < SS_LANES; ++l) {
        signs |= sign[l];
    }
    if (!all_finite(far) || !all_finite(soft) || signs >> 31) {
        return 0;
    }
    add_lanes(out->sum[SUM_SOFT], soft);
    add_lanes(out->sum[SUM_WEIGHT], weight);
    if (USES & HAS_ENTROPY) {
        add_logs(out->sum[SUM_LN], product);
        add_lanes(out->sum[SUM_FAR], h);
    }
    return 1;
}

static inline __attribute__((always_inline)) int
pair_soft_backward(const int USES, const int WEIGHTED, int64_t n, const pair_rows *k) {
    const float *restrict z0 = k->z0, *restrict z1 = k->z1;
    const float *restrict q0 = k->q0, *restrict q1 = k->q1, *restrict w_ = k->w;
    float *restrict h0 = k->h0, *restrict h1 = k->h1;
    const float by_soft = k->by_soft, by_h = k->by_h;
    float far[SS_LANES] = {0};
    for (int64_t i = 0; i < n; i += SS_LANES) {
        pair_ahead_soft(USES, WEIGHTED, k, i);
        pair_ahead_out(h0, h1, i);
        SS_SIMD
        for (int l = 0; l < SS_LANES; ++l) {
            PAIR_SOFTMAX
            const float w = WEIGHTED ? by_soft * w_[i + l] : by_soft;
            float g = 0.0f;
            if (USES & HAS_MSE) {
                g = w * ((p1 - q1[i + l]) - (p0 - q0[i + l]));
            }
            if (USES & HAS_ENTROPY) {
                g -= by_h * d;
            }
            g *= r * er;
            if (USES & HAS_KL) {
                g += w * (p1 * q0[i + l] - p0 * q1[i + l]);
            }
            h0[i + l] = -g;
            h1[i + l] = g;
        }
    }
    return all_finite(far);
}

/* Functions of their own: in one large function gcc gives up on vectorising. */
#define PAIR_SOFT_KINDS(ONE)                                                                       \
    ONE(mse, HAS_MSE, 0)                                                                           \
    ONE(mse_weighted, HAS_MSE, 1)                                                                  \
    ONE(kl, HAS_KL, 0)                                                                             \
    ONE(kl_weighted, HAS_KL, 1)                                                                    \
    ONE(entropy, HAS_ENTROPY, 0)                                                                   \
    ONE(mse_entropy, HAS_MSE | HAS_ENTROPY, 0)                                                     \
    ONE(mse_entropy_weighted, HAS_MSE | HAS_ENTROPY, 1)                                            \
    ONE(kl_entropy, HAS_KL | HAS_ENTROPY, 0)                                                       \
    ONE(kl_entropy_weighted, HAS_KL | HAS_ENTROPY, 1)

#define ONE(name, LONG, SQUARE)                                                                    \
    static __attribute__((noinline)) int pair_forward_##name(int64_t n, const pair_rows *k,        \
                                                             pair_lanes *out) {                    \
        return pair_labels_forward(LONG, SQUARE, n, k, out);                                       \
    }
ONE(i32, 0, 0)
ONE(i64, 1, 0)
ONE(i32_square, 0, 1)
ONE(i64_square, 1, 1)
#undef ONE

static __attribute__((noinline)) int pair_backward_i32(int64_t n, const pair_rows *k) {
    return pair_labels_backward(0, n, k);
}

static __attribute__((noinline)) int pair_backward_i64(int64_t n, const pair_rows *k) {
    return pair_labels_backward(1, n, k);
}

#define ONE(name, uses, weighted)                                                                  \
    static __attribute__((noinline)) int pair_forward_##name(int64_t n, const pair_rows *k,        \
                                                             pair_lanes *out) {                    \
        return pair_soft_forward(uses, weighted, n, k, out);                                       \
    }                                                                                              \
    static __attribute__((noinline)) int pair_backward_##name(int64_t n, const pair_rows *k) {     \
        return pair_soft_backward(uses, weighted, n, k);                                           \
    }
PAIR_SOFT_KINDS(ONE)
#undef ONE

/* One block, forward (`out`) or backward (NULL); whether the loop took it. */
static int run_pair(int32_t uses, int wide, int64_t n, const pair_rows *k, pair_lanes *out) {
    if (uses & HAS_LABELS) {
        if (out && k->square) {
            return (wide ? pair_forward_i64_square : pair_forward_i32_square)(n, k, out);
        }
        if (out) {
            return (wide ? pair_forward_i64 : pair_forward_i32)(n, k, out);
        }
        return (wide ? pair_backward_i64 : pair_backward_i32)(n, k);
    }
    switch (uses * 2 + (k->w != NULL)) {
#define ONE(name, uses, weighted)                                                                  \
    case (uses) * 2 + (weighted):                                                                  \
        return out ? pair_forward_##name(n, k, out) : pair_backward_##name(n, k);
        PAIR_SOFT_KINDS(ONE)
#undef ONE
    default:
        return 0;
    }
}

/* Whether a term on labels has weights, or leaves out one of the classes. */
static int is_partial(const vl_plan *p, int32_t term) {
    if (term < 0) {
        return 0;
    }
    const int64_t ignore = p->slot[p->term[term].slot].ignore;
    return p->term[term].weight >= 0 || (ignore >= 0 && ignore < p->C);
}

/* The terms of this sample, if these loops are for them: uses is 0 otherwise. */
static fused_terms pair_terms(const vl_block *k, int forward) {
    const vl_plan *p = k->plan;
    fused_terms f = find_terms(k);
    const vl_term *ce = f.at[VL_CE] < 0 ? NULL : &p->term[f.at[VL_CE]];
    const vl_term *entropy = f.at[VL_ENTROPY] < 0 ? NULL : &p->term[f.at[VL_ENTROPY]];
    int mixed = (f.uses & HAS_LABELS) && (f.uses & ~HAS_LABELS);
    int by_class = forward && ce && ce->a[0] != ce->a[1];
    int weighted = is_partial(p, f.at[VL_CE]) || is_partial(p, f.at[VL_DICE]) ||
                   (entropy && entropy->weight >= 0);
    if (p->C != 2 || mixed || by_class || weighted) {
        f.uses = 0;
    }
    return f;
}

#define PAIR_WIDEN(type)                                                                           \
    {                                                                                              \
        const type *restrict src = (const type *)y->data + offset;                                 \
        SS_SIMD                                                                                    \
        for (int64_t i = 0; i < n; ++i) {                                                          \
            to[i] = src[i];                                                                        \
        }                                                                                          \
        return to;                                                                                 \
    }

/* Labels of 32 or 64 bits where they are, shorter ones as 32 bits in `to`: mixed widths in one loop
 * make gcc choose short vectors. */
static const void *pair_labels(const ss_tensor *y, int64_t offset, int64_t n, int32_t *to) {
    switch (y->dtype) {
    case SS_BOOL:
    case SS_U8:
        PAIR_WIDEN(uint8_t)
    case SS_I8:
        PAIR_WIDEN(int8_t)
    case SS_U16:
        PAIR_WIDEN(uint16_t)
    case SS_I16:
        PAIR_WIDEN(int16_t)
    default:
        return (const char *)y->data + offset * (int64_t)ss_dtype_size(y->dtype);
    }
}

/* Where n voxels of this block begin, in every array; returns whether labels have 64 bits. */
static int find_pair_rows(vl_block *k, const fused_terms *f, int64_t offset, int64_t n,
                          pair_rows *r) {
    const vl_plan *p = k->plan;
    const int64_t at = k->b * 2 * p->S + offset;
    r->z0 = load_row(p->logits, at, n, n, k->zs);
    r->z1 = load_row(p->logits, at + p->S, n, n, k->zs + k->room);
    if (f->uses & HAS_LABELS) {
        const vl_term *t = &p->term[f->at[VL_CE] >= 0 ? f->at[VL_CE] : f->at[VL_DICE]];
        const ss_tensor *y = &p->targets[t->target];
        r->y = pair_labels(y, (k->b - t->first) * p->S + offset, n, k->y);
        return ss_dtype_size(y->dtype) == 8;
    }
    if (f->uses & (HAS_MSE | HAS_KL)) {
        const vl_term *t = &p->term[f->at[VL_MSE] >= 0 ? f->at[VL_MSE] : f->at[VL_KL]];
        const int64_t sample = (k->b - t->first) * p->S + offset;
        const int64_t target = sample + (k->b - t->first) * p->S;
        r->q0 = load_row(&p->targets[t->target], target, n, n, k->p);
        r->q1 = load_row(&p->targets[t->target], target + p->S, n, n, k->p + k->room);
        r->w = t->weight < 0 ? NULL : load_row(&p->weights[t->weight], sample, n, n, k->w);
    }
    return 0;
}

static double fold_lanes(const double *lane) {
    double sum = 0.0;
    for (int l = 0; l < SS_LANES; ++l) {
        sum += lane[l];
    }
    return sum;
}

/* Adds what the loops found in n voxels to the sums [terms, 2, 4] of an item. */
static void add_pair_sums(const vl_plan *p, const fused_terms *f, const pair_lanes *found,
                          int64_t n, double *sums) {
    double s[PAIR_SUMS];
    for (int i = 0; i < PAIR_SUMS; ++i) {
        s[i] = fold_lanes(found->sum[i]);
    }
    const double voxels = (double)n;
    const double ones = (double)found->ones;
    if (f->at[VL_CE] >= 0) {
        const double a = p->term[f->at[VL_CE]].a[0];
        double *to = sums + f->at[VL_CE] * 8;
        to[0] += (double)(float)a * (s[SUM_LN] + 0.5 * s[SUM_FAR]);
        to[1] += a * voxels;
        to[2] += voxels;
    }
    if (f->at[VL_DICE] >= 0) {
        const double add[8] = {s[SUM_I0], s[SUM_Z0], voxels - ones, voxels,
                               s[SUM_I1], s[SUM_Z1], ones,          voxels};
        for (int i = 0; i < 8; ++i) {
            sums[f->at[VL_DICE] * 8 + i] += add[i];
        }
    }
    int32_t soft = f->at[VL_MSE] >= 0 ? f->at[VL_MSE] : f->at[VL_KL];
    if (soft >= 0) {
        const double weight = p->term[soft].weight < 0 ? voxels : s[SUM_WEIGHT];
        sums[soft * 8] += s[SUM_SOFT];
        sums[soft * 8 + 1] += weight;
        sums[soft * 8 + 2] += weight;
    }
    if (f->at[VL_ENTROPY] >= 0) {
        double *to = sums + f->at[VL_ENTROPY] * 8;
        to[0] += s[SUM_LN] + s[SUM_FAR];
        to[1] += voxels;
        to[2] += voxels;
    }
}

/* How many of the voxels from `offset` on the loops took; their sums are added. */
static int64_t pair_forward(vl_block *k, int64_t offset, int64_t end, double *sums) {
    const vl_plan *p = k->plan;
    const fused_terms f = pair_terms(k, 1);
    if (!f.uses) {
        return 0;
    }
    pair_rows r = {0};
    pair_lanes found = {0};
    r.square = f.at[VL_DICE] >= 0 && p->term[f.at[VL_DICE]].squared;
    int64_t at = offset;
    while (end - at >= SS_LANES) {
        int64_t n = end - at < PAIR_BLOCK ? (end - at) / SS_LANES * SS_LANES : PAIR_BLOCK;
        int wide = find_pair_rows(k, &f, at, n, &r);
        if (!run_pair(f.uses, wide, n, &r, &found)) {
            break;
        }
        at += n;
    }
    add_pair_sums(p, &f, &found, at - offset, sums);
    return at - offset;
}

static void find_pair_derivatives(const vl_block *k, const fused_terms *f, const double *by,
                                  pair_rows *r) {
    const vl_plan *p = k->plan;
    const double *at[VL_ENTROPY + 1];
    for (int i = 0; i <= VL_ENTROPY; ++i) {
        at[i] = f->at[i] < 0 ? NULL : by + (f->at[i] * p->B + k->b) * 4;
    }
    if (at[VL_CE]) {
        r->a0 = (float)(at[VL_CE][0] * p->term[f->at[VL_CE]].a[0]);
        r->a1 = (float)(at[VL_CE][0] * p->term[f->at[VL_CE]].a[1]);
    }
    if (at[VL_DICE]) {
        const double *d = at[VL_DICE]; /* by I0, Z0, I1, Z1 */
        int squared = p->term[f->at[VL_DICE]].squared;
        double linear = squared ? 0.0 : d[3] - d[1];
        r->hit0 = (float)(linear - d[0]);
        r->hit1 = (float)(linear + d[2]);
        r->by_p0 = squared ? (float)(2.0 * d[1]) : 0.0f;
        r->by_p1 = squared ? (float)(2.0 * d[3]) : 0.0f;
    }
    r->by_soft = at[VL_MSE] ? (float)(2.0 * at[VL_MSE][0]) : (at[VL_KL] ? (float)at[VL_KL][0] : 0);
    r->by_h = at[VL_ENTROPY] ? (float)at[VL_ENTROPY][0] : 0.0f;
}

/* The same for the gradient. */
static int64_t pair_backward(vl_block *k, int64_t offset, int64_t end, const double *by,
                             const ss_tensor *out) {
    const fused_terms f = pair_terms(k, 0);
    if (!f.uses) {
        return 0;
    }
    pair_rows r = {0};
    find_pair_derivatives(k, &f, by, &r);
    int64_t at = offset;
    while (end - at >= SS_LANES) {
        int64_t n = end - at < PAIR_BLOCK ? (end - at) / SS_LANES * SS_LANES : PAIR_BLOCK;
        int wide = find_pair_rows(k, &f, at, n, &r);
        const int64_t to = k->b * 2 * k->plan->S + at;
        int straight = out->dtype == SS_F32;
        r.h0 = straight ? (float *)out->data + to : k->hs;
        r.h1 = straight ? r.h0 + k->plan->S : k->hs + k->room;
        if (!run_pair(f.uses, wide, n, &r, NULL)) {
            break;
        }
        if (!straight) {
            ss_store_f32(out, to, n, r.h0);
            ss_store_f32(out, to + k->plan->S, n, r.h1);
        }
        at += n;
    }
    return at - offset;
}
