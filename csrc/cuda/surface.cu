/* SPDX-License-Identifier: Apache-2.0
 *
 * surface.cu: surface distances between label maps, summarised per case and class.
 *
 *     stats[n, c] = weight(a), weight(g), mean(a), mean(g), max(a), max(g),
 *                   percentile(a), percentile(g), percentile(a u g), near(a), near(g)
 *
 * with a = d(A -> G), g = d(G -> A), A = {y_pred[n] = c}, G = {y[n] = c}: surfaces, weights and
 * summaries as in cpu/surface.c. y_pred, y [N, D, H, W] -> stats [N, C, 11]. Labels become 16 bits
 * and bounding boxes of A u G (device memory: nothing waits for it); then a sequence of 7 launches
 * for all pairs (case, class) at once, or for as many as ROOM bytes of workspace allow: surface
 * elements as bits along z; how many come before each tile of them; |dz| to the nearest one along
 * z; (|dz|, |dy|) to the nearest one in the plane of x; lists of elements, in tile order; distance
 * of each of them, a search along x; one block per percentile that selects it by histograms of 11
 * bits. Grids follow the whole volume, work the boxes: blocks walk over their box's tiles.
 *
 * Memory: labels once, 4 bytes per voxel written; per voxel of a box and side about 16 bytes. A
 * label that is no class takes its voxel out of both maps and is counted in faults.
 * Numerics: squared distances are ((dz sz)^2 + (dy sy)^2) + (dx sx)^2 in double, minimised axis by
 * axis in this order; rounding is monotone, so that they have the CPU's bits, and so have weights
 * of voxels, maxima, percentiles and near voxels. Sums go by tiles, then threads, then a tree:
 * within (40 + n / 2^17) 2^-53 of the exact ones, relatively; the CPU's within n 2^-53. Weighted:
 * the share that decides a percentile is counted in integers, exact for whole numbers, else to 62 -
 * log2(n) bits; where it is the percentile itself, the CPU's rounded sums may miss it and go on to
 * the next distance. Deterministic: tiles of 256 in the order of the box; integers otherwise.
 * registers <= 112
 */
#include "block.cuh"
#include "labels.cuh"

#define THREADS 256
#define TURNS 4
#define CHUNK (THREADS * SS_LABEL_TURNS * TURNS)
#define BOXES 1024          /* classes whose boxes fit in shared memory */
#define COLUMNS 11          /* of stats */
#define SIDE 65534          /* of D and H: |dz| and |dy| have 16 bits */
#define NONE 0xffffu        /* no element in this column, */
#define NOWHERE 0xffffffffu /* in this plane */
#define NUMBERS 256         /* of the host, that one launch carries */
#define ROOM ((int64_t)512 << 20)
#define LAUNCHED 8192 /* blocks of a launch, if every list gets enough of them */
#define BINS 2048
#define SELECTORS 512 /* threads of a block that selects */

/* What a tile of elements adds up to. */
struct surface_part {
    double sum, near, weight;
    unsigned long long most, any; /* bits of squared distances: the largest; all that occur */
};

struct surface_job {
    ss_label_maps maps;
    int64_t n, size[3], voxels, chunks; /* chunks of a case */
    int64_t classes, first, wanted;
    int32_t dims, corners; /* corners of a neighbourhood; 0: elements are voxels */
    int32_t precision;     /* bits of a weight as an integer */
    int32_t spacings, tolerances;
    int64_t pair, pairs;        /* of this sequence */
    int64_t grid, words, tiles; /* of a list, at most */
    int64_t blocks;             /* per list */
    double percentile;
    const double *areas;
    double *numbers;             /* spacing, then tolerances */
    uint16_t *label[2];          /* [n, voxels] */
    int32_t *box;                /* [n, classes, 6]: size - lowest, highest + 1; 0: absent */
    uint32_t *bits;              /* [lists, words]: lists are pairs x sides */
    int32_t *count, *total;      /* [lists, tiles] elements before, [lists] */
    unsigned long long *element; /* [lists, grid]: place, then bits of the squared distance */
    uint32_t *flat;              /* [lists, grid]: |dz| << 16 | |dy| */
    uint8_t *code;               /* [lists, grid] of elements */
    surface_part *part;          /* [lists, grid / THREADS] */
    double *stats;
    unsigned long long *faults;
};

/* A pair's box: element (z, y, x) of it is the voxel lo + (z, y, x), or the point before that. */
struct surface_view {
    int64_t n;
    int32_t c, lo[3], size[3];
};

/* ---- labels and boxes ------------------------------------------------------------------------ */

struct surface_numbers {
    double v[NUMBERS];
};

SS_KERNEL void k_surface_numbers(surface_numbers from, int32_t n, double *to) {
    for (int32_t i = (int32_t)threadIdx.x; i < n; i += THREADS) {
        to[i] = from.v[i];
    }
}

SS_KERNEL void k_surface_nothing(double *stats, int64_t n) {
    int64_t at = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (at < n) {
        stats[at] = NAN;
    }
}

/* Values only grow, so what is read may be old, and most voxels are inside the box already. */
SS_DEVICE void grow(int32_t *box, uint32_t label, const int32_t v[6]) {
    volatile int32_t *now = box + 6 * (int64_t)label;
    for (int k = 0; k < 6; ++k) {
        if (now[k] < v[k]) {
            atomicMax(&box[6 * (int64_t)label + k], v[k]);
        }
    }
}

