/* SPDX-License-Identifier: Apache-2.0
 *
 * surface.c: surface distances between label maps, summarised per case and class.
 *
 * A = {y_pred[n] = c}, G = {y[n] = c}. Surface elements are voxels of a mask with a face neighbour
 * outside it (outside the image counts as outside), each of weight 1; or, given `areas`, the points
 * between voxels whose 2x2x2 (2x2) neighbourhood is mixed, weighted by its code's area. With
 * a = d(A -> G), g = d(G -> A) the lists of distances to the nearest element of the other surface:
 *
 *     stats[n, c] = weight(a), weight(g), mean(a), mean(g), max(a), max(g),
 *                   percentile(a), percentile(g), percentile(a u g), near(a), near(g)
 *
 * near: the weight of elements within the tolerance. Percentiles interpolate linearly between order
 * statistics; weighted ones are the first distance at which the share of weight reaches p, and the
 * larger of both stands for the pooled one. Distances and what follows are NaN unless both masks
 * have elements. Memory: two reads of each label; masks as bits on the bounding box of A u G.
 * Numerics: distances exact up to one rounding per operation in double, sums in order of distance;
 * tolerances are compared in float, so that 0.1 x 3 is within 0.3. Threads share slices, cells and
 * directions only: same bits for every count.
 */
#include "labels.h"
#include "nearest.h"

#define COLUMNS 11

typedef struct box {
    int64_t lo[3], hi[3]; /* inclusive; lo > hi where a class is absent */
} box;

/* One direction of one pair: sorted distances with weights. */
typedef struct list {
    int64_t n;
    double *d;
    double *w; /* NULL: all 1 */
    double total;
    void *memory;
    ss_status status;
} list;

typedef struct job {
    ss_exec *x;
    const ss_surface_metrics_args *a;
    ss_label_rule rule;
    double spacing[3];
    int64_t n, c; /* the pair at work */
    int64_t blocks;
    box *boxes;   /* [threads][classes] */
    uint8_t *bad; /* one flag per thread, 64 bytes apart */
    box at;       /* the pair's bounding box */
    ss_bits mask[2];
    ss_bits surface[2];
    ss_cloud cloud[2];
    ss_status status[2];
    list out[2];
    char *room; /* of nearest_search, one per thread */
    int64_t room_size;
} job;

/* ---- bounding boxes ------------------------------------------------------------------------- */

static void grow(box *b, int64_t z, int64_t y, int64_t x0, int64_t x1) {
    const int64_t lo[3] = {z, y, x0};
    const int64_t hi[3] = {z, y, x1};
    for (int k = 0; k < 3; ++k) {
        b->lo[k] = lo[k] < b->lo[k] ? lo[k] : b->lo[k];
        b->hi[k] = hi[k] > b->hi[k] ? hi[k] : b->hi[k];
    }
}

/* Voxels f..e-1 of the case, all in one row, have the labels p and g. */
static void grow_run(const job *j, box *boxes, unsigned p, unsigned g, int64_t f, int64_t e) {
    const int64_t *s = j->a->y.shape;
    const unsigned first = (unsigned)j->a->first;
    if ((p < first || p == SS_NO_LABEL) && (g < first || g == SS_NO_LABEL)) {
        return;
    }
    int64_t row = f / s[3];
    int64_t x = f - row * s[3];
    if (p >= first && p != SS_NO_LABEL) {
        grow(&boxes[p], row / s[2], row % s[2], x, x + e - f - 1);
    }
    if (g != p && g >= first && g != SS_NO_LABEL) {
        grow(&boxes[g], row / s[2], row % s[2], x, x + e - f - 1);
    }
}

