/* SPDX-License-Identifier: Apache-2.0
 *
 * random_walker.c: foreground probability x of every voxel, given seeds and an optional prior pi.
 *
 *     (L + gamma I) x = gamma pi on free voxels, x = 1 and 0 on seeds; L the Laplacian of the grid
 *     w_ij = (exp(-beta (I_i - I_j)^2) + 1e-5) / (h_axis / h_min)^2 between face neighbours
 *
 * Conjugate gradients with the Jacobi preconditioner D, from x = x0 = pi or 1/2 (e = x - x0). They
 * stop when sqrt(r' D^-1 r / c' D^-1 c) <= tol, where c = A 1 (gamma and the weights to seeds) is
 * the right side whose solution is 1 everywhere: never 0, and the same when foreground and
 * background change places. r is kept as z = D^-1 r only.
 *
 * Only free voxels are stored: tiles of 8 neighbours along x that have one, in C order, each with
 * the numbers of its four neighbours across; what is missing is tile 0, which is all zeros. Weights
 * between a free voxel and a seed are in c, so that they are 0 here. (Tiles of 16 hold 1.7 to 2
 * times the free voxels of an organ's band, tiles of 8 only 1.4: less to move at any size.)
 *
 * Memory: per stored voxel 40 bytes of state and 2 of tile numbers. Per iteration one sweep
 * (p = z + b p, e = e + a p, q = A p, p'q: 40 bytes) and one more (z = z - a D^-1 q, z'Dz: 16).
 * Numerics: float vectors; sums in 8 float lanes over 128 tiles, then double in block order: equal
 * bits for every thread count and instruction set. A p is c p + sum of w (p_i - p_j): islands that
 * hang on weights of 1e-5 would drown in the rounding of D p - W p. x is clipped to 0..1, where the
 * exact x lies. NaN in the image or prior next to a free voxel makes all free voxels of that
 * problem NaN.
 */
#include "lanes.h"

#include <stdatomic.h>

#define TILE 8 /* voxels */
#define BLOCK_TILES (SS_BLOCK / TILE)
#define ARRAYS 10
#define LINES 18
#define GRAIN 32768 /* stored voxels that are worth a thread: 30 us a sweep, against a barrier */
#define FLOOR 1e-5f

/* What a row of seeds holds: the free voxels lie in first..last. */
typedef struct extent {
    int64_t first;
    int64_t last; /* < first: none */
    int32_t seeded;
    int32_t bad;
} extent;

typedef struct job {
    const ss_random_walker_args *a;
    extent *rows; /* of all problems */
    int32_t *status;
    float axis[3];
} job;

typedef struct walk {
    const job *job;
    int64_t n; /* problem */
    int64_t D, H, W;
    int64_t x0;      /* where tiles begin */
    int64_t columns; /* tiles per row */
    int64_t tiles;
    int64_t pitch;   /* of a line buffer */
    int32_t *map;    /* row, column -> tile, 0 if not stored */
    int32_t *beside; /* tile -> tiles at y - 1, y + 1, z - 1, z + 1 */
    float *c, *d, *wx, *wy, *wz, *z, *q, *e, *p[2];
    double *row_sum; /* of c^2 / D over a row */
    double *part[2]; /* of a block */
    float *lines;
    double alpha; /* of the last sweep: e is behind by alpha p */
    int32_t latest;
    atomic_int bad_prior;
} walk;

/* ---- where the free voxels are -------------------------------------------------------------- */

static void scan_rows(void *ctx, int64_t begin, int64_t end, int32_t thread) {
    const job *j = ctx;
    const int64_t W = j->a->seeds.shape[3];
    (void)thread;
    for (int64_t row = begin; row < end; ++row) {
        const uint8_t *restrict u = (const uint8_t *)j->a->seeds.data + row * W;
        uint8_t least = 255, most = 0; /* -1 as i8 is 255 here */
        for (int64_t x = 0; x < W; ++x) {
            least = least < u[x] ? least : u[x];
            most = most > u[x] ? most : u[x];
        }
        extent v = {0, -1, most > 0, most > 2};
        if (least == 0) {
            v.last = W - 1;
            while (u[v.first] != 0) {
                ++v.first;
            }
            while (u[v.last] != 0) {
                --v.last;
            }
        }
        j->rows[row] = v;
    }
}

