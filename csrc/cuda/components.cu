/* SPDX-License-Identifier: Apache-2.0
 *
 * components.cu: connected components, and masks of some of them, for a whole batch at once.
 *
 * Union-find over voxels, parents being earlier voxels: (1) each voxel points to the first voxel of
 * its run within 32 columns (a ballot), (2) runs are joined with neighbouring rows, only at the
 * first column where they meet, by atomicMin, (3) every voxel points to its root, the component's
 * first voxel in C order, (4) roots are counted in order (per 32 voxels, per chunk, then over
 * chunks), (5) a voxel's label is the rank of its root. Masks: sizes by integer atomics in (3)
 * instead.
 *
 * image [N, D, H, W] -> labels [N, D, H, W], count [N]: 5 launches; kept [N, D, H, W]: 6. Memory
 * per voxel: the image read twice and its neighbours from cache, 4 bytes of parents written and
 * read three times; workspace 1/4 byte, for masks 8 bytes. Numerics: integers, the CPU's exactly.
 * Deterministic: a root is a minimum, whatever the order of joins. registers <= 48
 */
#include "device.cuh"

#define THREADS 256
#define EACH 4     /* words or voxels of a thread whose loads are on their way together */
#define CHUNK 4096 /* voxels whose roots one block counts */
#define WORDS (CHUNK / 32)

struct components_job {
    int64_t n, d, h, w, voxels;               /* voxels per volume: fewer than 2^31 */
    int64_t words, chunks;                    /* per row; per volume */
    ss_divisor row_words, row, plane, blocks; /* by words, w and h; by blocks per volume */
    int32_t connectivity, by_value;
    const void *image;
    int32_t *parent;          /* -1: background */
    uint32_t *roots;          /* [n, chunks, WORDS] bits, */
    int32_t *before;          /* roots before each word, in its chunk; */
    int32_t *total;           /* [n, chunks] roots in earlier chunks */
    int32_t *size;            /* per root, or NULL */
    unsigned long long *best; /* [n]: size, then ~first voxel, of the largest component */
};

/* Whether a voxel of row `row` (its first element) at column x holds the value v (0: not asked). */
template <typename T> SS_DEVICE bool holds(const components_job &j, const T *row, int64_t x, T v) {
    if (x < 0 || x >= j.w) {
        return false;
    }
    T u = row[x];
    return j.by_value ? u == v : u != 0;
}

/* As a type that can be shuffled. */
SS_DEVICE uint32_t shuffled(uint8_t v) {
    return v;
}
SS_DEVICE uint32_t shuffled(uint16_t v) {
    return v;
}
SS_DEVICE uint32_t shuffled(uint32_t v) {
    return v;
}
SS_DEVICE unsigned long long shuffled(uint64_t v) {
    return v;
}

/* The volume that a block works on, and the block's number there. */
SS_DEVICE int64_t volume_of(const components_job &j, uint32_t *block) {
    uint32_t n = ss_divided(blockIdx.x, j.blocks);
    *block = blockIdx.x - n * j.blocks.by;
    return n;
}

/* A warp has EACH words of 32 columns. */
template <typename T> SS_KERNEL void k_components_runs(components_job j) {
    uint32_t block;
    const int64_t n = volume_of(j, &block);
    const T *image = (const T *)j.image + n * j.voxels;
    int32_t *parent = j.parent + n * j.voxels;
    const int lane = (int)threadIdx.x % 32;
    const uint32_t first = (block * (THREADS / 32) + threadIdx.x / 32) * EACH;
    T v[EACH];
    int32_t at[EACH]; /* -1: no voxel */
#pragma unroll
    for (int k = 0; k < EACH; ++k) {
        uint32_t row = ss_divided(first + k, j.row_words);
        uint32_t x = (first + k - row * j.row_words.by) * 32 + lane;
        bool in = row < (uint32_t)(j.d * j.h) && x < (uint32_t)j.w;
        at[k] = in ? (int32_t)(row * (uint32_t)j.w + x) : -1;
        v[k] = in ? image[at[k]] : (T)0;
    }
#pragma unroll
    for (int k = 0; k < EACH; ++k) {
        T left = (T)__shfl_up_sync(SS_ALL_LANES, shuffled(v[k]), 1);
        bool goes_on = lane > 0 && (j.by_value ? left == v[k] : left != 0);
        uint32_t heads = __ballot_sync(SS_ALL_LANES, v[k] != 0 && !goes_on);
        if (at[k] >= 0) {
            int head = 31 - __clz((int)(heads & (0xffffffffu >> (31 - lane))));
            parent[at[k]] = v[k] != 0 ? at[k] - (lane - head) : -1;
        }
    }
}

