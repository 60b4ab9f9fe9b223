/* SPDX-License-Identifier: Apache-2.0
 *
 * next_click.cu: where a simulated user would click next, all samples and classes (rows) at once.
 *
 *     FN = T & ~G & R,  FP = ~T & G & R;  if both are empty, without R; if still empty: no click
 *     RITM rule:   d2 = squared distance to the nearest voxel outside the region, m2 = max d2;
 *                  positive iff m2_FN > m2_FP; candidates 4 d2 > m2 of that region
 *     random rule: candidates FN | FP; positive iff the click is in FN
 *     click = candidate number floor(n r / 2^64) in C order, r = philox64(seed; counter)
 *
 * FN and FP are disjoint, so ONE transform serves both: of the distance to the nearest voxel of
 * another kind (nothing, FN, FP, outside), whose separable form is
 *     d2(i) = min over j on the axis of (i - j)^2 + (kind(j) = kind(i) ? d2'(j) : 0),
 * searched outwards from i and stopped by the best so far: as many steps as the distance itself.
 * Which region wins, and whether R counts, is found and used on the device.
 *
 * masks [N, D, H, W] -> point [N, 3], label [N] (1, 0; -1 and zeros for no click). Launches: 1
 * memset and 2 kernels (random), 5 (RITM, 2-D) or 6 (RITM). Bytes per voxel: 1 per mask; RITM: 1
 * more per mask and 8 + 8 + 8 + 4 of distances (distance * 4 + kind in 32 bits). Workspace: 4 bytes
 * per CHUNK voxels; RITM: 8 per voxel. Sides up to 16384 for RITM. Numerics: integers, the same
 * voxels as on the CPU. Deterministic: atomics only for maxima and flags. registers <= 56
 */
#include "block.cuh"

#define THREADS 256
#define WARPS (THREADS / SS_WARP)
#define EACH 16 /* voxels per thread */
#define CHUNK (THREADS * EACH)
#define AHEAD 4    /* voxels of a thread whose loads are on their way together */
#define SIDE 16384 /* d2 <= (SIDE / 2)^2 = 2^26 */

typedef struct click_row {
    uint32_t found; /* 1: errors within the region, 2: errors */
    int32_t m2[2];  /* FN, FP */
    int32_t reserved;
} click_row;

typedef struct click_task {
    const uint8_t *target, *current, *region, *skip; /* the last three may be NULL */
    int64_t rows, voxels, chunks, D, H, W;
    int32_t wide; /* rows begin at multiples of 8 bytes */
    uint64_t seed;
    const int64_t *counter;
    int64_t *point;
    int32_t *label;
    click_row *row;
    uint32_t *count;  /* [rows, chunks] */
    int32_t *near[2]; /* d2 * 4 + kind */
} click_task;

/* Bit k: byte k of eight is not 0. */
SS_DEVICE uint32_t nonzero_bytes(uint64_t v) {
    const uint64_t low = 0x7f7f7f7f7f7f7f7full;
    uint64_t ones = (((v & low) + low) | v) >> 7 & 0x0101010101010101ull;
    return (uint32_t)(ones * 0x0102040810204080ull >> 56);
}

/* Bit k: voxel `at` + k of a row is set, for k < n <= EACH; `absent` where there is no mask. */
SS_DEVICE uint32_t mask_bits(const uint8_t *mask, int64_t start, int64_t at, int32_t n,
                             int32_t wide, uint32_t absent) {
    if (!mask) {
        return absent;
    }
    const uint8_t *p = mask + start + at;
    if (wide && n == EACH) {
        const uint64_t *q = (const uint64_t *)p;
        return nonzero_bytes(q[0]) | nonzero_bytes(q[1]) << 8;
    }
    uint32_t bits = 0;
    for (int32_t k = 0; k < n; ++k) {
        bits |= (uint32_t)(p[k] != 0) << k;
    }
    return bits;
}

SS_DEVICE int32_t voxels_here(const click_task *c, int64_t at) {
    int64_t left = c->voxels - at;
    return (int32_t)(left < 0 ? 0 : left < EACH ? left : EACH);
}