static const uint8_t *seeds_of(const walk *k) {
    return (const uint8_t *)k->job->a->seeds.data + k->n * k->D * k->H * k->W;
}

/* Numbers the tiles in C order, beginning with 1. */
static void number_tiles(walk *k) {
    const uint8_t *seeds = seeds_of(k);
    const extent *rows = k->job->rows + k->n * k->D * k->H;
    int32_t next = 1;
    memset(k->map, 0, (size_t)(k->D * k->H * k->columns) * sizeof(int32_t));
    for (int64_t row = 0; row < k->D * k->H; ++row) {
        const uint8_t *u = seeds + row * k->W;
        for (int64_t x = rows[row].first; x <= rows[row].last; ++x) {
            if (u[x] == 0) {
                int64_t column = (x - k->x0) / TILE;
                k->map[row * k->columns + column] = next++;
                x = k->x0 + (column + 1) * TILE - 1; /* on to the next tile */
            }
        }
    }
    k->tiles = next - 1;
}

static void note_neighbours(walk *k) {
    const int64_t wide = k->H * k->columns;
    for (int64_t z = 0; z < k->D; ++z) {
        for (int64_t y = 0; y < k->H; ++y) {
            const int32_t *map = k->map + (z * k->H + y) * k->columns;
            for (int64_t c = 0; c < k->columns; ++c) {
                int32_t *b = k->beside + 4 * (int64_t)map[c];
                if (map[c]) {
                    b[0] = y > 0 ? map[c - k->columns] : 0;
                    b[1] = y + 1 < k->H ? map[c + k->columns] : 0;
                    b[2] = z > 0 ? map[c - wide] : 0;
                    b[3] = z + 1 < k->D ? map[c + wide] : 0;
                }
            }
        }
    }
}

static double fold_lanes(const float *lane, int32_t lanes) {
    double sum = 0.0;
    for (int32_t l = 0; l < lanes; ++l) {
        sum += (double)lane[l];
    }
    return sum;
}

/* ---- the system: a row at a time, then packed into tiles ------------------------------------ */

/* The part of a row that is being looked at: voxel x is at x - begin + 1. What lies beyond the
 * row's ends is anything at all, except in `free`. */
typedef struct line {
    const float *image;
    float *value; /* x0 of the header: 1 and 0 on seeds */
    float *free;  /* 1 and 0 */
} line;

typedef struct span {
    int64_t begin; /* where the row's first tile begins */
    int64_t n;     /* voxels to work on: whole tiles, a multiple of SS_LANES */
} span;

/* The equations of a span's voxels, without a margin. */
typedef struct equations {
    float *diagonal;
    float *residual; /* of x0, then z */
    float *source;   /* c of the header */
    float *edge;     /* weight of the edge before a voxel */
    float *weight[3];
    float *unused;
} equations;

/* m floats from element `at` on, which may reach over the ends of the tensor. */
static const float *window_f32(const ss_tensor *t, int64_t at, int64_t m, float *buffer) {
    const int64_t total = ss_count(t);
    if (at >= 0 && at + m <= total) {
        return ss_load_f32(t, at, m, buffer);
    }
    const int64_t lo = at < 0 ? -at : 0;
    const int64_t hi = at + m > total ? total - at : m;
    memset(buffer, 0, (size_t)m * sizeof(float));
    const float *inside = ss_load_f32(t, at + lo, hi - lo, buffer + lo);
    if (inside != buffer + lo) {
        memcpy(buffer + lo, inside, (size_t)(hi - lo) * sizeof(float));
    }
    return buffer;
}

static const uint8_t *window_u8(const ss_tensor *t, int64_t at, int64_t m, uint8_t *buffer) {
    const int64_t total = ss_count(t);
    const uint8_t *u = t->data;
    if (at >= 0 && at + m <= total) {
        return u + at;
    }
    const int64_t lo = at < 0 ? -at : 0;
    const int64_t hi = at + m > total ? total - at : m;
    memset(buffer, 0, (size_t)m);
    memcpy(buffer + lo, u + at + lo, (size_t)(hi - lo));
    return buffer;
}