SS_KERNEL void k_surface_labels(surface_job j) {
    SS_DYNAMIC_SHARED(int32_t, own);
    SS_SHARED int room[THREADS / SS_WARP];
    const int64_t n = blockIdx.x / j.chunks, chunk = blockIdx.x % j.chunks;
    const int32_t cells = j.classes <= BOXES ? (int32_t)(6 * j.classes) : 0;
    const uint32_t h = (uint32_t)j.size[1], w = (uint32_t)j.size[2];
    int32_t *box = j.box + n * 6 * j.classes;
    for (int32_t i = (int32_t)threadIdx.x; i < cells; i += THREADS) {
        own[i] = 0;
    }
    __syncthreads();
    int bad = 0;
    for (int turn = 0; turn < TURNS; ++turn) {
        const int64_t at = chunk * CHUNK + turn * THREADS * SS_LABEL_TURNS + threadIdx.x;
        uint32_t pair[SS_LABEL_TURNS];
        bad += ss_label_pairs<THREADS>(j.maps, n * j.voxels + at, (n + 1) * j.voxels, pair);
        for (int k = 0; k < SS_LABEL_TURNS; ++k) {
            const int64_t i = at + k * THREADS;
            if (i >= j.voxels) {
                continue;
            }
            const uint32_t p = pair[k] >> 16, g = pair[k] & 0xffffu;
            j.label[0][n * j.voxels + i] = (uint16_t)p;
            j.label[1][n * j.voxels + i] = (uint16_t)g;
            const bool in_p = p != SS_NO_LABEL && p >= j.first;
            const bool in_g = g != SS_NO_LABEL && g >= j.first && g != p;
            if (!in_p && !in_g) {
                continue;
            }
            const uint32_t row = (uint32_t)i / w, x = (uint32_t)i - row * w;
            const uint32_t z = row / h, y = row - z * h;
            const int32_t v[6] = {(int32_t)(j.size[0] - z), (int32_t)(h - y), (int32_t)(w - x),
                                  (int32_t)z + 1,           (int32_t)y + 1,   (int32_t)x + 1};
            if (in_p) {
                grow(cells ? own : box, p, v);
            }
            if (in_g) {
                grow(cells ? own : box, g, v);
            }
        }
    }
    ss_count_bad<THREADS>(j.faults, bad, room); /* has a barrier, which the boxes need as well */
    for (int32_t i = (int32_t)threadIdx.x; i < cells; i += THREADS) {
        if (own[i] > 0) {
            atomicMax(&box[i], own[i]);
        }
    }
}

/* ---- elements -------------------------------------------------------------------------------- */

SS_DEVICE surface_view view_of(const surface_job &j, int64_t list) {
    const int64_t pair = j.pair + list / 2;
    surface_view v;
    v.n = pair / j.wanted;
    v.c = (int32_t)(j.first + pair % j.wanted);
    const int32_t *box = j.box + (v.n * j.classes + v.c) * 6;
    for (int k = 0; k < 3; ++k) {
        v.lo[k] = (int32_t)j.size[k] - box[k];
        v.size[k] = box[k] ? box[3 + k] - v.lo[k] : 0;
        v.size[k] += v.size[k] && j.corners && (k > 0 || j.dims == 3) ? 1 : 0;
    }
    return v;
}

SS_DEVICE int64_t words_of(const surface_view &v) {
    return (int64_t)((v.size[0] + 31) / 32) * v.size[1] * v.size[2];
}

/* Whether a voxel is in the mask; outside the volume none is. */
SS_DEVICE bool in_mask(const surface_job &j, const uint16_t *map, int32_t c, int64_t z, int64_t y,
                       int64_t x) {
    return z >= 0 && z < j.size[0] && y >= 0 && y < j.size[1] && x >= 0 && x < j.size[2] &&
           map[(z * j.size[1] + y) * j.size[2] + x] == c;
}

/* The voxels around a point as bits, the first in memory order highest. */
SS_DEVICE uint32_t corner_code(const surface_job &j, const uint16_t *map, const surface_view &v,
                               int32_t z, int32_t y, int32_t x) {
    uint32_t code = 0;
    for (int b = 0; b < j.corners; ++b) {
        const int32_t dz = j.dims == 3 ? (b >> 2) - 1 : 0, dy = (b >> 1 & 1) - 1, dx = (b & 1) - 1;
        code =
            code << 1 | in_mask(j, map, v.c, v.lo[0] + z + dz, v.lo[1] + y + dy, v.lo[2] + x + dx);
    }
    return code;
}

SS_DEVICE bool is_element(const surface_job &j, const uint16_t *map, const surface_view &v,
                          int32_t z, int32_t y, int32_t x) {
    if (j.corners) {
        const uint32_t code = corner_code(j, map, v, z, y, x);
        return code != 0 && code != (1u << j.corners) - 1;
    }
    z += v.lo[0];
    y += v.lo[1];
    x += v.lo[2];
    return in_mask(j, map, v.c, z, y, x) &&
           !(in_mask(j, map, v.c, z, y, x - 1) && in_mask(j, map, v.c, z, y, x + 1) &&
             in_mask(j, map, v.c, z, y - 1, x) && in_mask(j, map, v.c, z, y + 1, x) &&
             (j.dims == 2 ||
              (in_mask(j, map, v.c, z - 1, y, x) && in_mask(j, map, v.c, z + 1, y, x))));
}

