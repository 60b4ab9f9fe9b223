/* SPDX-License-Identifier: Apache-2.0
 *
 * geodesic.cu: length of the shortest path from every voxel to a marked one, steps between faces.
 *
 *     d(i) = min over paths of sum over steps of sqrt(h_axis^2 + (weight (I_i - I_j))^2)
 *
 * Bricks of 512 voxels are relaxed in shared memory until nothing in them changes; a voxel on a
 * face that could shorten its neighbour beyond wakes that brick. Bricks are coloured like a chess
 * board and one colour is relaxed at a time, so that nobody reads what is being written, until no
 * brick was woken. That is the exact minimum: a length is the float sum of its steps from the
 * marked voxel on and float addition is monotone, so every order of relaxation ends at the CPU's
 * bits. There are as many phases as the most winding shortest path crosses bricks, at most one per
 * voxel; whoever sleeps costs 4 bytes per phase. No marked voxel or no way: +inf; NaN steps cannot
 * be passed.
 *
 * Launches: 1 memset and 2 kernels: start, and ONE for all phases of all problems (resident.cuh).
 * Bytes per voxel: 1 + 4 to start, then 4 + 4 + 4 per visit of a brick. Workspace: 4 bytes per
 * brick, and 4 per voxel of an image that is not float32. Deterministic: see above. registers <= 64
 */
#include "resident.cuh"

#define BRICK 512 /* voxels and threads */
#define MOST_BRICKS (1 << 29)
#define HALO 1836 /* 3 * 18 * 34, the largest brick with its margin */

typedef struct geodesic_group {
    uint32_t arrived;
    uint32_t woken[3]; /* whether phase p woke a brick, at p % 3 */
} geodesic_group;

typedef struct geodesic_task {
    const void *source;
    const float *image; /* the source, or a copy in float */
    float *copy;        /* that copy, or NULL */
    const uint8_t *mask;
    float *distance;
    int64_t N, classes, volume;
    int32_t bricks, size[3];    /* D H W */
    int32_t shift[3], along[3]; /* a brick's sides are powers of two; bricks per axis */
    float weight, h2[3];
    uint32_t *due;         /* [N, bricks] */
    geodesic_group *group; /* [N] */
} geodesic_task;

/* One thread's voxel in a brick. */
typedef struct geodesic_voxel {
    int32_t begin[3], local[3], at[3]; /* the brick's, in the brick, in the volume */
    int32_t inside;                    /* the volume */
    int64_t i;
} geodesic_voxel;

SS_DEVICE geodesic_voxel voxel_of(const geodesic_task *g, int32_t brick) {
    const int32_t t = threadIdx.x;
    const int32_t row = brick / g->along[2];
    geodesic_voxel v;
    v.begin[0] = row / g->along[1] << g->shift[0];
    v.begin[1] = row % g->along[1] << g->shift[1];
    v.begin[2] = brick % g->along[2] << g->shift[2];
    v.local[0] = t >> (g->shift[1] + g->shift[2]);
    v.local[1] = t >> g->shift[2] & ((1 << g->shift[1]) - 1);
    v.local[2] = t & ((1 << g->shift[2]) - 1);
    for (int32_t axis = 0; axis < 3; ++axis) {
        v.at[axis] = v.begin[axis] + v.local[axis];
    }
    v.inside = v.at[0] < g->size[0] && v.at[1] < g->size[1] && v.at[2] < g->size[2];
    v.i = ((int64_t)v.at[0] * g->size[1] + v.at[1]) * g->size[2] + v.at[2];
    return v;
}

