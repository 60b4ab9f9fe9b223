/* SPDX-License-Identifier: Apache-2.0
 *
 * fuse_lanes.h: the arithmetic of `fuse` on one block of voxels; fuse.c includes it twice, with
 * REAL float (FN(x) = x_f32, inline exp and log) and double (x_f64, the C library's).
 *
 * Lanes are L rows of `n` numbers: probabilities of L = C classes, or L = 1 row of foreground
 * probabilities ("binary": one channel, or two channels of logits).
 */

typedef struct FN(rows) {
    const REAL *at;
    int64_t step; /* from one channel to the next */
} FN(rows);

/* One thread's block-sized areas. */
typedef struct FN(area) {
    REAL *ref_u, *ref_l;      /* L rows each: used where a source must be converted */
    REAL *source;             /* GROUP x L rows, likewise */
    REAL *mu, *mean;          /* L rows each */
    REAL *spread, *h, *h_ref; /* sum r d^2, or sum r (H - H_ref); entropies */
    REAL *u, *conf, *label, *weight;
    REAL *tmp; /* 2 x GROUP rows */
    uint8_t *bytes;
} FN(area);

/* Sources waiting to be added to one of the means. */
typedef struct FN(group) {
    int count;
    REAL r[SS_MAX_LIST];
    FN(rows) p[SS_MAX_LIST];
} FN(group);

static inline REAL FN(keep)(REAL x, REAL lo, REAL hi) {
    x = x < lo ? lo : x; /* NaN stays */
    return x > hi ? hi : x;
}

/* ---- sources -------------------------------------------------------------------------------- */

static void FN(sigmoid)(int64_t n, const REAL *restrict z, REAL *restrict p) {
    SS_SIMD
    for (int64_t i = 0; i < n; ++i) {
        p[i] = z[i] == z[i] ? REAL_SIGMOID(z[i]) : z[i];
    }
}

/* Two channels: the softmax's second one. m - m is 0, or NaN for a logit of +inf, as in a softmax.
 */
static void FN(softmax2)(int64_t n, const REAL *restrict z0, const REAL *restrict z1,
                         REAL *restrict p) {
    SS_SIMD
    for (int64_t i = 0; i < n; ++i) {
        REAL m = z0[i] > z1[i] ? z0[i] : z1[i];
        REAL d = z1[i] - z0[i];
        p[i] = (d == d ? REAL_SIGMOID(d) : d) + (m - m);
    }
}

static void FN(larger)(int64_t n, const REAL *restrict z, REAL *restrict m) {
    SS_SIMD
    for (int64_t i = 0; i < n; ++i) {
        m[i] = z[i] > m[i] ? z[i] : m[i];
    }
}

/* `e` may be `z`. */
static void FN(exponentials)(int64_t n, const REAL *z, const REAL *restrict m, REAL *e,
                             REAL *restrict sum) {
    SS_SIMD
    for (int64_t i = 0; i < n; ++i) {
        e[i] = REAL_EXP(z[i] - m[i]);
        sum[i] += e[i];
    }
}

static void FN(divide)(int64_t n, const REAL *restrict sum, REAL *restrict p) {
    SS_SIMD
    for (int64_t i = 0; i < n; ++i) {
        p[i] /= sum[i];
    }
}

/* Softmax over the channels; logits that are not REAL are converted into `out` first. */
static void FN(softmax)(const plan *f, const ss_tensor *t, int64_t at, int64_t n, REAL *out,
                        REAL *tmp) {
    REAL *m = tmp;
    REAL *sum = tmp + f->n;
    for (int64_t c = 0; c < f->C; ++c) {
        const REAL *z = REAL_LOAD(t, at + c * f->V, n, out + c * f->n);
        if (c == 0) {
            memcpy(m, z, (size_t)n * sizeof *m);
        } else {
            FN(larger)(n, z, m);
        }
    }
    memset(sum, 0, (size_t)n * sizeof *sum);
    for (int64_t c = 0; c < f->C; ++c) {
        REAL *row = out + c * f->n;
        const REAL *z = t->dtype == REAL_DTYPE ? (const REAL *)t->data + at + c * f->V : row;
        FN(exponentials)(n, z, m, row, sum);
    }
    for (int64_t c = 0; c < f->C; ++c) {
        FN(divide)(n, sum, out + c * f->n);
    }
}