/* Bit b of word (k, y, x) is element (32 k + b, y, x). */
SS_KERNEL void k_surface_bits(surface_job j) {
    SS_SHARED int room[THREADS / SS_WARP];
    const int64_t list = blockIdx.x / j.blocks;
    const surface_view v = view_of(j, list);
    const uint16_t *map = j.label[list % 2] + v.n * j.voxels;
    const int64_t words = words_of(v);
    for (int64_t tile = blockIdx.x % j.blocks; tile * THREADS < words; tile += j.blocks) {
        const int64_t at = tile * THREADS + threadIdx.x;
        uint32_t bits = 0;
        if (at < words) {
            const uint32_t row = (uint32_t)at / (uint32_t)v.size[2];
            const int32_t x = (int32_t)((uint32_t)at - row * (uint32_t)v.size[2]);
            const int32_t y = (int32_t)(row % (uint32_t)v.size[1]);
            const int32_t z = (int32_t)(row / (uint32_t)v.size[1]) * 32;
            for (int32_t b = 0; b < 32 && z + b < v.size[0]; ++b) {
                bits |= (uint32_t)is_element(j, map, v, z + b, y, x) << b;
            }
            j.bits[list * j.words + at] = bits;
        }
        const int n = ss_block_sum<THREADS>(__popc(bits), room);
        if (threadIdx.x == 0) {
            j.count[list * j.tiles + tile] = n;
        }
    }
}

SS_KERNEL void k_surface_scan(surface_job j) {
    SS_SHARED int32_t room[THREADS / SS_WARP];
    const int64_t list = blockIdx.x;
    const int64_t tiles = (words_of(view_of(j, list)) + THREADS - 1) / THREADS;
    int32_t *count = j.count + list * j.tiles;
    int32_t before = 0;
    for (int64_t first = 0; first < tiles; first += THREADS) {
        const int64_t tile = first + threadIdx.x;
        int32_t all, upto = ss_block_scan<THREADS>(tile < tiles ? count[tile] : 0, room, &all);
        if (tile < tiles) {
            count[tile] = before + upto;
        }
        before += all;
    }
    if (threadIdx.x == 0) {
        j.total[list] = before;
    }
}

/* Whether there are distances: both masks have elements. */
SS_DEVICE bool both(const surface_job &j, int64_t list) {
    return j.total[list] > 0 && j.total[list ^ 1] > 0;
}

/* |dz| to the nearest element of each column, where the list will be. */
SS_KERNEL void k_surface_columns(surface_job j) {
    const int64_t list = blockIdx.x / j.blocks;
    const surface_view v = view_of(j, list);
    const int64_t plane = (int64_t)v.size[1] * v.size[2];
    const int64_t words = both(j, list) ? words_of(v) : 0;
    const uint32_t *bits = j.bits + list * j.words;
    uint16_t *out = (uint16_t *)(void *)(j.element + list * j.grid);
    for (int64_t tile = blockIdx.x % j.blocks; tile * THREADS < words; tile += j.blocks) {
        const int64_t at = tile * THREADS + threadIdx.x;
        if (at >= words) {
            continue;
        }
        const int32_t first = (int32_t)((uint32_t)at / (uint32_t)plane) * 32;
        const uint32_t own = bits[at];
        int32_t above = -1, below = -1; /* nearest elements before and behind this word */
        for (int64_t k = at - plane, z = first - 32; k >= 0 && above < 0; k -= plane, z -= 32) {
            above = bits[k] ? (int32_t)z + 31 - __clz((int)bits[k]) : -1;
        }
        for (int64_t k = at + plane, z = first + 32; k < words && below < 0; k += plane, z += 32) {
            below = bits[k] ? (int32_t)z + __ffs((int)bits[k]) - 1 : -1;
        }
        for (int32_t b = 0; b < 32 && first + b < v.size[0]; ++b) {
            const uint32_t upto = own & 0xffffffffu >> (31 - b), from = own >> b;
            const int32_t up = upto ? first + 31 - __clz((int)upto) : above;
            const int32_t down = from ? first + b + __ffs((int)from) - 1 : below;
            const uint32_t to_up = up >= 0 ? (uint32_t)(first + b - up) : NONE;
            const uint32_t to_down = down >= 0 ? (uint32_t)(down - first - b) : NONE;
            out[at + (first + b - first / 32) * plane] =
                (uint16_t)(to_up < to_down ? to_up : to_down);
        }
    }
}

SS_DEVICE double square(double k, double s) {
    return k * s * (k * s);
}

SS_DEVICE double flat_square(uint32_t place, double s0, double s1) {
    return place == NOWHERE
               ? INFINITY
               : square((double)(place >> 16), s0) + square((double)(place & NONE), s1);
}

/* The numbers of a case. */
SS_DEVICE const double *spacing_of(const surface_job &j, const surface_view &v) {
    return j.numbers + (j.spacings > 3 ? 3 * v.n : 0);
}