SS_DEVICE int skipped(const click_task *c, int64_t row) {
    return c->skip && c->skip[row];
}

/* Errors of a chunk: within the region in the low 16 bits, all of them in the high ones. */
SS_KERNEL void k_next_click_errors(click_task c) {
    SS_SHARED uint32_t room[WARPS];
    const int64_t row = blockIdx.x / c.chunks, chunk = blockIdx.x % c.chunks;
    if (skipped(&c, row)) {
        return;
    }
    const int64_t start = row * c.voxels, at = chunk * CHUNK + threadIdx.x * EACH;
    const int32_t n = voxels_here(&c, at);
    uint32_t wrong = mask_bits(c.target, start, at, n, c.wide, 0) ^
                     mask_bits(c.current, start, at, n, c.wide, 0);
    uint32_t kept = wrong & mask_bits(c.region, start, at, n, c.wide, 0xffffu);
    uint32_t sum = ss_block_sum<THREADS>((uint32_t)(__popc(kept) | __popc(wrong) << 16), room);
    if (threadIdx.x == 0) {
        c.count[blockIdx.x] = sum;
        if (sum) {
            atomicOr(&c.row[row].found, 2u | (uint32_t)((sum & 0xffffu) != 0));
        }
    }
}

/* ---- RITM ----------------------------------------------------------------------------------- */

/* 1 in FN, 2 in FP, 0 elsewhere */
SS_DEVICE int32_t kind_at(const click_task *c, int64_t i, int in_region) {
    int t = c->target[i] != 0;
    int g = c->current && c->current[i];
    int r = !in_region || !c->region || c->region[i];
    return r ? (t & !g) | (g & !t) << 1 : 0;
}

/* Squared distance along x: a warp per line finds where the kind changes, bit by bit, then every
 * voxel looks for the changes nearest to it. Shared memory: 3 bits per voxel of 8 lines. */
SS_KERNEL void k_next_click_lines(click_task c) {
    SS_DYNAMIC_SHARED(uint32_t, room);
    const int32_t words = (int32_t)((c.W + 31) / 32);
    const int32_t lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    uint32_t *fn = room + warp * 3 * words, *fp = fn + words, *edge = fp + words;
    const int64_t lines = c.D * c.H, line = (int64_t)blockIdx.x * WARPS + warp;
    const int64_t row = line / lines;
    const uint32_t found = row < c.rows && !skipped(&c, row) ? c.row[row].found : 0;
    uint32_t last = 0; /* kind of the voxel before the word */
    for (int32_t first = 0; first < words; first += AHEAD) {
        int32_t kind[AHEAD];
#pragma unroll
        for (int32_t k = 0; k < AHEAD; ++k) {
            const int64_t x = (first + k) * 32 + lane;
            kind[k] = found && x < c.W ? kind_at(&c, line * c.W + x, found & 1) : 0;
        }
#pragma unroll
        for (int32_t k = 0; k < AHEAD; ++k) {
            const int32_t w = first + k;
            uint32_t one = __ballot_sync(SS_ALL_LANES, kind[k] == 1);
            uint32_t two = __ballot_sync(SS_ALL_LANES, kind[k] == 2);
            if (lane == 0 && w < words) {
                uint32_t change = (one ^ (one << 1 | (last & 1))) | (two ^ (two << 1 | last >> 1));
                fn[w] = one;
                fp[w] = two;
                edge[w] = change | (w == 0);
            }
            last = one >> 31 | two >> 31 << 1;
        }
    }
    __syncthreads();
    for (int32_t w = 0; found && w < words; ++w) {
        const int32_t x = w * 32 + lane;
        int32_t kind = (int32_t)((fn[w] >> lane & 1) | (fp[w] >> lane & 1) << 1), d = 0;
        if (kind) {
            const uint32_t upto = 0xffffffffu >> (31 - lane); /* bits 0..lane */
            int32_t before = w, after = w;
            uint32_t left = edge[w] & upto, right = edge[w] & ~upto;
            while (!left) { /* ends: bit 0 of word 0 is set */
                left = edge[--before];
            }
            while (!right && ++after < words) {
                right = edge[after];
            }
            int32_t from = before * 32 + 31 - __clz((int32_t)left);
            int32_t to = right ? after * 32 + __ffs((int32_t)right) - 1 : (int32_t)c.W;
            d = x - from + 1 < to - x ? x - from + 1 : to - x;
        }
        if (x < c.W) {
            c.near[0][line * c.W + x] = d * d << 2 | kind;
        }
    }
}

