/* SPDX-License-Identifier: Apache-2.0
 *
 * fuse_maps.h: the common case of `fuse`, without a round trip of the sums through the cache: one
 * foreground row of float32 probabilities per source, the same weights for mean and uncertainty,
 * and that from the variance. fuse_lanes.h calls it for float.
 *
 * All sources are read side by side, a vector of each at a time, and the sums stay in registers
 * until mean, u and weight come out. That takes the number of sources at compile time: 2 to 12, one
 * function each. The order of the sums, and so every bit, is that of fuse_lanes.h.
 *
 * Strips of STRIP voxels leave for their outputs at once, so that reading and writing mix. Their
 * length is known at compile time: setting up a loop over so many streams costs as much as a strip.
 */

/* 0..1; NaN stays */
static inline float kept_inside(float x) {
    x = x < 0.0f ? 0.0f : x;
    return x > 1.0f ? 1.0f : x;
}

/* Where results go, from the block's first voxel on; NULL: not wanted. `other` is 1 - mean, of two
 * channels. `stream`: past the caches, which is fast where all of them begin with a line. */
typedef struct maps_out {
    float *mean, *other, *u, *weight;
    int stream;
} maps_out;

typedef struct maps_strip {
    float mean[STRIP], u[STRIP], weight[STRIP];
} maps_strip;

static inline __attribute__((always_inline)) void put_strip(const maps_out *out, int64_t at,
                                                            int64_t n, maps_strip *strip) {
    const int64_t bytes = n * (int64_t)sizeof(float);
    if (out->mean) {
        store_bytes(out->stream, out->mean + at, strip->mean, bytes);
    }
    if (out->u) {
        store_bytes(out->stream, out->u + at, strip->u, bytes);
    }
    if (out->weight) {
        store_bytes(out->stream, out->weight + at, strip->weight, bytes);
    }
    if (out->other) {
        SS_SIMD
        for (int64_t i = 0; i < n; ++i) {
            strip->mean[i] = 1.0f - strip->mean[i];
        }
        store_bytes(out->stream, out->other + at, strip->mean, bytes);
    }
}

/* One strip, n voxels from `at` on; p[0] is the reference. */
static inline __attribute__((always_inline)) void some_maps(const int COUNT, int64_t at, int64_t n,
                                                            const float *const *p, const float *r,
                                                            float scale, float rate,
                                                            maps_strip *restrict strip) {
    const float *restrict q = p[0] + at;
    SS_SIMD
    for (int64_t i = 0; i < n; ++i) {
        const float ref = q[i];
        float s = 0, s2 = 0;
#define MAP(k)                                                                                     \
    if (COUNT > k) {                                                                               \
        const float d = p[k][at + i] - ref, t = r[k] * d;                                          \
        s += t;                                                                                    \
        s2 += t * d;                                                                               \
    }
        MAP(1)
        MAP(2)
        MAP(3)
        MAP(4)
        MAP(5)
        MAP(6)
        MAP(7)
        MAP(8)
        MAP(9)
        MAP(10)
        MAP(11)
#undef MAP
        const float doubt = kept_inside((s2 - s * s) * scale);
        strip->mean[i] = s + ref;
        strip->u[i] = doubt;
        strip->weight[i] = ss_exp2_bounded(doubt * rate) + (doubt - doubt); /* NaN stays */
    }
}

static inline __attribute__((always_inline)) void all_maps(const int COUNT, int64_t n,
                                                           const float *const *maps,
                                                           const float *weights, float scale,
                                                           float rate, const maps_out *to) {
    _Alignas(64) maps_strip strip;
    const maps_out out = *to;
    const float *p[12]; /* copies: nothing that is stored can change them */
    float r[12];
    for (int k = 0; k < COUNT; ++k) {
        p[k] = maps[k];
        r[k] = weights[k];
    }
    int64_t i = 0;
    for (; i + STRIP <= n; i += STRIP) {
        for (int k = 0; k < COUNT; ++k) {
            ask_ahead(p[k] + i, MAPS_AHEAD);
        }
        some_maps(COUNT, i, STRIP, p, r, scale, rate, &strip);
        put_strip(&out, i, STRIP, &strip);
    }
    if (i < n) {
        some_maps(COUNT, i, n - i, p, r, scale, rate, &strip);
        put_strip(&out, i, n - i, &strip);
    }
}

/* Functions of their own: in one large function gcc gives up on vectorising. */
#define COUNTS(DO) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8) DO(9) DO(10) DO(11) DO(12)
#define MAPS_OF(count)                                                                             \
    static void maps_##count(int64_t n, const float *const *p, const float *r, float scale,        \
                             float rate, const maps_out *to) {                                     \
        all_maps(count, n, p, r, scale, rate, to);                                                 \
    }
COUNTS(MAPS_OF)
#undef MAPS_OF

typedef void (*maps_loop)(int64_t n, const float *const *p, const float *r, float scale, float rate,
                          const maps_out *to);

static maps_loop maps_loop_for(int count) {
    switch (count) {
#define MAPS_OF(count)                                                                             \
    case count:                                                                                    \
        return maps_##count;
        COUNTS(MAPS_OF)
#undef MAPS_OF
    default:
        return NULL;
    }
}
#undef COUNTS