/* (|dz|, |dy|) to the nearest element with the same x. A row farther away is nearer only if its
 * |dz| is smaller than that of the best so far. */
SS_KERNEL void k_surface_flat(surface_job j) {
    const int64_t list = blockIdx.x / j.blocks;
    const surface_view v = view_of(j, list);
    const int64_t width = v.size[2], plane = v.size[1] * width;
    const int64_t items = both(j, list) ? plane * v.size[0] : 0;
    const double s0 = spacing_of(j, v)[0], s1 = spacing_of(j, v)[1];
    const uint16_t *in = (const uint16_t *)(const void *)(j.element + list * j.grid);
    for (int64_t tile = blockIdx.x % j.blocks; tile * THREADS < items; tile += j.blocks) {
        const int64_t at = tile * THREADS + threadIdx.x;
        if (at >= items) {
            continue;
        }
        const int32_t y = (int32_t)((uint32_t)at / (uint32_t)width % (uint32_t)v.size[1]);
        const int32_t last = v.size[1] - 1 - y, reach = y > last ? y : last;
        uint32_t dz = in[at], place = dz == NONE ? NOWHERE : dz << 16;
        double best = dz == NONE ? INFINITY : square((double)dz, s0);
        for (int32_t k = 1; k <= reach && dz > 0; ++k) {
            const double c = square((double)k, s1);
            if (c >= best) {
                break;
            }
            const uint32_t up = k <= y ? in[at - k * width] : NONE;
            const uint32_t down = k <= last ? in[at + k * width] : NONE;
            const uint32_t near = up < down ? up : down;
            if (near < dz) {
                const double d = square((double)near, s0) + c;
                if (d < best) {
                    best = d;
                    dz = near;
                    place = near << 16 | (uint32_t)k;
                }
            }
        }
        j.flat[list * j.grid + at] = place;
    }
}

/* Places of the elements in tile order. */
SS_KERNEL void k_surface_list(surface_job j) {
    SS_SHARED int32_t room[THREADS / SS_WARP];
    const int64_t list = blockIdx.x / j.blocks;
    const surface_view v = view_of(j, list);
    const int64_t words = words_of(v);
    for (int64_t tile = blockIdx.x % j.blocks; tile * THREADS < words; tile += j.blocks) {
        const int64_t at = tile * THREADS + threadIdx.x;
        uint32_t bits = at < words ? j.bits[list * j.words + at] : 0;
        int32_t all, upto = ss_block_scan<THREADS>((int32_t)__popc(bits), room, &all);
        unsigned long long *out = j.element + list * j.grid + j.count[list * j.tiles + tile] + upto;
        const uint32_t row = (uint32_t)at / (uint32_t)v.size[2];
        const uint32_t x = (uint32_t)at - row * (uint32_t)v.size[2];
        const uint32_t y = row % (uint32_t)v.size[1], z = row / (uint32_t)v.size[1] * 32;
        for (; bits; bits &= bits - 1) {
            const uint32_t at_z = z + (uint32_t)__ffs((int)bits) - 1;
            *out++ = (unsigned long long)(at_z << 16 | y) << 32 | x;
        }
    }
}

/* ---- distances ------------------------------------------------------------------------------- */

SS_DEVICE surface_part joined(surface_part a, const surface_part &b) {
    a.sum += b.sum;
    a.near += b.near;
    a.weight += b.weight;
    a.most = b.most > a.most ? b.most : a.most;
    a.any |= b.any;
    return a;
}

/* Over all threads, in every thread, by a tree of fixed shape. */
template <int N> SS_DEVICE surface_part over_block(surface_part v, surface_part *room) {
    for (int step = SS_WARP / 2; step > 0; step /= 2) {
        surface_part other;
        other.sum = __shfl_xor_sync(SS_ALL_LANES, v.sum, step);
        other.near = __shfl_xor_sync(SS_ALL_LANES, v.near, step);
        other.weight = __shfl_xor_sync(SS_ALL_LANES, v.weight, step);
        other.most = __shfl_xor_sync(SS_ALL_LANES, v.most, step);
        other.any = __shfl_xor_sync(SS_ALL_LANES, v.any, step);
        v = joined(v, other);
    }
    if (threadIdx.x % SS_WARP == 0) {
        room[threadIdx.x / SS_WARP] = v;
    }
    __syncthreads();
    v = room[0];
    for (int w = 1; w < N / SS_WARP; ++w) {
        v = joined(v, room[w]);
    }
    __syncthreads();
    return v;
}

/* Squared distance from element (z, y, x) to the nearest one of the other side. */
SS_DEVICE double nearest(const uint32_t *flat, const surface_view &v, const double *s, int32_t z,
                         int32_t y, int32_t x) {
    const uint32_t *row = flat + ((int64_t)z * v.size[1] + y) * v.size[2];
    const double s0 = s[0], s1 = s[1], s2 = s[2];
    const int32_t last = v.size[2] - 1 - x, reach = x > last ? x : last;
    double best = flat_square(row[x], s0, s1);
    for (int32_t k = 1; k <= reach; ++k) {
        const double c = square((double)k, s2);
        if (c >= best) {
            break;
        }
        if (k <= x) {
            const double d = flat_square(row[x - k], s0, s1) + c;
            best = d < best ? d : best;
        }
        if (k <= last) {
            const double d = flat_square(row[x + k], s0, s1) + c;
            best = d < best ? d : best;
        }
    }
    return best;
}

