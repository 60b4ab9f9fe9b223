/* SPDX-License-Identifier: Apache-2.0
 *
 * next_click.c: where a simulated user would click next, per sample and class (row).
 *
 *     FN = T & ~G & R,  FP = ~T & G & R;  if both are empty, without R; if still empty: no click
 *     RITM rule:   d2 = squared distance to the nearest voxel outside the region (the patch's
 * outside included), m2 = max d2; positive iff m2_FN > m2_FP; candidates 4 d2 > m2 random rule:
 * candidates FN | FP; positive iff the click is in FN click = candidate number floor(n r / 2^64) in
 * C order, r = philox64(seed; counter)
 *
 * masks [N, D, H, W] -> point [N, 3], label [N] (1, 0; -1 and zeros for no click). dims 2: D, of
 * size 1, is no axis. One sweep reads 1 byte per voxel and mask and finds the counts and the box of
 * both regions; only the boxes are transformed, and the second one only if its inscribed ball could
 * be the larger one. Regions of depth 3 or less, such as rims and specks, are not transformed but
 * measured by bits (thin.h). Numerics: integers. Deterministic: counts, maxima and C order need no
 * order.
 */
#include "edt.h"
#include "extent.h"
#include "thin.h"

#define VOXELS 16384 /* per item when distances are compared */

typedef struct patch {
    ss_exec *x;
    const ss_next_click_args *a;
    int64_t row;
    int64_t lines, width, items;
    const uint8_t *target, *current, *region;
    int64_t current_step, region_step; /* per line; 0: the same line again and again */
    uint8_t *blank;                    /* a line of zeros, then a line of ones */
    uint8_t *columns;                  /* per thread: FN and FP counts of the columns */
    extent *error;                     /* [items][2]: FN, FP */
} patch;

/* Adds one line's errors to the column counters; bit 0: it has FN, bit 1: it has FP. */
static int add_line(const uint8_t *restrict t, const uint8_t *restrict g, const uint8_t *restrict r,
                    int64_t width, uint8_t *restrict fn, uint8_t *restrict fp) {
    uint8_t any_fn = 0, any_fp = 0;
    _Pragma("omp simd reduction(| : any_fn, any_fp)") for (int64_t w = 0; w < width; ++w) {
        uint8_t in_t = t[w] != 0, in_g = g[w] != 0, in_r = r[w] != 0;
        uint8_t wrong = (uint8_t)((in_t ^ in_g) & in_r);
        uint8_t missed = wrong & in_t, extra = wrong & in_g;
        fn[w] = (uint8_t)(fn[w] + missed);
        fp[w] = (uint8_t)(fp[w] + extra);
        any_fn |= missed;
        any_fp |= extra;
    }
    return any_fn | any_fp << 1;
}

/* False only where target and current mask agree; equal masks are the rule, and bytes tell. */
static int may_differ(const patch *p, int64_t begin, int64_t end) {
    const int64_t n = (end - begin) * p->width;
    const uint8_t *t = p->target + begin * p->width;
    return p->current_step ? ss_differ(t, p->current + begin * p->width, n) : ss_any(t, n);
}

static void add_lines(const patch *p, int64_t begin, int64_t end, uint8_t *fn, uint8_t *fp,
                      extent e[2]) {
    for (int64_t line = begin; line < end; ++line) {
        int found = add_line(p->target + line * p->width, p->current + line * p->current_step,
                             p->region + line * p->region_step, p->width, fn, fp);
        for (int32_t k = 0; k < 2; ++k) {
            if (found >> k & 1) {
                extent_line(&e[k], line, p->a->target.shape[2]);
            }
        }
    }
}

static void scan(void *ctx, int64_t begin, int64_t end, int32_t thread) {
    const patch *p = ctx;
    uint8_t *fn = p->columns + thread * 2 * p->width, *fp = fn + p->width;
    for (int64_t item = begin; item < end; ++item) {
        int64_t first = item * SS_LINES;
        int64_t last = first + SS_LINES < p->lines ? first + SS_LINES : p->lines;
        extent e[2] = {extent_empty(), extent_empty()};
        memset(fn, 0, (size_t)p->width * 2);
        for (int64_t line = first; line < last; line += SS_SKIP) {
            int64_t end_line = line + SS_SKIP < last ? line + SS_SKIP : last;
            if (may_differ(p, line, end_line)) {
                add_lines(p, line, end_line, fn, fp, e);
            }
        }
        extent_columns(&e[0], fn, p->width);
        extent_columns(&e[1], fp, p->width);
        memcpy(&p->error[2 * item], e, sizeof e);
    }
}

