/* SPDX-License-Identifier: Apache-2.0
 *
 * voxel_loss_sweep.h: one forward or backward sweep for any sum of terms, in REAL (float, double).
 *
 * The voxels of a sample are cut into chunks (items of work) and these into blocks that stay in the
 * first-level cache. For a block, rows of C classes are loaded and p and ln s = ln sum e^(z - max)
 * are computed once; then every term adds to its sums (forward) or to the gradient rows (backward):
 *
 *     h_c += p_c g_c - direct_c,   s += alpha - sum_c p_c g_c,   at last dz_c = h_c + p_c s
 *
 * (sigmoid: h_c += p_c (1 - p_c) g_c + direct; none: h_c += g_c). Rows are padded to whole lanes
 * with weight 0. Numerics: lanes of REAL within a block, folded in lane order into double, doubles
 * added in block and then chunk order. Logarithms are taken of s alone, never of p.
 *
 * Rows are made in voxel_loss_rows.h. The file that includes this defines REAL, VL_SIMD, VL_EXP,
 * VL_LOG, VL_KEEP_IF and VL_NAME(function).
 */

typedef struct vl_sweep {
    const vl_plan *plan;
    double *parts; /* forward: [items, terms, C, 4] */
    int64_t *bad;  /* forward: [items, 2] */
    const double *by;
    const ss_tensor *dlogits;
    char *scratch;
    int64_t scratch_bytes;
    int64_t room;
    int64_t chunks; /* per sample */
} vl_sweep;

/* ---- forward terms -------------------------------------------------------------------------- */

static double fold(const REAL *lane) {
    double sum = 0.0;
    for (int l = 0; l < SS_LANES; ++l) {
        sum += (double)lane[l];
    }
    return sum;
}

static double weight_sum(int64_t n, const REAL *restrict m) {
    REAL w[SS_LANES] = {0};
    for (int64_t i = 0; i < n; i += SS_LANES) {
        VL_SIMD
        for (int l = 0; l < SS_LANES; ++l) {
            w[l] += m[i + l];
        }
    }
    return fold(w);
}

static void dice_sums(int64_t n, int squared, const REAL *restrict m, const REAL *restrict q,
                      const REAL *restrict p, double *out) {
    REAL si[SS_LANES] = {0}, sz[SS_LANES] = {0}, sy[SS_LANES] = {0}, sw[SS_LANES] = {0};
    const REAL a = squared ? (REAL)1 : (REAL)0; /* v (a v + e) is v^2 or v, without a branch */
    const REAL e = (REAL)1 - a;
    for (int64_t i = 0; i < n; i += SS_LANES) {
        VL_SIMD
        for (int l = 0; l < SS_LANES; ++l) {
            REAL w = m[i + l], t = q[i + l], v = p[i + l];
            si[l] += w * (t * v);
            sz[l] += w * (v * (a * v + e));
            sy[l] += w * (t * (a * t + e));
            sw[l] += w;
        }
    }
    out[0] += fold(si);
    out[1] += fold(sz);
    out[2] += fold(sy);
    out[3] += fold(sw);
}

/* Sum of m a ((1 - smoothing) q + smoothing / C) (lse z - z_c), and of m q. */
static void ce_sums(int64_t n, REAL keep, REAL extra, const vl_block *k, const REAL *restrict m,
                    const REAL *restrict q, const REAL *restrict z, double *num, double *den) {
    const REAL *restrict mx = k->mx, *restrict ls = k->ls;
    REAL sn[SS_LANES] = {0}, sd[SS_LANES] = {0};
    for (int64_t i = 0; i < n; i += SS_LANES) {
        VL_SIMD
        for (int l = 0; l < SS_LANES; ++l) {
            REAL w = m[i + l], t = q[i + l];
            REAL r = w * (keep * t + extra);
            REAL d = r * ((mx[i + l] - z[i + l]) + ls[i + l]);
            sn[l] += r == 0 ? (REAL)0 : d; /* a class of weight 0 may have an infinite logit */
            sd[l] += w * t;
        }
    }
    *num += fold(sn);
    *den += fold(sd);
}

