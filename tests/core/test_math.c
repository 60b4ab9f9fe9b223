/* SPDX-License-Identifier: Apache-2.0
 *
 * test_math.c: the error bounds that ss_math.h claims, measured; conversions over all values;
 * known answers. The reference is double libm, whose own error is 1e-8 of what is measured here.
 * SEMISAM_EXHAUSTIVE=1 takes every float (a minute); sanitized builds take every 97th.
 */
#include "check.h"
#include "ss_math.h"

#include <stdlib.h>

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define STRIDE 97u
#else
#define STRIDE 1u
#endif

static uint32_t stride(uint32_t otherwise) {
    const char *all = getenv("SEMISAM_EXHAUSTIVE");
    return all && all[0] == '1' ? 1 : otherwise * STRIDE;
}

static double ulps(float got, double exact) {
    int e = 0;
    (void)frexp(exact, &e);
    return fabs((double)got - exact) / ldexp(1.0, (e < -125 ? -125 : e) - 24);
}

static void exp_range(uint32_t from, uint32_t to, uint32_t step, double *worst, float *where) {
    for (uint64_t u = from; u <= to; u += step) {
        float x = ss_bits_f32((uint32_t)u);
        if (!(x >= -87.33654f && x <= 88.72283f)) {
            continue;
        }
        double error = ulps(ss_expf(x), exp((double)x));
        if (!(error <= *worst)) {
            *worst = error;
            *where = x;
        }
    }
}

static void test_exp(void) {
    double worst = 0.0;
    float where = 0.0f;
    /* Below 2^-25 in magnitude the result is 1; up to there a coarse step is enough. */
    const uint32_t tiny = 0x33000000u, large = 0x42b20000u, sign = 0x80000000u;
    exp_range(0, tiny, stride(1009), &worst, &where);
    exp_range(sign, sign + tiny, stride(1009), &worst, &where);
    exp_range(tiny, large, stride(3), &worst, &where);
    exp_range(sign + tiny, sign + large, stride(3), &worst, &where);
    printf("  exp: largest error %.4f ulp at %.9g\n", worst, (double)where);
    CHECK(worst <= 0.991, "ss_math.h claims 0.991 ulp");
    CHECK(ss_expf(0.0f) == 1.0f && ss_expf(-0.0f) == 1.0f, "e^0");
    CHECK(ss_expf(88.73f) == INFINITY && ss_expf(INFINITY) == INFINITY, "overflow");
    CHECK(ss_expf(-87.34f) == 0.0f && ss_expf(-INFINITY) == 0.0f, "underflow");
    CHECK(isfinite(ss_expf(88.72283f)) && ss_expf(-87.33654f) > 0.0f, "ends of the range");
    CHECK(isnan(ss_expf(NAN)) && isnan(ss_expf(-NAN)), "NaN");
}

static void log_range(uint32_t from, uint32_t to, uint32_t step, double *worst, float *where) {
    for (uint64_t u = from; u < to; u += step) {
        float x = ss_bits_f32((uint32_t)u);
        double exact = log((double)x);
        double error = exact == 0.0 ? (ss_logf(x) == 0.0f ? 0.0 : 1e9) : ulps(ss_logf(x), exact);
        if (!(error <= *worst)) {
            *worst = error;
            *where = x;
        }
    }
}

static void test_log(void) {
    double worst = 0.0;
    float where = 0.0f;
    const uint32_t one_eighth = 0x3e000000u, eight = 0x41000000u;
    log_range(0x00800000u, one_eighth, stride(61), &worst, &where);
    log_range(one_eighth, eight, stride(1), &worst, &where);
    log_range(eight, 0x7f800000u, stride(61), &worst, &where);
    printf("  log: largest error %.4f ulp at %.9g\n", worst, (double)where);
    CHECK(worst <= 0.834, "ss_math.h claims 0.834 ulp");
    CHECK(ss_logf(1.0f) == 0.0f && !signbit(ss_logf(1.0f)), "ln 1");
    CHECK(ss_logf(0.0f) == -INFINITY && ss_logf(-0.0f) == -INFINITY, "ln 0");
    CHECK(ss_logf(1e-40f) == -INFINITY, "subnormal numbers count as 0");
    CHECK(ss_logf(INFINITY) == INFINITY, "ln inf");
    CHECK(isnan(ss_logf(-1.0f)) && isnan(ss_logf(-INFINITY)) && isnan(ss_logf(NAN)), "NaN");
}

