/* SPDX-License-Identifier: Apache-2.0
 *
 * edt.cu: exact squared Euclidean distance of every voxel to the nearest 0-voxel.
 *
 *     d2[z, y, x] = min over 0-voxels (z', y', x') of sz2 (z-z')^2 + sy2 (y-y')^2 + sx2 (x-x')^2
 *
 * mask [N, D, H, W] -> distance, index [N, D, H, W], all volumes in the same 3 or 4 launches:
 * 0-voxels to bits; distances along rows from the bits and, in the same launch, along columns; then
 * through planes, in place. A block holds 32, 16 or 8 neighbouring lines whole in shared memory
 * (sides up to SS_EDT_SHARED_SIDE; longer ones stay in global memory); each lane searches outwards
 * until no farther row can be nearer. Memory per voxel: 1 byte read, 4 written, 8 in between (12
 * with the index), 1/8 of bits.
 * Numerics: unit or equal spacing in integers, so exact; others in float, in the CPU's order of
 * operations: equal bits. Of equally near voxels the index is the first in C order, -1 where the
 * outside is as near. Deterministic: minima over sets that the mask alone defines. registers <= 48
 */
#include "edt.cuh"

#define THREADS 256
#define EACH 4
#define BIG_I32 (1 << 30) /* "none yet": plus any cost still an int32 */

enum { STORE_MIDDLE, STORE_SQUARES, STORE_SCALED, STORE_ROOT };

struct edt_pass {
    int64_t n[4];              /* N D H W */
    int32_t length, cols, log; /* of lines; neighbouring lines of a block, a power of two */
    int64_t columns, tiles;    /* neighbouring lines of a group; blocks per group */
    int32_t axis, store, border;
    float scale;
    const uint32_t *sites;
    const float *cost[3]; /* NULL: integers */
    const void *in;
    void *out;
    int16_t *place; /* row of the nearest site within each plane, or NULL */
    int64_t *index;
};

template <typename T> struct edt_number;
template <> struct edt_number<int32_t> {
    SS_DEVICE int32_t big() {
        return BIG_I32;
    }
    SS_DEVICE int32_t cost(const float *, int32_t k) {
        return k * k;
    }
};
template <> struct edt_number<float> {
    SS_DEVICE float big() {
        return INFINITY;
    }
    SS_DEVICE float cost(const float *table, int32_t k) {
        return table[k];
    }
};

SS_DEVICE bool closed(const edt_pass &p, int axis) {
    return p.border == 1 || (p.border == 2 && axis > 0);
}

/* Columns of the nearest sites at or before x (-1: none) and at or behind it (-1: none). */
SS_DEVICE void row_sites(const uint32_t *row, int32_t words, int32_t x, int32_t *left,
                         int32_t *right) {
    int32_t w = x >> 5;
    uint32_t upto = 0xffffffffu >> (31 - (x & 31)), word = row[w];
    uint32_t before = word & upto, behind = word & ~(upto >> 1);
    int32_t k = w;
    while (before == 0 && k > 0) {
        before = row[--k];
    }
    *left = before ? k * 32 + 31 - __clz((int)before) : -1;
    k = w;
    while (behind == 0 && k + 1 < words) {
        behind = row[++k];
    }
    *right = behind ? k * 32 + __ffs((int)behind) - 1 : -1;
}

template <typename T> SS_DEVICE T row_value(const edt_pass &p, const uint32_t *row, int32_t x) {
    int32_t left, right, w = (int32_t)p.n[3];
    row_sites(row, (int32_t)ss_edt_words(w), x, &left, &right);
    int32_t to_left = left >= 0 || closed(p, 2) ? x - left : INT32_MAX;
    int32_t to_right = right >= 0 ? right - x : (closed(p, 2) ? w - x : INT32_MAX);
    int32_t d = to_left < to_right ? to_left : to_right;
    return d == INT32_MAX ? edt_number<T>::big() : edt_number<T>::cost(p.cost[2], d);
}

/* The least f[j] + cost[|i - j|], faces included, and the first j that has it. */
template <typename T, bool INDEX>
SS_DEVICE T search(const T *f, int64_t stride, int32_t n, int32_t i, const float *cost, bool faces,
                   int32_t *place) {
    T best = f[i * stride];
    int32_t at = i, reach = i > n - 1 - i ? i : n - 1 - i;
    if (faces) {
        T c = edt_number<T>::cost(cost, i + 1 < n - i ? i + 1 : n - i);
        at = c < best ? n : at;
        best = c < best ? c : best;
    }
    const T *up = f + i * stride, *down = up;
    for (int32_t k = 1; k <= reach; ++k) {
        T c = edt_number<T>::cost(cost, k);
        if (INDEX ? c > best : c >= best) {
            break;
        }
        up -= stride;
        down += stride;
        if (k <= i) {
            T v = *up + c;
            if (v < best || (INDEX && v == best && i - k < at)) {
                best = v;
                at = i - k;
            }
        }
        if (i + k < n) {
            T v = *down + c;
            if (v < best || (INDEX && v == best && i + k < at)) {
                best = v;
                at = i + k;
            }
        }
    }
    *place = at;
    return best;
}

