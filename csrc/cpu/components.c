/* SPDX-License-Identifier: Apache-2.0
 *
 * components.c: connected components, and masks of some of them.
 *
 * Union-find over runs of foreground along rows. Where diagonals connect (26; in 2-D 8) the four
 * rows of a 2 x 2 bundle are one: any two of their voxels at most one column apart are neighbours,
 * so runs of their union are connected, and there are several times fewer of them. With 6, 18 or
 * equal-value components a bundle is one row. Rows are kept as bits; two runs of neighbouring
 * bundles meet if the rows that face each other have bits at most one column apart.
 *
 * Memory: 1 byte read and 4 (labels) or 1 (masks) written per voxel, 1/8 of bits, 20 bytes per run.
 * Deterministic: planes are cut into slabs by size alone; a component is numbered by the rank of
 * its first voxel in C order, whatever the order of joins.
 */
#include <stdatomic.h>
#include <string.h>

#include "bits.h"
#include "lanes.h"

#define SLAB_VOXELS (1 << 17)

/* A neighbouring bundle that comes earlier, and which of both sides' rows face each other: bit
 * 2 z + y stands for row (z, y) of a 2 x 2 bundle. */
typedef struct facing {
    int dz, dy;
    int reach; /* 1: diagonal along the row, too */
    int here, there;
} facing;

static const facing facing_6[] = {{0, -1, 0, 1, 1}, {-1, 0, 0, 1, 1}};
static const facing facing_18[] = {
    {0, -1, 1, 1, 1}, {-1, 0, 1, 1, 1}, {-1, -1, 0, 1, 1}, {-1, 1, 0, 1, 1}};
static const facing facing_all[] = {
    {0, -1, 1, 1, 1}, {-1, 0, 1, 1, 1}, {-1, -1, 1, 1, 1}, {-1, 1, 1, 1, 1}};
static const facing facing_26[] = {
    {0, -1, 1, 1 | 4, 2 | 8}, {-1, 0, 1, 1 | 2, 4 | 8}, {-1, -1, 1, 1, 8}, {-1, 1, 1, 2, 4}};

typedef struct job {
    const char *image;
    int64_t shape[3];
    size_t bytes; /* of an element: nonzero and equal are all that is asked of a value */
    int by_value;

    int side;             /* rows of a bundle along each axis: 1 or 2 */
    int64_t planes, rows; /* bundles along z and y */
    int64_t slab;         /* planes of bundles per item */
    int64_t words;        /* of a row of bits, one empty word on each side included */
    const facing *facing;
    int facings;

    uint64_t *bits;        /* foreground, one row after the other */
    uint64_t *starts;      /* the first column of every run of every bundle */
    uint8_t *buffer;       /* one row of bytes per thread */
    int32_t *offset;       /* of each bundle's first run; one more at the end */
    int32_t *begin, *end;  /* columns of each run */
    int32_t *parent;       /* an earlier run of the same component, or itself */
    int32_t *first, *size; /* of each run, then of each root: first voxel, voxels */

    int32_t *labels; /* outputs: one of these two */
    uint8_t *kept;
    const uint8_t *keep; /* per run */
} job;

/* ---- rows ----------------------------------------------------------------------------------- */

static uint64_t value_at(const job *j, int64_t i) {
    uint64_t v = 0;
    switch (j->bytes) {
    case 1:
        return ((const uint8_t *)j->image)[i];
    case 2:
        return ((const uint16_t *)(const void *)j->image)[i];
    case 4:
        return ((const uint32_t *)(const void *)j->image)[i];
    default:
        memcpy(&v, j->image + 8 * i, 8);
        return v;
    }
}

/* n bytes that are nonzero where the image is, from voxel `at`: its own memory where possible. */
static const uint8_t *row_bytes(const job *j, int64_t at, uint8_t *restrict buffer) {
    int64_t n = j->shape[2];
    if (j->bytes == 1) {
        return (const uint8_t *)j->image + at;
    }
    if (j->bytes == 2) {
        const uint16_t *restrict p = (const uint16_t *)(const void *)j->image + at;
        SS_SIMD
        for (int64_t i = 0; i < n; ++i) {
            buffer[i] = (uint8_t)(p[i] != 0);
        }
    } else if (j->bytes == 4) {
        const uint32_t *restrict p = (const uint32_t *)(const void *)j->image + at;
        SS_SIMD
        for (int64_t i = 0; i < n; ++i) {
            buffer[i] = (uint8_t)(p[i] != 0);
        }
    } else {
        const uint32_t *restrict p = (const uint32_t *)(const void *)j->image + 2 * at;
        SS_SIMD
        for (int64_t i = 0; i < n; ++i) { /* in halves: SSE2 cannot compare 64 bits */
            buffer[i] = (uint8_t)((p[2 * i] | p[2 * i + 1]) != 0);
        }
    }
    return buffer;
}