/* Fills three line buffers from `room` on with a row's span and a margin; uses two more. */
static line load_line(walk *k, int64_t row, span of, float *room) {
    const ss_random_walker_args *a = k->job->a;
    const int64_t m = of.n + SS_LANES;
    const int64_t volume = k->D * k->H * k->W;
    const int64_t at = row * k->W + of.begin - 1;
    float *restrict value = room + k->pitch;
    float *restrict free = room + 2 * k->pitch;
    uint8_t *bytes = (uint8_t *)(room + 4 * k->pitch);
    line l = {window_f32(&a->image, k->n / a->classes * volume + at, m, room), value, free};
    const uint8_t *restrict u = window_u8(&a->seeds, k->n * volume + at, m, bytes);
    if (a->prior.data) {
        const float *restrict p = window_f32(&a->prior, k->n * volume + at, m, room + 3 * k->pitch);
        SS_SIMD
        for (int64_t i = 0; i < m; ++i) {
            /* Bits, since SSE2 has no select and gcc would branch around the load. */
            uint32_t take = u[i] == 0 ? UINT32_MAX : 0;
            float seed = u[i] == 1 ? 1.0f : 0.0f;
            value[i] = ss_bits_f32((ss_f32_bits(p[i]) & take) | ss_f32_bits(seed));
            free[i] = u[i] == 0 ? 1.0f : 0.0f;
        }
    } else {
        SS_SIMD
        for (int64_t i = 0; i < m; ++i) {
            float seed = u[i] == 1 ? 1.0f : 0.0f;
            value[i] = u[i] == 0 ? 0.5f : seed;
            free[i] = u[i] == 0 ? 1.0f : 0.0f;
        }
    }
    if (of.begin == 0) {
        free[0] = 0.0f;
    }
    for (int64_t i = k->W - of.begin + 1; i < m; ++i) {
        free[i] = 0.0f;
    }
    return l;
}

/* Adds the edges between two rows a and b to the equations of a; weights of free pairs. */
static void add_edges(const walk *k, int32_t axis, int64_t n, line a, line b, equations of,
                      float *restrict weight) {
    const float beta = (float)k->job->a->beta;
    const float scale = k->job->axis[axis];
    const float *restrict ia = a.image + 1, *restrict ib = b.image + 1;
    const float *restrict va = a.value + 1, *restrict vb = b.value + 1;
    const float *restrict fa = a.free + 1, *restrict fb = b.free + 1;
    float *restrict diagonal = of.diagonal, *restrict residual = of.residual;
    float *restrict source = of.source;
    SS_SIMD
    for (int64_t i = 0; i < n; ++i) {
        float step = ia[i] - ib[i];
        float w = (ss_expf(-beta * (step * step)) + FLOOR) * scale;
        diagonal[i] += w;
        residual[i] += w * (vb[i] - va[i]);
        source[i] += fb[i] > 0.0f ? 0.0f : w;
        weight[i] = fa[i] * fb[i] > 0.0f ? w : 0.0f;
    }
}

/* Begins the equations with gamma and the edges along the row, each computed once. */
static void begin_row(const walk *k, span s, line a, equations of) {
    const float beta = (float)k->job->a->beta, gamma = (float)k->job->a->gamma;
    const float scale = k->job->axis[2];
    const float *restrict image = a.image;
    const float *restrict v = a.value + 1;
    const float *restrict f = a.free + 1;
    float *restrict edge = of.edge, *restrict weight = of.weight[0];
    float *restrict diagonal = of.diagonal, *restrict residual = of.residual;
    float *restrict source = of.source;
    SS_SIMD
    for (int64_t i = 0; i < s.n; ++i) {
        float step = image[i] - image[i + 1];
        edge[i] = (ss_expf(-beta * (step * step)) + FLOOR) * scale;
    }
    float step = image[s.n] - image[s.n + 1];
    edge[s.n] = (ss_expf(-beta * (step * step)) + FLOOR) * scale;
    if (s.begin == 0) {
        edge[0] = 0.0f;
    }
    if (k->W - s.begin <= s.n) {
        edge[k->W - s.begin] = 0.0f;
    }
    SS_SIMD
    for (int64_t i = 0; i < s.n; ++i) {
        float before = f[i - 1] > 0.0f ? 0.0f : edge[i];
        float after = f[i + 1] > 0.0f ? 0.0f : edge[i + 1];
        weight[i] = f[i] * f[i + 1] > 0.0f ? edge[i + 1] : 0.0f;
        diagonal[i] = gamma + edge[i] + edge[i + 1];
        residual[i] = edge[i] * (v[i - 1] - v[i]) + edge[i + 1] * (v[i + 1] - v[i]);
        source[i] = gamma + before + after;
    }
}

