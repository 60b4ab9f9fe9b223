/* SPDX-License-Identifier: Apache-2.0
 *
 * fuse_maps.h: the common case of `fuse`, without a round trip of the sums through the cache: one
 * foreground row of float32 probabilities per source, the same weights for mean and uncertainty,
 * and that from the variance. fuse_lanes.h calls it for float.
 *
 * All sources are read side by side, a vector of each at a time, and the sums stay in registers
 * until mean, u and weight come out. That takes the number of sources at compile time: 2 to 12, one
 * function each. The order of the sums, and so every bit, is that of fuse_lanes.h.
 */

/* 0..1; NaN stays */
static inline float kept_inside(float x) {
    x = x < 0.0f ? 0.0f : x;
    return x > 1.0f ? 1.0f : x;
}

/* n voxels from `at` on; p[0] is the reference. */
static inline __attribute__((always_inline)) void some_maps(const int COUNT, int64_t at, int64_t n,
                                                            const float *const *p, const float *r,
                                                            float scale, float rate,
                                                            float *restrict mean, float *restrict u,
                                                            float *restrict weight) {
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
        mean[i] = s + ref;
        u[i] = doubt;
        weight[i] = ss_exp2_bounded(doubt * rate) + (doubt - doubt); /* NaN stays */
    }
}

/* Functions of their own: in one large function gcc gives up on vectorising. */
#define COUNTS(DO) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8) DO(9) DO(10) DO(11) DO(12)
#define MAPS_OF(count)                                                                             \
    static void maps_##count(int64_t at, int64_t n, const float *const *p, const float *r,         \
                             float scale, float rate, float *mean, float *u, float *weight) {      \
        some_maps(count, at, n, p, r, scale, rate, mean, u, weight);                               \
    }
COUNTS(MAPS_OF)
#undef MAPS_OF

typedef void (*maps_loop)(int64_t at, int64_t n, const float *const *p, const float *r, float scale,
                          float rate, float *mean, float *u, float *weight);

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