/* Parents change while others read them; what is read is an ancestor at any time. */
SS_DEVICE int32_t root_of(const int32_t *parent, int32_t i) {
    const volatile int32_t *p = parent;
    int32_t up = p[i];
    while (up != i) {
        i = up;
        up = p[i];
    }
    return i;
}

/* Each turn the larger of both goes down, so this ends. */
SS_DEVICE void join(int32_t *parent, int32_t a, int32_t b) {
    for (;;) {
        a = root_of(parent, a);
        b = root_of(parent, b);
        if (a == b) {
            return;
        }
        int32_t high = a > b ? a : b, low = a > b ? b : a;
        int32_t old = atomicMin(&parent[high], low);
        if (old == high) {
            return;
        }
        a = old;
        b = low;
    }
}

/* Joins voxel i, at column x of `own`, with the row `other`, which begins at voxel `from`. */
template <typename T>
SS_DEVICE void join_row(const components_job &j, int32_t *parent, const T *own, const T *other,
                        int32_t i, int64_t x, int32_t from, bool reach) {
    T v = own[x];
    bool left = holds<T>(j, own, x - 1, v);
    if (holds<T>(j, other, x, v)) {
        if (!left || !holds<T>(j, other, x - 1, v)) {
            join(parent, i, from + (int32_t)x);
        }
    } else if (reach) {
        if (!left && holds<T>(j, other, x - 1, v)) {
            join(parent, i, from + (int32_t)x - 1);
        }
        if (!holds<T>(j, own, x + 1, v) && holds<T>(j, other, x + 1, v)) {
            join(parent, i, from + (int32_t)x + 1);
        }
    }
}

template <typename T> SS_KERNEL void k_components_join(components_job j) {
    uint32_t block;
    const int64_t n = volume_of(j, &block);
    const uint32_t at = block * THREADS + threadIdx.x;
    const T *image = (const T *)j.image + n * j.voxels;
    if (at >= (uint32_t)j.voxels || image[at] == 0) {
        return;
    }
    const uint32_t row = ss_divided(at, j.row), z = ss_divided(row, j.plane);
    const int64_t x = at - row * j.row.by, y = row - z * j.plane.by;
    const T *own = image + (at - x);
    int32_t *parent = j.parent + n * j.voxels;
    const int32_t i = (int32_t)at, w = (int32_t)j.w;
    if (x % 32 == 0 && holds<T>(j, own, x - 1, own[x])) {
        join(parent, i, i - 1);
    }
    bool diagonal = j.connectivity > 6, corner = j.connectivity > 18;
    if (y > 0) {
        join_row<T>(j, parent, own, own - w, i, x, i - (int32_t)x - w, diagonal);
    }
    if (z == 0) {
        return;
    }
    const T *plane = own - j.h * j.w;
    int32_t from = i - (int32_t)x - (int32_t)(j.h * j.w);
    join_row<T>(j, parent, own, plane, i, x, from, diagonal);
    if (diagonal && y > 0) {
        join_row<T>(j, parent, own, plane - w, i, x, from - w, corner);
    }
    if (diagonal && y + 1 < j.h) {
        join_row<T>(j, parent, own, plane + w, i, x, from + w, corner);
    }
}

/* Adds a warp's voxels to the sizes of their roots; what belongs to the root of its first voxel is
 * kept back in *held as long as that root stays the same. */
SS_DEVICE void add_sizes(int32_t *size, bool in, int32_t root, int32_t *kept, int32_t *held) {
    uint32_t active = __ballot_sync(SS_ALL_LANES, in);
    int32_t lead = __shfl_sync(SS_ALL_LANES, root, active ? __ffs((int)active) - 1 : 0);
    uint32_t same = __ballot_sync(SS_ALL_LANES, in && root == lead);
    if (!active) {
        return;
    }
    if (lead != *kept) {
        if (*held && threadIdx.x % 32 == 0) {
            atomicAdd(&size[*kept], *held);
        }
        *kept = lead;
        *held = 0;
    }
    *held += __popc(same);
    if (in && root != lead) {
        atomicAdd(&size[root], 1);
    }
}

