/* SPDX-License-Identifier: Apache-2.0
 *
 * sample_points.cu: n random points inside and n outside every class region of every sample.
 *
 * Region of class c: {argmax_c prob = c} (ties: smallest class); candidates are its voxels, or
 * those with max_c prob >= confidence if at least n of these are in the set (class, side). Ranks
 * among m candidates in C order by Floyd's subset sampling: for i = 0..n-1, r = pick(m - n + i + 1,
 * word i), or m - n + i if r was drawn before; where m < n all m are taken. Word i is
 * philox64(seed; counter + (0, 0, (2 c + side) n + i, 0)), side 1 outside. Points come in C order;
 * missing ones are -1.
 *
 * prob [B, C, D, H, W] -> point [B, C, 2, n, 3], label [B, C, 2, n] (1, 0, -1). Launches: 1 memset
 * and 3 kernels: count the classes of blocks of VOXELS voxels; one block per set draws the ranks
 * and finds their blocks; one warp per point finds the voxel. Memory: 4 bytes read per probability
 * (float); workspace 8 (C + 1) / VOXELS per voxel and 24 per point. Numerics: comparisons of
 * floats, the same voxels as on the CPU. Deterministic: counts are integers. registers <= 64
 */
#include "block.cuh"

#define VOXELS 512
#define THREADS 256
#define WARPS (THREADS / SS_WARP)
#define EACH (VOXELS / SS_WARP) /* voxels per lane when a warp looks at a block */
#define MOST 1024               /* points per set: ops.def */
#define SHARED_CLASSES 1024     /* counted in shared memory */

typedef struct point_counts {
    uint32_t all, confident;
} point_counts;

/* Where a point is: candidate number `rank` of a block; block < 0: there is none. */
typedef struct point_place {
    int64_t block;
    int32_t rank;
    int32_t confident;
} point_place;

typedef struct point_task {
    const void *prob;
    const int64_t *counter;
    uint64_t seed;
    int64_t B, C, voxels, H, W, blocks;
    int32_t n;
    float confidence;
    point_counts *count; /* [B, blocks, C + 1]; the last: confident voxels of all classes */
    point_place *place;  /* [B, C, 2, n] */
    int64_t *point;
    int32_t *label;
} point_task;

/* The winner among the classes at a voxel and its probability, as the CPU compares them. */
template <typename T>
SS_DEVICE int32_t classify(const point_task *t, int64_t b, int64_t i, float *p) {
    const int64_t start = b * t->C * t->voxels + i;
    float best = (float)ss_load<T>(t->prob, start);
    int32_t winner = 0;
    for (int32_t c = 1; c < (int32_t)t->C; ++c) {
        float v = (float)ss_load<T>(t->prob, start + c * t->voxels);
        winner = v > best ? c : winner;
        best = v > best ? v : best;
    }
    *p = best;
    return winner;
}

template <typename T> SS_KERNEL void k_sample_points_count(point_task t) {
    SS_SHARED uint32_t room[2 * (SHARED_CLASSES + 1)];
    const int64_t b = blockIdx.x / t.blocks, block = blockIdx.x % t.blocks;
    const int32_t slots = 2 * ((int32_t)t.C + 1);
    const int32_t shared = t.C <= SHARED_CLASSES;
    uint32_t *out = (uint32_t *)(t.count + (int64_t)blockIdx.x * (t.C + 1));
    uint32_t *count = shared ? room : out; /* `out` is zero already */
    for (int32_t k = threadIdx.x; shared && k < slots; k += THREADS) {
        room[k] = 0;
    }
    __syncthreads();
    for (int32_t k = threadIdx.x; k < VOXELS; k += THREADS) {
        const int64_t i = block * VOXELS + k;
        float p = 0.0f;
        if (i < t.voxels) {
            int32_t c = classify<T>(&t, b, i, &p);
            atomicAdd(&count[2 * (int64_t)c], 1u);
            if (p >= t.confidence) {
                atomicAdd(&count[2 * (int64_t)c + 1], 1u);
                atomicAdd(&count[2 * t.C + 1], 1u);
            }
        }
    }
    __syncthreads();
    for (int32_t k = threadIdx.x; shared && k < slots; k += THREADS) {
        out[k] = room[k];
    }
}