/* Whether any of n bytes is not 0: most rows of a scan are background. */
static inline int any_byte(const uint8_t *m, int64_t n) {
    uint64_t any = 0;
    int64_t i = 0;
    for (; i + 64 <= n; i += 64) {
        any |= pack64(m + i, 64);
    }
    return (any | (i < n ? pack64(m + i, n - i) : 0)) != 0;
}

static void pack_row(const uint8_t *restrict m, int64_t n, uint64_t *restrict bits) {
    int64_t full = n / 64;
    for (int64_t k = 0; k < full; ++k) {
        bits[k] = pack64(m + 64 * k, 64);
    }
    if (n % 64) {
        bits[full] = pack64(m + 64 * full, n % 64);
    }
}

static const uint64_t *row_bits(const job *j, int64_t z, int64_t y) {
    return j->bits + (z * j->shape[1] + y) * j->words;
}

/* Those rows of bundle (bz, by) that `which` names and the volume has (the lowest always); that one
 * again in the places that are left, so that the union of all `count` is the union of the rows. */
static inline void bundle_rows(const job *j, int64_t bz, int64_t by, int which, int count,
                               const uint64_t **row) {
    int lowest = __builtin_ctz((unsigned)which), found = 1;
    const uint64_t *first = row_bits(j, bz * j->side + lowest / 2, by * j->side + lowest % 2);
    for (int i = 0; i < count; ++i) {
        row[i] = first;
    }
    for (int r = lowest + 1; r < 4; ++r) {
        int64_t z = bz * j->side + r / 2, y = by * j->side + r % 2;
        if (((which >> r) & 1) && z < j->shape[0] && y < j->shape[1]) {
            row[found++] = row_bits(j, z, y);
        }
    }
}

static inline uint64_t of_two(const uint64_t *const *row, int64_t k) {
    return row[0][k] | row[1][k];
}

static inline uint64_t of_four(const uint64_t *const *row, int64_t k) {
    return row[0][k] | row[1][k] | row[2][k] | row[3][k];
}

/* 64 bits from column x, which may be -1. */
static inline uint64_t bits_from(const uint64_t *bits, int64_t x) {
    int64_t at = x + 64; /* behind the empty word */
    int shift = (int)(at & 63);
    return bits[at >> 6] >> shift | bits[(at >> 6) + 1] << 1 << (63 - shift);
}

static inline uint64_t mask_below(int64_t n) {
    return n <= 0 ? 0 : (n >= 64 ? ~(uint64_t)0 : ((uint64_t)1 << n) - 1);
}

/* ---- runs ----------------------------------------------------------------------------------- */

static int64_t count_values(const job *j, int64_t at) {
    int64_t runs = 0;
    uint64_t before = 0;
    for (int64_t i = 0; i < j->shape[2]; ++i) {
        uint64_t v = value_at(j, at + i);
        runs += v != 0 && v != before;
        before = v;
    }
    return runs;
}

/* Bits of the rows of bundle (bz, by); 0, and nothing written, if there is no foreground. */
static int pack_bundle(const job *j, int64_t bz, int64_t by, uint8_t *buffer) {
    const int64_t *s = j->shape;
    int64_t z0 = bz * j->side, z1 = z0 + j->side < s[0] ? z0 + j->side : s[0];
    int64_t y0 = by * j->side, y1 = y0 + j->side < s[1] ? y0 + j->side : s[1];
    int any = j->bytes > 1;
    for (int64_t z = z0; z < z1 && !any; ++z) {
        any = any_byte((const uint8_t *)j->image + (z * s[1] + y0) * s[2], (y1 - y0) * s[2]);
    }
    for (int64_t z = z0; z < z1 && any; ++z) {
        for (int64_t y = y0; y < y1; ++y) {
            uint64_t *bits = j->bits + (z * s[1] + y) * j->words;
            bits[0] = bits[j->words - 2] = bits[j->words - 1] = 0;
            pack_row(row_bytes(j, (z * s[1] + y) * s[2], buffer), s[2], bits + 1);
        }
    }
    return any;
}

