/* SPDX-License-Identifier: Apache-2.0
 *
 * voxel_loss_fused.h: the usual sums of terms for 2 to 4 classes, whole voxels in registers
 * (float).
 *
 * Same formulas and sums as voxel_loss_sweep.h, but every term of a sample is evaluated in one loop
 * over lanes: logits, label, weight and soft target are loaded once, nothing but the gradient is
 * stored. `fused_forward` and `fused_backward` return 0 where they have no such loop (other terms,
 * label smoothing, sigmoid), and the general sweep does the work. Class count and kinds of terms
 * are compile-time constants of an inlined function: USES is a set of HAS_ bits. With two classes
 * one exponential gives both probabilities: e = exp(-|z0 - z1|), p = 1 / (1 + e).
 */

enum { HAS_CE = 1, HAS_DICE = 2, HAS_MSE = 4, HAS_KL = 8, HAS_ENTROPY = 16, HAS_LABELS = 3 };

/* Where the terms of one sample are: index into the plan by kind, -1 if there is none. */
typedef struct fused_terms {
    int32_t at[VL_ENTROPY + 1];
    int32_t uses;
} fused_terms;

static fused_terms find_terms(const vl_block *k) {
    const vl_plan *p = k->plan;
    fused_terms f = {{-1, -1, -1, -1, -1}, 0};
    for (int32_t i = 0; i < p->n_terms; ++i) {
        const vl_term *t = &p->term[i];
        if (!vl_covers(t, k->b)) {
            continue;
        }
        int labels = t->kind == VL_CE || t->kind == VL_DICE;
        if ((f.uses & 1 << t->kind) || t->smoothing != 0.0 ||
            (t->kind != VL_ENTROPY && t->hard != labels)) {
            f.uses = 0;
            return f;
        }
        f.at[t->kind] = i;
        f.uses |= 1 << t->kind;
    }
    int apart = (f.uses & HAS_LABELS) == HAS_LABELS &&
                p->term[f.at[VL_CE]].slot != p->term[f.at[VL_DICE]].slot;
    int soft = (f.uses & HAS_MSE) && (f.uses & HAS_KL);
    if (p->activation != VL_SOFTMAX || p->C < 2 || p->C > 32 || apart || soft) {
        f.uses = 0;
    }
    return f;
}

/* What the loops read, and the constants of the backward loop. */
#define FUSED_CLASSES 4 /* the most that the tables below have loops for */

typedef struct fused_rows {
    const float *z[FUSED_CLASSES];
    const float *q[FUSED_CLASSES];
    float *h[FUSED_CLASSES];
    const int32_t *y;
    const float *m;         /* of labels */
    const float *mq;        /* of the soft target */
    const float *me;        /* of entropy */
    float a[FUSED_CLASSES]; /* class weights of CE; backward: times its derivative */
    float ui[FUSED_CLASSES], vz[FUSED_CLASSES], ez[FUSED_CLASSES];
    const char *ahead; /* labels of the next block, so many bytes per SS_LANES */
    int64_t ahead_step;
    float ue, uq; /* entropy; squared error (twice) or KL */
    float square, linear;
} fused_rows;

static void find_rows(vl_block *k, const fused_terms *f, fused_rows *r) {
    const vl_plan *p = k->plan;
    int32_t with_labels = f->at[VL_CE] >= 0 ? f->at[VL_CE] : f->at[VL_DICE];
    int32_t soft = f->at[VL_MSE] >= 0 ? f->at[VL_MSE] : f->at[VL_KL];
    for (int64_t c = 0; c < 4; ++c) {
        int64_t have = c < p->C ? c : 0;
        r->z[c] = k->z[have];
        r->h[c] = k->h[have];
        r->q[c] = k->z[have];
    }
    for (int64_t c = 0; c < p->C && soft >= 0; ++c) {
        const vl_term *t = &p->term[soft];
        int64_t offset = ((k->b - t->first) * p->C + c) * p->S + k->offset;
        r->q[c] = load_row(&p->targets[t->target], offset, k->n, k->lanes, k->p + c * k->room);
    }
    const ss_tensor *labels = with_labels < 0 ? NULL : &p->targets[p->term[with_labels].target];
    if (labels) {
        int64_t size = (int64_t)ss_dtype_size(labels->dtype);
        int64_t next = (k->b - p->term[with_labels].first) * p->S + k->offset + k->n;
        r->ahead = (const char *)labels->data + next * size;
        r->ahead_step = size * SS_LANES;
    }
    r->y = with_labels < 0 ? k->y : k->y + p->term[with_labels].slot * k->room;
    r->m = with_labels < 0 ? k->m : k->m + p->term[with_labels].slot * k->room;
    r->mq = soft < 0 ? k->m : k->m + p->term[soft].slot * k->room;
    r->me = f->at[VL_ENTROPY] < 0 ? k->m : k->m + p->term[f->at[VL_ENTROPY]].slot * k->room;
}