static void find_boxes(void *ctx, int64_t begin, int64_t end, int32_t thread) {
    const job *j = ctx;
    const int64_t *s = j->a->y.shape;
    const int64_t size = s[1] * s[2] * s[3];
    box *boxes = j->boxes + thread * j->rule.classes;
    uint16_t p[SS_LABEL_BLOCK];
    uint16_t g[SS_LABEL_BLOCK];
    uint64_t bits[SS_LABEL_BLOCK / 64];
    for (int64_t b = begin; b < end; ++b) {
        int64_t at = b * SS_LABEL_BLOCK;
        int64_t n = size - at < SS_LABEL_BLOCK ? size - at : SS_LABEL_BLOCK;
        if (ss_load_pair(&j->a->y_pred, &j->a->y, j->n * size + at, n, &j->rule, p, g)) {
            j->bad[64 * thread] = 1;
            continue;
        }
        int64_t words = ss_label_edges(p, g, n, bits);
        for (int64_t i = (s[3] - at % s[3]) % s[3]; i < n; i += s[3]) {
            bits[i / 64] |= (uint64_t)1 << (i % 64); /* runs end with their row */
        }
        int64_t run = 0;
        bits[0] &= ~(uint64_t)1;
        for (int64_t w = 0; w < words; ++w) {
            for (uint64_t left = bits[w]; left; left &= left - 1) {
                int64_t e = 64 * w + ss_lowest_bit(left);
                grow_run(j, boxes, p[run], g[run], at + run, at + e);
                run = e;
            }
        }
        grow_run(j, boxes, p[run], g[run], at + run, at + n);
    }
}

/* ---- masks and surfaces as bits ------------------------------------------------------------- */

/* Bit 1 + x - lo of row (1 + z - lo, 1 + y - lo); a margin of one voxel is background. */
static void fill_masks(void *ctx, int64_t begin, int64_t end, int32_t thread) {
    const job *j = ctx;
    const int64_t *s = j->a->y.shape;
    const int64_t width = j->at.hi[2] - j->at.lo[2] + 1;
    const int64_t words = j->mask[0].words;
    uint16_t p[SS_LABEL_BLOCK];
    uint16_t g[SS_LABEL_BLOCK];
    uint8_t bytes[2][SS_LABEL_BLOCK];
    const uint16_t c = (uint16_t)j->c;
    (void)thread;
    for (int64_t r = begin; r < end; ++r) {
        int64_t z = r / (j->mask[0].h - 2);
        int64_t y = r % (j->mask[0].h - 2);
        int64_t row = ((z + 1) * j->mask[0].h + y + 1) * words;
        int64_t from = ((j->n * s[1] + z + j->at.lo[0]) * s[2] + y + j->at.lo[1]) * s[3];
        for (int64_t w = 0; w < words; w += SS_LABEL_BLOCK / 64) {
            int64_t k0 = 64 * w;
            int64_t k1 = k0 + SS_LABEL_BLOCK < 64 * words ? k0 + SS_LABEL_BLOCK : 64 * words;
            int64_t v0 = k0 > 1 ? k0 : 1;
            int64_t n = (k1 < width + 1 ? k1 : width + 1) - v0;
            memset(bytes[0], 0, (size_t)(k1 - k0));
            memset(bytes[1], 0, (size_t)(k1 - k0));
            if (n > 0) {
                (void)ss_load_pair(&j->a->y_pred, &j->a->y, from + j->at.lo[2] + v0 - 1, n,
                                   &j->rule, p, g);
                uint8_t *restrict bp = bytes[0] + (v0 - k0);
                uint8_t *restrict bg = bytes[1] + (v0 - k0);
                SS_SIMD
                for (int64_t i = 0; i < n; ++i) {
                    bp[i] = p[i] == c;
                    bg[i] = g[i] == c;
                }
            }
            for (int64_t k = 0; k < (k1 - k0) / 64; ++k) {
                j->mask[0].row[row + w + k] = ss_pack64(bytes[0] + 64 * k);
                j->mask[1].row[row + w + k] = ss_pack64(bytes[1] + 64 * k);
            }
        }
    }
}

/* Word w of a row moved by one voxel: bit x takes the value of x + 1, or of x - 1. */
static uint64_t next_voxel(const uint64_t *row, int64_t w, int64_t words) {
    return row[w] >> 1 | (w + 1 < words ? row[w + 1] << 63 : 0);
}

static uint64_t previous_voxel(const uint64_t *row, int64_t w) {
    return row[w] << 1 | (w > 0 ? row[w - 1] >> 63 : 0);
}

/* A voxel is on the surface if not all of its face neighbours are in the mask. */
static void voxel_row(const ss_bits *m, int64_t z, int64_t y, int dims, uint64_t *out) {
    const uint64_t *row = m->row + (z * m->h + y) * m->words;
    const int64_t up = m->words;
    const int64_t front = m->h * m->words;
    for (int64_t w = 0; w < m->words; ++w) {
        uint64_t inner = next_voxel(row, w, m->words) & previous_voxel(row, w);
        inner &= row[w - up] & row[w + up];
        if (dims == 3) {
            inner &= row[w - front] & row[w + front];
        }
        out[w] = row[w] & ~inner;
    }
}