/* Turns the residual into z, with 0 = 0 on seeds; returns c' D^-1 c of the row. */
static double end_row(walk *k, int64_t n, line a, equations of) {
    float *restrict diagonal = of.diagonal, *restrict residual = of.residual;
    float *restrict source = of.source;
    const float *restrict f = a.free + 1;
    const float *restrict v = a.value + 1;
    float lane[SS_LANES] = {0};
    int32_t bad = 0;
    for (int64_t at = 0; at < n; at += SS_LANES) {
        SS_SIMD
        for (int64_t l = 0; l < SS_LANES; ++l) {
            const int64_t i = at + l;
            float d = f[i] > 0.0f ? diagonal[i] : 1.0f;
            float c = f[i] > 0.0f ? source[i] : 0.0f;
            diagonal[i] = d;
            residual[i] = f[i] > 0.0f ? residual[i] / d : 0.0f;
            source[i] = c;
            lane[l] += c * c / d;
        }
    }
    for (int64_t i = 0; i < n; ++i) {
        bad |= (f[i] > 0.0f) & ((v[i] < 0.0f) | (v[i] > 1.0f));
    }
    if (bad) {
        atomic_store_explicit(&k->bad_prior, 1, memory_order_relaxed);
    }
    return fold_lanes(lane, SS_LANES);
}

static void pack_row(const walk *k, int64_t row, span s, equations of) {
    const size_t bytes = TILE * sizeof(float);
    const int64_t first = (s.begin - k->x0) / TILE;
    for (int64_t column = first; column < first + s.n / TILE && column < k->columns; ++column) {
        const int64_t i = (int64_t)k->map[row * k->columns + column] * TILE;
        const int64_t from = (column - first) * TILE;
        if (i) {
            memcpy(k->c + i, of.source + from, bytes);
            memcpy(k->d + i, of.diagonal + from, bytes);
            memcpy(k->z + i, of.residual + from, bytes);
            memcpy(k->wx + i, of.weight[0] + from, bytes);
            memcpy(k->wy + i, of.weight[1] + from, bytes);
            memcpy(k->wz + i, of.weight[2] + from, bytes);
            memset(k->q + i, 0, bytes);
            memset(k->e + i, 0, bytes);
            memset(k->p[0] + i, 0, bytes);
        }
    }
}

static void build_row(walk *k, int64_t row, float *lines) {
    const extent x = k->job->rows[k->n * k->D * k->H + row];
    const int64_t z = row / k->H, y = row % k->H, pitch = k->pitch;
    const int64_t begin = x.first - (x.first - k->x0) % TILE;
    const span s = {begin, (x.last - begin) / SS_LANES * SS_LANES + SS_LANES};
    float *own = lines + 10 * pitch;
    equations of = {own,
                    own + pitch,
                    own + 2 * pitch,
                    own + 3 * pitch,
                    {own + 4 * pitch, own + 5 * pitch, own + 6 * pitch},
                    own + 7 * pitch};
    const line here = load_line(k, row, s, lines);
    begin_row(k, s, here, of);
    memset(of.weight[1], 0, (size_t)s.n * sizeof(float));
    memset(of.weight[2], 0, (size_t)s.n * sizeof(float));
    const struct {
        int32_t there, axis;
        int64_t row;
        float *weight;
    } across[4] = {{y > 0, 1, row - 1, of.unused},
                   {y + 1 < k->H, 1, row + 1, of.weight[1]},
                   {z > 0, 0, row - k->H, of.unused},
                   {z + 1 < k->D, 0, row + k->H, of.weight[2]}};
    for (int32_t i = 0; i < 4; ++i) {
        if (across[i].there) {
            const line there = load_line(k, across[i].row, s, lines + 5 * pitch);
            add_edges(k, across[i].axis, s.n, here, there, of, across[i].weight);
        }
    }
    k->row_sum[row] = end_row(k, s.n, here, of);
    pack_row(k, row, s, of);
}

/* ---- sweeps over blocks of tiles ------------------------------------------------------------ */