/* Bits of planes begin..end-1 of bundles, and how many runs each bundle has. */
static void count_runs(void *ctx, int64_t begin, int64_t end, int32_t thread) {
    job *j = ctx;
    uint8_t *buffer = j->buffer + thread * j->shape[2];
    for (int64_t b = begin * j->rows; b < end * j->rows; ++b) {
        int64_t bz = b / j->rows, by = b % j->rows, runs = 0;
        if (j->by_value) {
            runs = count_values(j, b * j->shape[2]);
        } else if (pack_bundle(j, bz, by, buffer)) {
            const uint64_t *row[4];
            uint64_t *starts = j->starts + b * j->words, before = 0;
            bundle_rows(j, bz, by, j->side == 1 ? 1 : 15, 4, row);
            for (int64_t k = 1; k < j->words - 1; ++k) {
                uint64_t bits = of_four(row, k);
                starts[k] = bits & ~(bits << 1 | before >> 63);
                before = bits;
                runs += __builtin_popcountll(starts[k]);
            }
        }
        j->offset[b + 1] = (int32_t)runs;
    }
}

static void put_run(job *j, int32_t run, int64_t begin, int64_t end) {
    j->begin[run] = (int32_t)begin;
    j->end[run] = (int32_t)end;
    j->parent[run] = run;
}

static void put_values(job *j, int64_t row) {
    int32_t run = j->offset[row];
    int64_t n = j->shape[2], at = row * n;
    for (int64_t end, begin = 0; begin < n; begin = end) {
        uint64_t v = value_at(j, at + begin);
        end = begin + 1;
        while (end < n && value_at(j, at + end) == v) {
            ++end;
        }
        if (v) {
            put_run(j, run++, begin, end);
        }
    }
}

static void put_bits(job *j, int64_t bundle, const uint64_t *const *row) {
    int32_t run = j->offset[bundle], run_end = run;
    uint64_t before = 0;
    for (int64_t k = 1; k < j->words - 1; ++k) {
        uint64_t bits = of_four(row, k), shifted = bits << 1 | before >> 63;
        uint64_t starts = bits & ~shifted, ends = shifted & ~bits;
        before = bits;
        for (; starts; starts &= starts - 1) {
            j->parent[run] = run;
            j->begin[run++] = (int32_t)((k - 1) * 64 + __builtin_ctzll(starts));
        }
        for (; ends; ends &= ends - 1) {
            j->end[run_end++] = (int32_t)((k - 1) * 64 + __builtin_ctzll(ends));
        }
    }
}

/* The rows of a bundle for measuring: those that the volume has not are masked out. */
typedef struct measured {
    const uint64_t *row[4];
    uint64_t in[4];
    int64_t at[4]; /* of their first voxels */
} measured;

static measured rows_to_measure(const job *j, int64_t bz, int64_t by) {
    measured m;
    for (int r = 0; r < 4; ++r) {
        int64_t z = bz * 2 + r / 2, y = by * 2 + r % 2;
        int in = z < j->shape[0] && y < j->shape[1];
        m.row[r] = in ? row_bits(j, z, y) : row_bits(j, bz * 2, by * 2);
        m.in[r] = in ? ~(uint64_t)0 : 0;
        m.at[r] = (z * j->shape[1] + y) * j->shape[2];
    }
    return m;
}

/* First voxel and size of a run of at most 64 columns, which almost all are. */
static inline void measure_short(const measured *m, int64_t begin, int64_t end, int32_t *first,
                                 int32_t *size) {
    uint64_t mask = mask_below(end - begin);
    uint64_t a = bits_from(m->row[0], begin) & mask;
    uint64_t b = bits_from(m->row[1], begin) & mask & m->in[1];
    uint64_t c = bits_from(m->row[2], begin) & mask & m->in[2];
    uint64_t d = bits_from(m->row[3], begin) & mask & m->in[3];
    uint64_t v = c ? c : d;
    int64_t at = c ? m->at[2] : m->at[3];
    v = b ? b : v;
    at = b ? m->at[1] : at;
    v = a ? a : v;
    at = a ? m->at[0] : at;
    *first = (int32_t)(at + begin + __builtin_ctzll(v));
    *size = __builtin_popcountll(a) + __builtin_popcountll(b) + __builtin_popcountll(c) +
            __builtin_popcountll(d);
}