/* 1 in FN, 2 in FP, 0 elsewhere */
static int error_at(const patch *p, int64_t line, int64_t w) {
    int t = p->target[line * p->width + w] != 0;
    int g = p->current[line * p->current_step + w] != 0;
    int r = p->region[line * p->region_step + w] != 0;
    return r ? (t & !g) | (g & !t) << 1 : 0;
}

static void put_click(const patch *p, int64_t d, int64_t h, int64_t w, int32_t label) {
    int64_t *point = (int64_t *)p->a->point.data + 3 * p->row;
    point[0] = d;
    point[1] = h;
    point[2] = w;
    ((int32_t *)p->a->label.data)[p->row] = label;
}

static int64_t pick(const patch *p, int64_t n) {
    const int64_t *c = (const int64_t *)p->a->counter.data + 4 * p->row;
    uint64_t r = ss_philox64((uint64_t)p->a->seed, (uint32_t)c[0], (uint32_t)c[1], (uint32_t)c[2],
                             (uint32_t)c[3]);
    return (int64_t)ss_pick((uint64_t)n, r);
}

static void random_click(const patch *p, int64_t n) {
    int64_t left = pick(p, n), item = 0;
    for (;; ++item) {
        int64_t here = p->error[2 * item].count + p->error[2 * item + 1].count;
        if (left < here) {
            break;
        }
        left -= here;
    }
    const int64_t height = p->a->target.shape[2];
    for (int64_t line = item * SS_LINES; line < p->lines; ++line) {
        for (int64_t w = 0; w < p->width; ++w) {
            int error = error_at(p, line, w);
            if (error && left-- == 0) {
                put_click(p, line / height, line % height, w, error == 1);
                return;
            }
        }
    }
}

/* ---- RITM ----------------------------------------------------------------------------------- */

/* One error region, cut out by its box: what is outside the box is outside the region. */
typedef struct ball {
    const patch *p;
    int which; /* 1 FN, 2 FP */
    int64_t lo[3], shape[3];
    int64_t voxels, items;
    uint8_t *mask;
    int32_t *d2;
    int32_t m2;
    int64_t *count; /* per item: its largest d2, then its number of candidates */
    thin thin;
    int is_thin; /* then `thin` has what is needed, and there is no mask, d2 or count */
} ball;

static ball ball_of(const patch *p, const extent *e, int which) {
    ball r = {.p = p, .which = which, .voxels = e->count > 0};
    for (int32_t axis = 0; axis < 3 && e->count > 0; ++axis) {
        r.lo[axis] = e->lo[axis];
        r.shape[axis] = e->hi[axis] - e->lo[axis] + 1;
        r.voxels *= r.shape[axis];
    }
    r.items = ss_items(r.voxels, VOXELS);
    return r;
}

/* No ball inside the box has a larger squared radius than this. */
static int64_t ball_bound(const ball *r) {
    int64_t least = r->shape[1] < r->shape[2] ? r->shape[1] : r->shape[2];
    if (r->p->a->dims == 3 && r->shape[0] < least) {
        least = r->shape[0];
    }
    int64_t radius = (least + 1) / 2;
    return radius * radius;
}

/* n voxels of line i of the box, from its column w on: 1 in the region, else 0. */
static void region_line(const ball *r, int64_t i, int64_t w, int64_t n, uint8_t *restrict out) {
    const patch *p = r->p;
    const uint8_t want = r->which == 1;
    int64_t d = r->lo[0] + i / r->shape[1], h = r->lo[1] + i % r->shape[1];
    int64_t line = d * p->a->target.shape[2] + h;
    const uint8_t *restrict t = p->target + line * p->width + r->lo[2] + w;
    const uint8_t *restrict g = p->current + line * p->current_step + r->lo[2] + w;
    const uint8_t *restrict ok = p->region + line * p->region_step + r->lo[2] + w;
    SS_SIMD
    for (int64_t k = 0; k < n; ++k) {
        uint8_t in_t = t[k] != 0, in_g = g[k] != 0;
        out[k] = (uint8_t)((in_t ^ in_g) & (in_t == want) & (ok[k] != 0));
    }
}

