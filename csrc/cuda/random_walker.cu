/* SPDX-License-Identifier: Apache-2.0
 *
 * random_walker.cu: foreground probability x of every voxel, given seeds and an optional prior pi.
 *
 *     (L + gamma I) x = gamma pi on free voxels, x = 1 and 0 on seeds; L the Laplacian of the grid
 *     w_ij = (exp(-beta (I_i - I_j)^2) + 1e-5) / (h_axis / h_min)^2 between face neighbours
 *
 * Conjugate gradients with the Jacobi preconditioner D, from x = x0 = pi or 1/2 (e = x - x0), until
 * sqrt(r' D^-1 r / c' D^-1 c) <= tol, c = A 1; r is kept as z = D^-1 r. As on the CPU (see there),
 * voxel by voxel the same expressions; only sums are folded in another order.
 *
 * Only free voxels are stored: tiles of 8 neighbours along x that have one, in C order, each with
 * the numbers of its four neighbours across; what is missing is tile 0, all zeros. Eight lanes read
 * a tile: 32 bytes, a sector. Launches: 1 memset, 4 kernels that number the tiles and set up the
 * equations, ONE for all iterations of all problems (resident.cuh: no host in the loop, no launch
 * after convergence, whatever max_iter is) and one that stores. Two barriers per iteration.
 *
 * Bytes: per stored voxel 40 of state and 2 of tile numbers; per iteration and stored voxel 40
 * + 16. Workspace for the worst case, every voxel free: 43 bytes per voxel. Numerics: float
 * vectors; sums in double over parts of PART_TILES tiles (more where there would be more than
 * PARTS), folded in order by every block, so that bits do not depend on the grid. Seeds out of
 * range count as free and priors are clipped, both counted in faults; a problem without seeds and
 * gamma = 0 has no solution: NaN. registers <= 64
 */
#include "block.cuh"
#include "resident.cuh"

#define TILE 8
#define THREADS 256
#define CELLS 4 /* per thread when numbering */
#define SOLVERS 512
#define PART_TILES (SOLVERS / TILE)
#define PARTS 2048
#define ARRAYS 10
#define FLOOR 1e-5f

enum { WALK_C, WALK_D, WALK_WX, WALK_WY, WALK_WZ, WALK_Z, WALK_Q, WALK_E, WALK_P };

typedef struct walk_state {
    int64_t tiles;
    double alpha; /* of the last sweep: e is behind by alpha p */
    int32_t latest;
    int32_t seeded;
    int32_t insoluble;
    uint32_t arrived; /* the barrier of the group of this number */
} walk_state;

typedef struct walk_task {
    const void *image, *prior;
    const uint8_t *seeds;
    int32_t image_dtype, prior_dtype;
    int64_t N, classes, D, H, W;
    int64_t columns, cells, chunks; /* a cell is where a tile may be */
    int64_t length;                 /* of a vector: of cells + 2 tiles */
    float axis[3], beta, gamma;
    double tol;
    int64_t max_iter;
    float *prob;
    int64_t *iterations;
    double *residual;
    unsigned long long *faults;
    walk_state *state;
    uint32_t *count; /* [N, chunks] tiles, then the number of the first one */
    int32_t *map;    /* [N, cells] -> tile, 0 if not stored */
    int32_t *beside; /* [N, cells + 2, 4]: tiles at y - 1, y + 1, z - 1, z + 1 */
    float *vectors;  /* [N, ARRAYS, length] */
    double *part;    /* [N, 3, PARTS] */
} walk_task;

/* ---- where the free voxels are --------------------------------------------------------------- */

/* 1 and 2: seeds; everything else is free. */
SS_DEVICE int32_t seed_at(const walk_task *k, int64_t i) {
    uint8_t u = k->seeds[i];
    return u <= 2 ? u : 0;
}