/* e^x for x <= 0 (or NaN): ss_expf without what only positive numbers need. */
static inline float exp_negative(float x) {
    const float big = 12582912.0f;
    float c = x < -87.33654f ? -87.33654f : x;
    float n = (c * 1.44269504f + big) - big;
    float r = c - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    float y = p * ss_bits_f32((uint32_t)((int32_t)n + 127) << 23);
    return x < -87.33654f ? 0.0f : y;
}

/* ln x for normal positive x, without the selects of ss_logf: inside a large loop gcc turns those
 * into branches and then does not vectorise it. x that is no finite number gives NaN through
 * `poison`. */
static inline float log_normal(float x, float poison) {
    uint32_t u = ss_f32_bits(x);
    int32_t shifted = (int32_t)(u - 0x3f3504f3u);
    float k = (float)(shifted >> 23);
    float r = ss_bits_f32((uint32_t)((shifted & 0x007fffff) + 0x3f3504f3)) - 1.0f;
    float z = r * r;
    float p = 7.0376836292e-2f;
    p = p * r - 1.1514610310e-1f;
    p = p * r + 1.1676998740e-1f;
    p = p * r - 1.2420140846e-1f;
    p = p * r + 1.4249322787e-1f;
    p = p * r - 1.6668057665e-1f;
    p = p * r + 2.0000714765e-1f;
    p = p * r - 2.4999993993e-1f;
    p = p * r + 3.3333331174e-1f;
    float y = r * z * p;
    y = y - k * 2.12194440e-4f;
    y = y - 0.5f * z;
    return (r + y) + k * 0.693359375f + (poison - poison);
}

/* ln s of a sum of exponentials: 1 <= s <= 4 or NaN. */
static inline float log_sum(float s) {
    return log_normal(s, s);
}

/* ln q of a target: a finite number for q = 0, so that q ln q = 0; NaN for negative q and NaN. */
static inline float log_target(float q) {
    float v = q < 1.17549435e-38f ? 1.17549435e-38f : q;
    uint32_t negative = (uint32_t)((int32_t)ss_f32_bits(q + 0.0f) >> 31); /* -0 is 0 */
    return log_normal(v, ss_bits_f32(ss_f32_bits(v) | negative));
}

/* Asks for what the next block will read: labels are read in one burst before the loop, and the
 * rows of logits are so many streams that the hardware alone falls behind. */
static inline __attribute__((always_inline)) void
fetch_ahead(const int C, const int USES, int64_t i, int64_t n, const fused_rows *r) {
    for (int c = 0; c < C; ++c) {
        __builtin_prefetch(r->z[c] + n + i);
        if (USES & (HAS_MSE | HAS_KL)) {
            __builtin_prefetch(r->q[c] + n + i);
        }
    }
    if (USES & HAS_LABELS) {
        const char *at = r->ahead + i / SS_LANES * r->ahead_step;
        __builtin_prefetch(at);
        if (r->ahead_step > 64) {
            __builtin_prefetch(at + 64);
        }
    }
}

/* Applies X to the classes that there are; C is a constant. */
#define EACH(X)                                                                                    \
    X(0)                                                                                           \
    X(1)                                                                                           \
    if (C > 2) {                                                                                   \
        X(2)                                                                                       \
    }                                                                                              \
    if (C > 3) {                                                                                   \
        X(3)                                                                                       \
    }