static double bce_sum(int64_t n, const REAL *restrict m, const REAL *restrict q,
                      const REAL *restrict z) {
    REAL s[SS_LANES] = {0};
    for (int64_t i = 0; i < n; i += SS_LANES) {
        VL_SIMD
        for (int l = 0; l < SS_LANES; ++l) {
            REAL v = z[i + l];
            REAL soft = VL_LOG((REAL)1 + VL_EXP(v > 0 ? -v : v));
            s[l] += m[i + l] * ((v > 0 ? v : (REAL)0) - v * q[i + l] + soft);
        }
    }
    return fold(s);
}

static double mse_sum(int64_t n, const REAL *restrict m, const REAL *restrict q,
                      const REAL *restrict p) {
    REAL s[SS_LANES] = {0};
    for (int64_t i = 0; i < n; i += SS_LANES) {
        VL_SIMD
        for (int l = 0; l < SS_LANES; ++l) {
            REAL d = p[i + l] - q[i + l];
            s[l] += m[i + l] * (d * d);
        }
    }
    return fold(s);
}

static double kl_sum(int64_t n, const vl_block *k, const REAL *restrict m, const REAL *restrict q,
                     const REAL *restrict z) {
    const REAL *restrict mx = k->mx, *restrict ls = k->ls;
    REAL s[SS_LANES] = {0};
    for (int64_t i = 0; i < n; i += SS_LANES) {
        VL_SIMD
        for (int l = 0; l < SS_LANES; ++l) {
            REAL t = q[i + l];
            REAL d = t * (VL_LOG(t) + ((mx[i + l] - z[i + l]) + ls[i + l]));
            s[l] += m[i + l] * (t == 0 ? (REAL)0 : d);
        }
    }
    return fold(s);
}

static double entropy_sum(int64_t n, const vl_block *k, const REAL *restrict m,
                          const REAL *restrict p, const REAL *restrict z) {
    const REAL *restrict mx = k->mx, *restrict ls = k->ls;
    REAL s[SS_LANES] = {0};
    for (int64_t i = 0; i < n; i += SS_LANES) {
        VL_SIMD
        for (int l = 0; l < SS_LANES; ++l) {
            s[l] += m[i + l] * (p[i + l] * ((mx[i + l] - z[i + l]) + ls[i + l]));
        }
    }
    return fold(s);
}

/* The term of this kind with labels whose CE and Dice share one loop per class; NULL otherwise. */
static const vl_term *paired_dice(const vl_block *k, const vl_term *ce) {
    if (ce->kind != VL_CE || !ce->hard || ce->smoothing != 0.0 ||
        k->plan->activation != VL_SOFTMAX) {
        return NULL;
    }
    for (int32_t i = 0; i < k->plan->n_terms; ++i) {
        const vl_term *t = &k->plan->term[i];
        if (t->kind == VL_DICE && t->hard && t->slot == ce->slot && vl_covers(t, k->b)) {
            return t;
        }
    }
    return NULL;
}

/* Whether a CE term before or after has done this Dice term's work. */
static int is_done(const vl_block *k, const vl_term *dice) {
    for (int32_t i = 0; dice->kind == VL_DICE && i < k->plan->n_terms; ++i) {
        const vl_term *t = &k->plan->term[i];
        if (vl_covers(t, k->b) && paired_dice(k, t) == dice) {
            return 1;
        }
    }
    return 0;
}