/* A block per brick: distance 0 or infinite, and whether there is anything to begin with. */
template <typename T> SS_KERNEL void k_geodesic_start(geodesic_task g) {
    const int64_t n = blockIdx.x / g.bricks;
    const geodesic_voxel v = voxel_of(&g, (int32_t)(blockIdx.x % g.bricks));
    int marked = 0;
    if (v.inside) {
        const int64_t i = n * g.volume + v.i;
        marked = g.mask[i] != 0;
        g.distance[i] = marked ? 0.0f : INFINITY;
        if (g.copy && n % g.classes == 0) {
            const int64_t to = n / g.classes * g.volume + v.i;
            g.copy[to] = (float)ss_load<T>(g.source, to);
        }
    }
    marked = __syncthreads_or(marked);
    if (threadIdx.x == 0) {
        g.due[blockIdx.x] = marked != 0;
    }
}

/* Length of the step to the neighbour on an axis, or infinite where there is none. */
SS_DEVICE float step_to(const geodesic_task *g, const float *image, const geodesic_voxel *v,
                        int32_t axis, int32_t side) {
    const int64_t plane = (int64_t)g->size[1] * g->size[2];
    const int64_t stride = axis == 2 ? 1 : axis == 1 ? g->size[2] : plane;
    const int there = v->inside && (side ? v->at[axis] + 1 < g->size[axis] : v->at[axis] > 0);
    if (!there) {
        return INFINITY;
    }
    const float jump = g->weight * (image[v->i] - image[side ? v->i + stride : v->i - stride]);
    return sqrtf(g->h2[axis] + jump * jump);
}

/* Fills shared memory with a brick's distances and a margin of one voxel. */
SS_DEVICE void load_brick(const geodesic_task *g, const geodesic_voxel *v, const float *d,
                          float *near) {
    const int32_t wide = (1 << g->shift[2]) + 2, high = (1 << g->shift[1]) + 2;
    const int32_t all = ((1 << g->shift[0]) + 2) * high * wide;
    for (int32_t k = threadIdx.x; k < all; k += BRICK) {
        const int32_t z = v->begin[0] + k / wide / high - 1;
        const int32_t y = v->begin[1] + k / wide % high - 1;
        const int32_t x = v->begin[2] + k % wide - 1;
        const int there =
            z >= 0 && z < g->size[0] && y >= 0 && y < g->size[1] && x >= 0 && x < g->size[2];
        near[k] = there ? d[((int64_t)z * g->size[1] + y) * g->size[2] + x] : INFINITY;
    }
}

/* Relaxes this thread's voxel of a loaded brick until nothing in the brick changes. */
SS_DEVICE float settle(float *near, int32_t me, const int32_t away[3], const float step[6]) {
    float mine = near[me];
    for (;;) {
        float best = mine;
#pragma unroll
        for (int32_t k = 0; k < 6; ++k) {
            const float offer = near[k % 2 ? me + away[k / 2] : me - away[k / 2]] + step[k];
            best = offer < best ? offer : best;
        }
        if (!__syncthreads_or(best < mine)) { /* and all have read */
            return mine;
        }
        mine = best;
        near[me] = mine;
        __syncthreads();
    }
}

/* Relaxes a brick; true in threads that woke a neighbouring brick. */
SS_DEVICE int relax_brick(const geodesic_task *g, int64_t n, int32_t brick, float *near) {
    const geodesic_voxel v = voxel_of(g, brick);
    float *d = g->distance + n * g->volume;
    const float *image = g->image + n / g->classes * g->volume;
    const int32_t wide = (1 << g->shift[2]) + 2, plane = ((1 << g->shift[1]) + 2) * wide;
    const int32_t away[3] = {plane, wide, 1};
    const int32_t me = (v.local[0] + 1) * plane + (v.local[1] + 1) * wide + v.local[2] + 1;
    float step[6];
#pragma unroll
    for (int32_t k = 0; k < 6; ++k) {
        step[k] = step_to(g, image, &v, k / 2, k % 2);
    }
    load_brick(g, &v, d, near);
    __syncthreads();
    const float first = near[me];
    const float mine = settle(near, me, away, step);
    if (mine < first) {
        d[v.i] = mine;
    }
    int woke = 0;
#pragma unroll
    for (int32_t k = 0; k < 6; ++k) {
        const int32_t last = (1 << g->shift[k / 2]) - 1;
        const int32_t layer = g->along[1] * g->along[2];
        const int32_t stride = k / 2 == 2 ? 1 : k / 2 == 1 ? g->along[2] : layer;
        const float theirs = near[k % 2 ? me + away[k / 2] : me - away[k / 2]];
        if (v.local[k / 2] == (k % 2 ? last : 0) && mine + step[k] < theirs) {
            atomicOr(&g->due[n * g->bricks + (k % 2 ? brick + stride : brick - stride)], 1u);
            woke = 1;
        }
    }
    __syncthreads(); /* near[] is free again */
    return woke;
}