/* z, p, top = max z and s = sum e^(z - top) of lane l; declared as scalars so that lanes vectorise.
 */
#define SOFTMAX_LANE                                                                               \
    float z0 = z0_[i + l], z1 = z1_[i + l], z2 = 0.0f, z3 = 0.0f;                                  \
    float p0, p1, p2 = 0.0f, p3 = 0.0f;                                                            \
    float top = z0 > z1 ? z0 : z1;                                                                 \
    float s;                                                                                       \
    if (C == 2) {                                                                                  \
        float e = exp_negative(z0 > z1 ? z1 - z0 : z0 - z1);                                       \
        s = 1.0f + e + (top - top); /* an infinite logit gives NaN */                              \
        float inverse = 1.0f / s;                                                                  \
        float rest = e * inverse;                                                                  \
        p0 = z0 > z1 ? inverse : rest;                                                             \
        p1 = z0 > z1 ? rest : inverse;                                                             \
    } else {                                                                                       \
        z2 = z2_[i + l];                                                                           \
        top = z2 > top ? z2 : top;                                                                 \
        if (C > 3) {                                                                               \
            z3 = z3_[i + l];                                                                       \
            top = z3 > top ? z3 : top;                                                             \
        }                                                                                          \
        p0 = exp_negative(z0 - top);                                                               \
        p1 = exp_negative(z1 - top);                                                               \
        p2 = exp_negative(z2 - top);                                                               \
        p3 = C > 3 ? exp_negative(z3 - top) : 0.0f;                                                \
        s = (p0 + p1) + (p2 + p3);                                                                 \
        float inverse = 1.0f / s;                                                                  \
        p0 *= inverse;                                                                             \
        p1 *= inverse;                                                                             \
        p2 *= inverse;                                                                             \
        p3 *= inverse;                                                                             \
    }

#define ROW_POINTERS                                                                               \
    const float *restrict z0_ = r->z[0], *restrict z1_ = r->z[1], *restrict z2_ = r->z[2],         \
                          *restrict z3_ = r->z[3];                                                 \
    const float *restrict q0_ = r->q[0], *restrict q1_ = r->q[1], *restrict q2_ = r->q[2],         \
                          *restrict q3_ = r->q[3];                                                 \
    const int32_t *restrict y_ = r->y;                                                             \
    const float *restrict m_ = r->m, *restrict mq_ = r->mq, *restrict me_ = r->me;                 \
    const float a0 = r->a[0], a1 = r->a[1], a2 = r->a[2], a3 = r->a[3];

#define DICE_DERIVATIVES                                                                           \
    const float u0 = r->ui[0], u1 = r->ui[1], u2 = r->ui[2], u3 = r->ui[3];                        \
    const float v0 = r->vz[0], v1 = r->vz[1], v2 = r->vz[2], v3 = r->vz[3];                        \
    const float e0 = r->ez[0], e1 = r->ez[1], e2 = r->ez[2], e3 = r->ez[3];

typedef struct fused_sums {
    double ce, soft, soft_weight, entropy, entropy_weight;
    double i[FUSED_CLASSES], z[FUSED_CLASSES], y[FUSED_CLASSES];
} fused_sums;

/* One class of a voxel with label y: Dice's sums, and z and a of the one class that y is. */
#define LABEL_SUMS(c)                                                                              \
    float t##c = keep_if(y == c, m);                                                               \
    y##c[l] += t##c;                                                                               \
    if (USES & HAS_DICE) {                                                                         \
        i##c[l] += t##c * p##c;                                                                    \
        n##c[l] += m * (p##c * (square * p##c + linear));                                          \
    }