/* One class of CE and Dice on the same labels: ce num, I, Z, Y and sum m into out. */
static void labels_sums(int64_t n, int squared, int32_t label, const vl_block *k,
                        const int32_t *restrict y, const REAL *restrict m, int64_t c, double *out) {
    const REAL *restrict p = k->p + c * k->room, *restrict z = k->z[c];
    const REAL *restrict mx = k->mx, *restrict ls = k->ls;
    REAL sn[SS_LANES] = {0}, si[SS_LANES] = {0}, sz[SS_LANES] = {0}, sy[SS_LANES] = {0};
    const REAL a = squared ? (REAL)1 : (REAL)0;
    const REAL e = (REAL)1 - a;
    for (int64_t i = 0; i < n; i += SS_LANES) {
        VL_SIMD
        for (int l = 0; l < SS_LANES; ++l) {
            REAL w = m[i + l], v = p[i + l];
            const int32_t hit = y[i + l] == label;
            REAL t = VL_KEEP_IF(hit, w);
            sn[l] += VL_KEEP_IF(hit, t * ((mx[i + l] - z[i + l]) + ls[i + l]));
            si[l] += t * v;
            sz[l] += w * (v * (a * v + e));
            sy[l] += t;
        }
    }
    out[0] = fold(sn);
    out[1] = fold(si);
    out[2] = fold(sz);
    out[3] = fold(sy);
}

static void labels_forward(vl_block *k, const vl_term *ce, const vl_term *dice, double *of_ce,
                           double *of_dice) {
    const double w = weight_sum(k->lanes, k->m + ce->slot * k->room);
    for (int64_t c = 0; c < k->plan->C; ++c) {
        double s[4];
        labels_sums(k->lanes, dice->squared, vl_label(k->plan, c), k, k->y + ce->slot * k->room,
                    k->m + ce->slot * k->room, c, s);
        of_ce[0] += ce->a[c] * s[0];
        of_ce[1] += ce->a[c] * s[3];
        of_dice[4 * c] += s[1];
        of_dice[4 * c + 1] += s[2];
        of_dice[4 * c + 2] += s[3];
        of_dice[4 * c + 3] += w;
    }
    of_ce[2] += w;
}

/* Adds this block's part of one term to sums [C, 4]. */
static void term_forward(vl_block *k, const vl_term *t, double *sums) {
    const int64_t C = k->plan->C;
    const int64_t n = k->lanes;
    const REAL *m = k->m + t->slot * k->room;
    const double w = t->kind == VL_DICE ? 0.0 : weight_sum(n, m);
    double den = 0.0;
    for (int64_t c = 0; c < C; ++c) {
        const REAL *p = k->p + c * k->room;
        const REAL *z = k->z[c];
        const REAL *q = t->target < 0 ? NULL : target_row(k, t, c);
        if (t->kind == VL_DICE) {
            dice_sums(n, t->squared, m, q, p, sums + 4 * c);
        } else if (t->kind == VL_CE && k->plan->activation == VL_SIGMOID) {
            sums[0] += bce_sum(n, m, q, z);
        } else if (t->kind == VL_CE) {
            double d = 0.0;
            ce_sums(n, (REAL)(t->a[c] * (1.0 - t->smoothing)),
                    (REAL)(t->a[c] * t->smoothing / (double)C), k, m, q, z, sums, &d);
            den += t->a[c] * d;
        } else if (t->kind == VL_MSE) {
            sums[0] += mse_sum(n, m, q, p);
        } else if (t->kind == VL_KL) {
            sums[0] += kl_sum(n, k, m, q, z);
        } else {
            sums[0] += entropy_sum(n, k, m, p, z);
        }
    }
    if (t->kind != VL_DICE) {
        int labels = t->kind == VL_CE && t->hard && k->plan->activation == VL_SOFTMAX;
        sums[1] += labels ? den : w;
        sums[2] += w;
    }
}

/* ---- backward terms ------------------------------------------------------------------------- */

/* g = m (u q + v p + e): Dice (u, v, e by I and Z), squared error (u = -2, v = 2, e = 0). */
static void add_by_p(vl_block *k, int64_t c, REAL u, REAL v, REAL e, const REAL *restrict m,
                     const REAL *restrict q) {
    const REAL *restrict p = k->p + c * k->room;
    REAL *restrict h = k->h[c];
    REAL *restrict s = k->s;
    if (k->plan->activation == VL_SOFTMAX) {
        VL_SIMD
        for (int64_t i = 0; i < k->lanes; ++i) {
            REAL pg = p[i] * (m[i] * (u * q[i] + v * p[i] + e));
            h[i] += pg;
            s[i] -= pg;
        }
    } else if (k->plan->activation == VL_SIGMOID) {
        VL_SIMD
        for (int64_t i = 0; i < k->lanes; ++i) {
            h[i] += p[i] * ((REAL)1 - p[i]) * (m[i] * (u * q[i] + v * p[i] + e));
        }
    } else {
        VL_SIMD
        for (int64_t i = 0; i < k->lanes; ++i) {
            h[i] += m[i] * (u * q[i] + v * p[i] + e);
        }
    }
}