/* One foreground row from one or two channels of logits. */
static void FN(binary)(const plan *f, const ss_tensor *t, int64_t at, int64_t n, REAL *out,
                       REAL *tmp) {
    const int two = f->C == 2;
    const REAL *z0 = REAL_LOAD(t, at, n, tmp);
    const REAL *z1 = two ? REAL_LOAD(t, at + f->V, n, tmp + f->n) : NULL;
    for (int64_t i = 0; i < n; i += STRIP) {
        int64_t m = n - i < STRIP ? n - i : STRIP;
        prefetch(t, at + f->n + i, m);
        if (two) {
            prefetch(t, at + f->V + f->n + i, m);
            FN(softmax2)(m, z0 + i, z1 + i, out + i);
        } else {
            FN(sigmoid)(m, z0 + i, out + i);
        }
    }
}

/* Probabilities of one source: its own memory where possible, else rows of `out`. */
static FN(rows)
    FN(load)(const plan *f, int64_t s, int64_t b, int64_t voxel, int64_t n, REAL *out, REAL *tmp) {
    const ss_tensor *t = &f->a->sources.at[s];
    int64_t at = b * f->C * f->V + voxel;
    if (f->a->logits && f->C <= 2) {
        FN(binary)(f, t, at, n, out, tmp);
        return (FN(rows)){out, f->n};
    }
    for (int64_t c = 0; c < f->C && (!f->direct || f->need_mi); ++c) {
        prefetch(t, at + c * f->V + f->n, HEAD < n ? HEAD : n);
    }
    if (f->a->logits) {
        FN(softmax)(f, t, at, n, out, tmp);
    } else if (t->dtype == REAL_DTYPE) {
        return (FN(rows)){(const REAL *)t->data + at, f->V};
    } else {
        for (int64_t c = 0; c < f->C; ++c) {
            (void)REAL_LOAD(t, at + c * f->V, n, out + c * f->n);
        }
    }
    return (FN(rows)){out, f->n};
}

/* ---- running sums --------------------------------------------------------------------------- */

/* sum += r_k (p_k - ref), and with SPREAD squares += r_k (p_k - ref)^2, for COUNT sources one after
 * the other; sums stay in registers. */
static inline __attribute__((always_inline)) void
FN(add_sources)(const int COUNT, const int SPREAD, int64_t n, const REAL *r, const REAL *const *p,
                const REAL *restrict ref, REAL *restrict sum, REAL *restrict squares) {
    const REAL r0 = r[0], r1 = COUNT > 1 ? r[1] : 0, r2 = COUNT > 2 ? r[2] : 0;
    const REAL r3 = COUNT > 3 ? r[3] : 0;
    const REAL *p0 = p[0], *p1 = COUNT > 1 ? p[1] : ref, *p2 = COUNT > 2 ? p[2] : ref;
    const REAL *p3 = COUNT > 3 ? p[3] : ref;
    SS_SIMD
    for (int64_t i = 0; i < n; ++i) {
        const REAL d0 = p0[i] - ref[i], t0 = r0 * d0;
        REAL s = sum[i] + t0;
        REAL s2 = SPREAD ? squares[i] + t0 * d0 : 0;
        if (COUNT > 1) {
            const REAL d = p1[i] - ref[i], t = r1 * d;
            s += t;
            s2 += t * d;
        }
        if (COUNT > 2) {
            const REAL d = p2[i] - ref[i], t = r2 * d;
            s += t;
            s2 += t * d;
        }
        if (COUNT > 3) {
            const REAL d = p3[i] - ref[i], t = r3 * d;
            s += t;
            s2 += t * d;
        }
        sum[i] = s;
        if (SPREAD) {
            squares[i] = s2;
        }
    }
}