/* The square of the nearest way out of the volume along an axis, if that counts. */
template <typename T> SS_DEVICE T way_out(const edt_pass &p, int axis, int64_t i) {
    int64_t n = p.n[axis + 1], d = i + 1 < n - i ? i + 1 : n - i;
    return closed(p, axis) ? edt_number<T>::cost(p.cost[axis], (int32_t)d) : edt_number<T>::big();
}

/* Composes the places along the axes: plane pz, then the row within it, then the column. */
template <typename T>
SS_DEVICE int64_t nearest_voxel(const edt_pass &p, int64_t n, int64_t z, int64_t y, int64_t x, T g,
                                int64_t pz) {
    const int64_t h = p.n[2], w = p.n[3];
    if (!(g < edt_number<T>::big()) || g == way_out<T>(p, 0, z) || g == way_out<T>(p, 1, y) ||
        g == way_out<T>(p, 2, x)) {
        return -1;
    }
    int64_t py = p.place[((n * p.n[1] + pz) * h + y) * w + x];
    const uint32_t *row = p.sites + ((n * p.n[1] + pz) * h + py) * ss_edt_words(w);
    int32_t left, right;
    row_sites(row, (int32_t)ss_edt_words(w), (int32_t)x, &left, &right);
    int64_t px = left >= 0 && (right < 0 || x - left <= right - x) ? left : right;
    return (pz * h + py) * w + px;
}

template <typename T, bool INDEX>
SS_DEVICE void store(const edt_pass &p, int64_t group, int64_t column, int32_t i, T g,
                     int32_t place) {
    int64_t at = (group * p.length + i) * p.columns + column;
    if (p.store == STORE_MIDDLE) {
        ((T *)p.out)[at] = g;
        if (INDEX) {
            p.place[at] = (int16_t)place;
        }
        return;
    }
    bool none = !(g < edt_number<T>::big());
    if (p.store == STORE_SQUARES) {
        ((int32_t *)p.out)[at] = none ? SS_EDT_FAR : (int32_t)g;
    } else {
        float v = p.store == STORE_ROOT ? sqrtf((float)g) * p.scale : (float)g * p.scale;
        ((float *)p.out)[at] = none ? INFINITY : v;
    }
    if (INDEX) {
        int64_t y = column / p.n[3], x = column % p.n[3];
        p.index[at] = nearest_voxel<T>(p, group, i, y, x, g, place);
    }
}

/* One tile of lines. ROWS: lines of columns, whose values come from the bits of their rows. */
template <typename T, bool ROWS, bool SHARED, bool INDEX> SS_KERNEL void k_edt_lines(edt_pass p) {
    SS_DYNAMIC_SHARED(char, room);
    const int64_t group = blockIdx.x / p.tiles, first = (blockIdx.x % p.tiles) << p.log;
    const int32_t column = (int32_t)threadIdx.x & (p.cols - 1), n = p.length;
    const int32_t row = (int32_t)threadIdx.x >> p.log, rows = THREADS >> p.log;
    const bool in = first + column < p.columns;
    const T *f = (const T *)p.in + group * n * p.columns + first + column;
    const float *cost = p.cost[p.axis];
    int64_t stride = p.columns;
    if (SHARED) {
        T *tile = (T *)(void *)room + column;
        float *own = (float *)(void *)room + ((int64_t)n << p.log);
        for (int32_t i = row; i < n && in; i += rows) {
            const uint32_t *bits = p.sites + (group * n + i) * ss_edt_words(p.n[3]);
            tile[i << p.log] =
                ROWS ? row_value<T>(p, bits, (int32_t)first + column) : f[i * stride];
        }
        for (int32_t k = (int32_t)threadIdx.x; cost && k <= n; k += THREADS) {
            own[k] = cost[k];
        }
        __syncthreads();
        f = tile;
        cost = own;
        stride = p.cols;
    }
    for (int32_t i = row; i < n && in; i += rows) {
        int32_t place;
        T g = search<T, INDEX>(f, stride, n, i, cost, closed(p, p.axis), &place);
        store<T, INDEX>(p, group, first + column, i, g, place);
    }
}