/* Notes which cells have a free voxel. */
SS_KERNEL void k_random_walker_scan(walk_task k) {
    SS_SHARED uint32_t room[THREADS / SS_WARP];
    const int64_t n = blockIdx.x / k.chunks, chunk = blockIdx.x % k.chunks;
    uint32_t stored = 0;
    int seeded = 0, bad = 0;
    for (int32_t j = 0; j < CELLS; ++j) {
        const int64_t cell = (chunk * CELLS + j) * THREADS + threadIdx.x;
        if (cell >= k.cells) {
            break;
        }
        const int64_t row = cell / k.columns, x0 = cell % k.columns * TILE;
        const uint8_t *u = k.seeds + (n * k.D * k.H + row) * k.W + x0;
        int free = 0;
        for (int32_t l = 0; l < TILE && x0 + l < k.W; ++l) {
            free |= u[l] == 0 || u[l] > 2;
            seeded |= u[l] == 1 || u[l] == 2;
            bad |= u[l] > 2;
        }
        k.map[n * k.cells + cell] = free;
        stored += (uint32_t)free;
    }
    stored = ss_block_sum<THREADS>(stored, room);
    seeded = __syncthreads_or(seeded);
    if (threadIdx.x == 0) {
        k.count[blockIdx.x] = stored;
        if (seeded) {
            atomicOr(&k.state[n].seeded, 1);
        }
    }
    ss_count_faults(k.faults, bad);
}

/* One block per problem: where each chunk's numbers begin; and the tiles of zeros at both ends. */
SS_KERNEL void k_random_walker_number(walk_task k) {
    SS_SHARED uint32_t room[THREADS / SS_WARP];
    const int64_t n = blockIdx.x;
    uint32_t *count = k.count + n * k.chunks;
    walk_state *state = k.state + n;
    const int insoluble = !state->seeded && !(k.gamma > 0.0f);
    uint32_t next = 1, total = 0;
    for (int64_t base = 0; base < k.chunks; base += THREADS, next += total) {
        const int64_t i = base + threadIdx.x;
        uint32_t here = i < k.chunks ? count[i] : 0;
        uint32_t before = ss_block_scan<THREADS>(here, room, &total);
        if (i < k.chunks) {
            count[i] = next + before;
        }
    }
    const int64_t tiles = (int64_t)next - 1;
    for (int32_t i = threadIdx.x; i < ARRAYS * 2 * TILE; i += THREADS) {
        const int64_t tile = i / TILE % 2 ? tiles + 1 : 0;
        k.vectors[(n * ARRAYS + i / TILE / 2) * k.length + tile * TILE + i % TILE] = 0.0f;
    }
    if (threadIdx.x == 0) {
        state->tiles = tiles;
        state->insoluble = insoluble;
    }
    ss_count_faults(k.faults, insoluble && threadIdx.x == 0);
}

/* Numbers the tiles in C order, beginning with 1. */
SS_KERNEL void k_random_walker_map(walk_task k) {
    SS_SHARED uint32_t room[THREADS / SS_WARP];
    const int64_t n = blockIdx.x / k.chunks, chunk = blockIdx.x % k.chunks;
    uint32_t next = k.count[blockIdx.x], total = 0;
    for (int32_t j = 0; j < CELLS; ++j, next += total) {
        const int64_t cell = (chunk * CELLS + j) * THREADS + threadIdx.x;
        int32_t *at = k.map + n * k.cells + cell;
        uint32_t stored = cell < k.cells ? (uint32_t)*at : 0;
        uint32_t before = ss_block_scan<THREADS>(stored, room, &total);
        if (stored) {
            *at = (int32_t)(next + before);
        }
    }
}

/* ---- the system -------------------------------------------------------------------------------
 */

SS_DEVICE float load_float(const void *p, int32_t dtype, int64_t i) {
    switch (dtype) {
    case SS_F16:
        return ss_load<ss_half>(p, i);
    case SS_BF16:
        return ss_load<ss_bfloat>(p, i);
    case SS_F64:
        return (float)ss_load<double>(p, i);
    default:
        return ss_load<float>(p, i);
    }
}

/* x0 of the header: 1 and 0 on seeds. */
SS_DEVICE float start_at(const walk_task *k, int64_t i, int32_t seed, int *bad) {
    if (seed) {
        return seed == 1 ? 1.0f : 0.0f;
    }
    if (!k->prior) {
        return 0.5f;
    }
    float v = load_float(k->prior, k->prior_dtype, i);
    *bad |= v < 0.0f || v > 1.0f;
    v = v < 0.0f ? 0.0f : v;
    return v > 1.0f ? 1.0f : v;
}

/* A free voxel's equation so far. */
typedef struct walk_equation {
    float diagonal, residual, source;
    float image, value;
} walk_equation;

/* Adds the edge to a neighbour, given its place in image and seeds; returns the weight of a free
 * pair, else 0. */
SS_DEVICE float add_edge(const walk_task *k, walk_equation *v, int64_t image, int64_t seed,
                         int32_t axis) {
    int ignored = 0;
    const float step = v->image - load_float(k->image, k->image_dtype, image);
    const float w = (ss_expf(-k->beta * (step * step)) + FLOOR) * k->axis[axis];
    const int32_t kind = seed_at(k, seed);
    v->diagonal += w;
    v->residual += w * (start_at(k, seed, kind, &ignored) - v->value);
    v->source += kind ? w : 0.0f;
    return kind ? 0.0f : w;
}

