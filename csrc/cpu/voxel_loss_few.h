/* SPDX-License-Identifier: Apache-2.0
 *
 * voxel_loss_few.h: the loops of voxel_loss_many.h for three and four classes, in registers
 * (float).
 *
 * Same formulas, data and conditions; all classes of a voxel are one lane of one loop, so nothing
 * goes through memory between them. C and LONG (labels of 64 bits) are constants.
 */

/* What the loop finds out about a block besides its sums. */
typedef struct few_union {
    float far[SS_LANES]; /* sum of logits */
    int64_t wide[SS_LANES];
    int32_t narrow[SS_LANES];
    int32_t over[SS_LANES]; /* negative where a label is too large */
} few_union;

static int are_few(const int C, const few_union *u) {
    int64_t all = 0;
    int32_t over = 0;
    for (int l = 0; l < SS_LANES; ++l) {
        all |= u->wide[l] | u->narrow[l];
        over |= u->over[l];
    }
    return (all & ~(int64_t)3) == 0 && (C == 4 || over >= 0) && all_finite(u->far);
}

#define FEW_EACH(X)                                                                                \
    X(0)                                                                                           \
    X(1)                                                                                           \
    X(2)                                                                                           \
    if (C > 3) {                                                                                   \
        X(3)                                                                                       \
    }

#define FEW_ROWS                                                                                   \
    const float *restrict z0_ = k->z[0], *restrict z1_ = k->z[1], *restrict z2_ = k->z[2],         \
                          *restrict z3_ = C > 3 ? k->z[3] : k->z[2];                               \
    const void *restrict y_ = k->y;

/* Asks for what the lanes will read MANY_AHEAD voxels later. */
#define FEW_AHEAD                                                                                  \
    __builtin_prefetch(z0_ + i + MANY_AHEAD);                                                      \
    __builtin_prefetch(z1_ + i + MANY_AHEAD);                                                      \
    __builtin_prefetch(z2_ + i + MANY_AHEAD);                                                      \
    if (C > 3) {                                                                                   \
        __builtin_prefetch(z3_ + i + MANY_AHEAD);                                                  \
    }                                                                                              \
    pair_ahead_labels(LONG, y_, i);

/* e^x for x <= 0. */
static inline float few_exp(float x) {
    float c = x * 1.44269504f;
    return ss_exp2_inside(c < -125.0f ? -125.0f : c);
}

/* All ones where the label is c, else 0; from the bits of the label as masks. */
static inline int32_t few_is(int c, int32_t odd, int32_t high) {
    return (c & 1 ? odd : ~odd) & (c & 2 ? high : ~high);
}

/* The label's bits as masks, e_c = exp(z_c - top), s and r = 1 / s of one voxel. */
#define FEW_SOFTMAX                                                                                \
    int32_t y;                                                                                     \
    if (LONG) {                                                                                    \
        u.wide[l] |= ((const int64_t *)y_)[i + l];                                                 \
        y = (int32_t)((const int64_t *)y_)[i + l];                                                 \
    } else {                                                                                       \
        y = ((const int32_t *)y_)[i + l];                                                          \
        u.narrow[l] |= y;                                                                          \
    }                                                                                              \
    if (C == 3) {                                                                                  \
        u.over[l] |= 2 - y;                                                                        \
    }                                                                                              \
    const float z0 = z0_[i + l], z1 = z1_[i + l], z2 = z2_[i + l], z3 = C > 3 ? z3_[i + l] : z2;   \
    const float larger = z1 > z0 ? z1 : z0, other = z3 > z2 ? z3 : z2;                             \
    const float top = other > larger ? other : larger;                                             \
    u.far[l] += C > 3 ? (z0 + z1) + (z2 + z3) : (z0 + z1) + z2;                                    \
    const int32_t odd = -(y & 1), high = -(y >> 1 & 1);                                            \
    const float e0 = few_exp(z0 - top), e1 = few_exp(z1 - top);                                    \
    const float e2 = few_exp(z2 - top), e3 = C > 3 ? few_exp(z3 - top) : 0.0f;                     \
    const float s = (e0 + e1) + (e2 + e3);                                                         \
    const float r = 1.0f / s;