static void tile_range(const walk *k, int64_t block, int64_t *begin, int64_t *end) {
    *begin = 1 + block * BLOCK_TILES;
    *end = *begin + BLOCK_TILES < k->tiles + 1 ? *begin + BLOCK_TILES : k->tiles + 1;
}

/* p = z + beta p_old, e = e + alpha p_old, q = A p; returns p'q. Neighbours' new p is computed
 * here again: it is not known whether they have been done, and arithmetic costs nothing here. */
static double multiply_block(const walk *k, int64_t block, const float *restrict old,
                             float *restrict new, float alpha, float beta) {
    float lane[TILE] = {0};
    int64_t begin, end;
    tile_range(k, block, &begin, &end);
    for (int64_t t = begin; t < end; ++t) {
        const int64_t i = t * TILE;
        const int32_t *b = k->beside + 4 * t;
        const int64_t y0 = (int64_t)b[0] * TILE, y1 = (int64_t)b[1] * TILE;
        const int64_t z0 = (int64_t)b[2] * TILE, z1 = (int64_t)b[3] * TILE;
        const float *restrict z = k->z, *restrict c = k->c + i;
        const float *restrict wx = k->wx + i, *restrict wy = k->wy, *restrict wz = k->wz;
        float *restrict e = k->e + i, *restrict q = k->q + i, *restrict p = new + i;
        SS_SIMD
        for (int32_t l = 0; l < TILE; ++l) {
            float mid = z[i + l] + beta * old[i + l];
            float left = mid - (z[i + l - 1] + beta * old[i + l - 1]);
            float right = mid - (z[i + l + 1] + beta * old[i + l + 1]);
            float up = mid - (z[y0 + l] + beta * old[y0 + l]);
            float down = mid - (z[y1 + l] + beta * old[y1 + l]);
            float above = mid - (z[z0 + l] + beta * old[z0 + l]);
            float below = mid - (z[z1 + l] + beta * old[z1 + l]);
            float sum = wx[l - 1] * left + wx[l] * right;
            sum += wy[y0 + l] * up + wy[i + l] * down;
            sum += wz[z0 + l] * above + wz[i + l] * below;
            sum += c[l] * mid;
            e[l] += alpha * old[i + l];
            q[l] = sum;
            p[l] = mid;
            lane[l] += mid * sum;
        }
    }
    return fold_lanes(lane, TILE);
}

/* z = z - alpha D^-1 q; returns z'Dz. */
static double update_block(const walk *k, int64_t block, float alpha) {
    float lane[TILE] = {0};
    int64_t begin, end;
    tile_range(k, block, &begin, &end);
    for (int64_t t = begin; t < end; ++t) {
        float *restrict z = k->z + t * TILE;
        const float *restrict q = k->q + t * TILE;
        const float *restrict d = k->d + t * TILE;
        SS_SIMD
        for (int32_t l = 0; l < TILE; ++l) {
            float v = z[l] - alpha * q[l] / d[l];
            z[l] = v;
            lane[l] += v * d[l] * v;
        }
    }
    return fold_lanes(lane, TILE);
}

static double fold(const double *part, int64_t n) {
    double sum = 0.0;
    for (int64_t i = 0; i < n; ++i) {
        sum += part[i];
    }
    return sum;
}

/* ---- one problem ---------------------------------------------------------------------------- */

static void store_row(const walk *k, int64_t row, float *restrict out, float *buffer) {
    const uint8_t *restrict u = seeds_of(k) + row * k->W;
    const extent extent = k->job->rows[k->n * k->D * k->H + row];
    const ss_tensor *prior = &k->job->a->prior;
    const float *restrict p = k->p[k->latest], *restrict e = k->e;
    const float alpha = (float)k->alpha;
    SS_SIMD
    for (int64_t x = 0; x < k->W; ++x) {
        out[x] = u[x] == 1 ? 1.0f : 0.0f;
    }
    if (extent.first > extent.last) {
        return;
    }
    const float *restrict start = buffer;
    if (prior->data) {
        start = ss_load_f32(prior, (k->n * k->D * k->H + row) * k->W, k->W, buffer);
    } else {
        for (int64_t x = 0; x < k->W; ++x) {
            buffer[x] = 0.5f;
        }
    }
    for (int64_t column = 0; column < k->columns; ++column) {
        const int64_t i = (int64_t)k->map[row * k->columns + column] * TILE;
        const int64_t x0 = k->x0 + column * TILE;
        const int64_t n = i == 0 ? 0 : (k->W - x0 < TILE ? k->W - x0 : TILE);
        for (int64_t l = 0; l < n; ++l) {
            float v = start[x0 + l] + (e[i + l] + alpha * p[i + l]);
            v = v < 0.0f ? 0.0f : v;
            v = v > 1.0f ? 1.0f : v;
            out[x0 + l] = u[x0 + l] == 0 ? v : out[x0 + l];
        }
    }
}

