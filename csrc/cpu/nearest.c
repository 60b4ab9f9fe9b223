/* SPDX-License-Identifier: Apache-2.0
 *
 * nearest.c: exact squared distances from every point of one surface to the nearest of another.
 *
 *     distance[i] = min over j of ((dz sz)^2 + (dy sy)^2) + (dx sx)^2,   d = q[i] - p[j]
 *
 * A distance transform would visit every voxel of the bounding box; surfaces are a few percent of
 * it. Points lie in cells of 8x8x8 with tight bounds. For a cell Q of queries, one lane loop over
 * all cells of p gives lower and upper bounds of their distance to Q; one exact query tightens the
 * upper bound; what remains is sorted by lower bound, and each query stops at the first cell that
 * cannot improve its best. Cost: O(cells^2 / lanes + points x few cells); memory: 40 bytes a point.
 * Numerics: double throughout, in the order above; bounds are computed by the same operations on
 * bounding coordinates, and rounding is monotone, so no rounded bound can exclude the nearest
 * point. The minimum does not depend on order: same bits for all threads and instruction sets.
 */
#include "nearest.h"
#include "labels.h"

#define SIDE 8

static uint64_t byte_of(const ss_bits *b, int64_t z, int64_t y, int64_t x8) {
    return b->row[(z * b->h + y) * b->words + (x8 >> 3)] >> (8 * (x8 & 7)) & 0xffu;
}

static int64_t least(int64_t a, int64_t b) {
    return a < b ? a : b;
}

/* Which of the eight cells in word w of these rows have points: most words have none. */
static uint64_t any_point(const ss_bits *b, int64_t z, int64_t y, int64_t w) {
    uint64_t any = 0;
    for (int64_t i = z; i < least(z + SIDE, b->d); ++i) {
        const uint64_t *row = b->row + i * b->h * b->words + w;
        for (int64_t j = y; j < least(y + SIDE, b->h); ++j) {
            any |= row[j * b->words];
        }
    }
    return any;
}

static void count_points(const ss_bits *b, ss_cloud *c) {
    for (int64_t i = 0; i < b->d * b->h * b->words; ++i) {
        c->points += b->row[i] ? ss_count_bits(b->row[i]) : 0;
    }
    for (int64_t z = 0; z < b->d; z += SIDE) {
        for (int64_t y = 0; y < b->h; y += SIDE) {
            for (int64_t w = 0; w < b->words; ++w) {
                for (uint64_t any = any_point(b, z, y, w); any; any >>= SIDE) {
                    c->cells += (any & 0xffu) != 0;
                }
            }
        }
    }
}

/* Appends the points of one cell behind `at`; returns how many. */
static int64_t collect_cell(const ss_bits *b, ss_cloud *c, int64_t z, int64_t y, int64_t x,
                            int64_t at) {
    int64_t n = at;
    for (int64_t i = z; i < least(z + SIDE, b->d); ++i) {
        for (int64_t j = y; j < least(y + SIDE, b->h); ++j) {
            for (uint64_t left = byte_of(b, i, j, x); left; left &= left - 1) {
                c->at[0][n] = (double)i;
                c->at[1][n] = (double)j;
                c->at[2][n] = (double)(SIDE * x + ss_lowest_bit(left));
                ++n;
            }
        }
    }
    return n - at;
}

/* Bounds of cell k, and the padding behind its points. */
static void close_cell(ss_cloud *c, int64_t k) {
    int64_t begin = c->start[k];
    int64_t end = begin + c->count[k];
    int64_t padded = (end + 7) / 8 * 8;
    for (int axis = 0; axis < 3; ++axis) {
        double lo = c->at[axis][begin];
        double hi = lo;
        for (int64_t i = begin; i < end; ++i) {
            lo = c->at[axis][i] < lo ? c->at[axis][i] : lo;
            hi = c->at[axis][i] > hi ? c->at[axis][i] : hi;
        }
        c->lo[axis][k] = lo;
        c->hi[axis][k] = hi;
        for (int64_t i = end; i < padded; ++i) {
            c->at[axis][i] = c->at[axis][end - 1];
        }
    }
    c->start[k + 1] = padded;
}