static void measure_long(const measured *m, int64_t begin, int64_t end, int32_t *first,
                         int32_t *size) {
    *first = -1;
    *size = 0;
    for (int r = 0; r < 4; ++r) {
        for (int64_t x = begin; x < end; x += 64) {
            uint64_t v = bits_from(m->row[r], x) & mask_below(end - x) & m->in[r];
            if (v && *first < 0) {
                *first = (int32_t)(m->at[r] + x + __builtin_ctzll(v));
            }
            *size += __builtin_popcountll(v);
        }
    }
}

/* First voxels and sizes of the runs of bundle (bz, by). */
static void measure(job *j, int64_t bz, int64_t by) {
    int64_t bundle = bz * j->rows + by;
    int32_t run = j->offset[bundle], last = j->offset[bundle + 1];
    if (j->side == 1) {
        for (; run < last; ++run) {
            j->first[run] = (int32_t)(bundle * j->shape[2] + j->begin[run]);
            j->size[run] = j->end[run] - j->begin[run];
        }
        return;
    }
    measured m = rows_to_measure(j, bz, by);
    for (; run < last; ++run) {
        int64_t begin = j->begin[run], end = j->end[run];
        if (end - begin <= 64) {
            measure_short(&m, begin, end, &j->first[run], &j->size[run]);
        } else {
            measure_long(&m, begin, end, &j->first[run], &j->size[run]);
        }
    }
}

/* ---- joins ---------------------------------------------------------------------------------- */

static inline int32_t find(int32_t *parent, int32_t i) {
    while (parent[i] != i) {
        parent[i] = parent[parent[i]];
        i = parent[i];
    }
    return i;
}

static inline void join(int32_t *parent, int32_t a, int32_t b) {
    if (parent[a] == parent[b]) {
        return;
    }
    a = find(parent, a);
    b = find(parent, b);
    parent[a > b ? a : b] = a > b ? b : a;
}

/* Two bundles (numbers p and q): the rows of theirs that face each other, and how near is near. */
typedef struct meeting {
    job *j;
    int reach;
    int64_t p, q;
    const uint64_t *here[4], *there[4];
} meeting;

/* Joins by bits. Runs that face each other in some column are joined in the first such column; runs
 * that only touch diagonally where one ends and the other begins. A column's run is found by
 * counting the starts up to it. */
static void join_bits(const meeting *m) {
    const job *j = m->j;
    uint64_t a_last = 0, b_last = 0;
    const uint64_t *starts_a = j->starts + m->p * j->words, *starts_b = j->starts + m->q * j->words;
    int32_t run_a = j->offset[m->p] - 1, run_b = j->offset[m->q] - 1;
    for (int64_t k = 1; k < j->words - 1; ++k) {
        uint64_t a = of_two(m->here, k), b = of_two(m->there, k);
        uint64_t a_before = a << 1 | a_last >> 63, b_before = b << 1 | b_last >> 63;
        uint64_t both = a & b & ~(a_before & b_before);
        a_last = a;
        b_last = b;
        for (; both; both &= both - 1) {
            uint64_t upto = both ^ (both - 1);
            join(j->parent, run_a + __builtin_popcountll(starts_a[k] & upto),
                 run_b + __builtin_popcountll(starts_b[k] & upto));
        }
        if (m->reach) {
            uint64_t b_first = a & b_before & ~(b | a_before);
            uint64_t a_first = b & a_before & ~(a | b_before);
            for (; b_first; b_first &= b_first - 1) {
                uint64_t upto = b_first ^ (b_first - 1);
                join(j->parent, run_a + __builtin_popcountll(starts_a[k] & upto),
                     run_b + __builtin_popcountll(starts_b[k] & upto >> 1));
            }
            for (; a_first; a_first &= a_first - 1) {
                uint64_t upto = a_first ^ (a_first - 1);
                join(j->parent, run_a + __builtin_popcountll(starts_a[k] & upto >> 1),
                     run_b + __builtin_popcountll(starts_b[k] & upto));
            }
        }
        run_a += __builtin_popcountll(starts_a[k]);
        run_b += __builtin_popcountll(starts_b[k]);
    }
}