/* A thread per voxel of a cell. */
SS_KERNEL void k_random_walker_build(walk_task k) {
    const int64_t blocks = (k.cells * TILE + THREADS - 1) / THREADS;
    const int64_t n = blockIdx.x / blocks;
    const int64_t cell = (blockIdx.x % blocks * THREADS + threadIdx.x) / TILE;
    const int32_t lane = threadIdx.x % TILE;
    const int32_t *map = k.map + n * k.cells + cell;
    const int32_t tile = cell < k.cells ? *map : 0;
    int bad = 0;
    if (tile) {
        const int64_t row = cell / k.columns, x = cell % k.columns * TILE + lane;
        const int64_t y = row % k.H, z = row / k.H, plane = k.H * k.W;
        const int64_t at = row * k.W + x, image = n / k.classes * k.D * plane + at;
        const int64_t seed = n * k.D * plane + at;
        walk_equation v = {k.gamma, 0.0f, k.gamma, 0.0f, 0.0f};
        float wx = 0.0f, wy = 0.0f, wz = 0.0f;
        const int free = x < k.W && seed_at(&k, seed) == 0;
        if (free) { /* in the CPU's order: sums of floats */
            v.image = load_float(k.image, k.image_dtype, image);
            v.value = start_at(&k, seed, 0, &bad);
            if (x > 0) {
                add_edge(&k, &v, image - 1, seed - 1, 2);
            }
            wx = x + 1 < k.W ? add_edge(&k, &v, image + 1, seed + 1, 2) : 0.0f;
            if (y > 0) {
                add_edge(&k, &v, image - k.W, seed - k.W, 1);
            }
            wy = y + 1 < k.H ? add_edge(&k, &v, image + k.W, seed + k.W, 1) : 0.0f;
            if (z > 0) {
                add_edge(&k, &v, image - plane, seed - plane, 0);
            }
            wz = z + 1 < k.D ? add_edge(&k, &v, image + plane, seed + plane, 0) : 0.0f;
        }
        float *own = k.vectors + n * ARRAYS * k.length + (int64_t)tile * TILE + lane;
        own[WALK_C * k.length] = free ? v.source : 0.0f;
        own[WALK_D * k.length] = free ? v.diagonal : 1.0f;
        own[WALK_WX * k.length] = wx;
        own[WALK_WY * k.length] = wy;
        own[WALK_WZ * k.length] = wz;
        own[WALK_Z * k.length] = free ? v.residual / v.diagonal : 0.0f;
        own[WALK_E * k.length] = 0.0f;
        own[WALK_P * k.length] = 0.0f;
        if (lane < 4) {
            const int there = lane < 2    ? (lane ? y + 1 < k.H : y > 0)
                              : lane == 2 ? z > 0
                                          : z + 1 < k.D;
            const int64_t away = lane < 2 ? k.columns : k.H * k.columns;
            k.beside[(n * (k.cells + 2) + tile) * 4 + lane] =
                there ? map[lane % 2 ? away : -away] : 0;
        }
    }
    ss_count_faults(k.faults, bad);
}

/* ---- iterations --------------------------------------------------------------------------------
 */

/* One problem as the blocks of its group see it. */
typedef struct walk {
    float *vectors;
    const int32_t *beside;
    int64_t length, tiles;
    int64_t size; /* tiles of a part, a multiple of PART_TILES */
    int64_t parts;
} walk;

SS_DEVICE walk walk_of(const walk_task *k, int64_t n) {
    walk w = {k->vectors + n * ARRAYS * k->length,
              k->beside + n * (k->cells + 2) * 4,
              k->length,
              k->state[n].tiles,
              PART_TILES,
              0};
    if (w.tiles > (int64_t)PARTS * PART_TILES) {
        w.size = (w.tiles - 1) / ((int64_t)PARTS * PART_TILES) * PART_TILES + PART_TILES;
    }
    w.parts = (w.tiles + w.size - 1) / w.size;
    return w;
}

/* p = z + beta p_old, e = e + alpha p_old, q = A p; returns this thread's share of p'q. Neighbours'
 * new p is computed here again, as nobody knows whether they have been done. */