/* direct = m (u q + e), alpha = the sum of these over classes: cross entropy and KL. */
static void add_direct(vl_block *k, int64_t c, REAL u, REAL e, const REAL *restrict m,
                       const REAL *restrict q) {
    const REAL *restrict p = k->p + c * k->room;
    REAL *restrict h = k->h[c];
    REAL *restrict s = k->s;
    if (k->plan->activation == VL_SIGMOID) {
        VL_SIMD
        for (int64_t i = 0; i < k->lanes; ++i) {
            h[i] += m[i] * u * (p[i] - q[i]);
        }
        return;
    }
    VL_SIMD
    for (int64_t i = 0; i < k->lanes; ++i) {
        REAL d = m[i] * (u * q[i] + e);
        h[i] -= d;
        s[i] += d;
    }
}

static void add_entropy(vl_block *k, int64_t c, REAL u, const REAL *restrict m) {
    const REAL *restrict p = k->p + c * k->room, *restrict z = k->z[c];
    const REAL *restrict mx = k->mx, *restrict ls = k->ls;
    REAL *restrict h = k->h[c];
    REAL *restrict s = k->s;
    VL_SIMD
    for (int64_t i = 0; i < k->lanes; ++i) {
        REAL pg = p[i] * (m[i] * u * ((mx[i] - z[i]) + ls[i]));
        h[i] += pg;
        s[i] -= pg;
    }
}

/* One class of CE (a = its weight times its derivative) and Dice on the same labels. */
static void add_labels(vl_block *k, int64_t c, REAL a, REAL u, REAL v, REAL e, int32_t slot) {
    const int32_t *restrict y = k->y + slot * k->room;
    const REAL *restrict m = k->m + slot * k->room, *restrict p = k->p + c * k->room;
    const int32_t label = vl_label(k->plan, c);
    REAL *restrict h = k->h[c];
    REAL *restrict s = k->s;
    VL_SIMD
    for (int64_t i = 0; i < k->lanes; ++i) {
        REAL w = m[i];
        REAL t = y[i] == label ? w : (REAL)0;
        REAL d = t * a;
        REAL pg = p[i] * (t * u + w * (v * p[i] + e));
        h[i] += pg - d;
        s[i] += d - pg;
    }
}

static void labels_backward(vl_block *k, const vl_term *ce, const vl_term *dice,
                            const double *by_ce, const double *by_dice) {
    for (int64_t c = 0; c < k->plan->C; ++c) {
        double z = by_dice[2 * c + 1];
        add_labels(k, c, (REAL)(by_ce[0] * ce->a[c]), (REAL)by_dice[2 * c],
                   dice->squared ? (REAL)(2.0 * z) : (REAL)0, dice->squared ? (REAL)0 : (REAL)z,
                   ce->slot);
    }
}

/* Adds one term to the gradient rows; by [C, 2] are the derivatives of the loss by its sums. */
static void term_backward(vl_block *k, const vl_term *t, const double *by) {
    const int64_t C = k->plan->C;
    const REAL *m = k->m + t->slot * k->room;
    for (int64_t c = 0; c < C; ++c) {
        const REAL *q = t->target < 0 ? NULL : target_row(k, t, c);
        double u = by[0];
        switch (t->kind) {
        case VL_DICE:
            add_by_p(k, c, (REAL)by[2 * c], t->squared ? (REAL)(2.0 * by[2 * c + 1]) : (REAL)0,
                     t->squared ? (REAL)0 : (REAL)by[2 * c + 1], m, q);
            break;
        case VL_MSE:
            add_by_p(k, c, (REAL)(-2.0 * u), (REAL)(2.0 * u), (REAL)0, m, q);
            break;
        case VL_ENTROPY:
            add_entropy(k, c, (REAL)u, m);
            break;
        case VL_KL:
            add_direct(k, c, (REAL)u, (REAL)0, m, q);
            break;
        default: {
            double a = k->plan->activation == VL_SIGMOID ? u : u * t->a[c];
            add_direct(k, c, (REAL)(a * (1.0 - t->smoothing)), (REAL)(a * t->smoothing / (double)C),
                       m, q);
        }
        }
    }
}