/* A chunk: parents become roots; roots are marked and counted, or sizes summed. */
SS_KERNEL void k_components_roots(components_job j) {
    SS_SHARED int32_t counts[WORDS];
    int64_t n = blockIdx.x / j.chunks, chunk = blockIdx.x % j.chunks;
    int32_t *parent = j.parent + n * j.voxels;
    int32_t kept = -1, held = 0;
    for (int k0 = 0; k0 < CHUNK / THREADS; k0 += EACH) {
        int32_t up[EACH];
#pragma unroll
        for (int e = 0; e < EACH; ++e) { /* two steps of EACH voxels together */
            int64_t v = chunk * CHUNK + (k0 + e) * THREADS + threadIdx.x;
            up[e] = v < j.voxels ? parent[v] : -1;
        }
#pragma unroll
        for (int e = 0; e < EACH; ++e) {
            up[e] = up[e] >= 0 ? parent[up[e]] : -1;
        }
#pragma unroll
        for (int e = 0; e < EACH; ++e) {
            int64_t v = chunk * CHUNK + (k0 + e) * THREADS + threadIdx.x;
            bool in = up[e] >= 0;
            int32_t root = in ? root_of(parent, up[e]) : -1;
            if (in) {
                parent[v] = root;
            }
            if (j.size) {
                add_sizes(j.size + n * j.voxels, in, root, &kept, &held);
                continue;
            }
            uint32_t bits = __ballot_sync(SS_ALL_LANES, in && root == v);
            if (threadIdx.x % 32 == 0) {
                int word = ((k0 + e) * THREADS + (int)threadIdx.x) / 32;
                j.roots[(int64_t)blockIdx.x * WORDS + word] = bits;
                counts[word] = __popc(bits);
            }
        }
    }
    if (j.size) {
        if (held && threadIdx.x % 32 == 0) {
            atomicAdd(&j.size[n * j.voxels + kept], held);
        }
        return;
    }
    __syncthreads();
    if (threadIdx.x < 32) { /* four words per lane, then over lanes */
        int lane = (int)threadIdx.x;
        int32_t own = 0;
        for (int k = 0; k < WORDS / 32; ++k) {
            own += counts[lane * (WORDS / 32) + k];
        }
        int32_t sum = own;
        for (int step = 1; step < 32; step *= 2) {
            int32_t other = __shfl_up_sync(SS_ALL_LANES, sum, step);
            sum += lane >= step ? other : 0;
        }
        int32_t base = sum - own;
        for (int k = 0; k < WORDS / 32; ++k) {
            int word = lane * (WORDS / 32) + k;
            j.before[(int64_t)blockIdx.x * WORDS + word] = base;
            base += counts[word];
        }
        if (lane == 31) {
            j.total[blockIdx.x] = sum;
        }
    }
}

/* One block per volume: totals of chunks to sums of those before, and the count. */
SS_KERNEL void k_components_scan(components_job j, int64_t *count) {
    SS_SHARED int32_t warp[THREADS / 32];
    int32_t *total = j.total + blockIdx.x * j.chunks;
    int lane = (int)threadIdx.x % 32, own_warp = (int)threadIdx.x / 32;
    int32_t carry = 0;
    for (int64_t c0 = 0; c0 < j.chunks; c0 += THREADS) {
        int64_t c = c0 + threadIdx.x;
        int32_t own = c < j.chunks ? total[c] : 0, sum = own;
        for (int step = 1; step < 32; step *= 2) {
            int32_t other = __shfl_up_sync(SS_ALL_LANES, sum, step);
            sum += lane >= step ? other : 0;
        }
        if (lane == 31) {
            warp[own_warp] = sum;
        }
        __syncthreads();
        int32_t base = carry;
        for (int k = 0; k < THREADS / 32; ++k) {
            base += k < own_warp ? warp[k] : 0;
            carry += warp[k];
        }
        if (c < j.chunks) {
            total[c] = base + sum - own;
        }
        __syncthreads();
    }
    if (threadIdx.x == 0) {
        count[blockIdx.x] = carry;
    }
}

