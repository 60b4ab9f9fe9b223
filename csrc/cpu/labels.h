/* SPDX-License-Identifier: Apache-2.0
 *
 * labels.h: label maps of any integer dtype, read a few thousand voxels at a time.
 *
 * A block of prediction and reference is checked against the number of classes and converted to
 * 16 bits (SS_NO_LABEL for voxels that take no part); bits that mark where a pair of labels differs
 * from the pair before it turn every later loop over voxels into a loop over runs.
 */
#ifndef SS_CPU_LABELS_H
#define SS_CPU_LABELS_H

#include "lanes.h"

#define SS_LABEL_BLOCK 4096
#define SS_NO_LABEL 0xffffu

typedef struct ss_label_rule {
    int64_t classes; /* labels are 0..classes-1, at most SS_NO_LABEL of them */
    int64_t ignore;  /* this reference label takes a voxel out of both maps, */
    int32_t ignores; /* if this is 1 */
} ss_label_rule;

/* Converts n labels; true if one is neither a class nor the ignored label. Signed types are read
 * as unsigned of the same size: negative labels become large ones, beyond `last`. */
#define SS_DEFINE_LABELS(T)                                                                        \
    static inline int ss_labels_##T(const T *restrict p, int64_t n, T last, T ignore, int ignores, \
                                    int keep, uint16_t *restrict out) {                            \
        unsigned bad = 0;                                                                          \
        _Pragma("omp simd reduction(| : bad)") for (int64_t i = 0; i < n; ++i) {                   \
            unsigned skip = (unsigned)((p[i] == ignore) & ignores);                                \
            unsigned good = p[i] <= last;                                                          \
            bad |= !(good | skip);                                                                 \
            out[i] = (uint16_t)(good & ((unsigned)keep | !skip) ? p[i] : SS_NO_LABEL);             \
        }                                                                                          \
        return bad != 0;                                                                           \
    }
SS_DEFINE_LABELS(uint8_t)
SS_DEFINE_LABELS(uint16_t)
SS_DEFINE_LABELS(uint32_t)
SS_DEFINE_LABELS(uint64_t)

/* The largest label of a dtype that is a class, and whether the ignored label can occur in it. */
static inline uint64_t ss_last_label(int32_t dtype, int64_t classes) {
    static const uint64_t most[SS_DTYPES] = {
        [SS_BOOL] = 1,         [SS_U8] = UINT8_MAX,   [SS_I8] = INT8_MAX,
        [SS_U16] = UINT16_MAX, [SS_I16] = INT16_MAX,  [SS_U32] = UINT32_MAX,
        [SS_I32] = INT32_MAX,  [SS_U64] = UINT64_MAX, [SS_I64] = INT64_MAX,
    };
    uint64_t last = (uint64_t)classes - 1;
    return last < most[dtype] ? last : most[dtype];
}

static inline int ss_has_label(int32_t dtype, int64_t label) {
    switch (dtype) {
    case SS_BOOL:
    case SS_U8:
        return label >= 0 && label <= UINT8_MAX;
    case SS_I8:
        return label >= INT8_MIN && label <= INT8_MAX;
    case SS_U16:
        return label >= 0 && label <= UINT16_MAX;
    case SS_I16:
        return label >= INT16_MIN && label <= INT16_MAX;
    case SS_U32:
        return label >= 0 && label <= UINT32_MAX;
    case SS_I32:
        return label >= INT32_MIN && label <= INT32_MAX;
    case SS_U64:
        return label >= 0;
    default:
        return 1;
    }
}

/* n labels from element `offset`; `keep`: an ignored label that is a class stays one. */
static inline int ss_load_labels(const ss_tensor *t, int64_t offset, int64_t n,
                                 const ss_label_rule *rule, int keep, uint16_t *restrict out) {
    uint64_t last = ss_last_label(t->dtype, rule->classes);
    int ignores = rule->ignores && ss_has_label(t->dtype, rule->ignore);
    uint64_t ignore = ignores ? (uint64_t)rule->ignore : 0;
    switch (ss_dtype_size(t->dtype)) {
    case 1:
        return ss_labels_uint8_t((const uint8_t *)t->data + offset, n, (uint8_t)last,
                                 (uint8_t)ignore, ignores, keep, out);
    case 2:
        return ss_labels_uint16_t((const uint16_t *)t->data + offset, n, (uint16_t)last,
                                  (uint16_t)ignore, ignores, keep, out);
    case 4:
        return ss_labels_uint32_t((const uint32_t *)t->data + offset, n, (uint32_t)last,
                                  (uint32_t)ignore, ignores, keep, out);
    default:
        return ss_labels_uint64_t((const uint64_t *)t->data + offset, n, last, ignore, ignores,
                                  keep, out);
    }
}

