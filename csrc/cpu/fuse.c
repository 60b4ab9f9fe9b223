/* SPDX-License-Identifier: Apache-2.0
 *
 * fuse.c: S sources -> mean, hard label, confidence, uncertainty and weight map, in one pass.
 *
 *     pbar = sum_s r_lab_s p^s     mu = sum_s r_unc_s p^s     H(p) = -sum_c p_c ln max(p_c + o,
 * 1e-7) var = sum_c sum_s r_unc_s (p^s_c - mu_c)^2    ent = H(mu)    mi = H(mu) - sum_s r_unc_s
 * H(p^s) u = var / (1 - 1/C), ent / ln C or mi / ln C, clipped to 0..1 weight: exp(-kappa u), 1 -
 * u, 1[u <= tau_u], (max pbar - 1/C) / (1 - 1/C) clipped, or 1
 *
 * Sources are [B, C, V] probabilities or logits; one channel is the foreground of two classes. Two
 * logits are one sigmoid, so they are summed as one foreground row, too. Memory: each source that
 * has weight is read once, each wanted output written once, past the caches if it is large.
 * Numerics: every sum runs over differences from the reference, the source of largest weight:
 * sum r (p - p_ref), sum r (p - p_ref)^2, sum r (H - H_ref). Identical sources therefore give
 * exactly p, var = 0 and mi = 0 whatever the weights' rounding. In var = E[d^2] - E[d]^2 nothing is
 * lost to cancellation: (mu - p_ref)^2 <= var / r_ref, and r_ref >= 1/S, so the relative error of
 * each class's var stays below about 4 S eps however small the spread. Entropies carry an absolute
 * error of a few eps. Where the mean of three or more logits is all that is wanted of them, nothing
 * can cancel: they are summed in groups without a reference, one division for four sigmoids, with
 * an absolute error below 4e-7; a block with a logit that is not finite takes the long way, which
 * keeps NaN. float64 sources are computed in double, all others in float.
 * Deterministic: a voxel is the work of one thread and sums run in the order of the sources.
 */
#include "lanes.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

/* Sources are read side by side, a dozen streams at a time. Some hardware follows them by itself;
 * where it loses them (a Zen 5, where streams lie a multiple of the page apart) a loop takes twice
 * as long, so the loops ask for what lies AHEAD voxels further on, which elsewhere costs little.
 * Where a source is converted first, the same places of the next block are asked for: all of it
 * between strips of arithmetic where there is much, else only its head, from where the hardware
 * takes over. */
enum { STRIP = 64, HEAD = 192, SPAN = 128, MAPS_AHEAD = 256, SIGMOIDS_AHEAD = 512 };

/* Sources that are added in one sweep over the sums. */
#define GROUP 4

enum { UNC_VAR, UNC_ENT, UNC_MI };
enum { WEIGHT_EXP, WEIGHT_LINEAR, WEIGHT_GATE, WEIGHT_CONF, WEIGHT_NONE };

/* The weights of one sample, normalised; references are the sources of largest weight. */
typedef struct sample {
    const double *r_lab;
    const double *r_unc;
    int64_t ref_l; /* -1: no source has weight here */
    int64_t ref_u;
    int same; /* r_lab = r_unc: the mean is mu */
    int maps; /* sources with weight, if fuse_maps.h has a loop for them; else 0 */
} sample;

typedef struct plan {
    const ss_fuse_args *a;
    sample *samples;
    double *r; /* B x 2 x S */
    int64_t S, B, C, V;
    int64_t L; /* rows that are summed: C, or 1 for two classes as one foreground */
    int64_t K; /* classes */
    int64_t n; /* voxels in a block */
    int64_t blocks;
    double scale; /* of u */
    int sigmoids; /* all that is wanted of the sources is the mean of foreground logits */
    int need_u, need_mu, need_var, need_mi, need_mean, need_conf;
    int direct;    /* sources are used where they are */
    int short_way; /* see fuse_maps.h */
    int stream;
    char *scratch;
    int64_t area_bytes;
} plan;

#if defined(__SSE2__)
/* 64 bytes past the caches, to an aligned place. */
static inline void stream_line(uint8_t *to, const uint8_t *from) {
#if defined(__AVX512F__)
    _mm512_stream_si512((void *)to, _mm512_loadu_si512(from));
#else
    for (int64_t k = 0; k < 64; k += 16) {
        _mm_stream_si128((__m128i *)(void *)(to + k),
                         _mm_loadu_si128((const __m128i *)(const void *)(from + k)));
    }
#endif
}
#endif

/* Copies a block to an output. Large outputs go past the caches: they do not fit anyway, and memory
 * need not be read before it is overwritten. */