static void test_bounded(void) {
    double worst = 0.0;
    for (float c = -125.0f; c <= 125.0f; c += 6e-5f * (float)STRIDE) {
        worst = fmax(worst, fabs((double)ss_exp2_inside(c) / exp2((double)c) - 1.0));
    }
    CHECK(worst <= 1.9e-7, "ss_exp2_inside: %.3g", worst);
    CHECK(ss_exp2_inside(0.0f) == 1.0f && ss_exp2_inside(-3.0f) == 0.125f, "powers of two");
    CHECK(ss_exp2_bounded(1e9f) == 0x1p125f && ss_exp2_bounded(-INFINITY) == 0x1p-125f, "bounds");
    worst = 0.0;
    for (uint32_t u = 0x00800000u; u < 0x7f800000u; u += stride(61)) {
        double x = (double)ss_bits_f32(u), exact = log(x);
        double error = fabs((double)ss_log_bounded((float)x) - exact);
        worst = fmax(worst, error / (1.1e-7 + 1.1e-7 * fabs(exact)));
    }
    CHECK(worst <= 1.0, "ss_log_bounded: %.3g of the bound", worst);
    CHECK(ss_log_bounded(1.0f) == 0.0f, "ln 1");
    worst = 0.0;
    double relative = 0.0;
    for (float x = -80.0f; x <= 80.0f; x += 1e-4f * (float)STRIDE) {
        double exact = 1.0 / (1.0 + exp(-(double)x)), error = fabs((double)ss_sigmoidf(x) - exact);
        worst = fmax(worst, error);
        relative = fmax(relative, error / exact / ((fabs((double)x) + 3.0) * 1e-7));
    }
    CHECK(worst <= 1.5e-7 && relative <= 1.0, "ss_sigmoidf: %.3g, %.3g of the relative bound",
          worst, relative);
}

/* A half by its definition: sign, 5 bits of exponent, 10 of fraction. */
static double half_value(uint32_t h) {
    int e = (int)(h >> 10 & 31), m = (int)(h & 1023);
    double v = e == 0 ? ldexp(m, -24) : ldexp(m + 1024, e - 25);
    return h & 0x8000 ? -v : v;
}

static void test_f16(void) {
    for (uint32_t h = 0; h < 65536; ++h) {
        float f = ss_f16_f32((uint16_t)h);
        uint16_t back = ss_f32_f16(f);
        if ((h & 0x7fff) > 0x7c00) {
            CHECK(isnan(f) && (back & 0x7fff) > 0x7c00, "NaN %04x", h);
        } else if ((h & 0x7fff) == 0x7c00) {
            CHECK(isinf(f) && back == h, "inf %04x", h);
        } else {
            CHECK((double)f == half_value(h) && back == h, "%04x -> %a -> %04x", h, (double)f,
                  back);
        }
    }
    /* Around the middle of every two neighbours; from 65520 on everything is infinite. */
    for (uint32_t h = 0; h < 0x7c00; ++h) {
        double next = h == 0x7bff ? 65536.0 : half_value(h + 1);
        float middle = (float)((half_value(h) + next) / 2);
        for (uint32_t sign = 0; sign <= 0x8000; sign += 0x8000) {
            float s = sign ? -1.0f : 1.0f;
            CHECK(ss_f32_f16(s * middle) == (h + (h & 1)) + sign, "tie above %04x", h);
            CHECK(ss_f32_f16(s * nextafterf(middle, 0.0f)) == h + sign, "below %04x", h);
            CHECK(ss_f32_f16(s * nextafterf(middle, INFINITY)) == h + 1 + sign, "above %04x", h);
        }
    }
    CHECK(ss_f32_f16(3.4e38f) == 0x7c00 && ss_f32_f16(-INFINITY) == 0xfc00, "overflow");
    CHECK(ss_f32_f16(1e-45f) == 0 && ss_f32_f16(-1e-45f) == 0x8000, "underflow");
    CHECK((ss_f32_f16(ss_bits_f32(0x7f800001u)) & 0x7fff) > 0x7c00, "NaN with a low payload");
}