SS_DEVICE int32_t colour_of(const geodesic_task *g, int32_t brick) {
    const int32_t row = brick / g->along[2];
    return (row / g->along[1] + row % g->along[1] + brick % g->along[2]) % 2;
}

/* Relaxes this block's bricks of one colour that are due; whether a brick was woken. Bricks are
 * dealt one by one, since those at work lie side by side. */
SS_DEVICE int relax_colour(const geodesic_task *g, int64_t n, int32_t colour, int32_t rank,
                           int32_t blocks, int32_t *list, uint32_t *listed, float *near) {
    int woke = 0;
    for (int32_t base = rank; base < g->bricks; base += blocks * BRICK) {
        const int32_t brick = base + blocks * (int32_t)threadIdx.x;
        if (threadIdx.x == 0) {
            *listed = 0;
        }
        __syncthreads();
        if (brick < g->bricks && colour_of(g, brick) == colour && g->due[n * g->bricks + brick]) {
            g->due[n * g->bricks + brick] = 0;
            list[atomicAdd(listed, 1u)] = brick;
        }
        __syncthreads();
        const uint32_t count = *listed;
        for (uint32_t i = 0; i < count; ++i) {
            woke |= relax_brick(g, n, list[i], near);
        }
        __syncthreads();
    }
    return __syncthreads_or(woke);
}

SS_KERNEL void __launch_bounds__(BRICK, 2) k_geodesic_relax(geodesic_task g, ss_groups share) {
    SS_SHARED float near[HALO];
    SS_SHARED int32_t list[BRICK];
    SS_SHARED uint32_t listed;
    const uint32_t number = blockIdx.x / share.blocks;
    const int32_t rank = (int32_t)(blockIdx.x % share.blocks);
    geodesic_group *own = g.group + number;
    ss_group group = {&own->arrived, share.blocks, 0};
    uint32_t phase = 0;
    for (int64_t n = number; n < g.N; n += share.groups) {
        for (int64_t turn = 0;; ++turn) {
            int woke =
                relax_colour(&g, n, turn % 2, rank, (int32_t)share.blocks, list, &listed, near);
            if (threadIdx.x == 0) {
                if (woke) {
                    atomicOr(&own->woken[phase], 1u);
                }
                if (rank == 0) { /* everybody read it two barriers ago */
                    own->woken[(phase + 1) % 3] = 0;
                }
            }
            ss_group_barrier(&group);
            const uint32_t woken = *(volatile uint32_t *)&own->woken[phase];
            phase = (phase + 1) % 3;
            if (turn > 0 && !woken) {
                break; /* so the other colour has nothing to do, nor this one after it */
            }
        }
    }
}

/* ---- the call ------------------------------------------------------------------------------- */