/* Candidates of (class, side) in a block. */
SS_DEVICE uint32_t candidates_of(const point_task *t, int64_t b, int64_t block, int64_t c,
                                 int32_t side, int32_t confident) {
    const point_counts *n = t->count + (b * t->blocks + block) * (t->C + 1);
    const uint32_t inside = confident ? n[c].confident : n[c].all;
    const int64_t left = t->voxels - block * VOXELS;
    const uint32_t whole =
        confident ? n[t->C].confident : (uint32_t)(left < VOXELS ? left : VOXELS);
    return side ? whole - inside : inside;
}

SS_DEVICE int64_t candidates_in_all(const point_task *t, int64_t b, int64_t c, int32_t side,
                                    int32_t confident, int64_t *room) {
    int64_t sum = 0;
    for (int64_t k = threadIdx.x; k < t->blocks; k += THREADS) {
        sum += candidates_of(t, b, k, c, side, confident);
    }
    return ss_block_sum<THREADS>(sum, room);
}

/* Floyd: `n` distinct ranks of m into rank[], ascending; `drawn` is room for as many. */
SS_DEVICE void choose(const point_task *t, int64_t b, int64_t set, int64_t m, int32_t n,
                      int64_t *drawn, int64_t *rank) {
    const int64_t *word = t->counter + 4 * b;
    for (int32_t i = threadIdx.x; i < n; i += THREADS) {
        uint64_t r = ss_philox64(t->seed, (uint32_t)word[0], (uint32_t)word[1],
                                 (uint32_t)(word[2] + set * t->n + i), (uint32_t)word[3]);
        drawn[i] = (int64_t)ss_pick((uint64_t)(m - n + i + 1), r);
    }
    __syncthreads();
    for (int32_t i = 1; i < n; ++i) {
        int taken = 0;
        for (int32_t k = threadIdx.x; k < i; k += THREADS) {
            taken |= drawn[k] == drawn[i];
        }
        taken = __syncthreads_or(taken);
        if (taken && threadIdx.x == 0) {
            drawn[i] = m - n + i;
        }
        __syncthreads();
    }
    for (int32_t i = threadIdx.x; i < n; i += THREADS) {
        int32_t smaller = 0;
        for (int32_t k = 0; k < n; ++k) {
            smaller += drawn[k] < drawn[i];
        }
        rank[smaller] = drawn[i];
    }
    __syncthreads();
}

/* One block per set (b, c, side). */
SS_KERNEL void k_sample_points_choose(point_task t) {
    SS_SHARED int64_t drawn[MOST];
    SS_SHARED int64_t rank[MOST];
    SS_SHARED int64_t room[WARPS];
    SS_SHARED int64_t first[THREADS + 1]; /* candidates before each of THREADS blocks */
    const int32_t side = blockIdx.x % 2;
    const int64_t c = blockIdx.x / 2 % t.C, b = blockIdx.x / 2 / t.C;
    point_place *place = t.place + (int64_t)blockIdx.x * t.n;
    int64_t m = candidates_in_all(&t, b, c, side, 1, room);
    const int32_t confident = m >= t.n;
    m = confident ? m : candidates_in_all(&t, b, c, side, 0, room);
    const int32_t n = (int32_t)(m < t.n ? m : t.n);
    choose(&t, b, 2 * c + side, m, n, drawn, rank);
    int64_t before = 0;
    for (int64_t base = 0; base < t.blocks && before < m; base += THREADS) {
        const int64_t k = base + threadIdx.x;
        int64_t here = k < t.blocks ? candidates_of(&t, b, k, c, side, confident) : 0, total;
        first[threadIdx.x] = before + ss_block_scan<THREADS>(here, room, &total);
        if (threadIdx.x == 0) {
            first[THREADS] = before + total;
        }
        __syncthreads();
        for (int32_t i = threadIdx.x; i < n; i += THREADS) {
            if (rank[i] >= before && rank[i] < before + total) {
                int32_t low = 0, high = THREADS; /* first[low] <= rank < first[high] */
                while (high - low > 1) {
                    int32_t mid = (low + high) / 2;
                    low = first[mid] <= rank[i] ? mid : low;
                    high = first[mid] <= rank[i] ? high : mid;
                }
                place[i] = {base + low, (int32_t)(rank[i] - first[low]), confident};
            }
        }
        before += total;
        __syncthreads();
    }
    for (int32_t i = n + threadIdx.x; i < t.n; i += THREADS) {
        place[i] = {-1, 0, 0};
    }
}