/* Both maps; a voxel whose reference is ignored is SS_NO_LABEL in both. */
static inline int ss_load_pair(const ss_tensor *pred, const ss_tensor *ref, int64_t offset,
                               int64_t n, const ss_label_rule *rule, uint16_t *restrict p,
                               uint16_t *restrict g) {
    int bad = ss_load_labels(pred, offset, n, rule, 1, p);
    bad |= ss_load_labels(ref, offset, n, rule, 0, g);
    if (rule->ignores) {
        SS_SIMD
        for (int64_t i = 0; i < n; ++i) {
            p[i] = (uint16_t)(g[i] == SS_NO_LABEL ? SS_NO_LABEL : p[i]);
        }
    }
    return bad;
}

/* Eight bytes as a number, the first one lowest: one load where the machine stores numbers so (gcc
 * does not find the load behind shifts). */
static inline uint64_t ss_load_le64(const uint8_t *p) {
    uint64_t w = 0;
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    memcpy(&w, p, sizeof w);
#else
    for (int i = 7; i >= 0; --i) {
        w = w << 8 | p[i];
    }
#endif
    return w;
}

/* Packs 64 bytes of 0 or 1 into bits, first byte lowest: bit 8 i + 7 j of the product, j = 8 - i,
 * is bit 56 + i; no other term reaches the top byte. */
static inline uint64_t ss_pack64(const uint8_t *bytes) {
    uint64_t out = 0;
    for (int k = 0; k < 8; ++k) {
        out |= (ss_load_le64(bytes + 8 * k) * 0x0102040810204080u >> 56) << (8 * k);
    }
    return out;
}

static inline int32_t ss_lowest_bit(uint64_t w) {
#if defined(__GNUC__)
    return __builtin_ctzll(w);
#else
    int32_t i = 0;
    for (; !(w & 1); w >>= 1) {
        ++i;
    }
    return i;
#endif
}

static inline int32_t ss_count_bits(uint64_t w) {
#if defined(__GNUC__)
    return __builtin_popcountll(w);
#else
    int32_t n = 0;
    for (; w; w &= w - 1) {
        ++n;
    }
    return n;
#endif
}

/* Bit i of `bits`: the pair at i differs from the one at i - 1 (bit 0 is always set). n is at most
 * SS_LABEL_BLOCK; returns the number of words. */
static inline int64_t ss_label_edges(const uint16_t *restrict p, const uint16_t *restrict g,
                                     int64_t n, uint64_t *restrict bits) {
    uint8_t edge[SS_LABEL_BLOCK];
    int64_t words = (n + 63) / 64;
    edge[0] = 1;
    SS_SIMD
    for (int64_t i = 1; i < n; ++i) {
        edge[i] = (uint8_t)((p[i] != p[i - 1]) | (g[i] != g[i - 1]));
    }
    memset(edge + n, 0, (size_t)(words * 64 - n));
    for (int64_t w = 0; w < words; ++w) {
        bits[w] = ss_pack64(edge + 64 * w);
    }
    return words;
}

/* Names the first label that is out of range, in memory order; OK if there is none. */
static inline ss_status ss_check_labels(ss_exec *x, const ss_tensor *t, const char *name,
                                        const ss_label_rule *rule) {
    uint16_t out[SS_LABEL_BLOCK];
    const int64_t n = ss_count(t);
    int64_t step = SS_LABEL_BLOCK;
    for (int64_t i = 0; i < n; i += step) {
        int64_t length = n - i < step ? n - i : step;
        if (!ss_load_labels(t, i, length, rule, 1, out)) {
            continue;
        }
        if (step == 1) {
            return ss_fail(x, SS_INVALID, "%s: expected labels from 0 to %lld%s, got %.0f", name,
                           (long long)rule->classes - 1, rule->ignores ? " or the ignored one" : "",
                           ss_at(t, i));
        }
        step = 1; /* it is in this block: look again, one by one */
        --i;
    }
    return SS_OK;
}

#endif
