/* SPDX-License-Identifier: Apache-2.0
 *
 * edt.c: exact squared Euclidean distance of every voxel to the nearest 0-voxel.
 *
 *     d2[z, y, x] = min over 0-voxels (z', y', x') of sz2 (z-z')^2 + sy2 (y-y')^2 + sx2 (x-x')^2
 *
 * Separable: along rows from the runs of foreground, along columns and then through planes by the
 * search of edt_axis.h, 32 columns in lanes. All of it happens inside the foreground's bounding
 * box, whose open sides are walls of 0-voxels. Memory: 1 byte read and 4 written per voxel, 2 (4)
 * in between per voxel of the box. Numerics: unit or equal spacing in integers, 16 bits where all
 * squares fit (below 32767, for sides up to 181 below 65535 - side^2) and otherwise once more in 32
 * bits, so exact; other spacings in float: three roundings of the squares, a relative error of at
 * most 3 x 2^-24 before the root. Deterministic: every voxel's value is a minimum over a set that
 * the mask alone defines.
 */
#include "edt.h"

#include <math.h>
#include <stdatomic.h>
#include <string.h>

#include "lanes.h"

#define EDT_LANES 32
#define EDT_NEAR 32

/* What is behind a face of the box. */
enum { EDT_OPEN, EDT_ZEROS, EDT_BORDER };

typedef struct edt_line {
    int64_t n;
    int64_t stride;
    int closed[2];
    int32_t big;
} edt_line;

typedef struct edt_job {
    const uint8_t *mask;
    const int64_t *shape;
    int border;
    int root; /* store distances instead of squares */
    float scale;
    const double *spacing; /* NULL: 1, or the same on all axes and in `scale` */
    int32_t *squares;      /* one of these two */
    float *distance;
    int64_t *index; /* or NULL */

    int64_t at[3], n[3]; /* the box */
    int closed[3][2];
    int flat;      /* nothing to do along the first axis */
    int64_t pitch; /* elements per row of the box, a multiple of EDT_LANES */
    int64_t slab;
    const void *cost[3];
    int32_t big; /* "no 0-voxel yet" in 16 bits: what the largest cost leaves */
    void *mid;
    int16_t *place[2];
    uint8_t *over;
    char *tile;
    size_t tile_bytes;
    int32_t *room;
    int64_t room_size;
} edt_job;

static int64_t edt_offset(const edt_job *job, int64_t z, int64_t y) {
    return ((job->at[0] + z) * job->shape[1] + job->at[1] + y) * job->shape[2] + job->at[2];
}

static void *edt_tile(const edt_job *job, int32_t thread) {
    return job->tile + (size_t)thread * job->tile_bytes;
}

static int32_t *edt_room(const edt_job *job, int32_t thread) {
    return job->room + thread * job->room_size;
}

/* The first i >= from with (m[i] != 0) == wanted, or n: eight at a time. */
static inline int64_t edt_find(const uint8_t *m, int64_t from, int64_t n, int wanted) {
    const uint64_t ones = 0x0101010101010101u;
    int64_t i = from;
    for (; i + 8 <= n; i += 8) {
        uint64_t word;
        memcpy(&word, m + i, 8);
        if (wanted ? word != 0 : ((word - ones) & ~word & (ones << 7)) != 0) {
            break; /* it is one of these */
        }
    }
    while (i < n && (m[i] != 0) != wanted) {
        ++i;
    }
    return i;
}

/* ---- the index of the nearest 0-voxel ------------------------------------------------------- */

/* Along one row: column of the nearest 0-voxel, the first of two; -1 and n are the faces. */
static void edt_row_places(const edt_job *job, const uint8_t *m, int16_t *place) {
    int64_t n = job->n[2];
    const int *closed = job->closed[2];
    for (int64_t end, begin = 0; begin < n; begin = end) {
        end = begin + 1;
        if (!m[begin]) {
            place[begin] = (int16_t)begin;
            continue;
        }
        end = edt_find(m, begin, n, 0);
        int left = begin > 0 || closed[0];
        int right = end < n || closed[1];
        for (int64_t i = begin; i < end; ++i) {
            int to_left = left && (!right || i - begin + 1 <= end - i);
            place[i] = (int16_t)(to_left ? begin - 1 : end);
        }
    }
}