/* Bit x of row (z, y) is the point between the voxels z, z + 1; y, y + 1; x, x + 1. */
static void point_row(const ss_bits *m, int64_t z, int64_t y, int dims, uint64_t *out) {
    const uint64_t *row = m->row + (z * m->h + y) * m->words;
    for (int64_t w = 0; w < m->words; ++w) {
        uint64_t any = 0;
        uint64_t all = ~(uint64_t)0;
        for (int k = 0; k < (dims == 3 ? 4 : 2); ++k) {
            const uint64_t *r = row + ((k & 1) + (k >> 1) * m->h) * m->words;
            uint64_t next = next_voxel(r, w, m->words);
            any |= r[w] | next;
            all &= r[w] & next;
        }
        out[w] = any & ~all;
    }
}

static void fill_surfaces(void *ctx, int64_t begin, int64_t end, int32_t thread) {
    const job *j = ctx;
    const int dims = (int)j->a->dims;
    (void)thread;
    for (int64_t r = begin; r < end; ++r) {
        for (int side = 0; side < 2; ++side) {
            const ss_bits *m = &j->mask[side];
            uint64_t *out = j->surface[side].row + r * m->words;
            int64_t z = r / m->h;
            int64_t y = r % m->h;
            int last = z == m->d - 1 || y == m->h - 1;
            if (j->a->areas.data && !last && (dims == 3 || z == 1)) {
                point_row(m, z, y, dims, out);
            } else if (!j->a->areas.data && !last && z > 0 && y > 0) {
                voxel_row(m, z, y, dims, out);
            } else {
                memset(out, 0, (size_t)m->words * sizeof *out);
            }
        }
    }
}

static void weigh(const job *j, int side) {
    const ss_bits *m = &j->mask[side];
    const ss_cloud *c = &j->cloud[side];
    const double *areas = j->a->areas.data;
    const int corners = j->a->dims == 3 ? 8 : 4;
    for (int64_t k = 0; k < c->cells; ++k) {
        for (int64_t i = c->start[k]; i < c->start[k] + c->count[k]; ++i) {
            unsigned code = 0; /* the first corner in memory order is the highest bit */
            for (int b = 0; b < corners; ++b) {
                int64_t z = (int64_t)c->at[0][i] + (b >> 2);
                int64_t y = (int64_t)c->at[1][i] + (b >> 1 & 1);
                int64_t x = (int64_t)c->at[2][i] + (b & 1);
                uint64_t word = m->row[(z * m->h + y) * m->words + x / 64];
                code = code << 1 | (unsigned)(word >> (x % 64) & 1);
            }
            c->weight[i] = areas[code];
        }
    }
}

static void build_clouds(void *ctx, int64_t begin, int64_t end, int32_t thread) {
    job *j = ctx;
    (void)thread;
    for (int64_t side = begin; side < end; ++side) {
        int weighted = j->a->areas.data != NULL;
        ss_exec own = *j->x; /* room for a sentence of this thread's own */
        j->status[side] = SS_CPU(cloud_build)(&own, &j->surface[side], weighted, &j->cloud[side]);
        if (weighted && j->status[side] == SS_OK) {
            weigh(j, (int)side);
        }
    }
}

static void search(void *ctx, int64_t begin, int64_t end, int32_t thread) {
    const job *j = ctx;
    const int64_t first = j->cloud[0].cells;
    void *room = j->room + thread * j->room_size;
    if (begin < first) {
        SS_CPU(nearest_search)(&j->cloud[0], &j->cloud[1], j->spacing, begin,
                               end < first ? end : first, room);
    }
    if (end > first) {
        SS_CPU(nearest_search)(&j->cloud[1], &j->cloud[0], j->spacing,
                               begin > first ? begin - first : 0, end - first, room);
    }
}

/* ---- sorted lists and what is read from them ------------------------------------------------ */

#define DIGIT 11
#define DIGITS 6
#define BUCKETS (1 << DIGIT)

/* Radix sort by the bits of non-negative doubles, which order as the numbers do; stable. Squared
 * distances in voxels are small integers: most of their digits are all zero and skipped. */