SS_KERNEL void k_surface_search(surface_job j) {
    SS_SHARED surface_part room[THREADS / SS_WARP];
    const int64_t list = blockIdx.x / j.blocks;
    const surface_view v = view_of(j, list);
    const int64_t items = j.total[list];
    const bool far = !both(j, list);
    const uint16_t *map = j.label[list % 2] + v.n * j.voxels;
    const double *s = spacing_of(j, v);
    const float within = j.tolerances ? (float)j.numbers[j.spacings + v.c] : 0.0f;
    unsigned long long *element = j.element + list * j.grid;
    for (int64_t tile = blockIdx.x % j.blocks; tile * THREADS < items; tile += j.blocks) {
        const int64_t at = tile * THREADS + threadIdx.x;
        surface_part own = {};
        if (at < items) {
            const unsigned long long place = element[at];
            const int32_t z = (int32_t)(place >> 48), y = (int32_t)(place >> 32 & 0xffffu);
            const int32_t x = (int32_t)(place & 0xffffffffu);
            own.weight = 1.0;
            if (j.corners) {
                const uint32_t code = corner_code(j, map, v, z, y, x);
                j.code[list * j.grid + at] = (uint8_t)code;
                own.weight = j.areas[code];
            }
            if (!far) {
                const double d2 = nearest(j.flat + (list ^ 1) * j.grid, v, s, z, y, x);
                const double d = sqrt(d2);
                own.sum = own.weight * d;
                own.near = (float)d <= within ? own.weight : 0.0;
                own.most = own.any = (unsigned long long)__double_as_longlong(d2);
                element[at] = own.any;
            }
        }
        own = over_block<THREADS>(own, room);
        if (threadIdx.x == 0) {
            j.part[list * ((j.grid + THREADS - 1) / THREADS) + tile] = own;
        }
    }
}

/* ---- summaries ------------------------------------------------------------------------------- */

struct surface_room {
    surface_part part[SELECTORS / SS_WARP];
    unsigned long long integer[256]; /* weight of each code */
    unsigned long long weight[BINS];
    uint32_t count[BINS];
    unsigned long long scan[SELECTORS / SS_WARP];
    int32_t most[SELECTORS / SS_WARP];
    unsigned long long chosen[3]; /* count and weight before a bin, count in it */
};

/* Weights as integers: times the power of two that makes the largest as long as `precision`. */
SS_DEVICE void weights_as_integers(const surface_job &j, surface_room *r) {
    const uint32_t t = threadIdx.x;
    double w = t > 0 && t + 1 < 1u << j.corners ? j.areas[t] : 0.0;
    w = w > 0.0 && w < 1e300 ? w : 0.0;
    surface_part own = {};
    own.most = (unsigned long long)__double_as_longlong(w);
    own = over_block<SELECTORS>(own, r->part);
    long long exponent = 1023 + j.precision - 1 - ((long long)(own.most >> 52) - 1023);
    exponent = exponent > 2046 ? 2046 : exponent;
    if (t < 256) {
        r->integer[t] = (unsigned long long)(w * __longlong_as_double(exponent << 52) + 0.5);
    }
    __syncthreads();
}

/* Adds a warp's elements to their bins; those of its first one's bin together. */
SS_DEVICE void tally(surface_room *r, bool in, uint32_t bin, bool weighted, unsigned long long w) {
    const uint32_t active = __ballot_sync(SS_ALL_LANES, in);
    if (!active) {
        return;
    }
    const uint32_t lead = __shfl_sync(SS_ALL_LANES, bin, __ffs((int)active) - 1);
    const bool led = in && bin == lead;
    const uint32_t same = __ballot_sync(SS_ALL_LANES, led);
    const unsigned long long sum = weighted ? ss_warp_sum(led ? w : 0ull) : 0;
    if (threadIdx.x % SS_WARP == 0) {
        atomicAdd(&r->count[lead], (uint32_t)__popc(same));
        if (weighted) {
            atomicAdd(&r->weight[lead], sum);
        }
    }
    if (in && !led) {
        atomicAdd(&r->count[bin], 1u);
        if (weighted) {
            atomicAdd(&r->weight[bin], w);
        }
    }
}

/* What a selection knows: it looks for the element of rank `rank`, or the first one at which the
 * share of weight reaches `share`. */
struct surface_goal {
    bool weighted;
    int32_t from, to; /* lists of the pair */
    int64_t rank;
    double share;
    unsigned long long prefix, before, inside, lighter, weight;
};