/* Composes the places along the three axes to positions in the volume. Whatever leads outside is as
 * near as the outside, which mark_outside overwrites. */
static void edt_store_index(const edt_job *job, int64_t z, int64_t y, int64_t x0, int64_t count,
                            const int16_t *through) {
    int64_t plane = job->n[1] * job->pitch;
    int64_t *out = job->index + edt_offset(job, z, y) + x0;
    for (int64_t l = 0; l < count && x0 + l < job->n[2]; ++l) {
        int64_t x = x0 + l;
        int64_t pz = through ? through[l] : z, py = y, px = x;
        if (pz >= 0 && pz < job->n[0]) {
            py = job->place[1][pz * plane + y * job->pitch + x];
            if (py >= 0 && py < job->n[1]) {
                px = job->place[0][pz * plane + py * job->pitch + x];
            }
        }
        out[l] = edt_offset(job, pz, py) + px;
    }
}

/* ---- number types --------------------------------------------------------------------------- */

#define EDT_T uint16_t
#define EDT_BIG(o) ((uint16_t)(o)->big)
#define EDT(name) name##_u16
#include "edt_axis.h"
#undef EDT_T
#undef EDT_BIG
#undef EDT

#define EDT_T int32_t
#define EDT_BIG(o) (1 << 30)
#define EDT(name) name##_i32
#include "edt_axis.h"
#undef EDT_T
#undef EDT_BIG
#undef EDT

#define EDT_T float
#define EDT_BIG(o) INFINITY
#define EDT(name) name##_f32
#include "edt_axis.h"
#undef EDT_T
#undef EDT_BIG
#undef EDT

/* ---- the foreground's bounding box ---------------------------------------------------------- */

typedef struct edt_bounds {
    int32_t zeros;          /* is there a 0-voxel? */
    int32_t y0, y1, x0, x1; /* y1 = 0: no foreground */
} edt_bounds;

typedef struct edt_scan {
    const uint8_t *mask;
    const int64_t *shape;
    uint8_t *columns; /* one row per thread */
    edt_bounds *plane;
} edt_scan;

static void scan_planes(void *ctx, int64_t begin, int64_t end, int32_t thread) {
    const edt_scan *scan = ctx;
    int64_t h = scan->shape[1], w = scan->shape[2];
    uint8_t *restrict column = scan->columns + thread * w;
    for (int64_t z = begin; z < end; ++z) {
        edt_bounds b = {0, 0, 0, 0, 0};
        uint8_t zeros = 0;
        memset(column, 0, (size_t)w);
        for (int64_t y = 0; y < h; ++y) {
            const uint8_t *restrict m = scan->mask + (z * h + y) * w;
            uint8_t any = 0;
            _Pragma("omp simd reduction(| : any, zeros)") for (int64_t i = 0; i < w; ++i) {
                column[i] |= m[i];
                any |= m[i];
                zeros |= (uint8_t)(m[i] == 0);
            }
            if (any) {
                b.y0 = b.y1 ? b.y0 : (int32_t)y;
                b.y1 = (int32_t)y + 1;
            }
        }
        b.zeros = zeros;
        if (b.y1) {
            b.x0 = (int32_t)edt_find(column, 0, w, 1);
            b.x1 = (int32_t)w;
            while (!column[b.x1 - 1]) {
                --b.x1;
            }
        }
        scan->plane[z] = b;
    }
}

static void fold_bounds(edt_job *job, const edt_bounds *plane, int *zeros) {
    const int64_t *s = job->shape;
    int64_t from[3] = {s[0], s[1], s[2]}, to[3] = {0, 0, 0};
    for (int64_t z = 0; z < s[0]; ++z) {
        const edt_bounds *b = &plane[z];
        *zeros |= b->zeros;
        if (b->y1) {
            from[0] = z < from[0] ? z : from[0];
            to[0] = z + 1;
            from[1] = b->y0 < from[1] ? b->y0 : from[1];
            to[1] = b->y1 > to[1] ? b->y1 : to[1];
            from[2] = b->x0 < from[2] ? b->x0 : from[2];
            to[2] = b->x1 > to[2] ? b->x1 : to[2];
        }
    }
    for (int k = 0; k < 3; ++k) {
        int behind = job->border == 1 || (job->border == 2 && k > 0) ? EDT_BORDER : EDT_OPEN;
        job->at[k] = from[k];
        job->n[k] = to[k] > from[k] ? to[k] - from[k] : 0;
        job->closed[k][0] = from[k] > 0 ? EDT_ZEROS : behind;
        job->closed[k][1] = to[k] < s[k] ? EDT_ZEROS : behind;
    }
    job->flat = job->n[0] == 1 && !job->closed[0][0] && !job->closed[0][1];
    job->pitch = (job->n[2] + EDT_LANES - 1) / EDT_LANES * EDT_LANES;
}