/* The least squared distance when going along one more axis, on which this is voxel `at` of n. */
SS_DEVICE int32_t search_axis(const int32_t *near, int64_t at, int64_t n, int64_t stride,
                              int32_t kind, int32_t best) {
    for (int32_t k = 1; k * k < best; ++k) {
        const int32_t square = k * k;
        int32_t behind = 0, ahead = 0; /* outside is another kind */
        if (at >= k) {
            int32_t v = near[-k * stride];
            behind = (v & 3) == kind ? v >> 2 : 0;
        }
        if (at + k < n) {
            int32_t v = near[k * stride];
            ahead = (v & 3) == kind ? v >> 2 : 0;
        }
        int32_t nearer = square + (behind < ahead ? behind : ahead);
        best = nearer < best ? nearer : best;
    }
    return best;
}

/* near[from] -> near[1 - from] along an axis; the last axis finds the maxima. */
SS_KERNEL void k_next_click_axis(click_task c, int32_t from, int64_t stride, int64_t n,
                                 int32_t last) {
    SS_SHARED int32_t room[WARPS];
    const int64_t row = blockIdx.x / c.chunks, chunk = blockIdx.x % c.chunks;
    if (skipped(&c, row) || !c.row[row].found) {
        return;
    }
    const int32_t *near = c.near[from] + row * c.voxels;
    int32_t *out = c.near[1 - from] + row * c.voxels;
    int32_t most_fn = 0, most_fp = 0;
    for (int32_t first = 0; first < EACH; first += AHEAD) {
        const int64_t start = chunk * CHUNK + first * THREADS + threadIdx.x;
        int32_t v[AHEAD];
#pragma unroll
        for (int32_t k = 0; k < AHEAD; ++k) {
            v[k] = start + k * THREADS < c.voxels ? near[start + k * THREADS] : 0;
        }
#pragma unroll
        for (int32_t k = 0; k < AHEAD; ++k) {
            const int64_t i = start + k * THREADS;
            if (v[k]) {
                const int32_t kind = v[k] & 3;
                int32_t d = search_axis(near + i, i / stride % n, n, stride, kind, v[k] >> 2);
                most_fn = kind == 1 && d > most_fn ? d : most_fn;
                most_fp = kind == 2 && d > most_fp ? d : most_fp;
                v[k] = d << 2 | kind;
            }
            if (i < c.voxels) {
                out[i] = v[k];
            }
        }
    }
    if (last) {
        most_fn = ss_block_max<THREADS>(most_fn, room);
        most_fp = ss_block_max<THREADS>(most_fp, room);
        if (threadIdx.x < 2 && (threadIdx.x ? most_fp : most_fn)) {
            atomicMax(&c.row[row].m2[threadIdx.x], threadIdx.x ? most_fp : most_fn);
        }
    }
}

typedef struct click_rule {
    int32_t kind;  /* of the region that wins */
    int32_t least; /* a candidate is further inside than this: 4 d2 > m2 iff d2 > floor(m2 / 4) */
} click_rule;

SS_DEVICE click_rule rule_of(const click_row *r) {
    click_rule rule = {r->m2[0] > r->m2[1] ? 1 : 2, 0};
    rule.least = (r->m2[0] > r->m2[1] ? r->m2[0] : r->m2[1]) / 4;
    return rule;
}

SS_DEVICE int is_candidate(int32_t v, click_rule rule) {
    return (v & 3) == rule.kind && v >> 2 > rule.least;
}