/* One warp per point: the candidate of this rank in its block. */
template <typename T> SS_KERNEL void k_sample_points_locate(point_task t) {
    const int32_t lane = threadIdx.x % SS_WARP;
    const int64_t slot = (int64_t)blockIdx.x * WARPS + threadIdx.x / SS_WARP;
    const int64_t set = slot / t.n;
    if (set >= t.B * t.C * 2) {
        return; /* a whole warp */
    }
    const int32_t side = set % 2;
    const int64_t c = set / 2 % t.C, b = set / 2 / t.C;
    const point_place place = t.place[slot];
    int64_t voxel = 0;
    int32_t left = place.rank, found = 0;
    for (int32_t k = 0; place.block >= 0 && !found && k < EACH; ++k) {
        const int64_t i = place.block * VOXELS + k * SS_WARP + lane;
        int32_t hit = 0;
        if (i < t.voxels) {
            float p;
            hit = (classify<T>(&t, b, i, &p) == c) != side;
            hit = hit && (!place.confident || p >= t.confidence);
        }
        uint32_t hits = __ballot_sync(SS_ALL_LANES, hit);
        found = left < __popc(hits);
        for (int32_t pass = 0; found && pass < left; ++pass) {
            hits &= hits - 1;
        }
        voxel = found ? i - lane + __ffs((int32_t)hits) - 1 : 0;
        left -= __popc(hits);
    }
    if (lane == 0) {
        int64_t *point = t.point + 3 * slot;
        point[0] = voxel / t.W / t.H;
        point[1] = voxel / t.W % t.H;
        point[2] = voxel % t.W;
        t.label[slot] = found ? !side : -1;
    }
}

/* ---- the call ------------------------------------------------------------------------------- */

static point_task point_plan(ss_carve *w, const ss_sample_points_args *a) {
    const int64_t *s = a->prob.shape;
    point_task t = {};
    t.prob = a->prob.data;
    t.counter = (const int64_t *)a->counter.data;
    t.seed = (uint64_t)a->seed;
    t.B = s[0];
    t.C = s[1];
    t.voxels = s[2] * s[3] * s[4];
    t.H = s[3];
    t.W = s[4];
    t.blocks = (t.voxels + VOXELS - 1) / VOXELS;
    t.n = (int32_t)a->n;
    t.confidence = (float)a->confidence;
    if ((double)t.confidence < a->confidence) {
        t.confidence = nextafterf(t.confidence, INFINITY); /* same comparison, in float */
    }
    t.point = (int64_t *)a->point.data;
    t.label = (int32_t *)a->label.data;
    t.count = ss_take<point_counts>(w, t.B * t.blocks * (t.C + 1));
    t.place = ss_take<point_place>(w, t.B * t.C * 2 * t.n);
    return t;
}

int64_t SS_CUDA_WORKSPACE(sample_points)(const ss_sample_points_args *a) {
    ss_carve w = {};
    (void)point_plan(&w, a);
    return ss_carved(&w);
}

template <typename T> static ss_status sample(ss_exec *x, const point_task &t) {
    const int64_t sets = t.B * t.C * 2;
    if (t.C > SHARED_CLASSES) {
        const int64_t entries = t.B * t.blocks * (t.C + 1);
        SS_TRY(ss_cuda_zero(x, t.count, entries * (int64_t)sizeof(point_counts)));
    }
    SS_TRY(SS_LAUNCH(x, ss_blocks(t.B * t.blocks, 1), THREADS, 0, (k_sample_points_count<T>), t));
    SS_TRY(SS_LAUNCH(x, ss_blocks(sets, 1), THREADS, 0, (k_sample_points_choose), t));
    return SS_LAUNCH(x, ss_blocks(sets * t.n, WARPS), THREADS, 0, (k_sample_points_locate<T>), t);
}

ss_status SS_CUDA(sample_points)(ss_exec *x, const ss_sample_points_args *a) {
    if (a->prob.shape[1] > INT32_MAX / 4) {
        return ss_cuda_fail(x, SS_INVALID, "prob: expected at most 2^29 classes, got %lld",
                            (long long)a->prob.shape[1]);
    }
    ss_carve w = ss_carve_of(x);
    const point_task t = point_plan(&w, a);
    SS_FOR_FLOAT(a->prob.dtype, T, return sample<T>(x, t));
    return SS_UNSUPPORTED;
}
