/* SPDX-License-Identifier: Apache-2.0
 *
 * voxel_loss_many.h: cross entropy and Dice on labels of 3 to 32 classes, one loop (float).
 * Three and four classes have loops of their own in voxel_loss_few.h.
 *
 * Sixteen voxels at a time go through all classes: the maximum, e_c = exp(z_c - max), s = sum e_c,
 * p_c = e_c / s; the classes' sums and e_c stay in the first-level cache. As in voxel_loss_pair.h,
 * sums of ln s are the logarithm of a product (16 factors of at most 32), labels are read in the
 * loop, and a block with logits that are not finite, or labels that are no classes, is left to the
 * general sweep. Backward: dz_c = p_c g_c + p_c (a_y - sum p g) - (c = y) a_c.
 * Least traffic, 4 C bytes of logits per voxel and pass, 1 to 8 of labels, 4 C of gradient.
 * Errors: e_c within 2e-7 + 1e-7 |z_c - max| relative, the rest as in voxel_loss_f32.c.
 * Determinism: 16 float lanes within a block, 16 double lanes over an item, folded in lane order.
 */

/* In a loop over classes: gcc (unroll-and-jam) would interleave two of them and lose the lanes. */
#define MANY_EACH __asm__ volatile("")
#define MANY_BLOCK 256 /* voxels: the product of 16 sums of 32 is finite, */
#define FEW_BLOCK 512  /* and that of 32 sums of 4 */
#define MANY_CLASSES 32
#define MANY_AHEAD 256 /* voxels that are asked for before they are read */

typedef struct many_rows {
    const float *z[MANY_CLASSES];
    float *h[MANY_CLASSES];
    const void *y;
    float square, plain;   /* Dice: p (square p + plain) */
    float a[MANY_CLASSES]; /* backward: CE by class, Dice by I, by Z */
    float u[MANY_CLASSES], v[MANY_CLASSES], e[MANY_CLASSES];
} many_rows;

typedef struct many_lanes {
    float i[MANY_CLASSES][SS_LANES], z[MANY_CLASSES][SS_LANES];
    int32_t y[MANY_CLASSES][SS_LANES];
} many_lanes;

typedef struct many_sums {
    double i[MANY_CLASSES][SS_LANES], z[MANY_CLASSES][SS_LANES];
    double ln[SS_LANES], behind[SS_LANES];
    int64_t y[MANY_CLASSES];
} many_sums;

/* What a block's values have in common, to see whether the loop was for them. */
typedef struct many_union {
    float far[SS_LANES]; /* sum of logits */
    int64_t wide[SS_LANES];
    int32_t most[SS_LANES];
} many_union;

static int are_classes(const many_union *u, int64_t classes) {
    int64_t all = 0;
    int32_t most = 0;
    for (int l = 0; l < SS_LANES; ++l) {
        all |= u->wide[l] | u->most[l];
        most = u->most[l] > most ? u->most[l] : most;
    }
    return all >= 0 && all < MANY_CLASSES && most < classes && all_finite(u->far);
}

/* Labels of 16 voxels into y, e^(z - max) into e, max into top and 1 / s into r; s into `s`. */
static inline __attribute__((always_inline)) void many_exp(const int C, const int LONG, int64_t i,
                                                           const many_rows *k, many_union *u,
                                                           int32_t *restrict y,
                                                           float (*restrict e)[SS_LANES],
                                                           float *restrict top, float *restrict s) {
    const int64_t *restrict wide = LONG ? (const int64_t *)k->y + i : NULL;
    const int32_t *restrict narrow = LONG ? NULL : (const int32_t *)k->y + i;
    const float *restrict first = k->z[0] + i, *restrict second = k->z[1] + i;
    SS_SIMD
    for (int l = 0; l < SS_LANES; ++l) {
        if (LONG) {
            u->wide[l] |= wide[l];
            y[l] = (int32_t)wide[l];
        } else {
            y[l] = narrow[l];
            u->wide[l] |= narrow[l];
        }
    }
    SS_SIMD
    for (int l = 0; l < SS_LANES; ++l) {
        u->most[l] = y[l] > u->most[l] ? y[l] : u->most[l];
        const float z = first[l], next = second[l];
        top[l] = next > z ? next : z;
        u->far[l] += z + next;
    }
    for (int c = 2; c < C; ++c) {
        MANY_EACH;
        const float *restrict z = k->z[c] + i;
        SS_SIMD
        for (int l = 0; l < SS_LANES; ++l) {
            u->far[l] += z[l];
            top[l] = z[l] > top[l] ? z[l] : top[l];
        }
    }
    for (int c = 0; c < C; ++c) {
        MANY_EACH;
        const float *restrict z = k->z[c] + i;
        __builtin_prefetch(z + MANY_AHEAD);
        SS_SIMD
        for (int l = 0; l < SS_LANES; ++l) {
            e[c][l] = exp_minus_abs(z[l] - top[l]);
            s[l] = c == 0 ? e[c][l] : s[l] + e[c][l];
        }
    }
}

