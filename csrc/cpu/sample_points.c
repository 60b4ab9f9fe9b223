/* SPDX-License-Identifier: Apache-2.0
 *
 * sample_points.c: n random points inside and n outside every class region of every sample.
 *
 * Region of class c: {argmax_c prob = c} (ties: smallest class); candidates are its voxels, or
 * those with max_c prob >= confidence if at least n of these are in the set. Ranks among m
 * candidates in C order by Floyd's subset sampling: for i = 0..n-1, r = pick(m - n + i + 1, word
 * i), or m - n + i if r was drawn before; where m < n all m are taken. Word i is philox64(seed;
 * counter + (0, 0, (2 c + side) n + i, 0)), side 1 outside. Points come in C order; missing ones
 * have label -1.
 *
 * prob [B, C, D, H, W] -> point [B, C, 2, n, 3], label [B, C, 2, n] (1, 0, -1). Nothing is sorted
 * and no list of voxels is made: blocks of VOXELS voxels are counted per class, then only blocks
 * that hold a chosen rank are looked at again. Memory: 4 bytes read per probability (float), 4 C /
 * VOXELS written per voxel. Numerics: comparisons only. Deterministic: counts are integers.
 */
#include "lanes.h"

#define VOXELS 256 /* a block; its counts fit 16 bits */
#define GROUP 32   /* blocks per item */

typedef struct counts {
    uint16_t all, confident; /* voxels of one class in one block */
} counts;

typedef struct total {
    int64_t all, confident;
} total;

typedef struct job {
    const ss_sample_points_args *a;
    int64_t voxels, blocks;
    float confidence;
    counts *count; /* [B, blocks, C] */
    total *total;  /* [B, C + 1]; the last: whole image */
} job;

/* The classes and the confidence of one block's voxels; returns how many voxels there are. */
static int64_t classify(const job *j, int64_t b, int64_t block, int32_t *restrict class,
                        float *restrict best) {
    const ss_tensor *p = &j->a->prob;
    float buffer[VOXELS];
    int64_t first = block * VOXELS;
    int64_t n = j->voxels - first < VOXELS ? j->voxels - first : VOXELS;
    const float *zero = ss_load_f32(p, b * p->shape[1] * j->voxels + first, n, buffer);
    memcpy(best, zero, (size_t)n * sizeof(float));
    memset(class, 0, (size_t)n * sizeof(int32_t));
    for (int32_t c = 1; c < (int32_t)p->shape[1]; ++c) {
        const float *restrict v =
            ss_load_f32(p, (b * p->shape[1] + c) * j->voxels + first, n, buffer);
        SS_SIMD
        for (int64_t i = 0; i < n; ++i) {
            int32_t more = -(int32_t)(v[i] > best[i]); /* all bits or none */
            class[i] = (class[i] & ~more) | (c & more);
            best[i] = v[i] > best[i] ? v[i] : best[i];
        }
    }
    return n;
}

/* Two classes need no intermediate results. */
static void count_two(const job *j, int64_t b, int64_t block, counts *out) {
    float buffers[2][VOXELS];
    const int64_t first = block * VOXELS, start = 2 * b * j->voxels + first;
    const int64_t n = j->voxels - first < VOXELS ? j->voxels - first : VOXELS;
    const float *restrict p0 = ss_load_f32(&j->a->prob, start, n, buffers[0]);
    const float *restrict p1 = ss_load_f32(&j->a->prob, start + j->voxels, n, buffers[1]);
    const float confidence = j->confidence;
    int32_t ones = 0, confident = 0, both = 0;
    _Pragma("omp simd reduction(+ : ones, confident, both)") for (int64_t i = 0; i < n; ++i) {
        int32_t one = p1[i] > p0[i];
        float best = p1[i] > p0[i] ? p1[i] : p0[i];
        int32_t sure = best >= confidence;
        ones += one;
        confident += sure;
        both += one & sure;
    }
    out[0] = (counts){(uint16_t)(n - ones), (uint16_t)(confident - both)};
    out[1] = (counts){(uint16_t)ones, (uint16_t)both};
}

static void count_all(const job *j, int64_t b, int64_t block, counts *out) {
    int32_t class[VOXELS];
    float best[VOXELS];
    const int64_t n = classify(j, b, block, class, best);
    const float confidence = j->confidence;
    for (int32_t c = 0; c < (int32_t)j->a->prob.shape[1]; ++c) {
        int32_t all = 0, confident = 0;
        _Pragma("omp simd reduction(+ : all, confident)") for (int64_t i = 0; i < n; ++i) {
            int32_t here = class[i] == c;
            all += here;
            confident += here & (best[i] >= confidence);
        }
        out[c] = (counts){(uint16_t)all, (uint16_t)confident};
    }
}

static void count(void *ctx, int64_t begin, int64_t end, int32_t thread) {
    const job *j = ctx;
    const int64_t classes = j->a->prob.shape[1];
    (void)thread;
    for (int64_t item = begin; item < end; ++item) {
        counts *out = j->count + item * classes;
        if (classes == 2) {
            count_two(j, item / j->blocks, item % j->blocks, out);
        } else {
            count_all(j, item / j->blocks, item % j->blocks, out);
        }
    }
}

static void add_totals(const job *j) {
    const int64_t classes = j->a->prob.shape[1];
    for (int64_t b = 0; b < j->a->prob.shape[0]; ++b) {
        total *t = j->total + b * (classes + 1);
        memset(t, 0, (size_t)(classes + 1) * sizeof(total));
        for (int64_t block = 0; block < j->blocks; ++block) {
            const counts *n = j->count + (b * j->blocks + block) * classes;
            for (int64_t c = 0; c < classes; ++c) {
                t[c].all += n[c].all;
                t[c].confident += n[c].confident;
            }
        }
        for (int64_t c = 0; c < classes; ++c) {
            t[classes].all += t[c].all;
            t[classes].confident += t[c].confident;
        }
    }
}