SS_DEVICE double multiply_part(const walk *w, int64_t part, int32_t latest, float alpha,
                               float beta) {
    const float *z = w->vectors + WALK_Z * w->length;
    const float *old = w->vectors + (WALK_P + latest) * w->length;
    const float *wx = w->vectors + WALK_WX * w->length, *wy = wx + w->length, *wz = wy + w->length;
    float *p = w->vectors + (WALK_P + 1 - latest) * w->length;
    float *e = w->vectors + WALK_E * w->length, *q = w->vectors + WALK_Q * w->length;
    const float *c = w->vectors + WALK_C * w->length;
    const int64_t end = (part + 1) * w->size < w->tiles ? (part + 1) * w->size : w->tiles;
    const int32_t l = threadIdx.x % TILE;
    double sum = 0.0;
    for (int64_t t = part * w->size + threadIdx.x / TILE; t < end; t += PART_TILES) {
        const int32_t *b = w->beside + 4 * (t + 1);
        const int64_t i = (t + 1) * TILE + l;
        const int64_t y0 = (int64_t)b[0] * TILE + l, y1 = (int64_t)b[1] * TILE + l;
        const int64_t z0 = (int64_t)b[2] * TILE + l, z1 = (int64_t)b[3] * TILE + l;
        const float before = old[i];
        const float mid = z[i] + beta * before;
        const float left = mid - (z[i - 1] + beta * old[i - 1]);
        const float right = mid - (z[i + 1] + beta * old[i + 1]);
        const float up = mid - (z[y0] + beta * old[y0]);
        const float down = mid - (z[y1] + beta * old[y1]);
        const float above = mid - (z[z0] + beta * old[z0]);
        const float below = mid - (z[z1] + beta * old[z1]);
        float v = wx[i - 1] * left + wx[i] * right;
        v += wy[y0] * up + wy[i] * down;
        v += wz[z0] * above + wz[i] * below;
        v += c[i] * mid;
        e[i] += alpha * before;
        q[i] = v;
        p[i] = mid;
        sum += (double)(mid * v);
    }
    return sum;
}

/* z = z - alpha D^-1 q; returns this thread's share of z'Dz. */
SS_DEVICE double update_part(const walk *w, int64_t part, float alpha) {
    float *z = w->vectors + WALK_Z * w->length;
    const float *q = w->vectors + WALK_Q * w->length, *d = w->vectors + WALK_D * w->length;
    const int64_t end = (part + 1) * w->size < w->tiles ? (part + 1) * w->size : w->tiles;
    double sum = 0.0;
    for (int64_t t = part * w->size + threadIdx.x / TILE; t < end; t += PART_TILES) {
        const int64_t i = (t + 1) * TILE + threadIdx.x % TILE;
        const float v = z[i] - alpha * q[i] / d[i];
        z[i] = v;
        sum += (double)(v * d[i] * v);
    }
    return sum;
}

/* This thread's shares of z'Dz and c'D^-1 c. */
SS_DEVICE double first_part(const walk *w, int64_t part, double *total) {
    const float *z = w->vectors + WALK_Z * w->length, *d = w->vectors + WALK_D * w->length;
    const float *c = w->vectors + WALK_C * w->length;
    const int64_t end = (part + 1) * w->size < w->tiles ? (part + 1) * w->size : w->tiles;
    double sum = 0.0;
    *total = 0.0;
    for (int64_t t = part * w->size + threadIdx.x / TILE; t < end; t += PART_TILES) {
        const int64_t i = (t + 1) * TILE + threadIdx.x % TILE;
        sum += (double)(z[i] * d[i] * z[i]);
        *total += (double)(c[i] * c[i] / d[i]);
    }
    return sum;
}

SS_DEVICE void put_part(double *part, int64_t b, double sum, double *room) {
    sum = ss_block_sum<SOLVERS>(sum, room);
    if (threadIdx.x == 0) {
        part[b] = sum;
    }
}

SS_DEVICE double fold_parts(const double *part, int64_t n, double *room) {
    double sum = 0.0;
    for (int64_t i = threadIdx.x; i < n; i += SOLVERS) {
        sum += part[i];
    }
    return ss_block_sum<SOLVERS>(sum, room);
}

/* Conjugate gradients from e = 0. All blocks compute the same numbers from the same parts; a part
 * is overwritten only when the barrier after its last reading is behind. */