/* labels are the parents' own memory: each voxel reads and writes its own alone. */
SS_KERNEL void k_components_label(components_job j) {
    uint32_t block;
    const int64_t n = volume_of(j, &block);
    int32_t *parent = j.parent + n * j.voxels;
    const uint32_t first = block * (THREADS * EACH) + threadIdx.x;
    int32_t root[EACH];
#pragma unroll
    for (int k = 0; k < EACH; ++k) {
        uint32_t at = first + k * THREADS;
        root[k] = at < (uint32_t)j.voxels ? parent[at] : -2;
    }
#pragma unroll
    for (int k = 0; k < EACH; ++k) {
        int32_t label = 0;
        if (root[k] >= 0) {
            int64_t chunk = n * j.chunks + root[k] / CHUNK;
            int64_t word = chunk * WORDS + root[k] % CHUNK / 32;
            uint32_t below = j.roots[word] & ((1u << (root[k] % 32)) - 1u);
            label = 1 + j.total[chunk] + j.before[word] + __popc(below);
        }
        if (root[k] >= -1) {
            parent[first + k * THREADS] = label;
        }
    }
}

/* The largest component of each volume, of equal ones the first. */
SS_KERNEL void k_components_largest(components_job j) {
    SS_SHARED unsigned long long warp[THREADS / 32];
    int64_t n = blockIdx.x / j.chunks, chunk = blockIdx.x % j.chunks;
    unsigned long long best = 0;
    for (int k = 0; k < CHUNK / THREADS; ++k) {
        int64_t v = chunk * CHUNK + k * THREADS + threadIdx.x;
        if (v < j.voxels && j.parent[n * j.voxels + v] == v) {
            unsigned long long size = (uint32_t)j.size[n * j.voxels + v];
            unsigned long long key = size << 32 | (0xffffffffu - (uint32_t)v);
            best = key > best ? key : best;
        }
    }
    for (int step = 16; step > 0; step /= 2) {
        unsigned long long other = __shfl_xor_sync(SS_ALL_LANES, best, step);
        best = other > best ? other : best;
    }
    if (threadIdx.x % 32 == 0) {
        warp[threadIdx.x / 32] = best;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int k = 1; k < THREADS / 32; ++k) {
            best = warp[k] > best ? warp[k] : best;
        }
        if (best > 0) {
            atomicMax(&j.best[n], best);
        }
    }
}

SS_KERNEL void k_components_keep(components_job j, int64_t min_size, uint8_t *kept) {
    uint32_t block;
    const int64_t n = volume_of(j, &block), start = n * j.voxels;
    const uint32_t first = block * (THREADS * EACH) + threadIdx.x;
    const uint8_t *image = (const uint8_t *)j.image + start;
    const uint32_t largest = min_size ? 0 : 0xffffffffu - (uint32_t)(j.best[n] & 0xffffffffu);
    int32_t root[EACH];
    uint8_t value[EACH];
#pragma unroll
    for (int k = 0; k < EACH; ++k) {
        uint32_t at = first + k * THREADS;
        root[k] = at < (uint32_t)j.voxels ? j.parent[start + at] : -2;
        value[k] = at < (uint32_t)j.voxels ? image[at] : 0;
    }
#pragma unroll
    for (int k = 0; k < EACH; ++k) {
        bool keep = root[k] >= 0;
        if (keep && min_size > 0) {
            keep = j.size[start + root[k]] >= min_size;
        } else if (keep) {
            keep = (uint32_t)root[k] == largest;
        }
        if (root[k] >= -1) {
            kept[start + first + k * THREADS] = keep ? value[k] : 0;
        }
    }
}

/* ---- host ------------------------------------------------------------------------------------ */

static ss_status start(ss_exec *x, const ss_tensor *image, int64_t connectivity,
                       components_job *j) {
    const int64_t *s = image->shape;
    j->n = s[0];
    j->d = s[1];
    j->h = s[2];
    j->w = s[3];
    j->voxels = s[1] * s[2] * s[3];
    j->words = (s[3] + 31) / 32;
    j->chunks = (j->voxels + CHUNK - 1) / CHUNK;
    j->row_words = ss_divisor_of(j->words);
    j->row = ss_divisor_of(j->w);
    j->plane = ss_divisor_of(j->h);
    j->connectivity = (int32_t)connectivity;
    j->image = image->data;
    if (x && connectivity != 6 && connectivity != 18 && connectivity != 26) {
        return ss_cuda_fail(x, SS_INVALID, "connectivity: expected 6, 18 or 26, got %d",
                            j->connectivity);
    }
    if (x && j->voxels >= INT32_MAX) {
        return ss_cuda_fail(
            x, SS_INVALID,
            "mask: expected volumes of fewer than 2^31 voxels, got %lld x %lld x %lld",
            (long long)s[1], (long long)s[2], (long long)s[3]);
    }
    return SS_OK;
}

