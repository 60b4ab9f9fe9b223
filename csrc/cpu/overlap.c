/* SPDX-License-Identifier: Apache-2.0
 *
 * overlap.c: voxel counts behind Dice and Jaccard, all classes in one pass over two label maps.
 *
 *     counts[n, c] = (|A|, |G|, |A & G|),  A = {y_pred[n] = c}, G = {y[n] = c}
 *
 * Shapes: y_pred, y [N, S] of any integer dtypes; counts [N, C, 3]. A reference voxel with the
 * ignored label counts nowhere; any other label outside 0..C-1 is an error. Memory: each label is
 * read once. Blocks of 4096 voxels are checked and converted in lanes; then only runs of equal
 * pairs of labels are visited, so the cost does not depend on the number of classes. Bytes that are
 * all 0 or 1, a mask and its reference, are counted as bits.
 * Counts are integers: exact, and the same for every thread count.
 */
#include "bits.h"
#include "labels.h"

typedef struct job {
    const ss_overlap_args *a;
    ss_label_rule rule;
    int64_t blocks;  /* per case */
    int64_t *counts; /* one table per thread */
    uint8_t *bad;    /* one flag per thread, 64 bytes apart */
    int bits;        /* blocks of 0 and 1 may be counted as bits */
} job;

static void add_run(int64_t *counts, unsigned p, unsigned g, int64_t length) {
    if (p != SS_NO_LABEL) {
        counts[3 * p] += length;
    }
    if (g != SS_NO_LABEL) {
        counts[3 * g + 1] += length;
        if (p == g) {
            counts[3 * p + 2] += length;
        }
    }
}

static void count_block(const uint16_t *p, const uint16_t *g, int64_t n, int64_t *counts) {
    uint64_t bits[SS_LABEL_BLOCK / 64];
    bits[0] = 0; /* gcc does not see that n is at least 1 */
    int64_t words = ss_label_edges(p, g, n, bits);
    int64_t begin = 0;
    bits[0] &= ~(uint64_t)1;
    for (int64_t w = 0; w < words; ++w) {
        for (uint64_t left = bits[w]; left; left &= left - 1) {
            int64_t end = 64 * w + ss_lowest_bit(left);
            add_run(counts, p[begin], g[begin], end - begin);
            begin = end;
        }
    }
    add_run(counts, p[begin], g[begin], n - begin);
}

/* Counts a block of two maps of 0 and 1; false if there is anything else in it. */
static int count_bits(const uint8_t *restrict p, const uint8_t *restrict g, int64_t n,
                      int64_t *counts) {
    uint8_t any = 0;
    _Pragma("omp simd reduction(| : any)") for (int64_t i = 0; i < n; ++i) {
        any |= (uint8_t)(p[i] | g[i]);
    }
    if (any > 1) {
        return 0;
    }
    int64_t ours = 0, theirs = 0, both = 0;
    for (int64_t i = 0; i < n; i += 64) {
        const int64_t m = n - i < 64 ? n - i : 64;
        const uint64_t a = pack64(p + i, m), b = pack64(g + i, m);
        ours += ss_count_bits(a);
        theirs += ss_count_bits(b);
        both += ss_count_bits(a & b);
    }
    counts[0] += n - ours;
    counts[1] += n - theirs;
    counts[2] += n - ours - theirs + both;
    counts[3] += ours;
    counts[4] += theirs;
    counts[5] += both;
    return 1;
}

/* Whether `count_bits` may be asked: bytes, of which neither 0 nor 1 is ignored. */
static int are_bits(const ss_overlap_args *a, const ss_label_rule *rule) {
    const int bytes = ss_dtype_size(a->y_pred.dtype) == 1 && ss_dtype_size(a->y.dtype) == 1;
    return bytes && rule->classes >= 2 &&
           !(rule->ignores && (rule->ignore == 0 || rule->ignore == 1));
}

static void blocks(void *ctx, int64_t begin, int64_t end, int32_t thread) {
    const job *j = ctx;
    const ss_overlap_args *a = j->a;
    const int64_t size = a->y.shape[1];
    const int64_t table = 3 * j->rule.classes;
    int64_t *counts = j->counts + thread * table * a->y.shape[0];
    uint16_t p[SS_LABEL_BLOCK];
    uint16_t g[SS_LABEL_BLOCK];
    for (int64_t b = begin; b < end; ++b) {
        int64_t n = b / j->blocks;
        int64_t at = b % j->blocks * SS_LABEL_BLOCK;
        int64_t length = size - at < SS_LABEL_BLOCK ? size - at : SS_LABEL_BLOCK;
        if (j->bits &&
            count_bits((const uint8_t *)a->y_pred.data + n * size + at,
                       (const uint8_t *)a->y.data + n * size + at, length, counts + n * table)) {
            continue;
        }
        if (ss_load_pair(&a->y_pred, &a->y, n * size + at, length, &j->rule, p, g)) {
            j->bad[64 * thread] = 1;
        } else {
            count_block(p, g, length, counts + n * table);
        }
    }
}

ss_status SS_CPU(overlap)(ss_exec *x, const ss_overlap_args *a) {
    const int64_t n = a->y.shape[0];
    job j = {.a = a, .rule = {a->num_classes, a->ignore_index, (int32_t)a->has_ignore}};
    j.bits = are_bits(a, &j.rule);
    j.blocks = (a->y.shape[1] + SS_LABEL_BLOCK - 1) / SS_LABEL_BLOCK;
    const int64_t table = n * 3 * a->num_classes;
    const int64_t grain = 8;
    int32_t threads = ss_parallel_threads(x, n * j.blocks, grain);
    j.counts = ss_scratch(x, threads * table, sizeof(int64_t));
    j.bad = ss_scratch(x, threads, 64);
    ss_status status = j.counts && j.bad ? SS_OK : SS_NO_MEMORY;
    if (status == SS_OK) {
        memset(j.counts, 0, (size_t)(threads * table) * sizeof(int64_t));
        memset(j.bad, 0, (size_t)threads * 64);
        ss_parallel_for(x, n * j.blocks, grain, blocks, &j);
        int64_t *out = a->counts.data;
        int bad = 0;
        memset(out, 0, (size_t)table * sizeof(int64_t));
        for (int32_t t = 0; t < threads; ++t) {
            bad |= j.bad[64 * t];
            for (int64_t i = 0; i < table; ++i) {
                out[i] += j.counts[t * table + i];
            }
        }
        if (bad) {
            status = ss_check_labels(x, &a->y_pred, "y_pred", &j.rule);
            status = status == SS_OK ? ss_check_labels(x, &a->y, "y", &j.rule) : status;
        }
    }
    ss_scratch_free(j.bad);
    ss_scratch_free(j.counts);
    return status;
}