static ss_status reserve(ss_exec *x, ss_cloud *c, int weighted) {
    int64_t room = c->points + 8 * c->cells;
    int64_t cells = (c->cells + 7) / 8 * 8;
    double *d = ss_scratch(x, (weighted ? 5 : 4) * room + 6 * cells, sizeof(double));
    c->memory[0] = d;
    int64_t *n = ss_scratch(x, 2 * c->cells + 1, sizeof(int64_t));
    c->memory[1] = n;
    if (!d || !n) {
        return SS_NO_MEMORY;
    }
    for (int axis = 0; axis < 3; ++axis) {
        c->at[axis] = d + axis * room;
        c->lo[axis] = d + 4 * room + 2 * axis * cells;
        c->hi[axis] = c->lo[axis] + cells;
    }
    c->distance = d + 3 * room;
    c->weight = weighted ? d + 4 * room + 6 * cells : NULL;
    c->start = n;
    c->count = n + c->cells + 1;
    return SS_OK;
}

ss_status SS_CPU(cloud_build)(ss_exec *x, const ss_bits *b, int weighted, ss_cloud *c) {
    memset(c, 0, sizeof *c);
    count_points(b, c);
    ss_status status = reserve(x, c, weighted);
    if (status != SS_OK) {
        return status;
    }
    int64_t k = 0;
    c->start[0] = 0;
    for (int64_t z = 0; z < b->d; z += SIDE) {
        for (int64_t y = 0; y < b->h; y += SIDE) {
            for (int64_t w = 0; w < b->words; ++w) {
                uint64_t any = any_point(b, z, y, w);
                for (int64_t x = 8 * w; any; ++x, any >>= SIDE) {
                    if (any & 0xffu) {
                        c->count[k] = collect_cell(b, c, z, y, x, c->start[k]);
                        close_cell(c, k);
                        ++k;
                    }
                }
            }
        }
    }
    return SS_OK;
}

void SS_CPU(cloud_free)(ss_cloud *c) {
    ss_scratch_free(c->memory[0]);
    ss_scratch_free(c->memory[1]);
}

/* ---- search --------------------------------------------------------------------------------- */

typedef struct room {
    double *near; /* lower bound of the squared distance of each cell to the cell of queries */
    double *far;  /* upper bound of the distance to the nearest point in it */
    int64_t *list;
} room;

int64_t SS_CPU(nearest_room)(const ss_cloud *p) {
    return (p->cells + 8) * (int64_t)(2 * sizeof(double) + sizeof(int64_t));
}

static double gap(double lo, double hi, double qlo, double qhi) {
    double below = lo - qhi;
    double above = qlo - hi;
    double g = below > above ? below : above;
    return g > 0.0 ? g : 0.0;
}

static double span(double lo, double hi, double qlo, double qhi) {
    double below = qhi - lo;
    double above = hi - qlo;
    return below > above ? below : above;
}

static double squares(double a, double b, double c) {
    return (a * a + b * b) + c * c;
}

/* Bounds between cell j of q and all cells of p. */
static void bound_cells(const ss_cloud *q, int64_t j, const ss_cloud *p, const double *s,
                        double *restrict near, double *restrict far) {
    const double *restrict l0 = p->lo[0], *restrict l1 = p->lo[1], *restrict l2 = p->lo[2];
    const double *restrict h0 = p->hi[0], *restrict h1 = p->hi[1], *restrict h2 = p->hi[2];
    const double a0 = q->lo[0][j], a1 = q->lo[1][j], a2 = q->lo[2][j];
    const double b0 = q->hi[0][j], b1 = q->hi[1][j], b2 = q->hi[2][j];
    const double s0 = s[0], s1 = s[1], s2 = s[2];
    SS_SIMD
    for (int64_t k = 0; k < p->cells; ++k) {
        near[k] = squares(gap(l0[k], h0[k], a0, b0) * s0, gap(l1[k], h1[k], a1, b1) * s1,
                          gap(l2[k], h2[k], a2, b2) * s2);
        far[k] = squares(span(l0[k], h0[k], a0, b0) * s0, span(l1[k], h1[k], a1, b1) * s1,
                         span(l2[k], h2[k], a2, b2) * s2);
    }
}

/* The smaller of `best` and the squared distance from q to the points of cell k. */
static double scan_cell(const ss_cloud *p, int64_t k, const double *q, const double *s,
                        double best) {
    const double *restrict z = p->at[0] + p->start[k];
    const double *restrict y = p->at[1] + p->start[k];
    const double *restrict x = p->at[2] + p->start[k];
    const int64_t groups = (p->start[k + 1] - p->start[k]) / 8;
    const double q0 = q[0], q1 = q[1], q2 = q[2], s0 = s[0], s1 = s[1], s2 = s[2];
    double least_lane[8] = {best, best, best, best, best, best, best, best};
    for (int64_t g = 0; g < groups; ++g) {
        SS_SIMD
        for (int l = 0; l < 8; ++l) {
            double d = squares((q0 - z[8 * g + l]) * s0, (q1 - y[8 * g + l]) * s1,
                               (q2 - x[8 * g + l]) * s2);
            least_lane[l] = d < least_lane[l] ? d : least_lane[l];
        }
    }
    for (int l = 0; l < 8; ++l) {
        best = least_lane[l] < best ? least_lane[l] : best;
    }
    return best;
}

