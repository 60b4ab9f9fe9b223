/* SPDX-License-Identifier: Apache-2.0
 *
 * bits.h: bytes as bits, 64 voxels to a word, the first voxel in the lowest bit.
 */
#ifndef SS_CPU_BITS_H
#define SS_CPU_BITS_H

#include <stdint.h>
#include <string.h>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

/* Eight bytes to eight bits, the first byte to the lowest. */
static inline uint64_t pack8(const uint8_t *m) {
    uint64_t v;
    memcpy(&v, m, 8);
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    v = __builtin_bswap64(v);
#endif
    const uint64_t low = 0x7f7f7f7f7f7f7f7fu;
    v = ((((v & low) + low) | v) & ~low) >> 7; /* 1 in every nonzero byte */
    return (v * 0x0102040810204080u) >> 56;
}

/* Up to 64 bytes to bits. */
static inline uint64_t pack64(const uint8_t *m, int64_t n) {
#if defined(__AVX512BW__)
    __m512i bytes = _mm512_maskz_loadu_epi8(~(uint64_t)0 >> (64 - n), m);
    return _mm512_test_epi8_mask(bytes, bytes);
#else
    uint64_t v = 0;
    int64_t i = 0;
#if defined(__SSE2__)
    for (; i + 16 <= n; i += 16) {
        __m128i bytes = _mm_loadu_si128((const __m128i *)(const void *)(m + i));
        __m128i zero = _mm_cmpeq_epi8(bytes, _mm_setzero_si128());
        v |= (uint64_t)(~_mm_movemask_epi8(zero) & 0xffff) << i;
    }
#endif
    for (; i + 8 <= n; i += 8) {
        v |= pack8(m + i) << i;
    }
    for (; i < n; ++i) {
        v |= (uint64_t)(m[i] != 0) << i;
    }
    return v;
#endif
}

#endif