static void sort_pairs(int64_t n, double **d, double **w, double *d2, double *w2, int64_t *count) {
    memset(count, 0, sizeof(int64_t) * DIGITS * BUCKETS);
    for (int64_t i = 0; i < n; ++i) {
        uint64_t key;
        memcpy(&key, *d + i, sizeof key);
        for (int k = 0; k < DIGITS; ++k) {
            ++count[k * BUCKETS + (int64_t)(key >> (k * DIGIT) & (BUCKETS - 1))];
        }
    }
    for (int k = 0; k < DIGITS; ++k) {
        int64_t *c = count + k * BUCKETS;
        int64_t sum = 0;
        int64_t most = 0;
        for (int64_t b = 0; b < BUCKETS; ++b) {
            int64_t here = c[b];
            most = here > most ? here : most;
            c[b] = sum;
            sum += here;
        }
        if (most == n) {
            continue;
        }
        for (int64_t i = 0; i < n; ++i) {
            uint64_t key;
            memcpy(&key, *d + i, sizeof key);
            int64_t to = c[key >> (k * DIGIT) & (BUCKETS - 1)]++;
            d2[to] = (*d)[i];
            if (*w) {
                w2[to] = (*w)[i];
            }
        }
        double *swap = *d;
        *d = d2;
        d2 = swap;
        if (*w) {
            swap = *w;
            *w = w2;
            w2 = swap;
        }
    }
}

static void sort_side(void *ctx, int64_t begin, int64_t end, int32_t thread) {
    job *j = ctx;
    (void)thread;
    for (int64_t side = begin; side < end; ++side) {
        const ss_cloud *c = &j->cloud[side];
        list *out = &j->out[side];
        ss_exec own = *j->x;
        double *d = ss_scratch(&own, 4 * c->points + DIGITS * BUCKETS, sizeof(double));
        out->memory = d;
        out->status = d ? SS_OK : SS_NO_MEMORY;
        if (!d) {
            continue;
        }
        out->n = c->points;
        out->d = d;
        out->w = c->weight ? d + 2 * c->points : NULL;
        int64_t n = 0;
        for (int64_t k = 0; k < c->cells; ++k) {
            size_t bytes = (size_t)c->count[k] * sizeof(double);
            memcpy(out->d + n, c->distance + c->start[k], bytes);
            if (out->w) {
                memcpy(out->w + n, c->weight + c->start[k], bytes);
            }
            n += c->count[k];
        }
        sort_pairs(n, &out->d, &out->w, d + n, d + 3 * n, (int64_t *)(void *)(d + 4 * n));
        for (int64_t i = 0; i < n; ++i) {
            out->d[i] = sqrt(out->d[i]);
            out->total += out->w ? out->w[i] : 1.0;
        }
    }
}

static double interpolate(double a, double b, double t) {
    return t < 0.5 ? a + (b - a) * t : b - (b - a) * (1.0 - t);
}

/* Percentile of the union of two sorted lists; the second one may be empty. */
static double percentile_of(const double *a, int64_t na, const double *b, int64_t nb, double p) {
    double rank = (double)(na + nb - 1) * (p / 100.0);
    int64_t k = (int64_t)rank;
    double here = 0.0;
    double next = 0.0;
    int64_t i = 0;
    int64_t m = 0;
    for (int64_t r = 0; r <= k + 1 && r < na + nb; ++r) {
        here = r <= k ? (m < nb && (i >= na || b[m] < a[i]) ? b[m] : a[i]) : here;
        next = m < nb && (i >= na || b[m] < a[i]) ? b[m++] : a[i++];
    }
    return interpolate(here, next, rank - (double)k);
}

static double weighted_percentile(const list *l, double p) {
    double sum = 0.0;
    for (int64_t i = 0; i < l->n; ++i) {
        sum += l->w[i];
        if (sum / l->total >= p / 100.0) {
            return l->d[i];
        }
    }
    return l->d[l->n - 1];
}

static void summarise(const job *j, double *out) {
    const double p = j->a->percentile;
    const float within = j->a->tolerance.n ? (float)j->a->tolerance.at[j->c] : 0.0f;
    for (int side = 0; side < 2; ++side) {
        const list *l = &j->out[side];
        double sum = 0.0;
        double near = 0.0;
        for (int64_t i = 0; i < l->n; ++i) {
            double w = l->w ? l->w[i] : 1.0;
            sum += w * l->d[i];
            near += (float)l->d[i] <= within ? w : 0.0;
        }
        out[side] = l->total;
        out[2 + side] = sum / l->total;
        out[4 + side] = l->d[l->n - 1];
        out[6 + side] = l->w ? weighted_percentile(l, p) : percentile_of(l->d, l->n, NULL, 0, p);
        out[9 + side] = near;
    }
    const list *a = &j->out[0];
    const list *g = &j->out[1];
    out[8] = a->w ? (out[6] > out[7] ? out[6] : out[7]) : percentile_of(a->d, a->n, g->d, g->n, p);
}