static inline __attribute__((always_inline)) int many_block_forward(const int C, const int LONG,
                                                                    int64_t n, const many_rows *k,
                                                                    many_sums *restrict out) {
    many_lanes found;
    many_union u = {{0}, {0}, {0}};
    memset(found.i, 0, sizeof found.i[0] * (size_t)C);
    memset(found.z, 0, sizeof found.z[0] * (size_t)C);
    memset(found.y, 0, sizeof found.y[0] * (size_t)C);
    float product[SS_LANES], behind[SS_LANES] = {0};
    float e[MANY_CLASSES][SS_LANES], top[SS_LANES], s[SS_LANES], r[SS_LANES];
    int32_t y[SS_LANES];
    for (int l = 0; l < SS_LANES; ++l) {
        product[l] = 1.0f;
    }
    const float square = k->square, plain = k->plain;
    for (int64_t i = 0; i < n; i += SS_LANES) {
        many_exp(C, LONG, i, k, &u, y, e, top, s);
        SS_SIMD
        for (int l = 0; l < SS_LANES; ++l) {
            r[l] = 1.0f / s[l];
            product[l] *= s[l];
        }
        for (int c = 0; c < C; ++c) {
            MANY_EACH;
            const float *restrict z = k->z[c] + i;
            SS_SIMD
            for (int l = 0; l < SS_LANES; ++l) {
                const float p = e[c][l] * r[l];
                const int32_t hit = -(y[l] == c);
                found.i[c][l] += ss_bits_f32(ss_f32_bits(p) & (uint32_t)hit);
                found.z[c][l] += p * (square * p + plain);
                found.y[c][l] -= hit;
                behind[l] += blend(hit, top[l] - z[l], 0.0f);
            }
        }
    }
    if (!are_classes(&u, C)) {
        return 0;
    }
    add_logs(out->ln, product);
    add_lanes(out->behind, behind);
    for (int c = 0; c < C; ++c) {
        MANY_EACH;
        add_lanes(out->i[c], found.i[c]);
        add_lanes(out->z[c], found.z[c]);
        for (int l = 0; l < SS_LANES; ++l) {
            out->y[c] += found.y[c][l];
        }
    }
    return 1;
}

static inline __attribute__((always_inline)) int
many_block_backward(const int C, const int LONG, int64_t n, const many_rows *k) {
    many_union u = {{0}, {0}, {0}};
    float p[MANY_CLASSES][SS_LANES], pg[MANY_CLASSES][SS_LANES];
    float top[SS_LANES], s[SS_LANES], r[SS_LANES], all[SS_LANES];
    int32_t y[SS_LANES];
    for (int64_t i = 0; i < n; i += SS_LANES) {
        many_exp(C, LONG, i, k, &u, y, p, top, s);
        SS_SIMD
        for (int l = 0; l < SS_LANES; ++l) {
            r[l] = 1.0f / s[l];
            all[l] = 0.0f * s[l];
        }
        for (int c = 0; c < C; ++c) {
            MANY_EACH;
            const float a = k->a[c], by_i = k->u[c], by_z = k->v[c], linear = k->e[c];
            SS_SIMD
            for (int l = 0; l < SS_LANES; ++l) {
                const int32_t hit = -(y[l] == c);
                const float v = p[c][l] * r[l];
                const float g = v * (blend(hit, by_i, 0.0f) + (by_z * v + linear));
                all[l] += blend(hit, a, 0.0f) - g;
                p[c][l] = v;
                pg[c][l] = g;
            }
        }
        for (int c = 0; c < C; ++c) {
            MANY_EACH;
            const float a = k->a[c];
            float *restrict h = k->h[c] + i;
            SS_SIMD
            for (int l = 0; l < SS_LANES; ++l) {
                const int32_t hit = -(y[l] == c);
                h[l] = (pg[c][l] + p[c][l] * all[l]) - blend(hit, a, 0.0f);
            }
        }
    }
    return are_classes(&u, C);
}