/* Squared distance from q to the cloud, looking only at the `n` cells of the list, which come in
 * the order of their lower bounds if `sorted`. */
static double query(const ss_cloud *p, const double *q, const double *s, const room *r, int64_t n,
                    int sorted, double best) {
    for (int64_t i = 0; i < n; ++i) {
        int64_t k = r->list[i];
        if (r->near[k] >= best) {
            if (sorted) {
                break;
            }
            continue;
        }
        double bound = squares(gap(p->lo[0][k], p->hi[0][k], q[0], q[0]) * s[0],
                               gap(p->lo[1][k], p->hi[1][k], q[1], q[1]) * s[1],
                               gap(p->lo[2][k], p->hi[2][k], q[2], q[2]) * s[2]);
        if (bound < best) {
            best = scan_cell(p, k, q, s, best);
        }
    }
    return best;
}

static int64_t keep_near(const room *r, int64_t n, double limit) {
    int64_t kept = 0;
    for (int64_t i = 0; i < n; ++i) {
        if (r->near[r->list[i]] <= limit) {
            r->list[kept++] = r->list[i];
        }
    }
    return kept;
}

/* Shell sort of the list by lower bound: lists have a few dozen entries, rarely thousands. */
static void sort_list(const room *r, int64_t n) {
    static const int64_t gaps[] = {8929, 3905, 2161, 929, 505, 209, 109, 41, 19, 5, 1};
    for (size_t g = 0; g < sizeof gaps / sizeof gaps[0]; ++g) {
        for (int64_t i = gaps[g]; i < n; ++i) {
            int64_t item = r->list[i];
            int64_t j = i;
            for (; j >= gaps[g] && r->near[r->list[j - gaps[g]]] > r->near[item]; j -= gaps[g]) {
                r->list[j] = r->list[j - gaps[g]];
            }
            r->list[j] = item;
        }
    }
}

static void search_cell(const ss_cloud *q, int64_t j, const ss_cloud *p, const double *s,
                        const room *r) {
    bound_cells(q, j, p, s, r->near, r->far);
    int64_t closest = 0;
    for (int64_t k = 1; k < p->cells; ++k) {
        closest = r->far[k] < r->far[closest] ? k : closest;
    }
    /* Every query of this cell has a point within `far` of the closest cell. */
    double limit = r->far[closest];
    int64_t n = 0;
    for (int64_t k = 0; k < p->cells; ++k) {
        r->list[n] = k;
        n += r->near[k] <= limit;
    }
    int64_t i = q->start[j];
    double first[3] = {q->at[0][i], q->at[1][i], q->at[2][i]};
    double reach = sqrt(squares(span(first[0], first[0], q->lo[0][j], q->hi[0][j]) * s[0],
                                span(first[1], first[1], q->lo[1][j], q->hi[1][j]) * s[1],
                                span(first[2], first[2], q->lo[2][j], q->hi[2][j]) * s[2]));
    double best = query(p, first, s, r, n, 0, scan_cell(p, closest, first, s, INFINITY));
    q->distance[i] = best;
    /* Triangle inequality, with room for its rounding. */
    double tight = sqrt(best) + reach;
    tight = tight * tight * (1.0 + 1e-12);
    n = keep_near(r, n, tight < limit ? tight : limit);
    sort_list(r, n);
    for (int64_t e = i + q->count[j]; ++i < e;) {
        double at[3] = {q->at[0][i], q->at[1][i], q->at[2][i]};
        q->distance[i] = query(p, at, s, r, n, 1, INFINITY);
    }
}

void SS_CPU(nearest_search)(const ss_cloud *q, const ss_cloud *p, const double *spacing,
                            int64_t begin, int64_t end, void *memory) {
    room r;
    r.near = memory;
    r.far = r.near + p->cells + 8;
    r.list = (int64_t *)(void *)(r.far + p->cells + 8);
    for (int64_t j = begin; j < end; ++j) {
        search_cell(q, j, p, spacing, &r);
    }
}