/* ---- one pair, one case, all ---------------------------------------------------------------- */

static double weight_of(const job *j, int side) {
    const ss_cloud *c = &j->cloud[side];
    double sum = c->weight ? 0.0 : (double)c->points;
    for (int64_t k = 0; c->weight && k < c->cells; ++k) {
        for (int64_t i = 0; i < c->count[k]; ++i) {
            sum += c->weight[c->start[k] + i];
        }
    }
    return sum;
}

static ss_status measure(job *j, double *out) {
    /* One direction per thread, unless starting a thread costs more than a direction. */
    const int64_t words = j->mask[0].d * j->mask[0].h * j->mask[0].words;
    ss_parallel_for(j->x, 2, words < 8192 ? 2 : 1, build_clouds, j);
    if (j->status[0] != SS_OK || j->status[1] != SS_OK) {
        return ss_fail(j->x, SS_NO_MEMORY, "could not allocate scratch memory");
    }
    out[0] = weight_of(j, 0);
    out[1] = weight_of(j, 1);
    if (!j->cloud[0].points || !j->cloud[1].points) {
        return SS_OK;
    }
    const int64_t cells = j->cloud[0].cells + j->cloud[1].cells;
    const int64_t grain = 16;
    int64_t most = SS_CPU(nearest_room)(&j->cloud[0]);
    int64_t other = SS_CPU(nearest_room)(&j->cloud[1]);
    j->room_size = ((most > other ? most : other) + 63) / 64 * 64;
    j->room = ss_scratch(j->x, ss_parallel_threads(j->x, cells, grain) * j->room_size, 1);
    if (!j->room) {
        return SS_NO_MEMORY;
    }
    ss_parallel_for(j->x, cells, grain, search, j);
    ss_parallel_for(j->x, 2, j->cloud[0].points + j->cloud[1].points < 8192 ? 2 : 1, sort_side, j);
    if (j->out[0].status != SS_OK || j->out[1].status != SS_OK) {
        return ss_fail(j->x, SS_NO_MEMORY, "could not allocate scratch memory");
    }
    summarise(j, out);
    return SS_OK;
}

static ss_status run_pair(job *j, double *out) {
    if (j->at.lo[0] > j->at.hi[0]) {
        out[0] = out[1] = 0.0; /* absent from both */
        return SS_OK;
    }
    ss_bits shape = {NULL, j->at.hi[0] - j->at.lo[0] + 3, j->at.hi[1] - j->at.lo[1] + 3,
                     (j->at.hi[2] - j->at.lo[2] + 3 + 63) / 64};
    const int64_t rows = shape.d * shape.h;
    uint64_t *bits = ss_scratch(j->x, 4 * rows * shape.words, sizeof(uint64_t));
    if (!bits) {
        return SS_NO_MEMORY;
    }
    memset(bits, 0, (size_t)(2 * rows * shape.words) * sizeof(uint64_t));
    for (int side = 0; side < 2; ++side) {
        j->mask[side] = j->surface[side] = shape;
        j->mask[side].row = bits + side * rows * shape.words;
        j->surface[side].row = bits + (2 + side) * rows * shape.words;
        memset(&j->cloud[side], 0, sizeof j->cloud[side]);
        memset(&j->out[side], 0, sizeof j->out[side]);
    }
    j->room = NULL;
    ss_parallel_for(j->x, (shape.d - 2) * (shape.h - 2), 64, fill_masks, j);
    ss_parallel_for(j->x, rows, 512, fill_surfaces, j);
    ss_status status = measure(j, out);
    for (int side = 0; side < 2; ++side) {
        SS_CPU(cloud_free)(&j->cloud[side]);
        ss_scratch_free(j->out[side].memory);
    }
    ss_scratch_free(j->room);
    ss_scratch_free(bits);
    return status;
}