static void store_bytes(int stream, void *to, const void *from, int64_t bytes) {
    uint8_t *d = to;
    const uint8_t *s = from;
#if defined(__SSE2__)
    int64_t head = (int64_t)(-(uintptr_t)d & 63);
    if (stream && bytes >= head + 64) {
        int64_t i = head;
        if (head) {
            memcpy(d, s, (size_t)head);
        }
        for (; i + 64 <= bytes; i += 64) {
            stream_line(d + i, s + i);
        }
        if (i < bytes) {
            memcpy(d + i, s + i, (size_t)(bytes - i));
        }
        return;
    }
#endif
    (void)stream;
    memcpy(d, s, (size_t)bytes);
}

/* Streaming stores are weakly ordered: they must be out before the thread reports its end. */
static void store_fence(void) {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

/* Asks for n elements of a tensor from `at` on; past the end that does nothing. */
static inline void prefetch(const ss_tensor *t, int64_t at, int64_t n) {
#if defined(__GNUC__)
    const int64_t size = t->dtype == SS_F64 ? 8 : (t->dtype == SS_F32 ? 4 : 2);
    const uintptr_t begin = (uintptr_t)t->data + (uintptr_t)(at * size);
    for (uintptr_t byte = 0; byte < (uintptr_t)(n * size); byte += 64) {
        __builtin_prefetch((const void *)(begin + byte), 0, 2);
    }
#else
    (void)t, (void)at, (void)n;
#endif
}

/* Asks for as many bytes as a strip of floats, `ahead` floats from here; past the end that does
 * nothing. */
static inline __attribute__((always_inline)) void ask_ahead(const void *at, int64_t ahead) {
#if defined(__GNUC__)
    for (int64_t i = 0; i < STRIP; i += 16) {
        __builtin_prefetch((const char *)at + (ahead + i) * (int64_t)sizeof(float));
    }
#else
    (void)at, (void)ahead;
#endif
}

/* 1 + 2^y with |y| cut at 30: the sigmoid is 0 or 1 there but for 1e-9, and a product of four of
 * these is far from infinity. */
static inline float denominator(uint32_t y) {
    int32_t a = (int32_t)(y & 0x7fffffffu);
    a = a < 0x41f00000 ? a : 0x41f00000; /* in integers, where a minimum is one instruction */
    return 1.0f + ss_exp2_inside(ss_bits_f32((uint32_t)a | (y & 0x80000000u)));
}

static inline int32_t larger_size(uint32_t y, int32_t most) {
    int32_t a = (int32_t)(y & 0x7fffffffu);
    return a > most ? a : most;
}

/* sum += sum_k r_k sigmoid(z1_k - z0_k) over the four sources of a group, with one division:
 * r0 / A + r1 / B = (r0 B + r1 A) / (A B), and so on. z: z0 and z1 of each. */
static inline __attribute__((always_inline)) int32_t some_sigmoids(int64_t n, const float *r,
                                                                   const float *const *z,
                                                                   int64_t at, int32_t most,
                                                                   float *restrict sum) {
    const float r0 = r[0], r1 = r[1], r2 = r[2], r3 = r[3];
    const float *a0 = z[0] + at, *a1 = z[1] + at, *b0 = z[2] + at, *b1 = z[3] + at;
    const float *c0 = z[4] + at, *c1 = z[5] + at, *d0 = z[6] + at, *d1 = z[7] + at;
    const float rate = -1.44269504f; /* of 2^ instead of e^ */
    _Pragma("omp simd reduction(max : most)") for (int64_t i = 0; i < n; ++i) {
        uint32_t a = ss_f32_bits((a1[i] - a0[i]) * rate);
        uint32_t b = ss_f32_bits((b1[i] - b0[i]) * rate);
        uint32_t c = ss_f32_bits((c1[i] - c0[i]) * rate);
        uint32_t d = ss_f32_bits((d1[i] - d0[i]) * rate);
        most = larger_size(a, larger_size(b, larger_size(c, larger_size(d, most))));
        float A = denominator(a), B = denominator(b);
        float C = denominator(c), D = denominator(d);
        float AB = A * B, CD = C * D;
        float upper = (r0 * B + r1 * A) * CD + (r2 * D + r3 * C) * AB;
        sum[i] += upper / (AB * CD);
    }
    return most;
}

/* Returns the bits of the largest |y|: where they are not those of a number, the sums mean nothing.
 */
static int32_t add_sigmoids(int64_t n, const float *r, const float *const *rows, float *sum) {
    const float *z[2 * GROUP];
    memcpy(z, rows, sizeof z);
    int32_t most = 0;
    int64_t i = 0;
    for (; i + STRIP <= n; i += STRIP) {
        for (int k = 0; k < 2 * GROUP; ++k) {
            ask_ahead(z[k] + i, SIGMOIDS_AHEAD);
        }
        most = some_sigmoids(STRIP, r, z, i, most, sum + i);
    }
    return i < n ? some_sigmoids(n - i, r, z, i, most, sum + i) : most;
}

#include "fuse_maps.h"

#define REAL float
#define FN(x) x##_f32
#define REAL_SIGMOIDS add_sigmoids
#define REAL_EXP ss_expf
#define REAL_EXP2 ss_exp2_bounded
#define REAL_SIGMOID ss_sigmoidf
#define REAL_LOG ss_log_bounded
#define REAL_DTYPE SS_F32
#define REAL_LOAD ss_load_f32
#include "fuse_lanes.h"
#undef REAL
#undef FN
#undef REAL_EXP
#undef REAL_EXP2
#undef REAL_SIGMOID
#undef REAL_LOG
#undef REAL_DTYPE
#undef REAL_LOAD
#undef REAL_SIGMOIDS

/* Where one source is double all are, so nothing is ever converted. */
static inline const double *in_place_f64(const ss_tensor *t, int64_t offset, int64_t n,
                                         double *buffer) {
    (void)n;
    (void)buffer;
    return (const double *)t->data + offset;
}

static inline double one_sigmoid(double x) {
    return 1.0 / (1.0 + exp(-x));
}

/* The C library's exp costs far more than a division, so nothing is won by pairs. */
#define REAL double
#define FN(x) x##_f64
#define REAL_EXP exp
#define REAL_EXP2 exp2
#define REAL_SIGMOID one_sigmoid
#define REAL_LOG log
#define REAL_DTYPE SS_F64
#define REAL_LOAD in_place_f64
#include "fuse_lanes.h"

/* ---- checks and plan ------------------------------------------------------------------------ */

/* One sample's column of weights, normalised into `to`; *ref is -1 if all are 0. */
static ss_status column(ss_exec *x, const char *name, const ss_tensor *r, const plan *f, int64_t b,
                        double *to, int64_t *ref) {
    const double *at = r->data; /* NULL: equal weights */
    double sum = 0;
    *ref = -1;
    for (int64_t s = 0; s < f->S; ++s) {
        double v = at ? at[s * f->B + b] : 1.0 / (double)f->S;
        if (!(v >= 0) || v > 2) {
            return ss_fail(x, SS_INVALID,
                           "%s: expected weights from 0 to 1, got %g for source %lld", name, v,
                           (long long)s);
        }
        to[s] = v;
        sum += v;
        if (v > 0 && (*ref < 0 || v > to[*ref])) {
            *ref = s;
        }
    }
    if (*ref >= 0 && !(sum > 1 - 1e-4 && sum < 1 + 1e-4)) {
        return ss_fail(x, SS_INVALID,
                       "%s: expected weights that sum to 1 (divide them by their sum), got a sum "
                       "of %g for sample %lld",
                       name, sum, (long long)b);
    }
    for (int64_t s = 0; *ref >= 0 && s < f->S; ++s) {
        to[s] /= sum;
    }
    return SS_OK;
}

static int count_maps(const plan *f, const double *r) {
    int count = 0;
    for (int64_t s = 0; s < f->S; ++s) {
        count += r[s] > 0;
    }
    return maps_loop_for(count) ? count : 0;
}

static ss_status read_weights(ss_exec *x, plan *f) {
    const ss_tensor *lab = &f->a->weights, *unc = &f->a->uncertainty_weights;
    for (int64_t b = 0; b < f->B; ++b) {
        double *r = f->r + 2 * b * f->S;
        sample *of = &f->samples[b];
        ss_status status = column(x, "weights", lab, f, b, r, &of->ref_l);
        if (status == SS_OK) {
            status =
                column(x, "uncertainty_weights", unc->data ? unc : lab, f, b, r + f->S, &of->ref_u);
        }
        if (status != SS_OK) {
            return status;
        }
        if ((of->ref_l < 0) != (of->ref_u < 0)) {
            return ss_fail(
                x, SS_INVALID,
                "uncertainty_weights: expected all 0 exactly where weights are, got something else "
                "for sample %lld",
                (long long)b);
        }
        of->r_lab = r;
        of->r_unc = r + f->S;
        of->same = memcmp(r, r + f->S, (size_t)f->S * sizeof *r) == 0;
        of->maps = f->short_way && of->same ? count_maps(f, r) : 0;
    }
    return SS_OK;
}

static ss_status check(ss_exec *x, const plan *f) {
    const ss_fuse_args *a = f->a;
    const char *names[] = {"weights", "uncertainty_weights"};
    const ss_tensor *tables[] = {&a->weights, &a->uncertainty_weights};
    for (int i = 0; i < 2; ++i) {
        if (tables[i]->data && tables[i]->shape[0] != f->S) {
            return ss_fail(x, SS_INVALID,
                           "%s: expected shape (%lld, %lld), one per source and sample, got (%lld, "
                           "%lld)",
                           names[i], (long long)f->S, (long long)f->B,
                           (long long)tables[i]->shape[0], (long long)tables[i]->shape[1]);
        }
    }
    for (int64_t s = 1; s < f->S; ++s) {
        if ((a->sources.at[s].dtype == SS_F64) != (a->sources.at[0].dtype == SS_F64)) {
            return ss_fail(
                x, SS_WRONG_TYPE, "sources: expected float64 for all or for none, got %s beside %s",
                ss_dtype_name(a->sources.at[s].dtype), ss_dtype_name(a->sources.at[0].dtype));
        }
    }
    if (a->channels != f->C && !(a->channels == 2 && f->C == 1)) {
        return ss_fail(x, SS_INVALID,
                       "channels: expected %lld (or 2 for one-channel sources), got %lld",
                       (long long)f->C, (long long)a->channels);
    }
    if (a->want_label && a->ignore_index < f->K) {
        return ss_fail(x, SS_INVALID, "ignore_index: expected a number from %lld to 255, got %lld",
                       (long long)f->K, (long long)a->ignore_index);
    }
    return SS_OK;
}

static void lay_out(plan *f) {
    const ss_fuse_args *a = f->a;
    f->S = a->sources.n;
    f->B = a->sources.at[0].shape[0];
    f->C = a->sources.at[0].shape[1];
    f->V = a->sources.at[0].shape[2];
    f->K = f->C == 1 ? 2 : f->C;
    f->L = f->C == 2 && a->logits ? 1 : f->C;
    int gated = a->want_label && a->tau_u < 1;
    int from_u = a->want_weight && a->weighting <= WEIGHT_GATE;
    f->need_u = a->want_uncertainty || gated || from_u;
    f->need_mu = f->need_u;
    f->need_var = f->need_u && a->unc == UNC_VAR;
    f->need_mi = f->need_u && a->unc == UNC_MI;
    f->need_conf =
        a->want_label || a->want_confidence || (a->want_weight && a->weighting == WEIGHT_CONF);
    f->need_mean = a->want_mean || f->need_conf;
    f->sigmoids = f->L == 1 && a->logits && f->S > 2 && !f->need_var && !f->need_mi;
    f->direct = !a->logits;
    for (int64_t s = 0; s < f->S; ++s) {
        const int32_t dtype = a->sources.at[s].dtype;
        f->direct &= dtype == SS_F32 || dtype == SS_F64;
    }
    f->short_way = f->direct && f->L == 1 && f->need_var && a->sources.at[0].dtype == SS_F32;
    double chance = 1.0 / (double)f->K;
    /* Both classes of a foreground row have the same variance. */
    double var = (f->L == 1 ? 2.0 : 1.0) / (1.0 - chance);
    f->scale = a->unc == UNC_VAR ? var : 1.0 / log((double)f->K);
    int64_t n = 4096 / f->L & ~(int64_t)63, most = f->short_way || f->sigmoids ? 4096 : SS_BLOCK;
    f->n = n < 64 ? 64 : (n > most ? most : n);
    f->blocks = (f->V + f->n - 1) / f->n;
    f->stream = f->B * f->V * 4 >= 1 << 20;
    int wide = a->sources.at[0].dtype == SS_F64;
    f->area_bytes = ((4 + GROUP) * f->L + 9 + 2 * GROUP) * f->n * (wide ? 8 : 4);
}

ss_status SS_CPU(fuse)(ss_exec *x, const ss_fuse_args *a) {
    plan f = {.a = a};
    lay_out(&f);
    ss_status status = check(x, &f);
    if (status != SS_OK) {
        return status;
    }
    int64_t work = f.n * f.L * f.S;
    int64_t grain = work < 1 << 18 ? (1 << 18) / work : 1;
    int32_t threads = ss_parallel_threads(x, f.B * f.blocks, grain);
    f.samples = ss_scratch(x, f.B, sizeof *f.samples);
    f.r = f.samples ? ss_scratch(x, 2 * f.B * f.S, sizeof *f.r) : NULL;
    f.scratch = f.r ? ss_scratch(x, threads, (size_t)f.area_bytes) : NULL;
    status = f.scratch ? read_weights(x, &f) : SS_NO_MEMORY;
    if (status == SS_OK) {
        int wide = a->sources.at[0].dtype == SS_F64;
        ss_parallel_for(x, f.B * f.blocks, grain, wide ? blocks_f64 : blocks_f32, &f);
    }
    ss_scratch_free(f.scratch);
    ss_scratch_free(f.r);
    ss_scratch_free(f.samples);
    return status;
}