SS_KERNEL void k_next_click_candidates(click_task c, int32_t in) {
    SS_SHARED uint32_t room[WARPS];
    const int64_t row = blockIdx.x / c.chunks, chunk = blockIdx.x % c.chunks;
    if (skipped(&c, row) || !c.row[row].found) {
        return;
    }
    const click_rule rule = rule_of(&c.row[row]);
    uint32_t n = 0;
    for (int32_t k = 0; k < EACH; ++k) {
        const int64_t i = chunk * CHUNK + k * THREADS + threadIdx.x;
        n += i < c.voxels && is_candidate(c.near[in][row * c.voxels + i], rule);
    }
    n = ss_block_sum<THREADS>(n, room);
    if (threadIdx.x == 0) {
        c.count[blockIdx.x] = n;
    }
}

/* ---- the click ------------------------------------------------------------------------------ */

/* Bit k: voxel `at` + k is a candidate. */
SS_DEVICE uint32_t candidate_bits(const click_task *c, int64_t row, int64_t at, int32_t in) {
    const int32_t n = voxels_here(c, at);
    const int64_t start = row * c->voxels;
    uint32_t bits = 0;
    if (in < 0) {
        bits = mask_bits(c->target, start, at, n, c->wide, 0) ^
               mask_bits(c->current, start, at, n, c->wide, 0);
        return c->row[row].found & 1 ? bits & mask_bits(c->region, start, at, n, c->wide, 0xffffu)
                                     : bits;
    }
    const click_rule rule = rule_of(&c->row[row]);
    for (int32_t k = 0; k < n; ++k) {
        bits |= (uint32_t)is_candidate(c->near[in][start + at + k], rule) << k;
    }
    return bits;
}

SS_DEVICE void put_click(const click_task *c, int64_t row, int64_t i, int32_t label) {
    int64_t *point = c->point + 3 * row;
    point[0] = i / c->W / c->H;
    point[1] = i / c->W % c->H;
    point[2] = i % c->W;
    c->label[row] = label;
}

/* One block per row: how many candidates, which one, in which chunk, which voxel. `in`: where the
 * distances are, or -1 for the random rule. */
SS_KERNEL void k_next_click_pick(click_task c, int32_t in) {
    SS_SHARED int64_t wide_room[WARPS];
    SS_SHARED uint32_t room[WARPS];
    SS_SHARED int64_t place[2]; /* chunk, candidates of it to pass */
    const int64_t row = blockIdx.x;
    const uint32_t found = skipped(&c, row) ? 0 : c.row[row].found;
    if (!found) {
        if (threadIdx.x == 0) {
            put_click(&c, row, 0, -1);
        }
        return;
    }
    const int32_t shift = in < 0 && !(found & 1) ? 16 : 0;
    const uint32_t keep = in < 0 ? 0xffffu : 0xffffffffu;
    const uint32_t *count = c.count + row * c.chunks;
    int64_t mine = 0;
    for (int64_t k = threadIdx.x; k < c.chunks; k += THREADS) {
        mine += count[k] >> shift & keep;
    }
    const int64_t n = ss_block_sum<THREADS>(mine, wide_room);
    const int64_t *word = c.counter + 4 * row;
    const uint64_t r = ss_philox64(c.seed, (uint32_t)word[0], (uint32_t)word[1], (uint32_t)word[2],
                                   (uint32_t)word[3]);
    int64_t left = (int64_t)ss_pick((uint64_t)n, r);
    uint32_t total = 0;
    for (int64_t base = 0; base < c.chunks; base += THREADS, left -= total) {
        const int64_t k = base + threadIdx.x;
        uint32_t here = k < c.chunks ? count[k] >> shift & keep : 0;
        int64_t before = ss_block_scan<THREADS>(here, room, &total);
        if (left >= before && left < before + here) {
            place[0] = k;
            place[1] = left - before;
        }
        if (left < total) { /* the same for all threads */
            break;
        }
    }
    __syncthreads();
    const int64_t at = place[0] * CHUNK + threadIdx.x * EACH;
    uint32_t bits = candidate_bits(&c, row, at, in);
    int64_t pass = place[1] - (int64_t)ss_block_scan<THREADS>((uint32_t)__popc(bits), room, &total);
    if (pass >= 0 && pass < __popc(bits)) {
        for (; pass > 0; --pass) {
            bits &= bits - 1;
        }
        const int64_t i = at + __ffs((int32_t)bits) - 1;
        int32_t fn = c.target[row * c.voxels + i] != 0;
        put_click(&c, row, i, fn);
    }
}