static ss_status run_case(job *j, double *out) {
    const int64_t classes = j->rule.classes;
    const int64_t grain = 8;
    int32_t threads = ss_parallel_threads(j->x, j->blocks, grain);
    for (int64_t k = 0; k < threads * classes; ++k) {
        j->boxes[k] = (box){{INT64_MAX, INT64_MAX, INT64_MAX}, {-1, -1, -1}};
    }
    memset(j->bad, 0, (size_t)threads * 64);
    ss_parallel_for(j->x, j->blocks, grain, find_boxes, j);
    int bad = 0;
    for (int32_t t = 0; t < threads; ++t) {
        bad |= j->bad[64 * t];
    }
    if (bad) {
        ss_status status = ss_check_labels(j->x, &j->a->y_pred, "y_pred", &j->rule);
        return status == SS_OK ? ss_check_labels(j->x, &j->a->y, "y", &j->rule) : status;
    }
    for (int64_t k = 0; k < classes * COLUMNS; ++k) {
        out[k] = NAN;
    }
    ss_status status = SS_OK;
    for (j->c = j->a->first; j->c < classes && status == SS_OK; ++j->c) {
        j->at = j->boxes[j->c];
        for (int32_t t = 1; t < threads; ++t) {
            const box *b = &j->boxes[t * classes + j->c];
            for (int k = 0; k < 3; ++k) {
                j->at.lo[k] = b->lo[k] < j->at.lo[k] ? b->lo[k] : j->at.lo[k];
                j->at.hi[k] = b->hi[k] > j->at.hi[k] ? b->hi[k] : j->at.hi[k];
            }
        }
        status = run_pair(j, out + j->c * COLUMNS);
    }
    return status;
}

static ss_status check_numbers(ss_exec *x, const ss_surface_metrics_args *a) {
    const int64_t n = a->spacing.n;
    if (n != 3 && n != 3 * a->y.shape[0]) {
        return ss_fail(x, SS_INVALID, "spacing: expected 3 numbers, or 3 per case (%lld), got %lld",
                       (long long)(3 * a->y.shape[0]), (long long)n);
    }
    for (int64_t i = 0; i < n; ++i) {
        /* The range keeps squares finite and normal. */
        if (!(a->spacing.at[i] >= 1e-100 && a->spacing.at[i] <= 1e100)) {
            return ss_fail(x, SS_INVALID, "spacing: expected positive finite numbers, got %g",
                           a->spacing.at[i]);
        }
    }
    if (a->tolerance.n != 0 && a->tolerance.n != a->num_classes) {
        return ss_fail(x, SS_INVALID, "tolerance: expected one number per class (%lld), got %lld",
                       (long long)a->num_classes, (long long)a->tolerance.n);
    }
    for (int64_t i = 0; i < a->tolerance.n; ++i) {
        if (!(a->tolerance.at[i] >= 0.0 && a->tolerance.at[i] <= 1e300)) {
            return ss_fail(x, SS_INVALID, "tolerance: expected finite numbers >= 0, got %g",
                           a->tolerance.at[i]);
        }
    }
    if (a->dims == 2 && a->y.shape[1] != 1) {
        return ss_fail(x, SS_INVALID, "y: expected D = 1 for dims = 2, got %lld",
                       (long long)a->y.shape[1]);
    }
    return SS_OK;
}

ss_status SS_CPU(surface_metrics)(ss_exec *x, const ss_surface_metrics_args *a) {
    const int64_t *s = a->y.shape;
    ss_status status = check_numbers(x, a);
    if (status != SS_OK) {
        return status;
    }
    job j = {.x = x, .a = a};
    j.rule = (ss_label_rule){a->num_classes, a->ignore_index, (int32_t)a->has_ignore};
    j.blocks = (s[1] * s[2] * s[3] + SS_LABEL_BLOCK - 1) / SS_LABEL_BLOCK;
    int32_t threads = ss_parallel_threads(x, j.blocks, 8);
    j.boxes = ss_scratch(x, threads * a->num_classes, sizeof(box));
    j.bad = ss_scratch(x, threads, 64);
    status = j.boxes && j.bad ? SS_OK : SS_NO_MEMORY;
    for (j.n = 0; j.n < s[0] && status == SS_OK; ++j.n) {
        memcpy(j.spacing, a->spacing.at + (a->spacing.n > 3 ? 3 * j.n : 0), sizeof j.spacing);
        status = run_case(&j, (double *)a->stats.data + j.n * a->num_classes * COLUMNS);
    }
    ss_scratch_free(j.bad);
    ss_scratch_free(j.boxes);
    return status;
}
