/* SPDX-License-Identifier: Apache-2.0
 *
 * labels.cuh: pairs of label maps of any integer dtypes, read as one number per voxel.
 *
 * ss_label_pairs reads SS_LABEL_TURNS voxels per thread, THREADS apart, so that a warp's loads are
 * contiguous and several of them are under way. A pair is p << 16 | g, with SS_NO_LABEL for a label
 * that takes no part: both, where the reference has the ignored label or either label is neither a
 * class nor the ignored one. The latter are errors on the CPU; here they are counted.
 */
#ifndef SS_CUDA_LABELS_CUH
#define SS_CUDA_LABELS_CUH

#include "device.cuh"

#define SS_NO_LABEL 0xffffu
#define SS_NO_PAIR 0xffffffffu
#define SS_LABEL_TURNS 4

typedef struct ss_label_map {
    const void *data;
    uint64_t last, ignore; /* signed labels are read as unsigned: negative ones lie behind `last` */
    int32_t bytes, ignores;
} ss_label_map;

typedef struct ss_label_maps {
    ss_label_map pred, ref;
} ss_label_maps;

/* ---- host ------------------------------------------------------------------------------------ */

static inline ss_label_map ss_label_map_of(const ss_tensor *t, int64_t classes, int64_t has_ignore,
                                           int64_t ignore) {
    const bool is_signed =
        t->dtype == SS_I8 || t->dtype == SS_I16 || t->dtype == SS_I32 || t->dtype == SS_I64;
    ss_label_map m = {};
    m.data = t->data;
    switch (t->dtype) {
    case SS_U16:
    case SS_I16:
        m.bytes = 2;
        break;
    case SS_U32:
    case SS_I32:
        m.bytes = 4;
        break;
    case SS_U64:
    case SS_I64:
        m.bytes = 8;
        break;
    default:
        m.bytes = 1;
        break;
    }
    const uint64_t most = t->dtype == SS_BOOL ? 1 : UINT64_MAX >> (64 - 8 * m.bytes + is_signed);
    const uint64_t last = (uint64_t)classes - 1;
    m.last = last < most ? last : most;
    /* An ignored label that the dtype cannot hold does not occur. */
    const bool low = is_signed && ignore < 0 && ignore >= -(int64_t)most - 1;
    const bool high = ignore >= 0 && (uint64_t)ignore <= (t->dtype == SS_BOOL ? 255 : most);
    m.ignores = has_ignore && (low || high);
    m.ignore = m.ignores ? (uint64_t)ignore & UINT64_MAX >> (64 - 8 * m.bytes) : 0;
    return m;
}

static inline ss_label_maps ss_label_maps_of(const ss_tensor *pred, const ss_tensor *ref,
                                             int64_t classes, int64_t has_ignore, int64_t ignore) {
    ss_label_maps m = {ss_label_map_of(pred, classes, has_ignore, ignore),
                       ss_label_map_of(ref, classes, has_ignore, ignore)};
    return m;
}

/* ---- device ---------------------------------------------------------------------------------- */

#define SS_LABEL_SKIP 0x10000u
#define SS_LABEL_BAD 0x20000u

/* Labels at, at + THREADS, ... below `end`: a class in the low 16 bits or SS_NO_LABEL, and flags.
 */
template <int THREADS, typename T>
SS_DEVICE void ss_label_codes(const ss_label_map &m, int64_t at, int64_t end, uint32_t *code) {
    const T *data = static_cast<const T *>(m.data);
    const T last = static_cast<T>(m.last), ignore = static_cast<T>(m.ignore);
    T v[SS_LABEL_TURNS];
    for (int k = 0; k < SS_LABEL_TURNS; ++k) {
        v[k] = at + k * THREADS < end ? data[at + k * THREADS] : static_cast<T>(0);
    }
    for (int k = 0; k < SS_LABEL_TURNS; ++k) {
        bool skip = m.ignores && v[k] == ignore, good = v[k] <= last;
        code[k] = (good ? static_cast<uint32_t>(v[k]) : SS_NO_LABEL) | (skip ? SS_LABEL_SKIP : 0) |
                  (good || skip ? 0 : SS_LABEL_BAD);
    }
}

template <int THREADS>
SS_DEVICE void ss_label_codes_any(const ss_label_map &m, int64_t at, int64_t end, uint32_t *code) {
    switch (m.bytes) {
    case 1:
        return ss_label_codes<THREADS, uint8_t>(m, at, end, code);
    case 2:
        return ss_label_codes<THREADS, uint16_t>(m, at, end, code);
    case 4:
        return ss_label_codes<THREADS, uint32_t>(m, at, end, code);
    default:
        return ss_label_codes<THREADS, uint64_t>(m, at, end, code);
    }
}

/* Pairs of voxels at, at + THREADS, ... ; SS_NO_PAIR from `end` on. Returns how many are bad. */
template <int THREADS>
SS_DEVICE int ss_label_pairs(const ss_label_maps &maps, int64_t at, int64_t end, uint32_t *pair) {
    uint32_t ref[SS_LABEL_TURNS];
    int bad = 0;
    ss_label_codes_any<THREADS>(maps.pred, at, end, pair);
    ss_label_codes_any<THREADS>(maps.ref, at, end, ref);
    for (int k = 0; k < SS_LABEL_TURNS; ++k) {
        bool in = at + k * THREADS < end, wrong = ((pair[k] | ref[k]) & SS_LABEL_BAD) != 0;
        bool out = !in || wrong || (ref[k] & SS_LABEL_SKIP) != 0;
        bad += in && wrong;
        pair[k] = out ? SS_NO_PAIR : pair[k] << 16 | ref[k];
    }
    return bad;
}

/* Adds a block's bad voxels to the counter, which may be NULL. All threads take part. */
template <int THREADS>
SS_DEVICE void ss_count_bad(unsigned long long *counter, int bad, int *room) {
    if (__syncthreads_or(bad) && counter) {
        int all = ss_block_sum<THREADS>(bad, room);
        if (threadIdx.x == 0) {
            atomicAdd(counter, static_cast<unsigned long long>(all));
        }
    }
}

#endif
