/* SPDX-License-Identifier: Apache-2.0
 *
 * ss_math.h: inline mathematics compiled by gcc, clang and nvcc alike.
 *
 * Everything here is branch-free or bounded, uses no fused multiply-add (build with
 * -ffp-contract=off, nvcc -fmad=false) and no table, so that a loop over lanes vectorises and every
 * device and instruction set gives the same bits. Errors are stated beside each function and
 * checked exhaustively or densely by tests/core/test_math.c.
 */
#ifndef SS_MATH_H
#define SS_MATH_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__CUDACC__)
#define SS_FN static __host__ __device__ __forceinline__
#else
#define SS_FN static inline
#endif

SS_FN float ss_bits_f32(uint32_t u) {
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
}

SS_FN uint32_t ss_f32_bits(float f) {
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    return u;
}

/* e^x: x = n ln 2 + r, |r| <= ln2/2, degree-6 polynomial in r, scaled by 2^n. Largest error 0.991
 * ulp on [-87.33, 88.72] (over all floats); below that 0 (subnormal results are flushed), above it
 * +inf; NaN stays. */
SS_FN float ss_expf(float x) {
    const float big = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    float c = x > 88.72283f ? 88.72283f : x;
    c = c < -87.33654f ? -87.33654f : c;
    float shifted = c * 1.44269504f + big;
    float n = shifted - big;
    float r = c - n * 0.693359375f; /* exact: the constant has 9 bits */
    r = r + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    /* The last bits of `shifted` are n, as an integer: k = n + 254. Two factors, since 2^128 is not
     * a float; NaN makes a garbage k, but p is NaN already. */
    uint32_t k = ss_f32_bits(shifted) - 0x4b400000u + 254u;
    uint32_t k1 = k >> 1;
    float s1 = ss_bits_f32(k1 << 23);
    float s2 = ss_bits_f32((k - k1) << 23);
    float y = p * s1 * s2;
    y = x < -87.33654f ? 0.0f : y;
    return x > 88.72283f ? INFINITY : y;
}

/* ln x for x >= 0: x = m 2^e with m in [sqrt(1/2), sqrt 2). Largest error 0.834 ulp (over all
 * normal floats); subnormal numbers count as 0; ln 0 = -inf; negative numbers and NaN give NaN; ln
 * inf = inf. */
SS_FN float ss_logf(float x) {
    uint32_t u = ss_f32_bits(x);
    int32_t shifted = (int32_t)(u - 0x3f3504f3u);
    int32_t e = shifted >> 23;
    float m = ss_bits_f32((uint32_t)((shifted & 0x007fffff) + 0x3f3504f3));
    float r = m - 1.0f;
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
    float k = (float)e;
    float y = r * z * p;
    y = y - k * 2.12194440e-4f;
    y = y - 0.5f * z;
    y = r + y;
    y = y + k * 0.693359375f;
    y = x < 1.17549435e-38f ? -INFINITY : y;
    y = x < 0.0f ? NAN : y;
    y = x > 3.4028235e38f ? INFINITY : y;
    return x == x ? y : x;
}

/* 2^c for |c| <= 125, and nothing else. The fraction goes through a degree-5 polynomial, summed in
 * a tree: a chain of operations that wait for each other is what it costs. Relative error 1.9e-7.
 */
SS_FN float ss_exp2_inside(float c) {
    const float big = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    float t = c + big;
    float f = c - (t - big); /* exact */
    float f2 = f * f;
    float p =
        (f * 5.550733581e-02f + 2.402224243e-01f) + f2 * (f * 1.326472731e-03f + 9.671512991e-03f);
    p = (f * 6.931470037e-01f + f2 * p) + 1.0f;
    /* The low bits of t are the integer. */
    return ss_bits_f32(ss_f32_bits(p) + (ss_f32_bits(t) << 23));
}

/* 2^y for |y| <= 125, and 2^+-125 beyond, NaN included: what a bounded function needs, at half the
 * price of ss_expf; error of ss_exp2_inside. */
SS_FN float ss_exp2_bounded(float y) {
    uint32_t u = ss_f32_bits(y);
    int32_t a = (int32_t)(u & 0x7fffffffu);
    a = a < 0x42fa0000 ? a : 0x42fa0000; /* 125: in integers, where a minimum is one instruction */
    return ss_exp2_inside(ss_bits_f32((uint32_t)a | (u & 0x80000000u)));
}

/* ln x for normal positive x, and nothing else: what p ln p with a floor under p needs. x = m 2^e
 * with m in [sqrt(1/2), sqrt 2), summed in a tree; absolute error 1.1e-7 + 1.1e-7 |ln x|. */