/* Conjugate gradients from e = 0. All threads compute the same numbers from the same parts. */
static void iterate(walk *k, ss_region *region, int32_t thread) {
    const ss_random_walker_args *a = k->job->a;
    const int64_t threads = ss_region_threads(region);
    const int64_t blocks = (k->tiles + BLOCK_TILES - 1) / BLOCK_TILES;
    const int64_t begin = blocks * thread / threads, end = blocks * (thread + 1) / threads;
    const double total = fold(k->row_sum, k->D * k->H);
    const double enough = a->tol * a->tol * total;
    double rr = fold(k->part[0], blocks), alpha = 0.0, beta = 0.0;
    int64_t done = 0;
    int32_t old = 0;
    while (done < a->max_iter && rr > enough) { /* false for NaN */
        for (int64_t b = begin; b < end; ++b) {
            k->part[1][b] =
                multiply_block(k, b, k->p[old], k->p[1 - old], (float)alpha, (float)beta);
        }
        ss_barrier(region);
        const double curvature = fold(k->part[1], blocks);
        old = 1 - old;
        if (!(curvature > 0.0)) {
            rr = curvature == curvature ? rr : curvature;
            alpha = 0.0; /* p is 0 to the last bit, or something was infinite */
            break;
        }
        alpha = (double)(float)(rr / curvature);
        for (int64_t b = begin; b < end; ++b) {
            k->part[0][b] = update_block(k, b, (float)alpha);
        }
        ss_barrier(region);
        const double next = fold(k->part[0], blocks);
        beta = next / rr;
        rr = next;
        ++done;
    }
    if (thread == 0) {
        k->alpha = rr == rr ? alpha : rr; /* NaN everywhere rather than a guess */
        k->latest = old;
        ((int64_t *)a->iterations.data)[k->n] = done;
        ((double *)a->residual.data)[k->n] = total > 0.0 ? sqrt(rr / total) : sqrt(total);
    }
    ss_barrier(region);
}

static void solve(void *ctx, ss_region *region, int32_t thread) {
    walk *k = ctx;
    const int64_t threads = ss_region_threads(region);
    const int64_t rows = k->D * k->H;
    const int64_t row0 = rows * thread / threads, row1 = rows * (thread + 1) / threads;
    const int64_t blocks = (k->tiles + BLOCK_TILES - 1) / BLOCK_TILES;
    const extent *extents = k->job->rows + k->n * rows;
    float *lines = k->lines + thread * LINES * k->pitch;
    for (int64_t row = row0; row < row1; ++row) {
        k->row_sum[row] = 0.0;
        if (extents[row].first <= extents[row].last) {
            build_row(k, row, lines);
        }
    }
    ss_barrier(region);
    for (int64_t b = blocks * thread / threads; b < blocks * (thread + 1) / threads; ++b) {
        k->part[0][b] = update_block(k, b, 0.0f);
    }
    ss_barrier(region);
    iterate(k, region, thread);
    float *out = (float *)k->job->a->prob.data + k->n * rows * k->W;
    for (int64_t row = row0; row < row1; ++row) {
        store_row(k, row, out + row * k->W, lines);
    }
}

static void free_walk(walk *k) {
    ss_scratch_free(k->map);
    ss_scratch_free(k->beside);
    ss_scratch_free(k->c);
    ss_scratch_free(k->row_sum);
    ss_scratch_free(k->lines);
}