#define LABEL_IS(c)                                                                                \
    zy = ss_bits_f32(ss_f32_bits(zy) | ss_f32_bits(keep_if(y == c, z##c)));                        \
    ay = ss_bits_f32(ss_f32_bits(ay) | ss_f32_bits(keep_if(y == c, a##c)));

/* An ignored voxel may have an infinite logit. */
#define FORWARD_LABELS                                                                             \
    if (USES & HAS_LABELS) {                                                                       \
        const int32_t y = y_[i + l];                                                               \
        const float m = m_[i + l];                                                                 \
        EACH(LABEL_SUMS)                                                                           \
        if (USES & HAS_CE) {                                                                       \
            float zy = 0.0f, ay = 0.0f;                                                            \
            EACH(LABEL_IS)                                                                         \
            sc[l] += keep_if(y >= 0, (m * ay) * ((top - zy) + ls));                                \
        }                                                                                          \
    }

static inline
    __attribute__((always_inline)) void forward_lanes(const int C, const int USES, int64_t n,
                                                      const fused_rows *r, fused_sums *out) {
    ROW_POINTERS
    const float square = r->square, linear = r->linear;
    float sc[SS_LANES] = {0}, ss[SS_LANES] = {0}, sw[SS_LANES] = {0}, se[SS_LANES] = {0};
    float sv[SS_LANES] = {0};
    float i0[SS_LANES] = {0}, i1[SS_LANES] = {0}, i2[SS_LANES] = {0}, i3[SS_LANES] = {0};
    float n0[SS_LANES] = {0}, n1[SS_LANES] = {0}, n2[SS_LANES] = {0}, n3[SS_LANES] = {0};
    float y0[SS_LANES] = {0}, y1[SS_LANES] = {0}, y2[SS_LANES] = {0}, y3[SS_LANES] = {0};
    for (int64_t i = 0; i < n; i += SS_LANES) {
        fetch_ahead(C, USES, i, n, r);
        SS_SIMD
        for (int l = 0; l < SS_LANES; ++l) {
            SOFTMAX_LANE
            float ls = USES & (HAS_CE | HAS_KL | HAS_ENTROPY) ? log_sum(s) : 0.0f;
            FORWARD_LABELS
            if (USES & HAS_MSE) {
                float d = 0.0f;
#define X(c) d += (p##c - q##c##_[i + l]) * (p##c - q##c##_[i + l]);
                EACH(X)
#undef X
                ss[l] += mq_[i + l] * d;
                sw[l] += mq_[i + l];
            }
            if (USES & HAS_KL) {
                float d = 0.0f;
#define X(c)                                                                                       \
    float q##c = q##c##_[i + l];                                                                   \
    d += q##c * (log_target(q##c) + ((top - z##c) + ls));
                EACH(X)
#undef X
                ss[l] += mq_[i + l] * d;
                sw[l] += mq_[i + l];
            }
            if (USES & HAS_ENTROPY) {
                float d = 0.0f;
#define X(c) d += p##c * ((top - z##c) + ls);
                EACH(X)
#undef X
                se[l] += me_[i + l] * d;
                sv[l] += me_[i + l];
            }
        }
    }
    out->ce = fold(sc);
    out->soft = fold(ss);
    out->soft_weight = fold(sw);
    out->entropy = fold(se);
    out->entropy_weight = fold(sv);
#define X(c)                                                                                       \
    out->i[c] = fold(i##c);                                                                        \
    out->z[c] = fold(n##c);                                                                        \
    out->y[c] = fold(y##c);
    EACH(X)
#undef X
}

static inline __attribute__((always_inline)) void backward_lanes(const int C, const int USES,
                                                                 int64_t n, const fused_rows *r) {
    ROW_POINTERS
    float *restrict h0 = r->h[0], *restrict h1 = r->h[1], *restrict h2 = r->h[2],
                    *restrict h3 = r->h[3];
    DICE_DERIVATIVES
    const float ue = r->ue, uq = r->uq;
    for (int64_t i = 0; i < n; i += SS_LANES) {
        fetch_ahead(C, USES, i, n, r);
        SS_SIMD
        for (int l = 0; l < SS_LANES; ++l) {
            SOFTMAX_LANE
            float g0 = 0.0f, g1 = 0.0f, g2 = 0.0f, g3 = 0.0f;
            float d0 = 0.0f, d1 = 0.0f, d2 = 0.0f, d3 = 0.0f;
            float all = 0.0f; /* alpha - sum_c p_c g_c */
            if (USES & HAS_LABELS) {
                const int32_t y = y_[i + l];
                const float m = m_[i + l];
#define X(c)                                                                                       \
    if (USES & HAS_DICE) {                                                                         \
        g##c += m * ((y == c ? u##c : 0.0f) + (v##c * p##c + e##c));                               \
    }                                                                                              \
    if (USES & HAS_CE) {                                                                           \
        d##c += y == c ? m * a##c : 0.0f;                                                          \
        all += d##c;                                                                               \
    }
                EACH(X)
#undef X
            }
            if (USES & HAS_MSE) {
                const float w = uq * mq_[i + l];
#define X(c) g##c += w * (p##c - q##c##_[i + l]);
                EACH(X)
#undef X
            }
            if (USES & HAS_KL) {
                const float w = uq * mq_[i + l];
#define X(c)                                                                                       \
    float k##c = w * q##c##_[i + l];                                                               \
    d##c += k##c;                                                                                  \
    all += k##c;
                EACH(X)
#undef X
            }
            if (USES & HAS_ENTROPY) {
                const float w = ue * me_[i + l];
                const float ls = log_sum(s);
#define X(c) g##c += w * ((top - z##c) + ls);
                EACH(X)
#undef X
            }
#define X(c) all -= p##c * g##c;
            EACH(X)
#undef X
#define X(c) h##c[i + l] = p##c * (g##c + all) - d##c;
            EACH(X)
#undef X
        }
    }
}

/* The sets of terms that have a loop, for so many classes. */
#define FUSED(ONE)                                                                                 \
    ONE(ce_dice, HAS_CE | HAS_DICE, 2)                                                             \
    ONE(ce_dice, HAS_CE | HAS_DICE, 3)                                                             \
    ONE(ce, HAS_CE, 2)                                                                             \
    ONE(ce, HAS_CE, 3)                                                                             \
    ONE(ce, HAS_CE, 4)                                                                             \
    ONE(dice, HAS_DICE, 2)                                                                         \
    ONE(dice, HAS_DICE, 3)                                                                         \
    ONE(dice, HAS_DICE, 4)                                                                         \
    ONE(mse, HAS_MSE, 2)                                                                           \
    ONE(mse, HAS_MSE, 3)                                                                           \
    ONE(mse, HAS_MSE, 4)                                                                           \
    ONE(kl, HAS_KL, 2)                                                                             \
    ONE(kl, HAS_KL, 3)                                                                             \
    ONE(entropy, HAS_ENTROPY, 2)                                                                   \
    ONE(entropy, HAS_ENTROPY, 3)                                                                   \
    ONE(entropy, HAS_ENTROPY, 4)                                                                   \
    ONE(mse_entropy, HAS_MSE | HAS_ENTROPY, 2)                                                     \
    ONE(mse_entropy, HAS_MSE | HAS_ENTROPY, 3)                                                     \
    ONE(mse_entropy, HAS_MSE | HAS_ENTROPY, 4)                                                     \
    ONE(kl_entropy, HAS_KL | HAS_ENTROPY, 2)                                                       \
    ONE(ce_dice_entropy, HAS_CE | HAS_DICE | HAS_ENTROPY, 2)

/* Functions of their own: in one large function gcc gives up on vectorising. */
#define ONE(name, set, classes)                                                                    \
    static __attribute__((noinline)) void forward_##name##classes(int64_t n, const fused_rows *r,  \
                                                                  fused_sums *out) {               \
        forward_lanes(classes, set, n, r, out);                                                    \
    }                                                                                              \
    static __attribute__((noinline)) void backward_##name##classes(int64_t n,                      \
                                                                   const fused_rows *r) {          \
        backward_lanes(classes, set, n, r);                                                        \
    }
FUSED(ONE)
#undef ONE

static int run_forward(int64_t C, int32_t uses, int64_t n, const fused_rows *r, fused_sums *out) {
    switch (uses * 8 + (int32_t)C) {
#define ONE(name, set, classes)                                                                    \
    case (set) * 8 + classes:                                                                      \
        forward_##name##classes(n, r, out);                                                        \
        return 1;
        FUSED(ONE)
#undef ONE
    default:
        return 0;
    }
}

static int run_backward(int64_t C, int32_t uses, int64_t n, const fused_rows *r) {
    switch (uses * 8 + (int32_t)C) {
#define ONE(name, set, classes)                                                                    \
    case (set) * 8 + classes:                                                                      \
        backward_##name##classes(n, r);                                                            \
        return 1;
        FUSED(ONE)
#undef ONE
    default:
        return 0;
    }
}

static int fused_forward(vl_block *k, double *sums) {
    const vl_plan *p = k->plan;
    const fused_terms f = find_terms(k);
    if (!f.uses || p->C > FUSED_CLASSES) {
        return 0;
    }
    fused_rows r = {0};
    fused_sums got = {0};
    find_rows(k, &f, &r);
    for (int64_t c = 0; c < p->C && f.at[VL_CE] >= 0; ++c) {
        r.a[c] = (float)p->term[f.at[VL_CE]].a[c];
    }
    r.square = f.at[VL_DICE] >= 0 && p->term[f.at[VL_DICE]].squared ? 1.0f : 0.0f;
    r.linear = 1.0f - r.square;
    if (!run_forward(p->C, f.uses, k->lanes, &r, &got)) {
        return 0;
    }
    const int64_t row = p->C * 4;
    double *of[VL_ENTROPY + 1];
    for (int i = 0; i <= VL_ENTROPY; ++i) {
        of[i] = f.at[i] < 0 ? NULL : sums + f.at[i] * row;
    }
    double weight = 0.0;
    for (int64_t c = 0; c < p->C; ++c) {
        weight += got.y[c];
    }
    for (int64_t c = 0; c < p->C; ++c) {
        if (of[VL_CE]) {
            of[VL_CE][1] += p->term[f.at[VL_CE]].a[c] * got.y[c];
        }
        if (of[VL_DICE]) {
            of[VL_DICE][4 * c] += got.i[c];
            of[VL_DICE][4 * c + 1] += got.z[c];
            of[VL_DICE][4 * c + 2] += got.y[c];
            of[VL_DICE][4 * c + 3] += weight;
        }
    }
    const double found[][2] = {
        {got.ce, weight}, {got.soft, got.soft_weight}, {got.entropy, got.entropy_weight}};
    const int kinds[] = {VL_CE, f.at[VL_MSE] >= 0 ? VL_MSE : VL_KL, VL_ENTROPY};
    for (int i = 0; i < 3; ++i) {
        double *to = of[kinds[i]];
        if (to) {
            to[0] += found[i][0];
            to[1] += i == 0 ? 0.0 : found[i][1];
            to[2] += found[i][1];
        }
    }
    return 1;
}

static int fused_backward(vl_block *k, const double *by) {
    const vl_plan *p = k->plan;
    const fused_terms f = find_terms(k);
    if (!f.uses || p->C > FUSED_CLASSES) {
        return 0;
    }
    fused_rows r = {0};
    find_rows(k, &f, &r);
    const double *at[VL_ENTROPY + 1];
    for (int i = 0; i <= VL_ENTROPY; ++i) {
        at[i] = f.at[i] < 0 ? NULL : by + (f.at[i] * p->B + k->b) * p->C * 2;
    }
    for (int64_t c = 0; c < p->C; ++c) {
        if (at[VL_CE]) {
            r.a[c] = (float)(at[VL_CE][0] * p->term[f.at[VL_CE]].a[c]);
        }
        if (at[VL_DICE]) {
            int squared = p->term[f.at[VL_DICE]].squared;
            double z = at[VL_DICE][2 * c + 1];
            r.ui[c] = (float)at[VL_DICE][2 * c];
            r.vz[c] = squared ? (float)(2.0 * z) : 0.0f;
            r.ez[c] = squared ? 0.0f : (float)z;
        }
    }
    r.uq = at[VL_MSE] ? (float)(2.0 * at[VL_MSE][0]) : (at[VL_KL] ? (float)at[VL_KL][0] : 0.0f);
    r.ue = at[VL_ENTROPY] ? (float)at[VL_ENTROPY][0] : 0.0f;
    return run_backward(p->C, f.uses, k->lanes, &r);
}