/* Functions of their own, so that the type of the labels is a constant in each. */
static __attribute__((noinline)) int many_forward_i32(int C, int64_t n, const many_rows *k,
                                                      many_sums *out) {
    return many_block_forward(C, 0, n, k, out);
}

static __attribute__((noinline)) int many_forward_i64(int C, int64_t n, const many_rows *k,
                                                      many_sums *out) {
    return many_block_forward(C, 1, n, k, out);
}

static __attribute__((noinline)) int many_backward_i32(int C, int64_t n, const many_rows *k) {
    return many_block_backward(C, 0, n, k);
}

static __attribute__((noinline)) int many_backward_i64(int C, int64_t n, const many_rows *k) {
    return many_block_backward(C, 1, n, k);
}

#include "voxel_loss_few.h"

/* One block; whether the loop took it. */
static int run_many_forward(int C, int wide, int64_t n, const many_rows *k, many_sums *out) {
    if (C <= 4) {
        return few_forward(C, wide, n, k, out);
    }
    return (wide ? many_forward_i64 : many_forward_i32)(C, n, k, out);
}

static int run_many_backward(int C, int wide, int64_t n, const many_rows *k) {
    if (C <= 4) {
        return few_backward(C, wide, n, k);
    }
    return (wide ? many_backward_i64 : many_backward_i32)(C, n, k);
}

/* The terms of this sample, if these loops are for them: uses is 0 otherwise. */
static fused_terms many_terms(const vl_block *k, int forward) {
    const vl_plan *p = k->plan;
    fused_terms f = find_terms(k);
    const vl_term *ce = f.at[VL_CE] < 0 ? NULL : &p->term[f.at[VL_CE]];
    int weighted = is_partial(p, f.at[VL_CE]) || is_partial(p, f.at[VL_DICE]);
    for (int64_t c = 1; forward && ce && c < p->C; ++c) {
        weighted |= ce->a[c] != ce->a[0];
    }
    if (p->C < 3 || p->C > MANY_CLASSES || (f.uses & ~HAS_LABELS) || weighted) {
        f.uses = 0;
    }
    return f;
}

/* Where n voxels of this block begin, in every array; returns whether labels have 64 bits. */
static int find_many_rows(vl_block *k, const fused_terms *f, int64_t offset, int64_t n,
                          many_rows *r) {
    const vl_plan *p = k->plan;
    const vl_term *t = &p->term[f->at[VL_CE] >= 0 ? f->at[VL_CE] : f->at[VL_DICE]];
    const ss_tensor *y = &p->targets[t->target];
    for (int64_t c = 0; c < p->C; ++c) {
        r->z[c] = load_row(p->logits, (k->b * p->C + c) * p->S + offset, n, n, k->zs + c * k->room);
    }
    r->y = pair_labels(y, (k->b - t->first) * p->S + offset, n, k->y);
    return ss_dtype_size(y->dtype) == 8;
}