SS_DEVICE void solve(const walk_task *k, int64_t n, uint32_t rank, ss_group *group, double *room) {
    const walk w = walk_of(k, n);
    double *part = k->part + n * 3 * PARTS;
    for (int64_t b = rank; b < w.parts; b += group->blocks) {
        double total, sum = first_part(&w, b, &total);
        put_part(part, b, sum, room);
        put_part(part + 2 * PARTS, b, total, room);
    }
    ss_group_barrier(group);
    const double total = fold_parts(part + 2 * PARTS, w.parts, room);
    const double enough = k->tol * k->tol * total;
    double rr = fold_parts(part, w.parts, room), alpha = 0.0, beta = 0.0;
    int64_t done = 0;
    int32_t latest = 0;
    while (done < k->max_iter && rr > enough && !k->state[n].insoluble) { /* false for NaN */
        for (int64_t b = rank; b < w.parts; b += group->blocks) {
            double sum = multiply_part(&w, b, latest, (float)alpha, (float)beta);
            put_part(part + PARTS, b, sum, room);
        }
        ss_group_barrier(group);
        const double curvature = fold_parts(part + PARTS, w.parts, room);
        latest = 1 - latest;
        if (!(curvature > 0.0)) {
            rr = curvature == curvature ? rr : curvature;
            alpha = 0.0; /* p is 0 to the last bit, or something was infinite */
            break;
        }
        alpha = (double)(float)(rr / curvature);
        for (int64_t b = rank; b < w.parts; b += group->blocks) {
            put_part(part, b, update_part(&w, b, (float)alpha), room);
        }
        ss_group_barrier(group);
        const double next = fold_parts(part, w.parts, room);
        beta = next / rr;
        rr = next;
        ++done;
    }
    if (rank == 0 && threadIdx.x == 0) {
        rr = k->state[n].insoluble ? (double)NAN : rr;
        k->state[n].alpha = rr == rr ? alpha : rr; /* NaN everywhere rather than a guess */
        k->state[n].latest = latest;
        k->iterations[n] = done;
        k->residual[n] = total > 0.0 || rr != rr ? sqrt(rr / total) : sqrt(total);
    }
}

SS_KERNEL void __launch_bounds__(SOLVERS, 2) k_random_walker_solve(walk_task k, ss_groups share) {
    SS_SHARED double room[SOLVERS / SS_WARP];
    const uint32_t number = blockIdx.x / share.blocks;
    ss_group group = {&k.state[number].arrived, share.blocks, 0};
    for (int64_t n = number; n < k.N; n += share.groups) {
        solve(&k, n, blockIdx.x % share.blocks, &group, room);
    }
}

SS_KERNEL void k_random_walker_store(walk_task k) {
    const int64_t blocks = (k.cells * TILE + THREADS - 1) / THREADS;
    const int64_t n = blockIdx.x / blocks;
    const int64_t cell = (blockIdx.x % blocks * THREADS + threadIdx.x) / TILE;
    const int64_t x = cell % k.columns * TILE + threadIdx.x % TILE;
    if (cell >= k.cells || x >= k.W) {
        return;
    }
    const int64_t at = (n * k.D * k.H + cell / k.columns) * k.W + x;
    const int32_t seed = seed_at(&k, at);
    int ignored = 0;
    float v = start_at(&k, at, seed, &ignored);
    if (!seed) {
        const float *own = k.vectors + n * ARRAYS * k.length +
                           (int64_t)k.map[n * k.cells + cell] * TILE + threadIdx.x % TILE;
        const float alpha = (float)k.state[n].alpha;
        v = v + (own[WALK_E * k.length] + alpha * own[(WALK_P + k.state[n].latest) * k.length]);
        v = v < 0.0f ? 0.0f : v;
        v = v > 1.0f ? 1.0f : v;
    }
    k.prob[at] = v;
}

/* ---- the call ------------------------------------------------------------------------------- */

static walk_task walk_plan(ss_carve *w, const ss_random_walker_args *a) {
    const int64_t *s = a->seeds.shape;
    walk_task k = {};
    k.image = a->image.data;
    k.prior = a->prior.data;
    k.seeds = (const uint8_t *)a->seeds.data;
    k.image_dtype = a->image.dtype;
    k.prior_dtype = a->prior.dtype;
    k.N = s[0];
    k.classes = a->classes;
    k.D = s[1];
    k.H = s[2];
    k.W = s[3];
    k.columns = (k.W + TILE - 1) / TILE;
    k.cells = k.D * k.H * k.columns;
    k.chunks = (k.cells + THREADS * CELLS - 1) / (THREADS * CELLS);
    k.length = (k.cells + 2) * TILE;
    k.beta = (float)a->beta;
    k.gamma = (float)a->gamma;
    k.tol = a->tol;
    k.max_iter = a->max_iter;
    k.prob = (float *)a->prob.data;
    k.iterations = (int64_t *)a->iterations.data;
    k.residual = (double *)a->residual.data;
    k.state = ss_take<walk_state>(w, k.N);
    k.count = ss_take<uint32_t>(w, k.N * k.chunks);
    k.map = ss_take<int32_t>(w, k.N * k.cells);
    k.beside = ss_take<int32_t>(w, k.N * (k.cells + 2) * 4);
    k.vectors = ss_take<float>(w, k.N * ARRAYS * k.length);
    k.part = ss_take<double>(w, k.N * 3 * PARTS);
    return k;
}