static inline __attribute__((always_inline)) int few_block_forward(const int C, const int LONG,
                                                                   const int SQUARE, int64_t n,
                                                                   const many_rows *k,
                                                                   many_sums *restrict out) {
    FEW_ROWS
    few_union u = {{0}, {0}, {0}, {0}};
    float i0[SS_LANES] = {0}, i1[SS_LANES] = {0}, i2[SS_LANES] = {0}, i3[SS_LANES] = {0};
    float n0[SS_LANES] = {0}, n1[SS_LANES] = {0}, n2[SS_LANES] = {0}, n3[SS_LANES] = {0};
    int32_t c1[SS_LANES] = {0}, c2[SS_LANES] = {0}, c3[SS_LANES] = {0};
    float product[SS_LANES], behind[SS_LANES] = {0};
    for (int l = 0; l < SS_LANES; ++l) {
        product[l] = 1.0f;
    }
    for (int64_t i = 0; i < n; i += SS_LANES) {
        FEW_AHEAD
        SS_SIMD
        for (int l = 0; l < SS_LANES; ++l) {
            FEW_SOFTMAX
            product[l] *= s;
            const float low = blend(odd, z1, z0);
            const float zy = blend(high, C > 3 ? blend(odd, z3, z2) : z2, low);
#define X(c)                                                                                       \
    const float p##c = e##c * r;                                                                   \
    i##c[l] += ss_bits_f32(ss_f32_bits(p##c) & (uint32_t)few_is(c, odd, high));                    \
    n##c[l] += SQUARE ? p##c * p##c : p##c;
            FEW_EACH(X)
#undef X
            behind[l] += top - zy;
            c1[l] -= odd;
            c2[l] -= high;
            if (C > 3) {
                c3[l] -= odd & high;
            }
        }
    }
    if (!are_few(C, &u)) {
        return 0;
    }
    add_logs(out->ln, product);
    add_lanes(out->behind, behind);
#define X(c)                                                                                       \
    add_lanes(out->i[c], i##c);                                                                    \
    add_lanes(out->z[c], n##c);
    FEW_EACH(X)
#undef X
    int64_t in_odd = 0, in_high = 0, in_both = 0;
    for (int l = 0; l < SS_LANES; ++l) {
        in_odd += c1[l];
        in_high += c2[l];
        in_both += c3[l];
    }
    out->y[0] += n - in_odd - in_high + in_both;
    out->y[1] += in_odd - in_both;
    out->y[2] += in_high - in_both;
    out->y[3] += in_both;
    return 1;
}

static inline __attribute__((always_inline)) int
few_block_backward(const int C, const int LONG, const int SQUARE, int64_t n, const many_rows *k) {
    FEW_ROWS
    few_union u = {{0}, {0}, {0}, {0}};
    float *restrict h0_ = k->h[0], *restrict h1_ = k->h[1], *restrict h2_ = k->h[2],
                    *restrict h3_ = C > 3 ? k->h[3] : NULL;
    const float a0 = k->a[0], a1 = k->a[1], a2 = k->a[2], a3 = C > 3 ? k->a[3] : 0.0f;
    const float w0 = k->e[0], w1 = k->e[1], w2 = k->e[2], w3 = C > 3 ? k->e[3] : 0.0f;
    const float u0 = k->u[0] + w0, u1 = k->u[1] + w1, u2 = k->u[2] + w2,
                u3 = C > 3 ? k->u[3] + w3 : 0.0f;
    const float v0 = k->v[0], v1 = k->v[1], v2 = k->v[2], v3 = C > 3 ? k->v[3] : 0.0f;
    for (int64_t i = 0; i < n; i += SS_LANES) {
        FEW_AHEAD
        __builtin_prefetch(h0_ + i + MANY_AHEAD, 1);
        __builtin_prefetch(h1_ + i + MANY_AHEAD, 1);
        __builtin_prefetch(h2_ + i + MANY_AHEAD, 1);
        if (C > 3) {
            __builtin_prefetch(h3_ + i + MANY_AHEAD, 1);
        }
        SS_SIMD
        for (int l = 0; l < SS_LANES; ++l) {
            FEW_SOFTMAX
#define X(c)                                                                                       \
    const int32_t is##c = few_is(c, odd, high);                                                    \
    const float p##c = e##c * r;                                                                   \
    const float b##c = blend(is##c, a##c, 0.0f);                                                   \
    const float d##c = blend(is##c, u##c, w##c);                                                   \
    const float g##c = SQUARE ? d##c + v##c * p##c : d##c;                                         \
    const float x##c = p##c * g##c
            X(0);
            X(1);
            X(2);
            X(3);
#undef X
            /* One of them is not 0. */
            const float ay = ss_bits_f32(ss_f32_bits(b0) | ss_f32_bits(b1) | ss_f32_bits(b2) |
                                         (C > 3 ? ss_f32_bits(b3) : 0u));
            const float all = (C > 3 ? (x0 + x1) + (x2 + x3) : (x0 + x1) + x2) - ay;
            h0_[i + l] = p0 * (g0 - all) - b0;
            h1_[i + l] = p1 * (g1 - all) - b1;
            h2_[i + l] = p2 * (g2 - all) - b2;
            if (C > 3) {
                h3_[i + l] = p3 * (g3 - all) - b3;
            }
        }
    }
    return are_few(C, &u);
}

#define FEW(name, C, LONG, SQUARE)                                                                 \
    static __attribute__((noinline)) int few_forward_##name(int64_t n, const many_rows *k,         \
                                                            many_sums *out) {                      \
        return few_block_forward(C, LONG, SQUARE, n, k, out);                                      \
    }                                                                                              \
    static __attribute__((noinline)) int few_backward_##name(int64_t n, const many_rows *k) {      \
        return few_block_backward(C, LONG, SQUARE, n, k);                                          \
    }
FEW(3_i32, 3, 0, 0)
FEW(3_i64, 3, 1, 0)
FEW(4_i32, 4, 0, 0)
FEW(4_i64, 4, 1, 0)
FEW(3_i32_square, 3, 0, 1)
FEW(3_i64_square, 3, 1, 1)
FEW(4_i32_square, 4, 0, 1)
FEW(4_i64_square, 4, 1, 1)
#undef FEW

static int few_forward(int C, int wide, int64_t n, const many_rows *k, many_sums *out) {
    static int (*const loop[2][2][2])(int64_t, const many_rows *, many_sums *) = {
        {{few_forward_3_i32, few_forward_3_i32_square},
         {few_forward_3_i64, few_forward_3_i64_square}},
        {{few_forward_4_i32, few_forward_4_i32_square},
         {few_forward_4_i64, few_forward_4_i64_square}}};
    return loop[C == 4][wide][k->square != 0.0f](n, k, out);
}

static int few_backward(int C, int wide, int64_t n, const many_rows *k) {
    static int (*const loop[2][2][2])(int64_t, const many_rows *) = {
        {{few_backward_3_i32, few_backward_3_i32_square},
         {few_backward_3_i64, few_backward_3_i64_square}},
        {{few_backward_4_i32, few_backward_4_i32_square},
         {few_backward_4_i64, few_backward_4_i64_square}}};
    return loop[C == 4][wide][k->square != 0.0f](n, k);
}