/* ---- sweeps --------------------------------------------------------------------------------- */

static int64_t block_room(int64_t C) {
    return C <= 4 ? 1024 : (C <= 8 ? 512 : (C <= 32 ? 256 : 64));
}

static int64_t align64(int64_t bytes) {
    return (bytes + 63) / 64 * 64;
}

/* Cuts one thread's scratch into rows; with `at` NULL, tells how many bytes that takes. */
static int64_t cut_scratch(const vl_plan *p, int64_t room, char *at, vl_block *k) {
    const int64_t row = room * (int64_t)sizeof(REAL);
    const int64_t slots = p->n_slots;
    const int64_t bytes[] = {align64(p->C * (int64_t)sizeof(REAL *)),
                             align64(p->C * (int64_t)sizeof(REAL *)),
                             p->C * row, /* zs */
                             p->C * row, /* p */
                             p->C * row, /* hs */
                             row,
                             row,
                             row,
                             row,
                             row,
                             slots * row,
                             align64(slots * room * (int64_t)sizeof(int32_t))};
    int64_t total = 0;
    char *part[sizeof bytes / sizeof bytes[0]];
    for (size_t i = 0; i < sizeof bytes / sizeof bytes[0]; ++i) {
        part[i] = at ? at + total : NULL;
        total += bytes[i];
    }
    k->z = (const REAL **)(void *)part[0];
    k->h = (REAL **)(void *)part[1];
    k->zs = (REAL *)(void *)part[2];
    k->p = (REAL *)(void *)part[3];
    k->hs = (REAL *)(void *)part[4];
    k->mx = (REAL *)(void *)part[5];
    k->ls = (REAL *)(void *)part[6];
    k->s = (REAL *)(void *)part[7];
    k->q = (REAL *)(void *)part[8];
    k->w = (REAL *)(void *)part[9];
    k->m = (REAL *)(void *)part[10];
    k->y = (int32_t *)(void *)part[11];
    k->plan = p;
    k->room = room;
    return total;
}

static int is_covered(const vl_plan *p, int64_t b) {
    for (int32_t i = 0; i < p->n_terms; ++i) {
        if (vl_covers(&p->term[i], b)) {
            return 1;
        }
    }
    return 0;
}

/* Whether ln s is needed in this sample. */
static int wants_log(const vl_plan *p, int64_t b, int forward) {
    for (int32_t i = 0; i < p->n_terms; ++i) {
        const vl_term *t = &p->term[i];
        if (vl_covers(t, b) &&
            (t->kind == VL_ENTROPY || (forward && (t->kind == VL_CE || t->kind == VL_KL)))) {
            return 1;
        }
    }
    return 0;
}

static void start_block(vl_block *k, int64_t b, int64_t offset, int64_t n) {
    k->b = b;
    k->offset = offset;
    k->n = n;
    k->lanes = (n + SS_LANES - 1) / SS_LANES * SS_LANES;
    read_logits(k);
    for (int32_t i = 0; i < k->plan->n_slots; ++i) {
        if (k->plan->slot[i].first <= b && b < k->plan->slot[i].last) {
            read_slot(k, i);
        }
    }
}

static void forward_block(vl_block *k, double *sums) {
    const vl_plan *p = k->plan;
    if (VL_FUSED_FORWARD(k, sums)) {
        return;
    }
    activate(k, wants_log(p, k->b, 1));
    for (int32_t i = 0; i < p->n_terms; ++i) {
        const vl_term *t = &p->term[i];
        if (!vl_covers(t, k->b) || is_done(k, t)) {
            continue;
        }
        const vl_term *dice = paired_dice(k, t);
        if (dice) {
            labels_forward(k, t, dice, sums + i * p->C * 4, sums + (dice - p->term) * p->C * 4);
        } else {
            term_forward(k, t, sums + i * p->C * 4);
        }
    }
}