/* The columns that hold all free voxels of problem n. */
static void bound_columns(walk *k) {
    const extent *rows = k->job->rows + k->n * k->D * k->H;
    int64_t first = k->W, last = -1;
    for (int64_t i = 0; i < k->D * k->H; ++i) {
        if (rows[i].first <= rows[i].last) {
            first = first < rows[i].first ? first : rows[i].first;
            last = last > rows[i].last ? last : rows[i].last;
        }
    }
    k->x0 = last < 0 ? 0 : first;
    k->columns = last < 0 ? 1 : (last - first) / TILE + 1;
}

/* Vectors start 5 cache lines off a power of two, so that their sets in L1 differ. */
static int64_t vector_length(const walk *k) {
    return ((k->tiles + 2) * TILE + 1023) / 1024 * 1024 + 5 * 16;
}

static ss_status allocate(ss_exec *x, walk *k, int32_t threads) {
    const int64_t length = vector_length(k);
    const int64_t blocks = (k->tiles + BLOCK_TILES - 1) / BLOCK_TILES;
    k->pitch = k->W / SS_LANES * SS_LANES + 4 * SS_LANES;
    k->beside = ss_scratch(x, 4 * (k->tiles + 2), sizeof(int32_t));
    k->c = ss_scratch(x, ARRAYS * length, sizeof(float));
    k->row_sum = ss_scratch(x, k->D * k->H + 2 * blocks, sizeof(double));
    k->lines = ss_scratch(x, threads * LINES * k->pitch, sizeof(float));
    if (!k->beside || !k->c || !k->row_sum || !k->lines) {
        return SS_NO_MEMORY;
    }
    float **arrays[ARRAYS] = {&k->c, &k->d, &k->wx, &k->wy,   &k->wz,
                              &k->z, &k->q, &k->e,  &k->p[0], &k->p[1]};
    for (int32_t i = 0; i < ARRAYS; ++i) {
        *arrays[i] = k->c + i * length;
        memset(*arrays[i], 0, TILE * sizeof(float));
        memset(*arrays[i] + (k->tiles + 1) * TILE, 0, TILE * sizeof(float));
    }
    k->part[0] = k->row_sum + k->D * k->H;
    k->part[1] = k->part[0] + blocks;
    note_neighbours(k);
    return SS_OK;
}

static ss_status run_problem(ss_exec *x, const job *j, int64_t n, int32_t most_threads) {
    const int64_t *shape = j->a->seeds.shape;
    walk k = {.job = j, .n = n, .D = shape[1], .H = shape[2], .W = shape[3]};
    atomic_init(&k.bad_prior, 0);
    bound_columns(&k);
    ss_status status = SS_NO_MEMORY;
    k.map = ss_scratch(x, k.D * k.H * k.columns, sizeof(int32_t));
    if (k.map) {
        number_tiles(&k);
        int64_t worth = 1 + k.tiles * TILE / GRAIN;
        int32_t threads = most_threads < worth ? most_threads : (int32_t)worth;
        status = allocate(x, &k, threads);
        if (status == SS_OK) {
            ss_parallel_region(threads, solve, &k);
            status = atomic_load(&k.bad_prior) ? SS_INVALID : SS_OK;
        }
    }
    free_walk(&k);
    return status;
}

/* Whole problems, one thread each. */
static void run_problems(void *ctx, int64_t begin, int64_t end, int32_t thread) {
    const job *j = ctx;
    (void)thread;
    for (int64_t n = begin; n < end; ++n) {
        ss_exec own = ss_exec_cpu(1); /* error texts of several threads must not mix */
        j->status[n] = run_problem(&own, j, n, 1);
    }
}

/* ---- the call ------------------------------------------------------------------------------- */

static ss_status bad_prior(ss_exec *x, const job *j, int64_t n) {
    const int64_t volume = ss_count(&j->a->seeds) / j->a->seeds.shape[0];
    const uint8_t *u = (const uint8_t *)j->a->seeds.data;
    for (int64_t i = n * volume; i < (n + 1) * volume; ++i) {
        double v = ss_at(&j->a->prior, i);
        if (u[i] == 0 && ((float)v < 0.0f || (float)v > 1.0f)) {
            return ss_fail(x, SS_INVALID, "prior: expected probabilities from 0 to 1, got %g", v);
        }
    }
    return ss_fail(x, SS_FAILED, "prior: changed during the call");
}