/* A grid for all volumes, of blocks that have `each` of a volume's `items`. */
static unsigned grid_of(components_job *j, int64_t items, int64_t each) {
    const int64_t blocks = (items + each - 1) / each;
    j->blocks = ss_divisor_of(blocks);
    return ss_blocks(j->n * blocks, 1);
}

template <typename T> static ss_status join_all(ss_exec *x, components_job j) {
    unsigned grid = grid_of(&j, j.d * j.h * j.words, THREADS / 32 * EACH);
    SS_TRY(SS_LAUNCH(x, grid, THREADS, 0, (k_components_runs<T>), j));
    grid = grid_of(&j, j.voxels, THREADS);
    SS_TRY(SS_LAUNCH(x, grid, THREADS, 0, (k_components_join<T>), j));
    return SS_LAUNCH(x, ss_blocks(j.n * j.chunks, 1), THREADS, 0, (k_components_roots), j);
}

/* Values are only compared with 0 and each other: unsigned of the same size will do. */
static ss_status join_any(ss_exec *x, const components_job &j, int32_t dtype) {
    switch (dtype) {
    case SS_U16:
    case SS_I16:
        return join_all<uint16_t>(x, j);
    case SS_U32:
    case SS_I32:
        return join_all<uint32_t>(x, j);
    case SS_U64:
    case SS_I64:
        return join_all<uint64_t>(x, j);
    default:
        return join_all<uint8_t>(x, j);
    }
}

static void take_labels(ss_carve *w, components_job *j) {
    j->roots = ss_take<uint32_t>(w, j->n * j->chunks * WORDS);
    j->before = ss_take<int32_t>(w, j->n * j->chunks * WORDS);
    j->total = ss_take<int32_t>(w, j->n * j->chunks);
}

static void take_masks(ss_carve *w, components_job *j) {
    j->parent = ss_take<int32_t>(w, j->n * j->voxels);
    j->size = ss_take<int32_t>(w, j->n * j->voxels);
    j->best = ss_take<unsigned long long>(w, j->n);
}

int64_t SS_CUDA_WORKSPACE(components)(const ss_components_args *a) {
    ss_carve w = {};
    components_job j = {};
    (void)start(nullptr, &a->image, a->connectivity, &j);
    take_labels(&w, &j);
    return ss_carved(&w);
}

int64_t SS_CUDA_WORKSPACE(keep_components)(const ss_keep_components_args *a) {
    ss_carve w = {};
    components_job j = {};
    (void)start(nullptr, &a->mask, a->connectivity, &j);
    take_masks(&w, &j);
    return ss_carved(&w);
}

ss_status SS_CUDA(components)(ss_exec *x, const ss_components_args *a) {
    components_job j = {};
    SS_TRY(start(x, &a->image, a->connectivity, &j));
    ss_carve w = ss_carve_of(x);
    take_labels(&w, &j);
    j.by_value = (int32_t)a->by_value;
    j.parent = (int32_t *)a->labels.data;
    SS_TRY(join_any(x, j, a->image.dtype));
    SS_TRY(SS_LAUNCH(x, ss_blocks(j.n, 1), THREADS, 0, (k_components_scan), j,
                     (int64_t *)a->count.data));
    const unsigned grid = grid_of(&j, j.voxels, THREADS * EACH);
    return SS_LAUNCH(x, grid, THREADS, 0, (k_components_label), j);
}

ss_status SS_CUDA(keep_components)(ss_exec *x, const ss_keep_components_args *a) {
    components_job j = {};
    SS_TRY(start(x, &a->mask, a->connectivity, &j));
    ss_carve w = ss_carve_of(x);
    take_masks(&w, &j);
    SS_TRY(ss_cuda_zero(x, j.size, j.n * j.voxels * (int64_t)sizeof *j.size));
    SS_TRY(ss_cuda_zero(x, j.best, j.n * (int64_t)sizeof *j.best));
    SS_TRY(join_any(x, j, a->mask.dtype));
    if (a->min_size == 0) {
        SS_TRY(SS_LAUNCH(x, ss_blocks(j.n * j.chunks, 1), THREADS, 0, (k_components_largest), j));
    }
    const unsigned grid = grid_of(&j, j.voxels, THREADS * EACH);
    return SS_LAUNCH(x, grid, THREADS, 0, (k_components_keep), j, a->min_size,
                     (uint8_t *)a->kept.data);
}