SS_FN float ss_log_bounded(float x) {
    int32_t shifted = (int32_t)(ss_f32_bits(x) - 0x3f3504f3u);
    float m = ss_bits_f32((uint32_t)((shifted & 0x007fffff) + 0x3f3504f3));
    float r = m - 1.0f;
    float z = r * r;
    float p =
        (r * 8.672189713e-02f - 1.437900811e-01f) * z + (r * 1.497799307e-01f - 1.656442583e-01f);
    p = p * (z * z) +
        ((r * 1.995487511e-01f - 2.500169873e-01f) * z + (r * 3.333416581e-01f - 0.5f));
    return (p * z + r) + (float)(shifted >> 23) * 6.93147181e-1f;
}

/* 1 / (1 + e^-x): largest absolute error 1.5e-7, relative error (|x| + 3) 1e-7; 1 at +inf, 2e-38 at
 * -inf and NaN alike, so callers that may meet NaN add a term that keeps it. */
SS_FN float ss_sigmoidf(float x) {
    return 1.0f / (1.0f + ss_exp2_bounded(x * -1.44269504f));
}

/* IEEE half -> float, exact; subnormal halves come out as what they are. */
SS_FN float ss_f16_f32(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16;
    uint32_t body = (uint32_t)(h & 0x7fffu) << 13;
    float scaled = ss_bits_f32(body) * 5.192296858534828e33f; /* 2^112 */
    uint32_t special = body + 0x70000000u;                    /* inf and NaN keep their payload */
    uint32_t u = body >= 0x0f800000u ? special : ss_f32_bits(scaled);
    return ss_bits_f32(u | sign);
}

/* float -> IEEE half, round to nearest even; overflow to inf; NaN stays NaN. */
SS_FN uint16_t ss_f32_f16(float f) {
    uint32_t u = ss_f32_bits(f);
    uint32_t sign = (u >> 16) & 0x8000u;
    uint32_t a = u & 0x7fffffffu;
    uint32_t odd = (a >> 13) & 1u;
    uint32_t normal = (a + 0xfffu + odd - 0x38000000u) >> 13;
    /* Subnormal halves: adding 0.5 puts the rounding at 2^-24, where a half's last bit is. */
    uint32_t tiny = ss_f32_bits(ss_bits_f32(a) + 0.5f) - 0x3f000000u;
    uint32_t h = a < 0x38800000u ? tiny : normal;
    h = a >= 0x477ff000u ? 0x7c00u : h;
    h = a > 0x7f800000u ? 0x7e00u : h;
    return (uint16_t)(h | sign);
}

SS_FN float ss_bf16_f32(uint16_t h) {
    return ss_bits_f32((uint32_t)h << 16);
}

/* float -> bfloat16, round to nearest even; NaN stays NaN. */
SS_FN uint16_t ss_f32_bf16(float f) {
    uint32_t u = ss_f32_bits(f);
    uint32_t r = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    return (uint16_t)((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : r);
}

/* Philox4x32-10 (Salmon et al., SC'11): four random words, a function of key and counter alone. */
typedef struct ss_philox4 {
    uint32_t v[4];
} ss_philox4;

SS_FN ss_philox4 ss_philox(uint64_t key, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
    uint32_t k0 = (uint32_t)key;
    uint32_t k1 = (uint32_t)(key >> 32);
    for (int round = 0; round < 10; ++round) {
        uint64_t a = (uint64_t)0xD2511F53u * c0;
        uint64_t b = (uint64_t)0xCD9E8D57u * c2;
        uint32_t n0 = (uint32_t)(b >> 32) ^ c1 ^ k0;
        uint32_t n2 = (uint32_t)(a >> 32) ^ c3 ^ k1;
        c1 = (uint32_t)b;
        c3 = (uint32_t)a;
        c0 = n0;
        c2 = n2;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    ss_philox4 out = {{c0, c1, c2, c3}};
    return out;
}

/* The first 64 random bits of a counter, low word first. */
SS_FN uint64_t ss_philox64(uint64_t key, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
    ss_philox4 r = ss_philox(key, c0, c1, c2, c3);
    return (uint64_t)r.v[0] | (uint64_t)r.v[1] << 32;
}

/* floor(n * r / 2^64): a whole number in 0..n-1, without 128-bit arithmetic. */
SS_FN uint64_t ss_pick(uint64_t n, uint64_t r) {
    uint64_t nl = n & 0xffffffffu;
    uint64_t nh = n >> 32;
    uint64_t rl = r & 0xffffffffu;
    uint64_t rh = r >> 32;
    uint64_t mid = nh * rl + ((nl * rl) >> 32);
    uint64_t low = nl * rh + (mid & 0xffffffffu);
    return nh * rh + (mid >> 32) + (low >> 32);
}

#endif