static ss_status check_numbers(ss_exec *x, job *j) {
    const ss_random_walker_args *a = j->a;
    const int64_t n = a->seeds.shape[0], b = a->image.shape[0];
    if (a->classes > n || n / a->classes != b || n % a->classes != 0) {
        return ss_fail(x, SS_INVALID,
                       "seeds: expected %lld x %lld problems (images x classes), got %lld",
                       (long long)b, (long long)a->classes, (long long)n);
    }
    if (a->gamma > 0.0 && !a->prior.data) {
        return ss_fail(x, SS_INVALID, "gamma: expected 0 without a prior, got %g", a->gamma);
    }
    if (a->spacing.n != 0 && a->spacing.n != 3) {
        return ss_fail(x, SS_INVALID, "spacing: expected 3 numbers, got %lld",
                       (long long)a->spacing.n);
    }
    double least = INFINITY;
    for (int64_t i = 0; i < a->spacing.n; ++i) {
        double h = a->spacing.at[i];
        if (!(h > 0.0 && h < INFINITY)) {
            return ss_fail(x, SS_INVALID, "spacing: expected positive numbers, got %g", h);
        }
        least = h < least ? h : least;
    }
    for (int64_t i = 0; i < 3; ++i) {
        double ratio = a->spacing.n ? least / a->spacing.at[i] : 1.0;
        j->axis[i] = (float)(ratio * ratio);
        if (j->axis[i] < 1e-12f) {
            return ss_fail(x, SS_INVALID, "spacing: expected ratios up to 1e6, got %g",
                           1.0 / ratio);
        }
    }
    return SS_OK;
}

static ss_status check_seeds(ss_exec *x, const job *j) {
    const ss_random_walker_args *a = j->a;
    const int64_t *shape = a->seeds.shape;
    const int64_t rows = shape[1] * shape[2];
    for (int64_t n = 0; n < shape[0]; ++n) {
        int32_t seeded = 0;
        for (int64_t row = n * rows; row < (n + 1) * rows; ++row) {
            seeded |= j->rows[row].seeded;
            for (int64_t i = row * shape[3]; j->rows[row].bad; ++i) {
                double v = ss_at(&a->seeds, i);
                if (v < 0.0 || v > 2.0) {
                    return ss_fail(x, SS_INVALID,
                                   "seeds: expected 0 (free), 1 (foreground) or 2 (background), "
                                   "got %g",
                                   v);
                }
            }
        }
        if (!seeded && !(a->gamma > 0.0)) {
            return ss_fail(x, SS_INVALID,
                           "seeds: expected at least one seed per problem where gamma is 0, "
                           "got none in problem %lld",
                           (long long)n);
        }
    }
    return SS_OK;
}

static ss_status run_all(ss_exec *x, job *j) {
    const int64_t n = j->a->seeds.shape[0];
    const int32_t threads = ss_parallel_threads(x, INT64_MAX, 1);
    if (n >= threads && threads > 1) {
        ss_parallel_for(x, n, 1, run_problems, j);
    } else {
        for (int64_t i = 0; i < n; ++i) {
            j->status[i] = run_problem(x, j, i, threads);
        }
    }
    for (int64_t i = 0; i < n; ++i) {
        if (j->status[i] == SS_INVALID) {
            return bad_prior(x, j, i);
        }
        if (j->status[i] != SS_OK) {
            return ss_fail(x, j->status[i], "could not allocate scratch memory for problem %lld",
                           (long long)i);
        }
    }
    return SS_OK;
}

ss_status SS_CPU(random_walker)(ss_exec *x, const ss_random_walker_args *a) {
    const int64_t *shape = a->seeds.shape;
    const int64_t rows = shape[0] * shape[1] * shape[2];
    job j = {.a = a};
    ss_status status = check_numbers(x, &j);
    if (status != SS_OK) {
        return status;
    }
    j.rows = ss_scratch(x, rows, sizeof(extent));
    j.status = ss_scratch(x, shape[0], sizeof(int32_t));
    status = SS_NO_MEMORY;
    if (j.rows && j.status) {
        ss_parallel_for(x, rows, (1 << 17) / shape[3] + 1, scan_rows, &j);
        status = check_seeds(x, &j);
        if (status == SS_OK) {
            status = run_all(x, &j);
        }
    }
    ss_scratch_free(j.rows);
    ss_scratch_free(j.status);
    return status;
}