static void fill_mask(void *ctx, int64_t begin, int64_t end, int32_t thread) {
    const ball *r = ctx;
    (void)thread;
    for (int64_t i = begin; i < end; ++i) {
        region_line(r, i, 0, r->shape[2], r->mask + i * r->shape[2]);
    }
}

static void fill_bits(void *ctx, int64_t begin, int64_t end, int32_t thread) {
    const ball *r = ctx;
    uint8_t bytes[64];
    (void)thread;
    for (int64_t i = begin; i < end; ++i) {
        uint64_t *bits = thin_line(&r->thin, i, 0);
        for (int64_t k = 0; k < r->thin.words; ++k) {
            int64_t n = r->shape[2] - 64 * k < 64 ? r->shape[2] - 64 * k : 64;
            region_line(r, i, 64 * k, n, bytes);
            bits[k] = pack64(bytes, n);
        }
        thin_shrink(&r->thin, i);
    }
}

/* Items of lines; one ends at its first deep line, as then nothing else matters. */
static void item_depths(void *ctx, int64_t begin, int64_t end, int32_t thread) {
    const ball *r = ctx;
    const int64_t lines = r->shape[0] * r->shape[1];
    (void)thread;
    for (int64_t item = begin; item < end; ++item) {
        int64_t last = (item + 1) * SS_LINES < lines ? (item + 1) * SS_LINES : lines;
        for (int64_t i = item * SS_LINES; i < last; ++i) {
            r->thin.depth[i] = thin_depth(&r->thin, i, r->thin.count + i * THIN_COUNTS);
            if (r->thin.depth[i] == THIN_DEEP) {
                break;
            }
        }
    }
}

static void thin_free(ball *r) {
    ss_scratch_free(r->thin.bits);
    ss_scratch_free(r->thin.count);
    ss_scratch_free(r->thin.depth);
    r->thin.bits = NULL;
    r->thin.count = NULL;
    r->thin.depth = NULL;
}

/* Finds m2 by bits, if the region is thin. */
static ss_status thin_measure(ball *r) {
    ss_exec *x = r->p->x;
    const int64_t lines = r->shape[0] * r->shape[1];
    r->thin.words = ss_items(r->shape[2], 64);
    memcpy(r->thin.shape, r->shape, sizeof r->shape);
    thin_plan(&r->thin, r->p->a->dims);
    r->thin.bits = ss_scratch(x, lines * r->thin.words, (THIN_RADIUS + 1) * sizeof(uint64_t));
    r->thin.count = ss_scratch(x, lines, THIN_COUNTS * sizeof(int32_t));
    r->thin.depth = ss_scratch(x, lines, 1);
    if (!r->thin.bits || !r->thin.count || !r->thin.depth) {
        return SS_NO_MEMORY;
    }
    ss_parallel_for(x, lines, 128, fill_bits, r);
    ss_parallel_for(x, ss_items(lines, SS_LINES), 1, item_depths, r);
    uint8_t most = 0;
    for (int64_t i = 0; i < lines && most < THIN_DEEP; ++i) {
        most = r->thin.depth[i] > most ? r->thin.depth[i] : most;
    }
    r->is_thin = most < THIN_DEEP;
    if (r->is_thin) {
        r->m2 = most;
    } else {
        thin_free(r);
    }
    return SS_OK;
}

static void item_maxima(void *ctx, int64_t begin, int64_t end, int32_t thread) {
    const ball *r = ctx;
    (void)thread;
    for (int64_t item = begin; item < end; ++item) {
        const int32_t *d2 = r->d2 + item * VOXELS;
        int64_t n = r->voxels - item * VOXELS < VOXELS ? r->voxels - item * VOXELS : VOXELS;
        int32_t most = 0;
        _Pragma("omp simd reduction(max : most)") for (int64_t i = 0; i < n; ++i) {
            most = d2[i] > most ? d2[i] : most;
        }
        r->count[item] = most;
    }
}

static void item_candidates(void *ctx, int64_t begin, int64_t end, int32_t thread) {
    const ball *r = ctx;
    const int32_t quarter = r->m2 / 4; /* 4 d2 > m2 iff d2 > floor(m2 / 4) */
    (void)thread;
    for (int64_t item = begin; item < end; ++item) {
        const int32_t *d2 = r->d2 + item * VOXELS;
        int64_t n = r->voxels - item * VOXELS < VOXELS ? r->voxels - item * VOXELS : VOXELS;
        int32_t count = 0;
        _Pragma("omp simd reduction(+ : count)") for (int64_t i = 0; i < n; ++i) {
            count += d2[i] > quarter;
        }
        r->count[item] = count;
    }
}