/* Histogram of the `width` bits from `shift` on over elements that begin with the prefix. */
SS_DEVICE void count_bins(const surface_job &j, int64_t list, surface_room *r,
                          const surface_goal &goal, int shift, int width) {
    for (int64_t l = list + goal.from; l < list + goal.to; ++l) {
        const unsigned long long *element = j.element + l * j.grid;
        const int64_t n = j.total[l];
        for (int64_t i = 0; i < n; i += SELECTORS * 4) {
            unsigned long long key[4];
            for (int u = 0; u < 4; ++u) {
                const int64_t at = i + u * SELECTORS + threadIdx.x;
                key[u] = at < n ? element[at] : ~0ull; /* no distance: its sign is set */
            }
            for (int u = 0; u < 4; ++u) {
                const int64_t at = i + u * SELECTORS + threadIdx.x;
                const bool in = key[u] >> (shift + width) == goal.prefix;
                const uint32_t bin = (uint32_t)(key[u] >> shift) & ((1u << width) - 1);
                const unsigned long long w =
                    goal.weighted && in ? r->integer[j.code[l * j.grid + at]] : 0;
                tally(r, in, bin, goal.weighted, w);
            }
        }
    }
}

/* Finds the bin of the goal: the first that reaches it, or else the last one with elements. */
SS_DEVICE uint32_t choose_bin(surface_room *r, surface_goal *goal, bool whole) {
    enum { EACH = BINS / SELECTORS };
    const int32_t first = (int32_t)threadIdx.x * EACH;
    unsigned long long n = 0, w = 0, all = 0;
    for (int k = 0; k < EACH; ++k) {
        n += r->count[first + k];
        w += r->weight[first + k];
    }
    n = goal->before + ss_block_scan<SELECTORS>(n, r->scan, &all);
    w = goal->lighter + ss_block_scan<SELECTORS>(w, r->scan, &all);
    goal->weight = whole ? all : goal->weight;
    int32_t found = -1;
    for (int k = 0; k < EACH; ++k) {
        n += r->count[first + k];
        w += r->weight[first + k];
        const bool reached = goal->weighted ? (double)w / (double)goal->weight >= goal->share
                                            : (int64_t)n > goal->rank;
        if (r->count[first + k] && found < BINS) {
            found = reached ? 2 * BINS - first - k : first + k;
        }
    }
    found = ss_block_max<SELECTORS>(found, r->most);
    const int32_t bin = found > BINS ? 2 * BINS - found : found;
    if (bin / EACH == (int32_t)threadIdx.x) { /* n and w are those behind its last bin */
        for (int k = EACH - 1; k >= bin % EACH; --k) {
            n -= r->count[first + k];
            w -= r->weight[first + k];
        }
        r->chosen[0] = n;
        r->chosen[1] = w;
        r->chosen[2] = r->count[bin];
    }
    __syncthreads();
    goal->before = r->chosen[0];
    goal->lighter = r->chosen[1];
    goal->inside = r->chosen[2];
    return (uint32_t)bin;
}

/* The bits of the goal's squared distance; bits that no distance has (`any`) cost no pass. */
SS_DEVICE unsigned long long chosen_square(const surface_job &j, int64_t list, surface_room *r,
                                           surface_goal *goal, unsigned long long any) {
    bool whole = true;
    for (int shift = 52, width = 11; shift >= 0;) {
        uint32_t bin = 0;
        if (any >> shift & ((1u << width) - 1)) {
            for (int32_t i = (int32_t)threadIdx.x; i < BINS; i += SELECTORS) {
                r->count[i] = 0;
                r->weight[i] = 0;
            }
            __syncthreads();
            count_bins(j, list, r, *goal, shift, width);
            __syncthreads();
            bin = choose_bin(r, goal, whole);
            __syncthreads();
            whole = false;
        }
        goal->prefix = goal->prefix << width | bin;
        width = shift > 0 && shift < 11 ? shift : 11;
        shift = shift > 0 ? (shift < 11 ? 0 : shift - 11) : -1;
    }
    return goal->prefix;
}

/* Bits of the smallest squared distance above `key`, or the key itself. */
SS_DEVICE unsigned long long next_square(const surface_job &j, int64_t list, surface_room *r,
                                         const surface_goal &goal, unsigned long long key) {
    surface_part own = {}; /* most: of the complements */
    for (int64_t l = list + goal.from; l < list + goal.to; ++l) {
        for (int64_t i = threadIdx.x; i < j.total[l]; i += SELECTORS) {
            const unsigned long long other = j.element[l * j.grid + i];
            own.most = other > key && ~other > own.most ? ~other : own.most;
        }
    }
    own = over_block<SELECTORS>(own, r->part);
    return own.most ? ~own.most : key;
}

SS_DEVICE double percentile_of(const surface_job &j, int64_t list, surface_room *r, int32_t from,
                               int32_t to, unsigned long long any) {
    surface_goal goal = {};
    goal.weighted = j.corners > 0;
    goal.from = from;
    goal.to = to;
    goal.share = j.percentile / 100.0;
    int64_t n = 0;
    for (int64_t l = list + from; l < list + to; ++l) {
        n += j.total[l];
    }
    const double rank = (double)(n - 1) * goal.share;
    goal.rank = (int64_t)rank;
    goal.inside = (unsigned long long)n;
    const unsigned long long key = chosen_square(j, list, r, &goal, any);
    const double here = sqrt(__longlong_as_double((long long)key));
    const int64_t equal = (int64_t)(goal.before + goal.inside); /* those up to this distance */
    if (goal.weighted || goal.rank + 1 < equal || equal == n) {
        return here;
    }
    const double next = sqrt(__longlong_as_double((long long)next_square(j, list, r, goal, key)));
    const double t = rank - (double)goal.rank;
    return t < 0.5 ? here + (next - here) * t : next - (next - here) * (1.0 - t);
}