static void test_bf16(void) {
    for (uint32_t h = 0; h < 65536; ++h) {
        float f = ss_bf16_f32((uint16_t)h);
        CHECK(ss_f32_bits(f) == h << 16, "%04x", h);
        if ((h & 0x7fff) > 0x7f80) {
            CHECK((ss_f32_bf16(f) & 0x7fff) > 0x7f80, "NaN %04x", h);
            continue;
        }
        CHECK(ss_f32_bf16(f) == h, "%04x", h);
        if ((h & 0x7fff) < 0x7f80) {
            uint32_t middle = h << 16 | 0x8000;
            CHECK(ss_f32_bf16(ss_bits_f32(middle)) == h + (h & 1), "tie above %04x", h);
            CHECK(ss_f32_bf16(ss_bits_f32(middle - 1)) == h, "below %04x", h);
            CHECK(ss_f32_bf16(ss_bits_f32(middle + 1)) == h + 1, "above %04x", h);
        }
    }
    CHECK((ss_f32_bf16(ss_bits_f32(0x7f800001u)) & 0x7fff) > 0x7f80, "NaN with a low payload");
    CHECK((ss_f32_bf16(ss_bits_f32(0xffffffffu)) & 0x7fff) > 0x7f80, "NaN that would carry over");
}

/* The known answers published with Random123 for philox4x32-10. */
static void test_philox(void) {
    static const struct {
        uint64_t key;
        uint32_t c[4], expected[4];
    } known[] = {
        {0, {0, 0, 0, 0}, {0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u}},
        {UINT64_MAX,
         {UINT32_MAX, UINT32_MAX, UINT32_MAX, UINT32_MAX},
         {0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu}},
        {0x299f31d0a4093822u,
         {0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u},
         {0xd16cfe09u, 0x94fdccebu, 0x5001e420u, 0x24126ea1u}},
    };
    for (size_t i = 0; i < sizeof known / sizeof known[0]; ++i) {
        const uint32_t *c = known[i].c, *v = known[i].expected;
        ss_philox4 r = ss_philox(known[i].key, c[0], c[1], c[2], c[3]);
        CHECK(memcmp(r.v, v, sizeof r.v) == 0, "vector %zu", i);
        uint64_t r64 = ss_philox64(known[i].key, c[0], c[1], c[2], c[3]);
        CHECK(r64 == ((uint64_t)v[1] << 32 | v[0]), "64 bits of vector %zu", i);
    }
}

static void test_pick(void) {
    __extension__ typedef unsigned __int128 u128;
    const uint64_t edges[] = {
        0, 1, 2, 3, 0xffffffffu, 0x100000000u, UINT64_MAX / 2, UINT64_MAX - 1, UINT64_MAX};
    const size_t n = sizeof edges / sizeof edges[0];
    uint64_t state = 1;
    for (int i = 0; i < 1000000; ++i) {
        uint64_t a = next_random(&state) >> (next_random(&state) & 63);
        uint64_t b = next_random(&state) >> (next_random(&state) & 63);
        a = i < (int)(n * n) ? edges[(size_t)i / n] : a;
        b = i < (int)(n * n) ? edges[(size_t)i % n] : b;
        CHECK(ss_pick(a, b) == (uint64_t)((u128)a * b >> 64), "%llx %llx", (unsigned long long)a,
              (unsigned long long)b);
    }
}

int main(void) {
    test_exp();
    test_log();
    test_bounded();
    test_f16();
    test_bf16();
    test_philox();
    test_pick();
    return done();
}