static void ball_free(ball *r) {
    ss_scratch_free(r->mask);
    ss_scratch_free(r->d2);
    ss_scratch_free(r->count);
    thin_free(r);
}

/* Transforms the region and finds m2. */
static ss_status ball_measure(ball *r) {
    ss_exec *x = r->p->x;
    for (int32_t axis = 0; axis < 3; ++axis) {
        if (r->shape[axis] > SS_EDT_SIDE) {
            return ss_fail(x, SS_INVALID, "target: expected errors within %d voxels, got %lld",
                           SS_EDT_SIDE, (long long)r->shape[axis]);
        }
    }
    ss_status status = thin_measure(r);
    if (status != SS_OK || r->is_thin) {
        return status;
    }
    r->mask = ss_scratch(x, r->voxels, 1);
    r->d2 = ss_scratch(x, r->voxels, sizeof(int32_t));
    r->count = ss_scratch(x, r->items, sizeof(int64_t));
    if (!r->mask || !r->d2 || !r->count) {
        return SS_NO_MEMORY;
    }
    ss_parallel_for(x, r->shape[0] * r->shape[1], 128, fill_mask, r);
    status = SS_CPU(edt_unit)(x, r->mask, r->shape, r->p->a->dims == 3 ? 1 : 2, r->d2);
    if (status != SS_OK) {
        return status;
    }
    ss_parallel_for(x, r->items, 2, item_maxima, r);
    for (int64_t i = 0; i < r->items; ++i) {
        r->m2 = r->count[i] > r->m2 ? (int32_t)r->count[i] : r->m2;
    }
    return SS_OK;
}

static void thin_click(const ball *r, int32_t label) {
    const int32_t quarter = r->m2 / 4; /* 0, 1 or 2 */
    const int64_t lines = r->shape[0] * r->shape[1];
    const int32_t *count = r->thin.count + quarter;
    int64_t n = 0;
    for (int64_t i = 0; i < lines; ++i) {
        n += count[i * THIN_COUNTS];
    }
    int64_t left = pick(r->p, n), i = 0;
    for (; left >= count[i * THIN_COUNTS]; ++i) {
        left -= count[i * THIN_COUNTS];
    }
    put_click(r->p, r->lo[0] + i / r->shape[1], r->lo[1] + i % r->shape[1],
              r->lo[2] + thin_column(&r->thin, i, quarter, left), label);
}

static void ball_click(ball *r, int32_t label) {
    if (r->is_thin) {
        thin_click(r, label);
        return;
    }
    const int32_t quarter = r->m2 / 4;
    ss_parallel_for(r->p->x, r->items, 2, item_candidates, r);
    int64_t n = 0;
    for (int64_t i = 0; i < r->items; ++i) {
        n += r->count[i];
    }
    int64_t left = pick(r->p, n), item = 0;
    for (; left >= r->count[item]; ++item) {
        left -= r->count[item];
    }
    for (int64_t i = item * VOXELS; i < r->voxels; ++i) {
        if (r->d2[i] > quarter && left-- == 0) {
            put_click(r->p, r->lo[0] + i / r->shape[2] / r->shape[1],
                      r->lo[1] + i / r->shape[2] % r->shape[1], r->lo[2] + i % r->shape[2], label);
            return;
        }
    }
}

static ss_status ritm_click(const patch *p, const extent *fn, const extent *fp) {
    ball missed = ball_of(p, fn, 1), extra = ball_of(p, fp, 2);
    const int64_t missed_bound = ball_bound(&missed), extra_bound = ball_bound(&extra);
    const int missed_first = missed_bound >= extra_bound;
    ss_status status = ball_measure(missed_first ? &missed : &extra);
    int decided = missed_first ? missed.m2 > extra_bound : extra.m2 >= missed_bound;
    if (status == SS_OK && !decided) {
        status = ball_measure(missed_first ? &extra : &missed);
    }
    if (status == SS_OK) {
        int positive = missed.m2 > extra.m2;
        ball_click(positive ? &missed : &extra, positive);
    }
    ball_free(&missed);
    ball_free(&extra);
    return status;
}

/* ---- rows ----------------------------------------------------------------------------------- */