/* Functions of their own: in one large function gcc gives up on vectorising. */
#define ADD(count)                                                                                 \
    static void FN(add_mean##count)(int64_t n, const REAL *r, const REAL *const *p,                \
                                    const REAL *restrict ref, REAL *restrict sum) {                \
        FN(add_sources)(count, 0, n, r, p, ref, sum, NULL);                                        \
    }                                                                                              \
    static void FN(add_spread##count)(int64_t n, const REAL *r, const REAL *const *p,              \
                                      const REAL *restrict ref, REAL *restrict sum,                \
                                      REAL *restrict squares) {                                    \
        FN(add_sources)(count, 1, n, r, p, ref, sum, squares);                                     \
    }
ADD(1)
ADD(2)
ADD(3)
ADD(4)
#undef ADD

/* Up to four sources; `squares` NULL: the mean alone. */
static void FN(add_some)(int count, int64_t n, const REAL *r, const REAL *const *p, const REAL *ref,
                         REAL *sum, REAL *squares) {
    switch (count * 2 + (squares != NULL)) {
#define ADD(count)                                                                                 \
    case count * 2:                                                                                \
        FN(add_mean##count)(n, r, p, ref, sum);                                                    \
        return;                                                                                    \
    case count * 2 + 1:                                                                            \
        FN(add_spread##count)(n, r, p, ref, sum, squares);                                         \
        return;
        ADD(1)
        ADD(2)
        ADD(3)
        ADD(4)
#undef ADD
    default:
        return;
    }
}

/* Adds and empties a group; `squares` NULL: the mean alone. Strip by strip through all sources: the
 * hardware follows many streams, but not where each begins a page of its own after the last. */
static void FN(flush)(const plan *f, int64_t n, FN(group) * g, FN(rows) ref, REAL *sum,
                      REAL *squares) {
    for (int64_t c = 0; c < f->L && g->count; ++c) {
        for (int64_t i = 0; i < n; i += SPAN) {
            const int64_t m = n - i < SPAN ? n - i : SPAN;
            const REAL *q = ref.at + c * ref.step + i;
            for (int k = 0; k < g->count; k += GROUP) {
                const int count = g->count - k < GROUP ? g->count - k : GROUP;
                const REAL *p[GROUP] = {0};
                for (int j = 0; j < count; ++j) {
                    p[j] = g->p[k + j].at + c * g->p[k + j].step + i;
                    for (int64_t at = 0; f->direct && at < m;
                         at += 4 * STRIP / (int64_t)sizeof(REAL)) {
                        ask_ahead(p[j] + at, MAPS_AHEAD);
                    }
                }
                FN(add_some)(count, m, g->r + k, p, q, sum + c * f->n + i,
                             squares ? squares + i : NULL);
            }
        }
    }
    g->count = 0;
}

static inline void FN(push)(FN(group) * g, double r, FN(rows) p) {
    g->r[g->count] = (REAL)r;
    g->p[g->count++] = p;
}

static void FN(shift_back)(int64_t n, const REAL *restrict ref, REAL *restrict sum) {
    SS_SIMD
    for (int64_t i = 0; i < n; ++i) {
        sum[i] += ref[i];
    }
}

static inline REAL FN(p_log_p)(REAL p, REAL offset) {
    REAL x = p + offset;
    return p * REAL_LOG(x > (REAL)1e-7 ? x : (REAL)1e-7);
}

static void FN(entropy_binary)(int64_t n, REAL offset, const REAL *restrict p, REAL *restrict h) {
    SS_SIMD
    for (int64_t i = 0; i < n; ++i) {
        h[i] = -(FN(p_log_p)(p[i], offset) + FN(p_log_p)((REAL)1 - p[i], offset));
    }
}

static void FN(entropy_channel)(int64_t n, REAL offset, const REAL *restrict p, REAL *restrict h) {
    SS_SIMD
    for (int64_t i = 0; i < n; ++i) {
        h[i] -= FN(p_log_p)(p[i], offset);
    }
}

static void FN(entropy)(const plan *f, int64_t n, FN(rows) p, REAL *h) {
    REAL offset = (REAL)f->a->log_offset;
    if (f->L == 1) {
        FN(entropy_binary)(n, offset, p.at, h);
        return;
    }
    memset(h, 0, (size_t)n * sizeof *h);
    for (int64_t c = 0; c < f->L; ++c) {
        FN(entropy_channel)(n, offset, p.at + c * p.step, h);
    }
}

/* ---- maps ----------------------------------------------------------------------------------- */

static void FN(less_square)(int64_t n, const REAL *restrict sum, REAL *restrict squares) {
    SS_SIMD
    for (int64_t i = 0; i < n; ++i) {
        squares[i] -= sum[i] * sum[i];
    }
}

static void FN(scaled)(int64_t n, REAL scale, const REAL *restrict x, REAL *restrict u) {
    SS_SIMD
    for (int64_t i = 0; i < n; ++i) {
        u[i] = FN(keep)(x[i] * scale, (REAL)0, (REAL)1);
    }
}

/* One row: u from the sums, and the mean in place of its sum. */
static void FN(variance_binary)(int64_t n, REAL scale, const REAL *restrict ref, REAL *restrict sum,
                                const REAL *restrict squares, REAL *restrict u) {
    SS_SIMD
    for (int64_t i = 0; i < n; ++i) {
        u[i] = FN(keep)((squares[i] - sum[i] * sum[i]) * scale, (REAL)0, (REAL)1);
        sum[i] += ref[i];
    }
}

static void FN(difference)(int64_t n, const REAL *restrict h, const REAL *restrict h_ref,
                           REAL *restrict spread) {
    SS_SIMD
    for (int64_t i = 0; i < n; ++i) {
        spread[i] = (h[i] - h_ref[i]) - spread[i];
    }
}

static void FN(confidence_binary)(int64_t n, const REAL *restrict p, REAL *restrict conf,
                                  REAL *restrict label) {
    SS_SIMD
    for (int64_t i = 0; i < n; ++i) {
        conf[i] = p[i] > (REAL)0.5 ? p[i] : (REAL)1 - p[i];
        label[i] = p[i] > (REAL)0.5 ? (REAL)1 : (REAL)0;
    }
}

/* Strictly larger only, so ties go to the smallest class; NaN is taken and stays. */
static void FN(confidence_channel)(int64_t n, REAL c, const REAL *restrict p, REAL *restrict conf,
                                   REAL *restrict label) {
    SS_SIMD
    for (int64_t i = 0; i < n; ++i) {
        REAL x = p[i], best = conf[i], at = label[i]; /* no load under a condition */
        int take = (x > best) | (x != x);
        label[i] = take ? c : at;
        conf[i] = take ? x : best;
    }
}

static void FN(ignore_below)(int64_t n, REAL tau, REAL ignore, const REAL *restrict conf,
                             REAL *restrict label) {
    SS_SIMD
    for (int64_t i = 0; i < n; ++i) {
        REAL at = label[i];
        label[i] = conf[i] >= tau ? at : ignore;
    }
}

static void FN(ignore_above)(int64_t n, REAL tau, REAL ignore, const REAL *restrict u,
                             REAL *restrict label) {
    SS_SIMD
    for (int64_t i = 0; i < n; ++i) {
        REAL at = label[i];
        label[i] = u[i] <= tau ? at : ignore;
    }
}

static void FN(label_bytes)(int64_t n, const REAL *restrict label, uint8_t *restrict bytes) {
    SS_SIMD
    for (int64_t i = 0; i < n; ++i) {
        bytes[i] = (uint8_t)(int32_t)label[i];
    }
}

static void FN(weight_exp)(int64_t n, double kappa, const REAL *restrict u, REAL *restrict w) {
    const REAL rate = (REAL)(kappa * -1.4426950408889634); /* of 2^ instead of e^ */
    SS_SIMD
    for (int64_t i = 0; i < n; ++i) {
        w[i] = u[i] == u[i] ? REAL_EXP2(u[i] * rate) : u[i];
    }
}

static void FN(weight_linear)(int64_t n, const REAL *restrict u, REAL *restrict w) {
    SS_SIMD
    for (int64_t i = 0; i < n; ++i) {
        w[i] = (REAL)1 - u[i];
    }
}

/* NaN + 0 keeps a NaN that the comparison would lose. */
static void FN(weight_gate)(int64_t n, REAL tau, const REAL *restrict u, REAL *restrict w) {
    SS_SIMD
    for (int64_t i = 0; i < n; ++i) {
        w[i] = (u[i] <= tau ? (REAL)1 : (REAL)0) + (u[i] - u[i]);
    }
}

static void FN(weight_conf)(int64_t n, REAL chance, const REAL *restrict conf, REAL *restrict w) {
    const REAL scale = (REAL)1 / ((REAL)1 - chance);
    SS_SIMD
    for (int64_t i = 0; i < n; ++i) {
        w[i] = FN(keep)((conf[i] - chance) * scale, (REAL)0, (REAL)1);
    }
}

static void FN(fill)(int64_t n, REAL value, REAL *restrict x) {
    SS_SIMD
    for (int64_t i = 0; i < n; ++i) {
        x[i] = value;
    }
}

static void FN(complement)(int64_t n, const REAL *restrict p, REAL *restrict q) {
    SS_SIMD
    for (int64_t i = 0; i < n; ++i) {
        q[i] = (REAL)1 - p[i];
    }
}

/* ---- one block ------------------------------------------------------------------------------ */

#ifdef REAL_SIGMOIDS
/* One group's weighted sigmoids; 0 where a logit is not finite. `rows` takes converted logits. */
static int FN(add_logits)(const plan *f, const ss_tensor *const *t, const REAL *r, int64_t at,
                          int64_t n, const REAL *zeros, REAL *rows, REAL *sum) {
    const int64_t C = f->C;
    const REAL *z[2 * GROUP];
    for (int64_t k = 0; k < 2 * GROUP; ++k) {
        const int64_t channel = at + (C == 2 ? k % 2 : 0) * f->V;
        const int none = C == 1 && k % 2 == 0;
        z[k] = none ? zeros : REAL_LOAD(t[k / 2], channel, n, rows + k * f->n);
    }
    return REAL_SIGMOIDS(n, r, z, sum) < 0x7f800000;
}

/* The foreground's mean from logits alone; 0 where one of them is not finite. Needs no reference:
 * nothing cancels in a mean. */
static int FN(mean_of_logits)(const plan *f, const double *r, const FN(area) * w, int64_t b,
                              int64_t at, int64_t n, REAL *sum) {
    const ss_tensor *source[GROUP];
    REAL weight[GROUP];
    const int64_t first = b * f->C * f->V + at;
    int count = 0;
    memset(sum, 0, (size_t)n * sizeof *sum);
    if (f->C == 1) {
        memset(w->h, 0, (size_t)n * sizeof *w->h); /* the background's logits */
    }
    for (int64_t s = 0; s < f->S; ++s) {
        if (r[s] > 0) {
            source[count] = &f->a->sources.at[s];
            weight[count++] = (REAL)r[s];
        }
        if (count == 0 || (count < GROUP && s < f->S - 1)) {
            continue;
        }
        for (; count < GROUP; ++count) { /* the last group: its first source again, for nothing */
            source[count] = source[0];
            weight[count] = 0;
        }
        if (!FN(add_logits)(f, source, weight, first, n, w->h, w->tmp, sum)) {
            return 0;
        }
        count = 0;
    }
    return 1;
}
#endif

/* One pass over the sources of sample b: mu, mean (both without their shift) and spread. */
static void FN(gather)(const plan *f, const sample *of, const FN(area) * w, int64_t b, int64_t at,
                       int64_t n, FN(rows) * ref_u, FN(rows) * ref_l) {
    size_t row = (size_t)f->n * sizeof(REAL);
    const int mean = f->need_mean && !of->same;
    if (f->need_mu || of->same) {
        *ref_u = FN(load)(f, of->ref_u, b, at, n, w->ref_u, w->tmp);
        memset(w->mu, 0, row * (size_t)f->L);
        memset(w->spread, 0, row);
    }
    if (f->need_mi) {
        FN(entropy)(f, n, *ref_u, w->h_ref);
    }
    if (mean) {
        *ref_l = FN(load)(f, of->ref_l, b, at, n, w->ref_l, w->tmp);
        memset(w->mean, 0, row * (size_t)f->L);
    }
    FN(group) to_mu = {0};
    FN(group) to_mean = {0};
    REAL *squares = f->need_var ? w->spread : NULL;
    int64_t loaded = 0;
    for (int64_t s = 0; s < f->S; ++s) {
        int in_mu = (f->need_mu || of->same) && of->r_unc[s] > 0 && s != of->ref_u;
        int in_mean = mean && of->r_lab[s] > 0 && s != of->ref_l;
        if (!in_mu && !in_mean) {
            continue;
        }
        REAL *rows = w->source + (f->direct ? 0 : loaded * f->L * f->n);
        FN(rows) p = FN(load)(f, s, b, at, n, rows, w->tmp);
        if (in_mu) {
            FN(push)(&to_mu, of->r_unc[s], p);
        }
        if (in_mean) {
            FN(push)(&to_mean, of->r_lab[s], p);
        }
        if (in_mu && f->need_mi) {
            FN(entropy)(f, n, p, w->h);
            const REAL r = (REAL)of->r_unc[s];
            const REAL *h = w->h;
            FN(add_mean1)(n, &r, &h, w->h_ref, w->spread);
        }
        if (++loaded == (f->direct ? f->S : GROUP)) {
            FN(flush)(f, n, &to_mu, *ref_u, w->mu, squares);
            FN(flush)(f, n, &to_mean, *ref_l, w->mean, NULL);
            loaded = 0;
        }
    }
    FN(flush)(f, n, &to_mu, *ref_u, w->mu, squares);
    FN(flush)(f, n, &to_mean, *ref_l, w->mean, NULL);
}

/* Both means from their sums, and sum r (p - mu)^2, or its u if that is one row. */
static void FN(finish)(const plan *f, const sample *of, const FN(area) * w, int64_t n,
                       FN(rows) ref_u, FN(rows) ref_l) {
    const int mu = f->need_mu || of->same;
    if (mu && f->L == 1 && f->need_var) {
        FN(variance_binary)(n, (REAL)f->scale, ref_u.at, w->mu, w->spread, w->u);
    }
    for (int64_t c = 0; mu && c < f->L && !(f->L == 1 && f->need_var); ++c) {
        REAL *sum = w->mu + c * f->n;
        if (f->need_var) {
            FN(less_square)(n, sum, w->spread);
        }
        FN(shift_back)(n, ref_u.at + c * ref_u.step, sum);
    }
    for (int64_t c = 0; f->need_mean && !of->same && c < f->L; ++c) {
        FN(shift_back)(n, ref_l.at + c * ref_l.step, w->mean + c * f->n);
    }
}

/* u from the means and the spread. */
static void FN(doubt)(const plan *f, const FN(area) * w, int64_t n) {
    if (f->need_var) {
        if (f->L > 1) {
            FN(scaled)(n, (REAL)f->scale, w->spread, w->u);
        }
        return;
    }
    FN(entropy)(f, n, (FN(rows)){w->mu, f->n}, w->h);
    if (f->need_mi) {
        FN(difference)(n, w->h, w->h_ref, w->spread);
        FN(scaled)(n, (REAL)f->scale, w->spread, w->u);
    } else {
        FN(scaled)(n, (REAL)f->scale, w->h, w->u);
    }
}

/* Nothing is known about this sample: uniform distribution, u = 1, weight 0, label ignored. */
static void FN(unknown)(const plan *f, const FN(area) * w, int64_t n) {
    REAL chance = (REAL)(1.0 / (double)f->K);
    for (int64_t c = 0; c < f->L; ++c) {
        FN(fill)(n, chance, w->mean + c * f->n);
    }
    FN(fill)(n, (REAL)1, w->u);
    FN(fill)(n, chance, w->conf);
    FN(fill)(n, (REAL)f->a->ignore_index, w->label);
    FN(fill)(n, (REAL)0, w->weight);
}

static void FN(decide)(const plan *f, const FN(area) * w, int64_t n, const REAL *mean) {
    const ss_fuse_args *a = f->a;
    if (f->L == 1) {
        FN(confidence_binary)(n, mean, w->conf, w->label);
    } else {
        memcpy(w->conf, mean, (size_t)n * sizeof *mean);
        memset(w->label, 0, (size_t)n * sizeof *w->label);
        for (int64_t c = 1; c < f->L; ++c) {
            FN(confidence_channel)(n, (REAL)c, mean + c * f->n, w->conf, w->label);
        }
    }
    if (a->want_label) {
        FN(ignore_below)(n, (REAL)a->tau_c, (REAL)a->ignore_index, w->conf, w->label);
        if (a->tau_u < 1) {
            FN(ignore_above)(n, (REAL)a->tau_u, (REAL)a->ignore_index, w->u, w->label);
        }
    }
}

static void FN(weigh)(const plan *f, const FN(area) * w, int64_t n) {
    switch (f->a->weighting) {
    case WEIGHT_EXP:
        FN(weight_exp)(n, f->a->kappa, w->u, w->weight);
        return;
    case WEIGHT_LINEAR:
        FN(weight_linear)(n, w->u, w->weight);
        return;
    case WEIGHT_GATE:
        FN(weight_gate)(n, (REAL)f->a->tau_u, w->u, w->weight);
        return;
    case WEIGHT_CONF:
        FN(weight_conf)(n, (REAL)(1.0 / (double)f->K), w->conf, w->weight);
        return;
    default:
        FN(fill)(n, (REAL)1, w->weight);
    }
}

static void FN(put)(const plan *f, const ss_tensor *out, int64_t at, int64_t n, const REAL *x) {
    store_bytes(f->stream, (REAL *)out->data + at, x, n * (int64_t)sizeof *x);
}

static void FN(store)(const plan *f, const FN(area) * w, int64_t b, int64_t at, int64_t n,
                      const REAL *mean) {
    const ss_fuse_args *a = f->a;
    int64_t to = b * f->V + at;
    if (a->want_mean && a->channels == 2 && f->L == 1) {
        FN(complement)(n, mean, w->tmp);
        FN(put)(f, &a->mean, 2 * b * f->V + at, n, w->tmp);
        FN(put)(f, &a->mean, (2 * b + 1) * f->V + at, n, mean);
    } else if (a->want_mean) {
        for (int64_t c = 0; c < f->L; ++c) {
            FN(put)(f, &a->mean, (b * f->L + c) * f->V + at, n, mean + c * f->n);
        }
    }
    if (a->want_label) {
        FN(label_bytes)(n, w->label, w->bytes);
        store_bytes(f->stream, (uint8_t *)a->label.data + to, w->bytes, n);
    }
    if (a->want_confidence) {
        FN(put)(f, &a->confidence, to, n, w->conf);
    }
    if (a->want_uncertainty) {
        FN(put)(f, &a->uncertainty, to, n, w->u);
    }
    if (a->want_weight) {
        FN(put)(f, &a->weight, to, n, w->weight);
    }
}

/* The short way to the means, where there is one; 0: take the long one. */
static int FN(means)(const plan *f, const sample *of, const FN(area) * w, int64_t b, int64_t at,
                     int64_t n) {
#ifdef REAL_SIGMOIDS
    const int mu = f->need_mu || of->same;
    const int mean = f->need_mean && !of->same;
    return f->sigmoids && (!mu || FN(mean_of_logits)(f, of->r_unc, w, b, at, n, w->mu)) &&
           (!mean || FN(mean_of_logits)(f, of->r_lab, w, b, at, n, w->mean));
#else
    (void)f, (void)of, (void)w, (void)b, (void)at, (void)n;
    return 0;
#endif
}

#ifdef REAL_SIGMOIDS
/* NULL for what is not wanted; `aligned`: still, everything begins with a line. */
static float *FN(place)(int64_t wanted, const ss_tensor *out, int64_t at, int *aligned) {
    float *to = wanted ? (float *)out->data + at : NULL;
    *aligned &= ((uintptr_t)to & 63) == 0;
    return to;
}

/* A block of the common case: what comes out is stored while it is in L1. */
static void FN(short_way)(const plan *f, const sample *of, const FN(area) * w, int64_t b,
                          int64_t at, int64_t n) {
    const ss_fuse_args *a = f->a;
    const float rate = (float)(a->kappa * -1.4426950408889634); /* of 2^ instead of e^ */
    const int own_weight = a->want_weight && a->weighting != WEIGHT_EXP;
    const maps_loop loop = maps_loop_for(of->maps);
    const float *p[SS_MAX_LIST];
    float r[SS_MAX_LIST];
    int count = 1, aligned = 1;
    p[0] = (const float *)a->sources.at[of->ref_u].data + b * f->V + at;
    r[0] = 0; /* its difference from itself */
    for (int64_t s = 0; s < f->S; ++s) {
        if (s != of->ref_u && of->r_unc[s] > 0) {
            p[count] = (const float *)a->sources.at[s].data + b * f->V + at;
            r[count++] = (float)of->r_unc[s];
        }
    }
    const int64_t to = b * f->V + at, two = a->channels == 2;
    maps_out out = {.stream = f->stream};
    out.other = FN(place)(a->want_mean && two, &a->mean, to + b * f->V, &aligned);
    out.mean = FN(place)(a->want_mean, &a->mean, two ? to + (b + 1) * f->V : to, &aligned);
    out.u = FN(place)(a->want_uncertainty, &a->uncertainty, to, &aligned);
    out.weight = FN(place)(a->want_weight, &a->weight, to, &aligned);
    if (!f->need_conf && !own_weight && (aligned || !f->stream)) {
        loop(n, p, r, (float)f->scale, rate, &out);
        return;
    }
    loop(n, p, r, (float)f->scale, rate, &(maps_out){w->mu, NULL, w->u, w->weight, 0});
    if (f->need_conf) {
        FN(decide)(f, w, n, w->mu);
    }
    if (own_weight) {
        FN(weigh)(f, w, n);
    }
    FN(store)(f, w, b, at, n, w->mu);
}
#endif

static void FN(one_block)(const plan *f, const FN(area) * w, int64_t b, int64_t at, int64_t n) {
    const sample *of = &f->samples[b];
    FN(rows) ref_u = {NULL, 0};
    FN(rows) ref_l = {NULL, 0};
    if (of->ref_l < 0) {
        FN(unknown)(f, w, n);
        FN(store)(f, w, b, at, n, w->mean);
        return;
    }
#ifdef REAL_SIGMOIDS
    if (of->maps) {
        FN(short_way)(f, of, w, b, at, n);
        return;
    }
#endif
    const REAL *mean = of->same ? w->mu : w->mean;
    if (!FN(means)(f, of, w, b, at, n)) {
        FN(gather)(f, of, w, b, at, n, &ref_u, &ref_l);
        FN(finish)(f, of, w, n, ref_u, ref_l);
    }
    if (f->need_u) {
        FN(doubt)(f, w, n);
    }
    if (f->need_conf) {
        FN(decide)(f, w, n, mean);
    }
    if (f->a->want_weight) {
        FN(weigh)(f, w, n);
    }
    FN(store)(f, w, b, at, n, mean);
}

/* Items are blocks, sample after sample. */
static void FN(blocks)(void *ctx, int64_t begin, int64_t end, int32_t thread) {
    const plan *f = ctx;
    REAL *base = (REAL *)(void *)(f->scratch + (int64_t)thread * f->area_bytes);
    const int64_t n = f->n;
    const int64_t wide = f->L * n;
    FN(area) w = {.ref_u = base, .ref_l = base + wide, .source = base + 2 * wide};
    w.mu = base + (2 + GROUP) * wide;
    w.mean = base + (3 + GROUP) * wide;
    REAL *rest = base + (4 + GROUP) * wide;
    w.spread = rest;
    w.h = rest + n;
    w.h_ref = rest + 2 * n;
    w.u = rest + 3 * n;
    w.conf = rest + 4 * n;
    w.label = rest + 5 * n;
    w.weight = rest + 6 * n;
    w.tmp = rest + 7 * n;
    w.bytes = (uint8_t *)(rest + (7 + 2 * GROUP) * n);
    for (int64_t item = begin; item < end; ++item) {
        int64_t b = item / f->blocks;
        int64_t at = item % f->blocks * n;
        int64_t left = f->V - at;
        FN(one_block)(f, &w, b, at, left < n ? left : n);
    }
    store_fence();
}