/* ---- the call ------------------------------------------------------------------------------- */

static click_task click_plan(ss_carve *w, const ss_next_click_args *a) {
    const int64_t *s = a->target.shape;
    click_task c = {};
    c.target = (const uint8_t *)a->target.data;
    c.current = (const uint8_t *)a->current.data;
    c.region = (const uint8_t *)a->region.data;
    c.skip = (const uint8_t *)a->skip.data;
    c.rows = s[0];
    c.D = s[1];
    c.H = s[2];
    c.W = s[3];
    c.voxels = c.D * c.H * c.W;
    c.chunks = (c.voxels + CHUNK - 1) / CHUNK;
    c.wide = c.voxels % 8 == 0 &&
             (((uintptr_t)c.target | (uintptr_t)c.current | (uintptr_t)c.region) & 7) == 0;
    c.seed = (uint64_t)a->seed;
    c.counter = (const int64_t *)a->counter.data;
    c.point = (int64_t *)a->point.data;
    c.label = (int32_t *)a->label.data;
    c.row = ss_take<click_row>(w, c.rows);
    c.count = ss_take<uint32_t>(w, c.rows * c.chunks);
    for (int32_t k = 0; k < 2 && a->ritm; ++k) {
        c.near[k] = ss_take<int32_t>(w, c.rows * c.voxels);
    }
    return c;
}

int64_t SS_CUDA_WORKSPACE(next_click)(const ss_next_click_args *a) {
    ss_carve w = {};
    (void)click_plan(&w, a);
    return ss_carved(&w);
}

static ss_status click_distances(ss_exec *x, const click_task *c, int32_t dims, int32_t *in) {
    const unsigned blocks = ss_blocks(c->rows * c->chunks, 1);
    const int64_t lines = c->rows * c->D * c->H;
    const size_t shared = (size_t)(WARPS * 3 * ((c->W + 31) / 32)) * sizeof(uint32_t);
    SS_TRY(SS_LAUNCH(x, ss_blocks(lines, WARPS), THREADS, shared, (k_next_click_lines), *c));
    SS_TRY(SS_LAUNCH(x, blocks, THREADS, 0, (k_next_click_axis), *c, 0, c->W, c->H, dims == 2));
    if (dims == 3) {
        SS_TRY(SS_LAUNCH(x, blocks, THREADS, 0, (k_next_click_axis), *c, 1, c->W * c->H, c->D, 1));
    }
    *in = dims == 2;
    return SS_LAUNCH(x, blocks, THREADS, 0, (k_next_click_candidates), *c, *in);
}

ss_status SS_CUDA(next_click)(ss_exec *x, const ss_next_click_args *a) {
    const int64_t *s = a->target.shape;
    if (a->dims == 2 && s[1] != 1) {
        return ss_cuda_fail(x, SS_INVALID,
                            "target: expected [N, 1, H, W] for 2 dimensions, got D = %lld",
                            (long long)s[1]);
    }
    for (int32_t axis = 1; axis < 4 && a->ritm; ++axis) {
        if (s[axis] > SIDE) {
            return ss_cuda_fail(x, SS_INVALID, "target: expected sides up to %d, got %lld", SIDE,
                                (long long)s[axis]);
        }
    }
    ss_carve w = ss_carve_of(x);
    const click_task c = click_plan(&w, a);
    int32_t in = -1;
    SS_TRY(ss_cuda_zero(x, c.row, c.rows * (int64_t)sizeof(click_row)));
    SS_TRY(SS_LAUNCH(x, ss_blocks(c.rows * c.chunks, 1), THREADS, 0, (k_next_click_errors), c));
    if (a->ritm) {
        SS_TRY(click_distances(x, &c, (int32_t)a->dims, &in));
    }
    return SS_LAUNCH(x, ss_blocks(c.rows, 1), THREADS, 0, (k_next_click_pick), c, in);
}