int64_t SS_CUDA_WORKSPACE(random_walker)(const ss_random_walker_args *a) {
    ss_carve w = {};
    (void)walk_plan(&w, a);
    return ss_carved(&w);
}

static ss_status walk_spacing(ss_exec *x, const ss_random_walker_args *a, float *axis) {
    if (a->spacing.n != 0 && a->spacing.n != 3) {
        return ss_cuda_fail(x, SS_INVALID, "spacing: expected 3 numbers, got %lld",
                            (long long)a->spacing.n);
    }
    double least = (double)INFINITY;
    for (int64_t i = 0; i < a->spacing.n; ++i) {
        double h = a->spacing.at[i];
        if (!(h > 0.0 && h < (double)INFINITY)) {
            return ss_cuda_fail(x, SS_INVALID, "spacing: expected positive numbers, got %g", h);
        }
        least = h < least ? h : least;
    }
    for (int64_t i = 0; i < 3; ++i) {
        double ratio = a->spacing.n ? least / a->spacing.at[i] : 1.0;
        axis[i] = (float)(ratio * ratio);
        if (axis[i] < 1e-12f) {
            return ss_cuda_fail(x, SS_INVALID, "spacing: expected ratios up to 1e6, got %g",
                                1.0 / ratio);
        }
    }
    return SS_OK;
}

static ss_status walk_check(ss_exec *x, const ss_random_walker_args *a, const walk_task *k) {
    const int64_t b = a->image.shape[0];
    if (a->classes > k->N || k->N / a->classes != b || k->N % a->classes != 0) {
        return ss_cuda_fail(x, SS_INVALID,
                            "seeds: expected %lld x %lld problems (images x classes), got %lld",
                            (long long)b, (long long)a->classes, (long long)k->N);
    }
    if (a->gamma > 0.0 && !a->prior.data) {
        return ss_cuda_fail(x, SS_INVALID, "gamma: expected 0 without a prior, got %g", a->gamma);
    }
    if (k->cells > INT32_MAX - 2) {
        return ss_cuda_fail(x, SS_INVALID, "image: expected at most 2^34 voxels, got more");
    }
    return SS_OK;
}

ss_status SS_CUDA(random_walker)(ss_exec *x, const ss_random_walker_args *a) {
    ss_carve w = ss_carve_of(x);
    walk_task k = walk_plan(&w, a);
    SS_TRY(walk_check(x, a, &k));
    SS_TRY(walk_spacing(x, a, k.axis));
    k.faults = SS_FAULTS_OF(x, random_walker);
    const unsigned chunks = ss_blocks(k.N * k.chunks, 1), problems = ss_blocks(k.N, 1);
    const unsigned voxels = ss_blocks(k.N * ss_blocks(k.cells * TILE, THREADS), 1);
    unsigned fit = 1;
    SS_TRY(ss_resident_blocks(x, k_random_walker_solve, SOLVERS, &fit));
    const ss_groups share = ss_share_out(fit, k.N, ss_blocks(k.cells, PART_TILES));
    SS_TRY(ss_cuda_zero(x, k.state, k.N * (int64_t)sizeof(walk_state)));
    SS_TRY(SS_LAUNCH(x, chunks, THREADS, 0, (k_random_walker_scan), k));
    SS_TRY(SS_LAUNCH(x, problems, THREADS, 0, (k_random_walker_number), k));
    SS_TRY(SS_LAUNCH(x, chunks, THREADS, 0, (k_random_walker_map), k));
    SS_TRY(SS_LAUNCH(x, voxels, THREADS, 0, (k_random_walker_build), k));
    SS_TRY(ss_launch_resident(x, "k_random_walker_solve", k_random_walker_solve,
                              share.groups * share.blocks, SOLVERS, k, share));
    return SS_LAUNCH(x, voxels, THREADS, 0, (k_random_walker_store), k);
}