static ss_status find_box(ss_exec *x, edt_job *job, int *zeros) {
    const int64_t *s = job->shape;
    int64_t grain = 1 + (1 << 17) / (s[1] * s[2]);
    int32_t threads = ss_parallel_threads(x, s[0], grain);
    edt_scan scan = {job->mask, s, NULL, NULL};
    scan.columns = ss_scratch(x, threads * s[2], 1);
    scan.plane = ss_scratch(x, s[0], sizeof *scan.plane);
    ss_status status = SS_NO_MEMORY;
    if (scan.columns && scan.plane) {
        ss_parallel_for(x, s[0], grain, scan_planes, &scan);
        fold_bounds(job, scan.plane, zeros);
        status = SS_OK;
    }
    ss_scratch_free(scan.columns);
    ss_scratch_free(scan.plane);
    return status;
}

/* ---- outside the box ------------------------------------------------------------------------ */

static void put_own(const edt_job *job, int64_t begin, int64_t end) {
    void *at = job->squares ? (void *)(job->squares + begin) : (void *)(job->distance + begin);
    memset(at, 0, (size_t)(end - begin) * 4); /* 0 and 0.0f look alike */
    for (int64_t i = begin; job->index && i < end; ++i) {
        job->index[i] = i;
    }
}

static void clear_planes(void *ctx, int64_t begin, int64_t end, int32_t thread) {
    const edt_job *job = ctx;
    int64_t h = job->shape[1], w = job->shape[2];
    (void)thread;
    for (int64_t z = begin; z < end; ++z) {
        int64_t row = z * h * w;
        if (z < job->at[0] || z >= job->at[0] + job->n[0]) {
            put_own(job, row, row + h * w);
            continue;
        }
        put_own(job, row, row + job->at[1] * w);
        for (int64_t y = job->at[1]; y < job->at[1] + job->n[1]; ++y) {
            put_own(job, row + y * w, row + y * w + job->at[2]);
            put_own(job, row + y * w + job->at[2] + job->n[2], row + (y + 1) * w);
        }
        put_own(job, row + (job->at[1] + job->n[1]) * w, row + h * w);
    }
}

static void fill_far(const edt_job *job) {
    int64_t n = job->shape[0] * job->shape[1] * job->shape[2];
    for (int64_t i = 0; i < n; ++i) {
        if (job->squares) {
            job->squares[i] = SS_EDT_FAR;
        } else {
            job->distance[i] = INFINITY;
        }
        if (job->index) {
            job->index[i] = -1;
        }
    }
}

/* ---- one volume ----------------------------------------------------------------------------- */

enum { EDT_U16, EDT_I32, EDT_F32 };

static size_t type_size(int type) {
    return type == EDT_U16 ? sizeof(uint16_t) : sizeof(int32_t);
}

/* In 16 bits costs end where `big` plus a cost would overflow: at squares that no step within the
 * box has, or at `big` itself, which never wins. */
static void fill_cost(void *out, int64_t n, int type, int32_t big, double step) {
    int64_t most = big > 32767 ? 65535 - big : 32767;
    for (int64_t k = 0; k < n; ++k) {
        if (type == EDT_U16) {
            ((uint16_t *)out)[k] = (uint16_t)(k * k < most ? k * k : most);
        } else if (type == EDT_I32) {
            ((int32_t *)out)[k] = (int32_t)(k * k);
        } else {
            ((float *)out)[k] = (float)(step * step * (double)(k * k));
        }
    }
}