/* Three blocks per pair: a, g, and both. */
SS_KERNEL void k_surface_summary(surface_job j) {
    SS_SHARED surface_room r;
    const int64_t list = blockIdx.x / 3 * 2;
    const int32_t target = (int32_t)(blockIdx.x % 3);
    const surface_view v = view_of(j, list);
    double *out = j.stats + (v.n * j.classes + v.c) * COLUMNS;
    const bool weighted = j.corners > 0, measured = both(j, list);
    unsigned long long any = 0;
    for (int32_t side = 0; side < 2; ++side) {
        const int64_t n = j.total[list + side];
        const surface_part *part = j.part + (list + side) * ((j.grid + THREADS - 1) / THREADS);
        surface_part all = {};
        for (int64_t i = threadIdx.x; i * THREADS < n; i += SELECTORS) {
            all = joined(all, part[i]);
        }
        all = over_block<SELECTORS>(all, r.part);
        any |= all.any;
        if (side == target && threadIdx.x == 0) {
            const double total = weighted ? all.weight : (double)n;
            out[side] = total;
            if (measured) {
                out[2 + side] = all.sum / total;
                out[4 + side] = sqrt(__longlong_as_double((long long)all.most));
                out[9 + side] = all.near;
            }
        }
    }
    if (!measured) {
        return;
    }
    if (weighted) {
        weights_as_integers(j, &r);
    }
    double value = 0.0;
    for (int32_t k = 0; k < (weighted && target == 2 ? 2 : 1); ++k) {
        const int32_t from = target == 2 ? k : target;
        const int32_t to = target == 2 && !weighted ? 2 : from + 1;
        const double one = percentile_of(j, list, &r, from, to, any);
        value = one > value ? one : value;
    }
    if (threadIdx.x == 0) {
        out[6 + target] = value;
    }
}

/* ---- host ------------------------------------------------------------------------------------ */

static void shape_of(const ss_surface_metrics_args *a, surface_job *j) {
    const int64_t *s = a->y.shape;
    j->n = s[0];
    j->voxels = s[1] * s[2] * s[3];
    j->chunks = (j->voxels + CHUNK - 1) / CHUNK;
    j->classes = a->num_classes;
    j->first = a->first;
    j->wanted = a->first < a->num_classes ? a->num_classes - a->first : 0;
    j->dims = (int32_t)a->dims;
    j->corners = !a->areas.data ? 0 : (a->dims == 3 ? 8 : 4);
    j->grid = 1;
    int64_t plane = 1;
    for (int k = 0; k < 3; ++k) {
        j->size[k] = s[k + 1];
        const int64_t side = s[k + 1] + (j->corners && (k > 0 || a->dims == 3));
        j->grid *= side;
        plane *= k > 0 ? side : 1;
    }
    j->words = (j->grid / plane + 31) / 32 * plane;
    j->tiles = (j->words + THREADS - 1) / THREADS;
    j->precision = 62;
    for (int64_t most = 1; most < j->grid; most *= 2) {
        --j->precision;
    }
    j->spacings = (int32_t)a->spacing.n;
    j->tolerances = (int32_t)a->tolerance.n;
}

static void layout(ss_carve *w, surface_job *j) {
    j->numbers = ss_take<double>(w, (int64_t)j->spacings + j->tolerances);
    j->label[0] = ss_take<uint16_t>(w, j->n * j->voxels);
    j->label[1] = ss_take<uint16_t>(w, j->n * j->voxels);
    j->box = ss_take<int32_t>(w, j->n * j->classes * 6);
    const int64_t parts = (j->grid + THREADS - 1) / THREADS;
    const int64_t each = 2 * (j->grid * (j->corners ? 13 : 12) + j->words * 4 + j->tiles * 4 +
                              parts * (int64_t)sizeof(surface_part));
    j->pairs = ROOM / each > 1 ? ROOM / each : 1;
    j->pairs = j->pairs < j->n * j->wanted ? j->pairs : j->n * j->wanted;
    const int64_t lists = 2 * j->pairs;
    j->bits = ss_take<uint32_t>(w, lists * j->words);
    j->count = ss_take<int32_t>(w, lists * j->tiles);
    j->total = ss_take<int32_t>(w, lists);
    j->element = ss_take<unsigned long long>(w, lists * j->grid);
    j->flat = ss_take<uint32_t>(w, lists * j->grid);
    j->code = ss_take<uint8_t>(w, j->corners ? lists * j->grid : 0);
    j->part = ss_take<surface_part>(w, lists * parts);
}

int64_t SS_CUDA_WORKSPACE(surface_metrics)(const ss_surface_metrics_args *a) {
    ss_carve w = {};
    surface_job j = {};
    shape_of(a, &j);
    layout(&w, &j);
    return ss_carved(&w);
}