static inline void meet_values(const meeting *m, int32_t a, int32_t b) {
    const job *j = m->j;
    int64_t a0 = j->begin[a], b0 = j->begin[b], n = j->shape[2];
    if (a0 < j->end[b] + m->reach && b0 < j->end[a] + m->reach &&
        value_at(j, m->p * n + a0) == value_at(j, m->q * n + b0)) {
        join(j->parent, a, b);
    }
}

/* Joins runs of equal values: both lists are ascending, the one that ends first moves on. */
static void join_values(const meeting *m) {
    const job *j = m->j;
    int32_t a = j->offset[m->p], a_end = j->offset[m->p + 1];
    int32_t b = j->offset[m->q], b_end = j->offset[m->q + 1];
    while (a < a_end && b < b_end) {
        meet_values(m, a, b);
        if (j->end[a] < j->end[b]) {
            ++a;
        } else if (j->end[a] > j->end[b]) {
            ++b;
        } else { /* neighbours in a row can touch: the next ones reach back diagonally */
            if (a + 1 < a_end) {
                meet_values(m, a + 1, b);
            }
            if (b + 1 < b_end) {
                meet_values(m, a, b + 1);
            }
            ++a;
            ++b;
        }
    }
}

/* Whether there is nothing to join: a bundle is empty, or each has one run, of one component. */
static inline int are_joined(const job *j, int64_t p, int64_t q) {
    int32_t a = j->offset[p], b = j->offset[q];
    int32_t in_a = j->offset[p + 1] - a, in_b = j->offset[q + 1] - b;
    return in_a == 0 || in_b == 0 ||
           (in_a == 1 && in_b == 1 && find(j->parent, a) == find(j->parent, b));
}

/* Joins plane bz of bundles with itself (`across` 0) or with the plane before (1). */
static void join_plane(job *j, int64_t bz, int across) {
    for (int f = 0; f < j->facings; ++f) {
        const facing *to = &j->facing[f];
        if ((to->dz != 0) != across) {
            continue;
        }
        int64_t from = to->dy < 0 ? 1 : 0;
        int64_t until = to->dy > 0 ? j->rows - 1 : j->rows;
        for (int64_t by = from; by < until; ++by) {
            int64_t p = bz * j->rows + by;
            int64_t q = (bz + to->dz) * j->rows + by + to->dy;
            if (are_joined(j, p, q)) {
                continue;
            }
            meeting m;
            m.j = j;
            m.reach = to->reach;
            m.p = p;
            m.q = q;
            if (j->by_value) {
                join_values(&m);
                continue;
            }
            bundle_rows(j, bz, by, to->here, 2, m.here);
            bundle_rows(j, bz + to->dz, by + to->dy, to->there, 2, m.there);
            join_bits(&m);
        }
    }
}

/* Slabs of planes: their runs, and all joins inside them. */
static void join_slabs(void *ctx, int64_t begin, int64_t end, int32_t thread) {
    job *j = ctx;
    (void)thread;
    for (int64_t s = begin; s < end; ++s) {
        int64_t z1 = (s + 1) * j->slab < j->planes ? (s + 1) * j->slab : j->planes;
        for (int64_t bz = s * j->slab; bz < z1; ++bz) {
            for (int64_t by = 0; by < j->rows; ++by) {
                int64_t bundle = bz * j->rows + by;
                if (j->offset[bundle] == j->offset[bundle + 1]) {
                    continue;
                }
                const uint64_t *row[4];
                if (j->by_value) {
                    put_values(j, bundle);
                } else {
                    bundle_rows(j, bz, by, j->side == 1 ? 1 : 15, 4, row);
                    put_bits(j, bundle, row);
                }
                measure(j, bz, by);
            }
            join_plane(j, bz, 0);
            if (bz > s * j->slab) {
                join_plane(j, bz, 1);
            }
        }
    }
}

/* ---- one volume ----------------------------------------------------------------------------- */