/* Floyd: `n` distinct ranks of m, ascending. Returns how many. */
static int64_t choose(const ss_sample_points_args *a, const int64_t *word, int64_t set, int64_t m,
                      int64_t *rank) {
    const int64_t n = m < a->n ? m : a->n;
    for (int64_t i = 0; i < n; ++i) {
        uint64_t r = ss_philox64((uint64_t)a->seed, (uint32_t)word[0], (uint32_t)word[1],
                                 (uint32_t)(word[2] + set * a->n + i), (uint32_t)word[3]);
        int64_t v = (int64_t)ss_pick((uint64_t)(m - n + i + 1), r);
        for (int64_t k = 0; k < i; ++k) {
            v = rank[k] == v ? m - n + i : v; /* that one is new: later than all before */
        }
        int64_t k = i;
        for (; k > 0 && rank[k - 1] > v; --k) {
            rank[k] = rank[k - 1];
        }
        rank[k] = v;
    }
    return n;
}

/* Candidates of (class, side) in a block or an image, from its counts. */
static int64_t candidates(int64_t inside, int64_t whole, int side) {
    return side ? whole - inside : inside;
}

static int64_t block_candidates(const job *j, const counts *n, int64_t c, int side, int confident) {
    int64_t whole = 0;
    for (int64_t k = 0; side && k < j->a->prob.shape[1]; ++k) {
        whole += confident ? n[k].confident : n[k].all;
    }
    return candidates(confident ? n[c].confident : n[c].all, whole, side);
}

static void put_point(const job *j, int64_t slot, int64_t voxel, int32_t label) {
    const int64_t *s = j->a->prob.shape;
    int64_t *point = (int64_t *)j->a->point.data + 3 * slot;
    point[0] = voxel / s[4] / s[3];
    point[1] = voxel / s[4] % s[3];
    point[2] = voxel % s[4];
    ((int32_t *)j->a->label.data)[slot] = label;
}

/* Writes the candidates of one block whose ranks (minus `before`) are in rank[0..n); returns how
 * many those were. */
static int64_t put_block(const job *j, int64_t b, int64_t c, int side, int confident, int64_t block,
                         int64_t before, const int64_t *rank, int64_t n, int64_t slot) {
    int32_t class[VOXELS];
    float best[VOXELS];
    uint8_t hit[VOXELS];
    const int64_t voxels = classify(j, b, block, class, best);
    const float confidence = j->confidence;
    const int32_t wanted = (int32_t)c, any = !confident;
    SS_SIMD
    for (int64_t i = 0; i < voxels; ++i) {
        int32_t inside = class[i] == wanted;
        hit[i] = (uint8_t)((inside ^ side) & ((best[i] >= confidence) | any));
    }
    int64_t seen = before, done = 0;
    for (int64_t i = 0; i < voxels && done < n; ++i) {
        if (hit[i] && seen++ == rank[done]) {
            put_point(j, slot + done++, block * VOXELS + i, !side);
        }
    }
    return done;
}

static void locate(void *ctx, int64_t begin, int64_t end, int32_t thread) {
    const job *j = ctx;
    const ss_sample_points_args *a = j->a;
    const int64_t classes = a->prob.shape[1];
    int64_t rank[1024];
    (void)thread;
    for (int64_t set = begin; set < end; ++set) {
        const int side = (int)(set % 2);
        const int64_t c = set / 2 % classes, b = set / 2 / classes;
        const total *t = j->total + b * (classes + 1);
        int64_t m = candidates(t[c].confident, t[classes].confident, side);
        const int confident = m >= a->n;
        m = confident ? m : candidates(t[c].all, t[classes].all, side);
        const int64_t n =
            choose(a, (const int64_t *)a->counter.data + 4 * b, 2 * c + side, m, rank);
        int64_t done = 0, before = 0;
        for (int64_t block = 0; done < n && block < j->blocks; ++block) {
            const counts *at = j->count + (b * j->blocks + block) * classes;
            int64_t here = block_candidates(j, at, c, side, confident);
            if (rank[done] < before + here) {
                done += put_block(j, b, c, side, confident, block, before, rank + done, n - done,
                                  set * a->n + done);
            }
            before += here;
        }
        for (; done < a->n; ++done) {
            put_point(j, set * a->n + done, 0, -1);
        }
    }
}

ss_status SS_CPU(sample_points)(ss_exec *x, const ss_sample_points_args *a) {
    const int64_t *s = a->prob.shape;
    job j = {.a = a, .voxels = s[2] * s[3] * s[4], .confidence = (float)a->confidence};
    if ((double)j.confidence < a->confidence) {
        j.confidence = nextafterf(j.confidence, INFINITY); /* same comparison, in float */
    }
    j.blocks = j.voxels / VOXELS + (j.voxels % VOXELS != 0);
    if (s[1] > INT32_MAX) {
        return ss_fail(x, SS_INVALID, "prob: expected at most 2^31 - 1 classes, got %lld",
                       (long long)s[1]);
    }
    j.count = ss_scratch(x, s[0] * j.blocks * s[1], sizeof(counts));
    j.total = ss_scratch(x, s[0] * (s[1] + 1), sizeof(total));
    if (j.count && j.total) {
        ss_parallel_for(x, s[0] * j.blocks, GROUP, count, &j);
        add_totals(&j);
        ss_parallel_for(x, s[0] * s[1] * 2, 32, locate, &j);
    }
    int failed = !j.count || !j.total;
    ss_scratch_free(j.count);
    ss_scratch_free(j.total);
    return failed ? SS_NO_MEMORY : SS_OK;
}
