/* SPDX-License-Identifier: Apache-2.0
 *
 * lanes.h: what the inner loops of CPU kernels share.
 *
 * A dtype is a matter of load and store: blocks of SS_BLOCK voxels are converted to float, computed
 * in float lanes, and stored back. Sums are kept in SS_LANES float lanes within a block, folded in
 * lane order into double, and doubles are folded in block order. `SS_SIMD` marks a lane loop: the
 * build's vectoriser report must name every one of them (tests/test_vectorised.py).
 */
#ifndef SS_CPU_LANES_H
#define SS_CPU_LANES_H

#include "../semisam.h"
#include "../ss_math.h"
#include "isa.h"
#include "runtime.h"

#define SS_LANES 16
#define SS_BLOCK 1024
#define SS_SIMD _Pragma("omp simd")

/* Element i of a tensor's memory as double, any dtype: for reading small things, not for loops. */
static inline double ss_at(const ss_tensor *t, int64_t i) {
    switch (t->dtype) {
    case SS_BOOL:
    case SS_U8:
        return ((const uint8_t *)t->data)[i];
    case SS_I8:
        return ((const int8_t *)t->data)[i];
    case SS_U16:
        return ((const uint16_t *)t->data)[i];
    case SS_I16:
        return ((const int16_t *)t->data)[i];
    case SS_U32:
        return ((const uint32_t *)t->data)[i];
    case SS_I32:
        return ((const int32_t *)t->data)[i];
    case SS_U64:
        return (double)((const uint64_t *)t->data)[i];
    case SS_I64:
        return (double)((const int64_t *)t->data)[i];
    case SS_F16:
        return (double)ss_f16_f32(((const uint16_t *)t->data)[i]);
    case SS_BF16:
        return (double)ss_bf16_f32(((const uint16_t *)t->data)[i]);
    case SS_F32:
        return (double)((const float *)t->data)[i];
    default:
        return ((const double *)t->data)[i];
    }
}

/* n floats from element `offset` of a floating tensor: the memory itself if it is float already,
 * else converted into `buffer`. */
static inline const float *ss_load_f32(const ss_tensor *t, int64_t offset, int64_t n,
                                       float *restrict buffer) {
    switch (t->dtype) {
    case SS_F32:
        return (const float *)t->data + offset;
    case SS_F16: {
        const uint16_t *restrict p = (const uint16_t *)t->data + offset;
        SS_SIMD
        for (int64_t i = 0; i < n; ++i) {
            buffer[i] = ss_f16_f32(p[i]);
        }
        return buffer;
    }
    case SS_BF16: {
        const uint16_t *restrict p = (const uint16_t *)t->data + offset;
        SS_SIMD
        for (int64_t i = 0; i < n; ++i) {
            buffer[i] = ss_bf16_f32(p[i]);
        }
        return buffer;
    }
    default: {
        const double *restrict p = (const double *)t->data + offset;
        SS_SIMD
        for (int64_t i = 0; i < n; ++i) {
            buffer[i] = (float)p[i];
        }
        return buffer;
    }
    }
}

/* Stores n floats at element `offset` of a floating tensor. */
static inline void ss_store_f32(const ss_tensor *t, int64_t offset, int64_t n,
                                const float *restrict src) {
    switch (t->dtype) {
    case SS_F32:
        memcpy((float *)t->data + offset, src, (size_t)n * sizeof(float));
        return;
    case SS_F16: {
        uint16_t *restrict p = (uint16_t *)t->data + offset;
        SS_SIMD
        for (int64_t i = 0; i < n; ++i) {
            p[i] = ss_f32_f16(src[i]);
        }
        return;
    }
    case SS_BF16: {
        uint16_t *restrict p = (uint16_t *)t->data + offset;
        SS_SIMD
        for (int64_t i = 0; i < n; ++i) {
            p[i] = ss_f32_bf16(src[i]);
        }
        return;
    }
    default: {
        double *restrict p = (double *)t->data + offset;
        SS_SIMD
        for (int64_t i = 0; i < n; ++i) {
            p[i] = (double)src[i];
        }
        return;
    }
    }
}

#endif