static geodesic_task geodesic_plan(ss_carve *w, const ss_geodesic_args *a) {
    const int64_t *s = a->mask.shape;
    geodesic_task g = {};
    g.source = a->image.data;
    g.mask = (const uint8_t *)a->mask.data;
    g.distance = (float *)a->distance.data;
    g.N = s[0];
    g.classes = a->classes;
    g.volume = s[1] * s[2] * s[3];
    int64_t bricks = 1;
    const int32_t flat[3] = {0, 4, 5}, thin[3] = {2, 3, 4}, cube[3] = {3, 3, 3};
    for (int32_t axis = 0; axis < 3; ++axis) {
        g.size[axis] = (int32_t)s[axis + 1];
        g.shift[axis] = s[1] == 1 ? flat[axis] : s[1] <= 4 ? thin[axis] : cube[axis];
        g.along[axis] = ((g.size[axis] - 1) >> g.shift[axis]) + 1;
        bricks *= s[axis + 1] < INT32_MAX - BRICK ? g.along[axis] : MOST_BRICKS;
        g.h2[axis] = 1.0f;
    }
    g.bricks = bricks < MOST_BRICKS ? (int32_t)bricks : MOST_BRICKS;
    g.weight = (float)a->weight;
    g.group = ss_take<geodesic_group>(w, g.N);
    g.due = ss_take<uint32_t>(w, g.N * g.bricks);
    g.image = (const float *)a->image.data;
    if (a->image.dtype != SS_F32) {
        g.copy = ss_take<float>(w, a->image.shape[0] * g.volume);
        g.image = g.copy;
    }
    return g;
}

int64_t SS_CUDA_WORKSPACE(geodesic)(const ss_geodesic_args *a) {
    ss_carve w = {};
    (void)geodesic_plan(&w, a);
    return ss_carved(&w);
}

static ss_status geodesic_check(ss_exec *x, const ss_geodesic_args *a, geodesic_task *g) {
    const int64_t b = a->image.shape[0];
    if (a->classes > g->N || g->N / a->classes != b || g->N % a->classes != 0) {
        return ss_cuda_fail(x, SS_INVALID,
                            "mask: expected %lld x %lld problems (images x classes), got %lld",
                            (long long)b, (long long)a->classes, (long long)g->N);
    }
    if (g->bricks == MOST_BRICKS) {
        return ss_cuda_fail(x, SS_INVALID,
                            "mask: expected at most 2^38 voxels, sides below 2^31, got more");
    }
    if (a->spacing.n != 0 && a->spacing.n != 3) {
        return ss_cuda_fail(x, SS_INVALID, "spacing: expected 3 numbers, got %lld",
                            (long long)a->spacing.n);
    }
    for (int64_t i = 0; i < a->spacing.n; ++i) {
        double h = a->spacing.at[i];
        if (!(h >= 1e-9 && h <= 1e9)) {
            return ss_cuda_fail(x, SS_INVALID, "spacing: expected numbers from 1e-9 to 1e9, got %g",
                                h);
        }
        g->h2[i] = (float)(h * h);
    }
    return SS_OK;
}

ss_status SS_CUDA(geodesic)(ss_exec *x, const ss_geodesic_args *a) {
    ss_carve w = ss_carve_of(x);
    geodesic_task g = geodesic_plan(&w, a);
    SS_TRY(geodesic_check(x, a, &g));
    const unsigned bricks = ss_blocks(g.N * g.bricks, 1);
    unsigned fit = 1;
    SS_TRY(ss_resident_blocks(x, k_geodesic_relax, BRICK, &fit));
    ss_groups share = ss_share_out(fit, g.N, (g.bricks + 1) / 2);
    share.blocks -= share.blocks > 2 && share.blocks % 2 == 0; /* or a block's are of one colour */
    SS_TRY(ss_cuda_zero(x, g.group, g.N * (int64_t)sizeof(geodesic_group)));
    ss_status status = SS_UNSUPPORTED;
    SS_FOR_FLOAT(a->image.dtype, T,
                 status = SS_LAUNCH(x, bricks, BRICK, 0, (k_geodesic_start<T>), g));
    SS_TRY(status);
    return ss_launch_resident(x, "k_geodesic_relax", k_geodesic_relax, share.groups * share.blocks,
                              BRICK, g, share);
}