static void plan(job *j, int connectivity) {
    j->side = connectivity == 26 && !j->by_value ? 2 : 1;
    if (connectivity == 6) {
        j->facing = facing_6;
        j->facings = 2;
    } else {
        j->facing = connectivity == 18 ? facing_18 : (j->side == 2 ? facing_26 : facing_all);
        j->facings = 4;
    }
    j->planes = (j->shape[0] + j->side - 1) / j->side;
    j->rows = (j->shape[1] + j->side - 1) / j->side;
    j->words = (j->shape[2] + 63) / 64 + 3;
    j->slab = 1 + SLAB_VOXELS / (j->side * j->shape[1] * j->shape[2]);
}

static ss_status make_runs(ss_exec *x, job *j) {
    int32_t threads = ss_parallel_threads(x, j->planes, 1);
    int64_t rows = j->shape[0] * j->shape[1], bundles = j->planes * j->rows;
    j->bits = ss_scratch(x, j->by_value ? 0 : rows * j->words, sizeof *j->bits);
    j->starts = ss_scratch(x, j->by_value ? 0 : bundles * j->words, sizeof *j->starts);
    j->buffer = ss_scratch(x, threads * j->shape[2], 1);
    j->offset = ss_scratch(x, bundles + 1, sizeof *j->offset);
    if (!j->bits || !j->starts || !j->buffer || !j->offset) {
        return SS_NO_MEMORY;
    }
    ss_parallel_for(x, j->planes, j->slab, count_runs, j);
    j->offset[0] = 0;
    for (int64_t b = 0; b < bundles; ++b) {
        j->offset[b + 1] += j->offset[b];
    }
    int64_t runs = j->offset[bundles];
    j->begin = ss_scratch(x, 5 * (runs + 1), sizeof *j->begin);
    if (!j->begin) {
        return SS_NO_MEMORY;
    }
    j->end = j->begin + runs + 1;
    j->parent = j->end + runs + 1;
    j->first = j->parent + runs + 1;
    j->size = j->first + runs + 1;
    return SS_OK;
}

/* All joins; afterwards parent[run] is the root, with the component's first voxel and size. */
static void join_all(ss_exec *x, job *j) {
    int64_t slabs = (j->planes + j->slab - 1) / j->slab;
    int32_t runs = j->offset[j->planes * j->rows];
    ss_parallel_for(x, slabs, 1, join_slabs, j);
    for (int64_t s = 1; s < slabs; ++s) {
        join_plane(j, s * j->slab, 1);
    }
    for (int32_t i = 0; i < runs; ++i) { /* a parent comes earlier, so it is final already */
        int32_t root = j->parent[j->parent[i]];
        j->parent[i] = root;
        if (root != i) {
            j->first[root] = j->first[i] < j->first[root] ? j->first[i] : j->first[root];
            j->size[root] += j->size[i];
        }
    }
}

static void free_runs(job *j) {
    ss_scratch_free(j->bits);
    ss_scratch_free(j->starts);
    ss_scratch_free(j->buffer);
    ss_scratch_free(j->offset);
    ss_scratch_free(j->begin);
}

/* ---- outputs -------------------------------------------------------------------------------- */

/* size[run] becomes the label: 1 + the rank of the component's first voxel. */
static ss_status number(ss_exec *x, job *j, int64_t *count) {
    int64_t voxels = j->shape[0] * j->shape[1] * j->shape[2], words = voxels / 64 + 1;
    int32_t runs = j->offset[j->planes * j->rows];
    uint64_t *marks = ss_scratch(x, words, sizeof *marks);
    int32_t *before = ss_scratch(x, words, sizeof *before);
    if (marks && before) {
        memset(marks, 0, (size_t)words * sizeof *marks);
        for (int32_t i = 0; i < runs; ++i) {
            if (j->parent[i] == i) {
                marks[j->first[i] / 64] |= (uint64_t)1 << (j->first[i] % 64);
            }
        }
        int32_t sum = 0;
        for (int64_t k = 0; k < words; ++k) {
            before[k] = sum;
            sum += __builtin_popcountll(marks[k]);
        }
        for (int32_t i = 0; i < runs; ++i) {
            int32_t f = j->first[i];
            j->size[i] =
                j->parent[i] != i
                    ? j->size[j->parent[i]]
                    : 1 + before[f / 64] + __builtin_popcountll(marks[f / 64] & mask_below(f % 64));
        }
        *count = sum;
    }
    ss_status status = marks && before ? SS_OK : SS_NO_MEMORY;
    ss_scratch_free(marks);
    ss_scratch_free(before);
    return status;
}