static void forward_items(void *ctx, int64_t begin, int64_t end, int32_t thread) {
    const vl_sweep *sweep = ctx;
    const vl_plan *p = sweep->plan;
    vl_block k = {0};
    cut_scratch(p, sweep->room, sweep->scratch + thread * sweep->scratch_bytes, &k);
    for (int64_t item = begin; item < end; ++item) {
        int64_t b = item / sweep->chunks;
        int64_t from = item % sweep->chunks * VL_CHUNK;
        int64_t to = from + VL_CHUNK < p->S ? from + VL_CHUNK : p->S;
        double *sums = sweep->parts + item * p->n_terms * p->C * 4;
        memset(sums, 0, (size_t)(p->n_terms * p->C * 4) * sizeof(double));
        k.bad = 0;
        k.bad_label = 0;
        k.b = b;
        for (int64_t o = from; o < to && is_covered(p, b);) {
            o += VL_PAIR_FORWARD(&k, o, to, sums);
            if (o < to) {
                start_block(&k, b, o, to - o < sweep->room ? to - o : sweep->room);
                forward_block(&k, sums);
                o += k.n;
            }
        }
        sweep->bad[2 * item] = k.bad;
        sweep->bad[2 * item + 1] = k.bad_label;
    }
}

static void gradient_rows(vl_block *k, const ss_tensor *out, int straight) {
    const vl_plan *p = k->plan;
    for (int64_t c = 0; c < p->C; ++c) {
        k->h[c] = straight ? (REAL *)out->data + (k->b * p->C + c) * p->S + k->offset
                           : k->hs + c * k->room;
    }
}

static void backward_block(vl_block *k, const double *by) {
    const vl_plan *p = k->plan;
    if (VL_FUSED_BACKWARD(k, by)) {
        return;
    }
    activate(k, wants_log(p, k->b, 0));
    memset(k->s, 0, (size_t)k->lanes * sizeof(REAL));
    for (int64_t c = 0; c < p->C; ++c) {
        memset(k->h[c], 0, (size_t)k->lanes * sizeof(REAL));
    }
    for (int32_t i = 0; i < p->n_terms; ++i) {
        const vl_term *t = &p->term[i];
        const double *d = by + (i * p->B + k->b) * p->C * 2;
        if (!vl_covers(t, k->b) || is_done(k, t)) {
            continue;
        }
        const vl_term *dice = paired_dice(k, t);
        if (dice) {
            labels_backward(k, t, dice, d, by + ((dice - p->term) * p->B + k->b) * p->C * 2);
        } else {
            term_backward(k, t, d);
        }
    }
    for (int64_t c = 0; c < p->C && p->activation == VL_SOFTMAX; ++c) {
        const REAL *restrict v = k->p + c * k->room, *restrict s = k->s;
        REAL *restrict h = k->h[c];
        VL_SIMD
        for (int64_t i = 0; i < k->lanes; ++i) {
            h[i] += v[i] * s[i];
        }
    }
}

static void zero_rows(const vl_plan *p, const ss_tensor *out, int64_t b, int64_t from, int64_t to) {
    size_t size = ss_dtype_size(out->dtype);
    for (int64_t c = 0; c < p->C; ++c) {
        memset((char *)out->data + (size_t)((b * p->C + c) * p->S + from) * size, 0,
               (size_t)(to - from) * size);
    }
}