static void add_many_sums(const vl_plan *p, const fused_terms *f, const many_sums *found, int64_t n,
                          double *sums) {
    if (f->at[VL_CE] >= 0) {
        const double a = p->term[f->at[VL_CE]].a[0];
        double *to = sums + f->at[VL_CE] * p->C * 4;
        to[0] += a * (fold_lanes(found->ln) + fold_lanes(found->behind));
        to[1] += a * (double)n;
        to[2] += (double)n;
    }
    for (int64_t c = 0; f->at[VL_DICE] >= 0 && c < p->C; ++c) {
        double *to = sums + (f->at[VL_DICE] * p->C + c) * 4;
        to[0] += fold_lanes(found->i[c]);
        to[1] += fold_lanes(found->z[c]);
        to[2] += (double)found->y[c];
        to[3] += (double)n;
    }
}

static int64_t many_block(const vl_block *k) {
    const int64_t most = k->plan->C <= 4 ? FEW_BLOCK : MANY_BLOCK;
    return k->room < most ? k->room : most;
}

/* How many of the voxels from `offset` on the loops took; their sums are added. */
static int64_t many_forward(vl_block *k, int64_t offset, int64_t end, double *sums) {
    const vl_plan *p = k->plan;
    const fused_terms f = many_terms(k, 1);
    int64_t at = offset;
    if (!f.uses) {
        return 0;
    }
    const int64_t block = many_block(k);
    many_rows r;
    many_sums found = {0};
    r.square = f.at[VL_DICE] >= 0 && p->term[f.at[VL_DICE]].squared ? 1.0f : 0.0f;
    r.plain = 1.0f - r.square;
    while (end - at >= SS_LANES) {
        int64_t n = end - at < block ? (end - at) / SS_LANES * SS_LANES : block;
        int wide = find_many_rows(k, &f, at, n, &r);
        if (!run_many_forward((int)p->C, wide, n, &r, &found)) {
            break;
        }
        at += n;
    }
    add_many_sums(p, &f, &found, at - offset, sums);
    return at - offset;
}

static void find_many_derivatives(const vl_block *k, const fused_terms *f, const double *by,
                                  many_rows *r) {
    const vl_plan *p = k->plan;
    r->square = f->at[VL_DICE] >= 0 && p->term[f->at[VL_DICE]].squared ? 1.0f : 0.0f;
    for (int64_t c = 0; c < p->C; ++c) {
        r->a[c] = r->u[c] = r->v[c] = r->e[c] = 0.0f;
        if (f->at[VL_CE] >= 0) {
            const double d = by[(f->at[VL_CE] * p->B + k->b) * p->C * 2];
            r->a[c] = (float)(d * p->term[f->at[VL_CE]].a[c]);
        }
        if (f->at[VL_DICE] >= 0) {
            const double *d = by + ((f->at[VL_DICE] * p->B + k->b) * p->C + c) * 2;
            const int squared = p->term[f->at[VL_DICE]].squared;
            r->u[c] = (float)d[0];
            r->v[c] = squared ? (float)(2.0 * d[1]) : 0.0f;
            r->e[c] = squared ? 0.0f : (float)d[1];
        }
    }
}

/* The same for the gradient. */
static int64_t many_backward(vl_block *k, int64_t offset, int64_t end, const double *by,
                             const ss_tensor *out) {
    const vl_plan *p = k->plan;
    const fused_terms f = many_terms(k, 0);
    int64_t at = offset;
    if (!f.uses) {
        return 0;
    }
    const int64_t block = many_block(k);
    const int straight = out->dtype == SS_F32;
    many_rows r;
    find_many_derivatives(k, &f, by, &r);
    while (end - at >= SS_LANES) {
        int64_t n = end - at < block ? (end - at) / SS_LANES * SS_LANES : block;
        int wide = find_many_rows(k, &f, at, n, &r);
        for (int64_t c = 0; c < p->C; ++c) {
            r.h[c] =
                straight ? (float *)out->data + (k->b * p->C + c) * p->S + at : k->hs + c * k->room;
        }
        if (!run_many_backward((int)p->C, wide, n, &r)) {
            break;
        }
        for (int64_t c = 0; c < p->C && !straight; ++c) {
            ss_store_f32(out, (k->b * p->C + c) * p->S + at, n, r.h[c]);
        }
        at += n;
    }
    return at - offset;
}