/* Distances along rows alone, where columns are too long for shared memory. */
template <typename T> SS_KERNEL void k_edt_rows(edt_pass p, T *out) {
    int64_t at = (int64_t)blockIdx.x * THREADS + threadIdx.x, w = p.n[3];
    if (at < p.n[0] * p.n[1] * p.n[2] * w) {
        out[at] = row_value<T>(p, p.sites + at / w * ss_edt_words(w), (int32_t)(at % w));
    }
}

/* A warp per row: the loads of EACH words are on their way together. */
SS_KERNEL void k_edt_sites(const uint8_t *mask, int64_t rows, int64_t w, uint32_t *sites) {
    const int64_t row = (int64_t)blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
    const int32_t words = (int32_t)ss_edt_words(w), lane = (int32_t)threadIdx.x % 32;
    if (row >= rows) { /* the whole warp */
        return;
    }
    mask += row * w;
    sites += row * words;
    for (int32_t first = 0; first < words; first += EACH) {
        bool zero[EACH];
#pragma unroll
        for (int32_t k = 0; k < EACH; ++k) {
            const int32_t x = (first + k) * 32 + lane;
            zero[k] = x < w && mask[x] == 0;
        }
        uint32_t own = 0;
#pragma unroll
        for (int32_t k = 0; k < EACH; ++k) {
            const uint32_t bits = __ballot_sync(SS_ALL_LANES, zero[k]);
            own = lane == k ? bits : own;
        }
        if (lane < EACH && first + lane < words) {
            sites[first + lane] = own;
        }
    }
}

/* cost[k] of one axis: step^2 k^2 in double, rounded once. */
SS_KERNEL void k_edt_cost(double step0, double step1, double step2, int64_t n, float *cost) {
    int64_t k = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (k < n) {
        cost[k] = (float)(step0 * step0 * (double)(k * k));
        cost[n + k] = (float)(step1 * step1 * (double)(k * k));
        cost[2 * n + k] = (float)(step2 * step2 * (double)(k * k));
    }
}

/* ---- host ------------------------------------------------------------------------------------ */

/* Whether the middle result needs memory of its own: lines outside shared memory cannot be replaced
 * while others search them. */
static bool long_lines(const int64_t n[4]) {
    return n[1] > SS_EDT_SHARED_SIDE || n[2] > SS_EDT_SHARED_SIDE;
}

static int64_t costs(const int64_t n[4]) {
    int64_t most = n[1] > n[2] ? n[1] : n[2];
    return (most > n[3] ? most : n[3]) + 1;
}

template <typename T, bool ROWS, bool INDEX> static ss_status run_lines(ss_exec *x, edt_pass p) {
    const int64_t n = p.length, limit = SS_MAX_SHARED;
    const bool shared = n <= SS_EDT_SHARED_SIDE;
    const int64_t table = p.cost[0] ? (n + 1) * 4 : 0;
    p.log = 5;
    while (shared && p.log > 3 && (n << p.log) * 4 + table > limit) {
        --p.log;
    }
    p.cols = 1 << p.log;
    p.tiles = (p.columns + p.cols - 1) / p.cols;
    const int64_t groups = p.n[0] * (p.axis == 1 ? p.n[1] : 1);
    const size_t bytes = shared ? (size_t)((n << p.log) * 4 + table) : 0;
    const unsigned blocks = ss_blocks(groups * p.tiles, 1);
    if (shared) {
        return SS_LAUNCH(x, blocks, THREADS, bytes, (k_edt_lines<T, ROWS, true, INDEX>), p);
    }
    return SS_LAUNCH(x, blocks, THREADS, 0, (k_edt_lines<T, false, false, INDEX>), p);
}

/* All passes from the bits; `spare` is a copy in between for long lines. */
template <typename T, bool INDEX>
static ss_status run_passes(ss_exec *x, edt_pass p, void *spare, int store) {
    const int64_t *n = p.n;
    void *out = p.out, *middle = long_lines(n) ? spare : out;
    p.axis = 1;
    p.length = (int32_t)n[2];
    p.columns = n[3];
    p.store = STORE_MIDDLE;
    p.out = middle;
    if (n[2] > SS_EDT_SHARED_SIDE) {
        unsigned blocks = ss_blocks(n[0] * n[1] * n[2] * n[3], THREADS);
        SS_TRY(SS_LAUNCH(x, blocks, THREADS, 0, (k_edt_rows<T>), p, (T *)out));
        p.in = out;
        SS_TRY((run_lines<T, false, INDEX>(x, p)));
    } else {
        SS_TRY((run_lines<T, true, INDEX>(x, p)));
    }
    p.axis = 0;
    p.length = (int32_t)n[1];
    p.columns = n[2] * n[3];
    p.store = store;
    p.in = middle;
    p.out = out;
    return run_lines<T, false, INDEX>(x, p);
}