static void backward_items(void *ctx, int64_t begin, int64_t end, int32_t thread) {
    const vl_sweep *sweep = ctx;
    const vl_plan *p = sweep->plan;
    const ss_tensor *out = sweep->dlogits;
    vl_block k = {0};
    cut_scratch(p, sweep->room, sweep->scratch + thread * sweep->scratch_bytes, &k);
    for (int64_t item = begin; item < end; ++item) {
        int64_t b = item / sweep->chunks;
        int64_t from = item % sweep->chunks * VL_CHUNK;
        int64_t to = from + VL_CHUNK < p->S ? from + VL_CHUNK : p->S;
        if (!is_covered(p, b)) {
            zero_rows(p, out, b, from, to);
            continue;
        }
        k.b = b;
        for (int64_t o = from; o < to;) {
            o += VL_PAIR_BACKWARD(&k, o, to, sweep->by, out);
            if (o == to) {
                break;
            }
            start_block(&k, b, o, to - o < sweep->room ? to - o : sweep->room);
            int straight = out->dtype == VL_REAL_DTYPE && k.lanes == k.n;
            gradient_rows(&k, out, straight);
            backward_block(&k, sweep->by);
            for (int64_t c = 0; c < p->C && !straight; ++c) {
                VL_STORE(out, (b * p->C + c) * p->S + o, k.n, k.h[c]);
            }
            o += k.n;
        }
    }
}

static ss_status make_scratch(ss_exec *x, vl_sweep *s, int64_t items) {
    vl_block k;
    s->room = block_room(s->plan->C);
    s->chunks = (s->plan->S + VL_CHUNK - 1) / VL_CHUNK;
    s->scratch_bytes = align64(cut_scratch(s->plan, s->room, NULL, &k));
    s->scratch = ss_scratch(x, s->scratch_bytes, (size_t)ss_parallel_threads(x, items, 1));
    return s->scratch ? SS_OK : SS_NO_MEMORY;
}

static ss_status name_bad(ss_exec *x, const vl_plan *p, const int64_t *bad, int64_t items) {
    for (int64_t i = 0; i < items; ++i) {
        if (bad[2 * i] == 1) {
            int64_t classes = p->C == 1 ? 2 : p->C;
            return ss_fail(x, SS_INVALID,
                           "target: expected labels 0 to %lld (or ignore_index) for %lld classes, "
                           "got %lld",
                           (long long)classes - 1, (long long)classes, (long long)bad[2 * i + 1]);
        }
        if (bad[2 * i] == 2) {
            return ss_fail(x, SS_INVALID, "weight: expected values >= 0, got a negative one");
        }
    }
    return SS_OK;
}

ss_status VL_NAME(vl_forward)(ss_exec *x, const vl_plan *p, double *sums) {
    const int64_t chunks = (p->S + VL_CHUNK - 1) / VL_CHUNK;
    const int64_t items = p->B * chunks;
    const int64_t size = p->C * 4;
    vl_sweep s = {.plan = p};
    s.parts = ss_scratch(x, items, (size_t)(p->n_terms * size) * sizeof(double));
    s.bad = ss_scratch(x, items, 2 * sizeof(int64_t));
    ss_status status = s.parts && s.bad ? make_scratch(x, &s, items) : SS_NO_MEMORY;
    if (status == SS_OK) {
        ss_parallel_for(x, items, 1, forward_items, &s);
        status = name_bad(x, p, s.bad, items);
    }
    for (int64_t item = 0; status == SS_OK && item < items; ++item) {
        for (int64_t i = 0; i < p->n_terms; ++i) {
            const double *from = s.parts + (item * p->n_terms + i) * size;
            double *to = sums + (i * p->B + item / chunks) * size;
            for (int64_t j = 0; j < size; ++j) {
                to[j] += from[j];
            }
        }
    }
    ss_scratch_free(s.scratch);
    ss_scratch_free(s.bad);
    ss_scratch_free(s.parts);
    return status;
}

ss_status VL_NAME(vl_backward)(ss_exec *x, const vl_plan *p, const double *by,
                               const ss_tensor *dlogits) {
    const int64_t items = p->B * ((p->S + VL_CHUNK - 1) / VL_CHUNK);
    vl_sweep s = {.plan = p, .by = by, .dlogits = dlogits};
    ss_status status = make_scratch(x, &s, items);
    if (status == SS_OK) {
        ss_parallel_for(x, items, 1, backward_items, &s);
    }
    ss_scratch_free(s.scratch);
    return status;
}