static void run_passes(ss_exec *x, edt_job *job, int type) {
    static const ss_body planes[] = {planes_u16, planes_i32, planes_f32};
    static const ss_body slabs[] = {slabs_u16, slabs_i32, slabs_f32};
    int64_t plane = job->n[1] * job->pitch;
    ss_parallel_for(x, job->n[0], 1 + (1 << 14) / plane, planes[type], job);
    if (!job->flat) {
        ss_parallel_for(x, (job->n[1] + job->slab - 1) / job->slab,
                        1 + (1 << 14) / (job->slab * job->pitch * job->n[0]), slabs[type], job);
    }
}

/* The box in one number type; *over says whether a square did not fit it. */
static ss_status run_box(ss_exec *x, edt_job *job, int type, int *over) {
    const int64_t *n = job->n;
    size_t size = type_size(type);
    int64_t most = n[0] > n[1] ? n[0] : n[1];
    int64_t longest = most > n[2] ? most : n[2];
    int64_t costs = longest + EDT_NEAR + 4;
    costs = (costs + 31) / 32 * 32;
    int64_t rows = (1 << 16) / ((n[0] + 2 * EDT_NEAR) * job->pitch);
    job->slab = rows < 1 ? 1 : (rows > n[1] ? n[1] : rows);
    int64_t plane_tile = (2 * n[1] + 2 * EDT_NEAR) * job->pitch;
    int64_t slab_tile = (2 * n[0] + 2 * EDT_NEAR) * job->pitch * job->slab;
    int64_t tile = plane_tile > slab_tile ? plane_tile : slab_tile;
    int32_t threads = ss_parallel_threads(x, n[0] > n[1] ? n[0] : n[1], 1);
    int64_t voxels = n[0] * n[1] * job->pitch;
    job->big = longest <= 181 ? 65535 - (int32_t)(longest * longest) : 32767;
    job->tile_bytes = (size_t)tile * size;
    job->room_size = 4 * most;
    char *cost = ss_scratch(x, 3 * costs, size);
    job->mid = ss_scratch(x, job->flat ? 0 : voxels, size);
    job->tile = ss_scratch(x, threads * tile, size);
    job->room = ss_scratch(x, threads * job->room_size, sizeof *job->room);
    job->over = ss_scratch(x, n[0] + n[1], 1);
    int16_t *places = job->index ? ss_scratch(x, 2 * voxels, sizeof *places) : NULL;
    ss_status status = SS_NO_MEMORY;
    if (cost && job->mid && job->tile && job->room && job->over && (places || !job->index)) {
        for (int k = 0; k < 3; ++k) {
            job->cost[k] = cost + (size_t)(k * costs) * size;
            fill_cost(cost + (size_t)(k * costs) * size, costs, type, job->big,
                      job->spacing ? job->spacing[k] : 1.0);
        }
        memset(job->over, 0, (size_t)(n[0] + n[1]));
        job->place[0] = places;
        job->place[1] = places ? places + voxels : NULL;
        run_passes(x, job, type);
        for (int64_t i = 0; i < n[0] + n[1]; ++i) {
            *over |= job->over[i];
        }
        status = SS_OK;
    }
    ss_scratch_free(cost);
    ss_scratch_free(job->mid);
    ss_scratch_free(job->tile);
    ss_scratch_free(job->room);
    ss_scratch_free(job->over);
    ss_scratch_free(places);
    return status;
}

static ss_status run_volume(ss_exec *x, edt_job *job) {
    const int64_t *s = job->shape;
    int zeros = 0;
    ss_status status = find_box(x, job, &zeros);
    if (status != SS_OK) {
        return status;
    }
    if (!zeros && !job->border) {
        fill_far(job);
        return SS_OK;
    }
    ss_parallel_for(x, s[0], 1 + (1 << 17) / (s[1] * s[2]), clear_planes, job);
    if (job->n[0] == 0) {
        return SS_OK;
    }
    int over = 0;
    if (job->spacing) {
        return run_box(x, job, EDT_F32, &over);
    }
    status = run_box(x, job, EDT_U16, &over);
    return status == SS_OK && over ? run_box(x, job, EDT_I32, &over) : status;
}

static ss_status check_sides(ss_exec *x, const int64_t s[3]) {
    if (s[0] > SS_EDT_SIDE || s[1] > SS_EDT_SIDE || s[2] > SS_EDT_SIDE) {
        return ss_fail(x, SS_INVALID, "mask: expected sides of at most %d, got (%lld, %lld, %lld)",
                       SS_EDT_SIDE, (long long)s[0], (long long)s[1], (long long)s[2]);
    }
    return SS_OK;
}