/* Writes columns [begin, end) of row r, which belong to a run. */
static inline void put(const job *j, int64_t r, int64_t begin, int64_t end, int32_t run) {
    int64_t at = r * j->shape[2] + begin, n = end - begin;
    if (j->labels) {
        int32_t *restrict out = j->labels + at;
        int32_t label = j->size[run];
        if (n < 16) { /* most runs of noise: shorter than a vector loop's preparations */
            for (int64_t i = 0; i < n; ++i) {
                out[i] = label;
            }
            return;
        }
        SS_SIMD
        for (int64_t i = 0; i < n; ++i) {
            out[i] = label;
        }
    } else if (j->keep[j->parent[run]]) {
        memcpy(j->kept + at, j->image + at, (size_t)n);
    }
}

/* One row from its bits: where they begin, the starts so far say which run of the bundle it is. */
static void put_row(const job *j, int64_t r, int64_t bundle) {
    const uint64_t *bits = j->bits + r * j->words, *starts = j->starts + bundle * j->words;
    int32_t before = j->offset[bundle] - 1, run = 0;
    int64_t begin = 0;
    for (int64_t k = 1; k < j->words - 1; ++k) {
        uint64_t changes = bits[k] ^ (bits[k] << 1 | bits[k - 1] >> 63);
        for (; changes; changes &= changes - 1) {
            int64_t at = (k - 1) * 64 + __builtin_ctzll(changes);
            uint64_t upto = changes ^ (changes - 1);
            if (bits[k] & upto & ~(upto >> 1)) {
                begin = at;
                run = before + __builtin_popcountll(starts[k] & upto);
            } else {
                put(j, r, begin, at, run);
            }
        }
        before += __builtin_popcountll(starts[k]);
    }
}

/* Whether a mask keeps all of a bundle's runs (1), none (0) or some (-1). */
static int kept_runs(const job *j, int64_t bundle) {
    int some = 0, all = 1;
    for (int32_t run = j->offset[bundle]; run < j->offset[bundle + 1]; ++run) {
        int keep = j->keep[j->parent[run]];
        some |= keep;
        all &= keep;
    }
    return all ? some : -some;
}

static void paint_row(const job *j, int64_t r, int64_t bundle) {
    int64_t at = r * j->shape[2];
    if (j->by_value) {
        for (int32_t run = j->offset[bundle]; run < j->offset[bundle + 1]; ++run) {
            put(j, r, j->begin[run], j->end[run], run);
        }
        return;
    }
    int kept = j->labels ? -1 : kept_runs(j, bundle);
    if (kept < 0) {
        put_row(j, r, bundle);
    } else if (kept) {
        memcpy(j->kept + at, j->image + at, (size_t)j->shape[2]);
    }
}

static void paint(void *ctx, int64_t begin, int64_t end, int32_t thread) {
    const job *j = ctx;
    int64_t h = j->shape[1], n = h * j->shape[2];
    int half = j->side - 1;
    (void)thread;
    for (int64_t z = begin; z < end; ++z) {
        if (j->labels) {
            memset(j->labels + z * n, 0, (size_t)n * sizeof *j->labels);
        } else {
            memset(j->kept + z * n, 0, (size_t)n);
        }
        for (int64_t y = 0; y < h; ++y) {
            int64_t bundle = (z >> half) * j->rows + (y >> half);
            if (j->offset[bundle] < j->offset[bundle + 1]) {
                paint_row(j, z * h + y, bundle);
            }
        }
    }
}

static void paint_all(ss_exec *x, job *j) {
    ss_parallel_for(x, j->shape[0], j->slab * j->side, paint, j);
}

static ss_status label_volume(ss_exec *x, job *j, int connectivity, int64_t *count) {
    plan(j, connectivity);
    ss_status status = make_runs(x, j);
    if (status == SS_OK) {
        join_all(x, j);
        status = number(x, j, count);
    }
    if (status == SS_OK) {
        paint_all(x, j);
    }
    free_runs(j);
    return status;
}

/* keep[root] = 1 for components of at least min_size voxels; min_size 0: the largest, of equal
 * ones that whose first voxel comes first. */