static void sum_errors(const patch *p, extent *fn, extent *fp) {
    *fn = extent_empty();
    *fp = extent_empty();
    for (int64_t i = 0; i < p->items; ++i) {
        extent_join(fn, &p->error[2 * i]);
        extent_join(fp, &p->error[2 * i + 1]);
    }
}

static ss_status click(patch *p) {
    const int64_t grain = 1 + (int64_t)(1 << 17) / (SS_LINES * p->width);
    extent fn, fp;
    ss_parallel_for(p->x, p->items, grain, scan, p);
    sum_errors(p, &fn, &fp);
    if (fn.count + fp.count == 0 && p->region_step) {
        p->region = p->blank + p->width;
        p->region_step = 0;
        ss_parallel_for(p->x, p->items, grain, scan, p);
        sum_errors(p, &fn, &fp);
    }
    if (fn.count + fp.count == 0) {
        put_click(p, 0, 0, 0, -1);
        return SS_OK;
    }
    if (p->a->ritm) {
        return ritm_click(p, &fn, &fp);
    }
    random_click(p, fn.count + fp.count);
    return SS_OK;
}

static ss_status click_row(ss_exec *x, const ss_next_click_args *a, int64_t row) {
    const int64_t *s = a->target.shape;
    patch p = {.x = x, .a = a, .row = row, .lines = s[1] * s[2], .width = s[3]};
    const int64_t start = row * p.lines * p.width;
    if (a->skip.data && ((const uint8_t *)a->skip.data)[row]) {
        put_click(&p, 0, 0, 0, -1);
        return SS_OK;
    }
    p.items = ss_items(p.lines, SS_LINES);
    p.blank = ss_scratch(x, p.width, 2);
    p.columns = ss_scratch(x, ss_parallel_threads(x, p.items, 1) * p.width, 2);
    p.error = ss_scratch(x, p.items, 2 * sizeof(extent));
    ss_status status = SS_NO_MEMORY;
    if (p.blank && p.columns && p.error) {
        memset(p.blank, 0, (size_t)p.width);
        memset(p.blank + p.width, 1, (size_t)p.width);
        p.target = (const uint8_t *)a->target.data + start;
        p.current_step = a->current.data ? p.width : 0;
        p.current = a->current.data ? (const uint8_t *)a->current.data + start : p.blank;
        p.region_step = a->region.data ? p.width : 0;
        p.region = a->region.data ? (const uint8_t *)a->region.data + start : p.blank + p.width;
        status = click(&p);
    }
    ss_scratch_free(p.blank);
    ss_scratch_free(p.columns);
    ss_scratch_free(p.error);
    return status;
}

typedef struct run {
    ss_exec x;
    ss_status status;
} run;

typedef struct job {
    const ss_next_click_args *a;
    run *rows;
} job;

static void click_rows(void *ctx, int64_t begin, int64_t end, int32_t thread) {
    const job *j = ctx;
    (void)thread;
    for (int64_t row = begin; row < end; ++row) {
        j->rows[row].status = click_row(&j->rows[row].x, j->a, row);
    }
}

ss_status SS_CPU(next_click)(ss_exec *x, const ss_next_click_args *a) {
    const int64_t rows = a->target.shape[0];
    if (a->dims == 2 && a->target.shape[1] != 1) {
        return ss_fail(x, SS_INVALID,
                       "target: expected [N, 1, H, W] for 2 dimensions, got D = %lld",
                       (long long)a->target.shape[1]);
    }
    /* With rows enough for everybody each thread takes whole rows, else all share each row. */
    const int32_t threads = ss_parallel_threads(x, INT32_MAX, 1);
    job j = {a, ss_scratch(x, rows, sizeof(run))};
    if (!j.rows) {
        return SS_NO_MEMORY;
    }
    for (int64_t row = 0; row < rows; ++row) {
        j.rows[row].x = *x;
        j.rows[row].x.threads = rows >= threads ? 1 : x->threads;
    }
    if (rows >= threads) {
        const int64_t grain = 1 + (1 << 15) / (ss_count(&a->target) / rows); /* worth a thread */
        ss_parallel_for(x, rows, grain, click_rows, &j);
    } else {
        click_rows(&j, 0, rows, 0);
    }
    ss_status status = SS_OK;
    for (int64_t row = 0; row < rows && status == SS_OK; ++row) {
        status = j.rows[row].status;
        if (status != SS_OK) {
            memcpy(x->error, j.rows[row].x.error, sizeof x->error);
        }
    }
    ss_scratch_free(j.rows);
    return status;
}