/* Equal spacings are integers times a factor. */
static void set_spacing(edt_job *job, const double spacing[3]) {
    job->scale = 1.0f;
    job->spacing = spacing;
    int plane = job->shape[0] == 1 && job->border != 1;
    if (spacing[1] == spacing[2] && (plane || spacing[0] == spacing[1])) {
        job->spacing = NULL;
        job->scale = (float)spacing[1];
    }
}

ss_status SS_CPU(edt_unit)(ss_exec *x, const uint8_t *mask, const int64_t shape[3], int border,
                           int32_t *out) {
    edt_job job = {.mask = mask, .shape = shape, .border = border, .squares = out};
    job.scale = 1.0f;
    ss_status status = check_sides(x, shape);
    return status == SS_OK ? run_volume(x, &job) : status;
}

ss_status SS_CPU(edt_spaced)(ss_exec *x, const uint8_t *mask, const int64_t shape[3],
                             const double spacing[3], int border, float *out) {
    edt_job job = {.mask = mask, .shape = shape, .border = border, .distance = out};
    set_spacing(&job, spacing);
    ss_status status = check_sides(x, shape);
    return status == SS_OK ? run_volume(x, &job) : status;
}

/* ---- the operator --------------------------------------------------------------------------- */

typedef struct edt_batch {
    ss_exec *x;
    const ss_edt_args *a;
    const double *spacing;
    atomic_int failed; /* the status of a volume that failed, if any did: only memory can */
} edt_batch;

static ss_status run_one(ss_exec *x, const ss_edt_args *a, const double *spacing, int64_t n) {
    const int64_t *s = a->mask.shape + 1;
    int64_t voxels = s[0] * s[1] * s[2];
    edt_job job = {.mask = (const uint8_t *)a->mask.data + n * voxels,
                   .shape = s,
                   .border = (int)a->border,
                   .root = !a->squared,
                   .distance = (float *)a->distance.data + n * voxels,
                   .index = a->want_index ? (int64_t *)a->index.data + n * voxels : NULL};
    set_spacing(&job, spacing);
    return run_volume(x, &job);
}

static void run_many(void *ctx, int64_t begin, int64_t end, int32_t thread) {
    edt_batch *b = ctx;
    ss_exec x = *b->x;
    x.threads = 1;
    (void)thread;
    for (int64_t n = begin; n < end; ++n) {
        ss_status status = run_one(&x, b->a, b->spacing, n);
        if (status != SS_OK) {
            atomic_store(&b->failed, (int)status);
        }
    }
}

ss_status SS_CPU(edt)(ss_exec *x, const ss_edt_args *a) {
    const int64_t *s = a->mask.shape;
    double spacing[3] = {1.0, 1.0, 1.0};
    if (a->spacing.n != 0 && a->spacing.n != 3) {
        return ss_fail(x, SS_INVALID, "spacing: expected 3 numbers or none, got %lld",
                       (long long)a->spacing.n);
    }
    for (int64_t k = 0; k < a->spacing.n; ++k) {
        spacing[k] = a->spacing.at[k];
        if (!(spacing[k] >= 1e-12 && spacing[k] <= 1e12)) {
            return ss_fail(x, SS_INVALID,
                           "spacing: expected positive numbers (1e-12 to 1e12), got %g",
                           spacing[k]);
        }
    }
    ss_status status = check_sides(x, s + 1);
    if (status != SS_OK) {
        return status;
    }
    if (s[0] > 1 && s[1] * s[2] * s[3] < 1 << 20) {
        edt_batch b = {.x = x, .a = a, .spacing = spacing};
        atomic_init(&b.failed, SS_OK);
        ss_parallel_for(x, s[0], 1 + (1 << 16) / (s[1] * s[2] * s[3]), run_many, &b);
        status = (ss_status)atomic_load(&b.failed);
        return status == SS_OK ? SS_OK : ss_fail(x, status, "could not allocate scratch memory");
    }
    for (int64_t n = 0; n < s[0] && status == SS_OK; ++n) {
        status = run_one(x, a, spacing, n);
    }
    return status;
}