static void choose(const job *j, int64_t min_size, uint8_t *keep) {
    int32_t runs = j->offset[j->planes * j->rows];
    int32_t best = -1;
    for (int32_t i = 0; i < runs; ++i) {
        keep[i] = j->parent[i] == i && min_size > 0 && j->size[i] >= min_size;
        if (j->parent[i] == i && (best < 0 || j->size[i] > j->size[best] ||
                                  (j->size[i] == j->size[best] && j->first[i] < j->first[best]))) {
            best = i;
        }
    }
    if (min_size == 0 && best >= 0) {
        keep[best] = 1;
    }
}

static ss_status keep_volume(ss_exec *x, job *j, int connectivity, int64_t min_size) {
    plan(j, connectivity);
    ss_status status = make_runs(x, j);
    uint8_t *keep = NULL;
    if (status == SS_OK) {
        keep = ss_scratch(x, j->offset[j->planes * j->rows] + 1, 1);
        status = keep ? SS_OK : SS_NO_MEMORY;
    }
    if (status == SS_OK) {
        join_all(x, j);
        choose(j, min_size, keep);
        j->keep = keep;
        paint_all(x, j);
    }
    ss_scratch_free(keep);
    free_runs(j);
    return status;
}

/* ---- the operators -------------------------------------------------------------------------- */

typedef struct batch {
    ss_exec *x;
    const ss_tensor *image;
    int connectivity;
    int by_value;
    int32_t *labels;
    int64_t *count;
    uint8_t *kept;
    int64_t min_size;
    atomic_int failed; /* the status of a volume that failed, if any did: only memory can */
} batch;

static ss_status run_one(ss_exec *x, const batch *b, int64_t n) {
    const int64_t *s = b->image->shape + 1;
    int64_t voxels = s[0] * s[1] * s[2];
    job j = {.shape = {s[0], s[1], s[2]}, .by_value = b->by_value};
    j.bytes = ss_dtype_size(b->image->dtype);
    j.image = (const char *)b->image->data + (size_t)(n * voxels) * j.bytes;
    if (b->labels) {
        j.labels = b->labels + n * voxels;
        return label_volume(x, &j, b->connectivity, b->count + n);
    }
    j.kept = b->kept + n * voxels;
    return keep_volume(x, &j, b->connectivity, b->min_size);
}

static void run_many(void *ctx, int64_t begin, int64_t end, int32_t thread) {
    batch *b = ctx;
    ss_exec x = *b->x;
    x.threads = 1;
    (void)thread;
    for (int64_t n = begin; n < end; ++n) {
        ss_status status = run_one(&x, b, n);
        if (status != SS_OK) {
            atomic_store(&b->failed, (int)status);
        }
    }
}

static ss_status run_batch(ss_exec *x, batch *b) {
    const int64_t *s = b->image->shape;
    int64_t voxels = s[1] * s[2] * s[3];
    if (b->connectivity != 6 && b->connectivity != 18 && b->connectivity != 26) {
        return ss_fail(x, SS_INVALID, "connectivity: expected 6, 18 or 26, got %d",
                       b->connectivity);
    }
    if (voxels >= INT32_MAX) {
        return ss_fail(x, SS_INVALID,
                       "mask: expected volumes of fewer than 2^31 voxels, got %lld x %lld x %lld",
                       (long long)s[1], (long long)s[2], (long long)s[3]);
    }
    atomic_init(&b->failed, SS_OK);
    if (s[0] > 1 && voxels < 1 << 20) {
        ss_parallel_for(x, s[0], 1 + (1 << 16) / voxels, run_many, b);
        ss_status status = (ss_status)atomic_load(&b->failed);
        return status == SS_OK ? SS_OK : ss_fail(x, status, "could not allocate scratch memory");
    }
    ss_status status = SS_OK;
    for (int64_t n = 0; n < s[0] && status == SS_OK; ++n) {
        status = run_one(x, b, n);
    }
    return status;
}

ss_status SS_CPU(components)(ss_exec *x, const ss_components_args *a) {
    batch b = {.x = x, .image = &a->image, .connectivity = (int)a->connectivity};
    b.by_value = (int)a->by_value;
    b.labels = a->labels.data;
    b.count = a->count.data;
    return run_batch(x, &b);
}

ss_status SS_CPU(keep_components)(ss_exec *x, const ss_keep_components_args *a) {
    batch b = {.x = x, .image = &a->mask, .connectivity = (int)a->connectivity};
    b.kept = a->kept.data;
    b.min_size = a->min_size;
    return run_batch(x, &b);
}