static ss_status check_numbers(ss_exec *x, const ss_surface_metrics_args *a) {
    const ss_doubles s = a->spacing, t = a->tolerance;
    const int64_t *size = a->y.shape;
    if (s.n != 3 && s.n != 3 * size[0]) {
        return ss_cuda_fail(x, SS_INVALID,
                            "spacing: expected 3 numbers, or 3 per case (%lld), got %lld",
                            (long long)(3 * size[0]), (long long)s.n);
    }
    for (int64_t i = 0; i < s.n; ++i) {
        if (!(s.at[i] >= 1e-100 && s.at[i] <= 1e100)) {
            return ss_cuda_fail(x, SS_INVALID, "spacing: expected positive finite numbers, got %g",
                                s.at[i]);
        }
    }
    if (t.n != 0 && t.n != a->num_classes) {
        return ss_cuda_fail(x, SS_INVALID,
                            "tolerance: expected one number per class (%lld), got %lld",
                            (long long)a->num_classes, (long long)t.n);
    }
    for (int64_t i = 0; i < t.n; ++i) {
        if (!(t.at[i] >= 0.0 && t.at[i] <= 1e300)) {
            return ss_cuda_fail(x, SS_INVALID, "tolerance: expected finite numbers >= 0, got %g",
                                t.at[i]);
        }
    }
    if (a->dims == 2 && size[1] != 1) {
        return ss_cuda_fail(x, SS_INVALID, "y: expected D = 1 for dims = 2, got %lld",
                            (long long)size[1]);
    }
    if (size[1] > SIDE || size[2] > SIDE || size[3] >= INT32_MAX ||
        (size[1] + 1) * (size[2] + 1) > INT32_MAX / (size[3] + 1)) {
        return ss_cuda_fail(x, SS_INVALID,
                            "y: expected D and H up to %d and fewer than 2^31 voxels, got %lld x "
                            "%lld x %lld",
                            SIDE, (long long)size[1], (long long)size[2], (long long)size[3]);
    }
    return SS_OK;
}

/* Copies numbers of the host to the device, as arguments: nothing has to outlive the call. */
static ss_status send(ss_exec *x, ss_doubles from, double *to) {
    for (int64_t i = 0; i < from.n; i += NUMBERS) {
        surface_numbers part = {};
        const int64_t n = from.n - i < NUMBERS ? from.n - i : NUMBERS;
        memcpy(part.v, from.at + i, (size_t)n * sizeof(double));
        SS_TRY(SS_LAUNCH(x, 1, THREADS, 0, (k_surface_numbers), part, n, to + i));
    }
    return SS_OK;
}

/* All pairs of a group. */
static ss_status measure(ss_exec *x, surface_job j) {
    const int64_t lists = 2 * j.pairs, tiles = (j.grid + THREADS - 1) / THREADS;
    j.blocks = LAUNCHED / lists > 64 ? LAUNCHED / lists : 64;
    j.blocks = j.blocks < tiles ? j.blocks : tiles;
    const unsigned all = ss_blocks(lists * j.blocks, 1);
    SS_TRY(SS_LAUNCH(x, all, THREADS, 0, (k_surface_bits), j));
    SS_TRY(SS_LAUNCH(x, ss_blocks(lists, 1), THREADS, 0, (k_surface_scan), j));
    SS_TRY(SS_LAUNCH(x, all, THREADS, 0, (k_surface_columns), j));
    SS_TRY(SS_LAUNCH(x, all, THREADS, 0, (k_surface_flat), j));
    SS_TRY(SS_LAUNCH(x, all, THREADS, 0, (k_surface_list), j));
    SS_TRY(SS_LAUNCH(x, all, THREADS, 0, (k_surface_search), j));
    return SS_LAUNCH(x, ss_blocks(3 * j.pairs, 1), SELECTORS, 0, (k_surface_summary), j);
}

ss_status SS_CUDA(surface_metrics)(ss_exec *x, const ss_surface_metrics_args *a) {
    SS_TRY(check_numbers(x, a));
    surface_job j = {};
    shape_of(a, &j);
    ss_carve w = ss_carve_of(x);
    layout(&w, &j);
    j.maps = ss_label_maps_of(&a->y_pred, &a->y, a->num_classes, a->has_ignore, a->ignore_index);
    j.percentile = a->percentile;
    j.areas = (const double *)a->areas.data;
    j.stats = (double *)a->stats.data;
    j.faults = SS_FAULTS_OF(x, surface_metrics);
    SS_TRY(send(x, a->spacing, j.numbers));
    SS_TRY(send(x, a->tolerance, j.numbers + j.spacings));
    const int64_t stats = j.n * j.classes * COLUMNS;
    SS_TRY(
        SS_LAUNCH(x, ss_blocks(stats, THREADS), THREADS, 0, (k_surface_nothing), j.stats, stats));
    SS_TRY(ss_cuda_zero(x, j.box, j.n * j.classes * 6 * (int64_t)sizeof *j.box));
    const size_t shared = j.classes <= BOXES ? (size_t)(6 * j.classes) * sizeof(int32_t) : 0;
    SS_TRY(SS_LAUNCH(x, ss_blocks(j.n * j.chunks, 1), THREADS, shared, (k_surface_labels), j));
    const int64_t most = j.pairs;
    for (int64_t from = 0; from < j.n * j.wanted; from += most) {
        j.pair = from;
        j.pairs = j.n * j.wanted - from < most ? j.n * j.wanted - from : most;
        SS_TRY(measure(x, j));
    }
    return SS_OK;
}