void *ss_cuda_edt_take(ss_carve *w, const int64_t n[4]) {
    return ss_take<int32_t>(w, long_lines(n) ? n[0] * n[1] * n[2] * n[3] : 0);
}

ss_status ss_cuda_edt_squared(ss_exec *x, void *room, const uint32_t *sites, const int64_t n[4],
                              int border, int32_t *out) {
    edt_pass p = {};
    memcpy(p.n, n, sizeof p.n);
    p.border = border;
    p.sites = sites;
    p.out = out;
    return run_passes<int32_t, false>(x, p, room, STORE_SQUARES);
}

struct edt_pieces {
    uint32_t *sites;
    float *cost;
    int16_t *place;
    void *spare;
};

static void layout(ss_carve *w, const ss_edt_args *a, edt_pieces *p) {
    const int64_t *n = a->mask.shape;
    p->sites = ss_take<uint32_t>(w, n[0] * n[1] * n[2] * ss_edt_words(n[3]));
    p->cost = ss_take<float>(w, 3 * costs(n));
    p->place = ss_take<int16_t>(w, a->want_index ? n[0] * n[1] * n[2] * n[3] : 0);
    p->spare = ss_cuda_edt_take(w, n);
}

int64_t SS_CUDA_WORKSPACE(edt)(const ss_edt_args *a) {
    ss_carve w = {};
    edt_pieces p;
    layout(&w, a, &p);
    return ss_carved(&w);
}

static ss_status check(ss_exec *x, const ss_edt_args *a, double spacing[3]) {
    const int64_t *s = a->mask.shape + 1;
    if (a->spacing.n != 0 && a->spacing.n != 3) {
        return ss_cuda_fail(x, SS_INVALID, "spacing: expected 3 numbers or none, got %lld",
                            (long long)a->spacing.n);
    }
    for (int64_t k = 0; k < 3; ++k) {
        spacing[k] = a->spacing.n ? a->spacing.at[k] : 1.0;
        if (!(spacing[k] >= 1e-12 && spacing[k] <= 1e12)) {
            return ss_cuda_fail(x, SS_INVALID,
                                "spacing: expected positive numbers (1e-12 to 1e12), got %g",
                                spacing[k]);
        }
    }
    if (s[0] > SS_EDT_SIDE || s[1] > SS_EDT_SIDE || s[2] > SS_EDT_SIDE) {
        return ss_cuda_fail(x, SS_INVALID,
                            "mask: expected sides of at most %d, got (%lld, %lld, %lld)",
                            SS_EDT_SIDE, (long long)s[0], (long long)s[1], (long long)s[2]);
    }
    return SS_OK;
}

ss_status SS_CUDA(edt)(ss_exec *x, const ss_edt_args *a) {
    const int64_t *n = a->mask.shape;
    double spacing[3];
    SS_TRY(check(x, a, spacing));
    ss_carve w = ss_carve_of(x);
    edt_pieces pieces;
    layout(&w, a, &pieces);
    edt_pass p = {};
    memcpy(p.n, n, sizeof p.n);
    p.border = (int32_t)a->border;
    p.sites = pieces.sites;
    p.place = pieces.place;
    p.index = (int64_t *)a->index.data;
    p.out = a->distance.data;
    p.scale = 1.0f;
    const int64_t rows = n[0] * n[1] * n[2];
    SS_TRY(SS_LAUNCH(x, ss_blocks(rows, THREADS / 32), THREADS, 0, (k_edt_sites),
                     (const uint8_t *)a->mask.data, rows, n[3], pieces.sites));
    /* Equal spacings are integers times a factor. */
    const bool plane = n[1] == 1 && a->border != 1;
    const int store = a->squared ? STORE_SCALED : STORE_ROOT;
    if (spacing[1] == spacing[2] && (plane || spacing[0] == spacing[1])) {
        p.scale = (float)spacing[1];
        p.scale = a->squared ? p.scale * p.scale : p.scale;
        return a->want_index ? run_passes<int32_t, true>(x, p, pieces.spare, store)
                             : run_passes<int32_t, false>(x, p, pieces.spare, store);
    }
    SS_TRY(SS_LAUNCH(x, ss_blocks(costs(n), THREADS), THREADS, 0, (k_edt_cost), spacing[0],
                     spacing[1], spacing[2], costs(n), pieces.cost));
    for (int k = 0; k < 3; ++k) {
        p.cost[k] = pieces.cost + k * costs(n);
    }
    return a->want_index ? run_passes<float, true>(x, p, pieces.spare, store)
                         : run_passes<float, false>(x, p, pieces.spare, store);
}
