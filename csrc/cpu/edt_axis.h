/* SPDX-License-Identifier: Apache-2.0
 *
 * edt_axis.h: one axis of the distance transform for 32 columns at a time, any number type.
 *
 * Included once per type with EDT_T, EDT_BIG(job) ("no 0-voxel yet"; BIG plus any cost must not
 * overflow) and EDT(name). A tile holds rows -EDT_NEAR .. n + EDT_NEAR - 1 of `stride` columns;
 * rows outside 0..n-1 are BIG. cost[k] is the squared length of k steps.
 *
 *     g[i] = min over j of f[j] + cost[|i - j|], and cost[i + 1], cost[n - i] for closed faces
 *
 * The search goes outwards from i and ends when no farther row can be nearer; what EDT_NEAR rows do
 * not settle is settled by divide and conquer: the nearest row never moves back as i grows, since
 * cost is convex, so known neighbours bracket it. O(n log n) per column, whatever the mask.
 */

/* The largest of 32 lanes. */
static inline EDT_T EDT(most)(const EDT_T *v) {
    EDT_T m = v[0];
    _Pragma("omp simd reduction(max : m)") for (int l = 0; l < EDT_LANES; ++l) {
        m = v[l] > m ? v[l] : m;
    }
    return m;
}

/* best = min(best, rows i - k - 3 .. i - k and i + k .. i + k + 3). */
static inline void EDT(step)(const EDT_T *restrict f, int64_t stride, int64_t k,
                             const EDT_T *restrict cost, EDT_T *restrict best) {
    const EDT_T *restrict up = f - k * stride;
    const EDT_T *restrict down = f + k * stride;
    EDT_T c0 = cost[k], c1 = cost[k + 1], c2 = cost[k + 2], c3 = cost[k + 3];
    SS_SIMD
    for (int l = 0; l < EDT_LANES; ++l) {
        EDT_T a0 = up[l] < down[l] ? up[l] : down[l];
        EDT_T a1 = up[l - stride] < down[l + stride] ? up[l - stride] : down[l + stride];
        EDT_T a2 =
            up[l - 2 * stride] < down[l + 2 * stride] ? up[l - 2 * stride] : down[l + 2 * stride];
        EDT_T a3 =
            up[l - 3 * stride] < down[l + 3 * stride] ? up[l - 3 * stride] : down[l + 3 * stride];
        a0 = (EDT_T)(a0 + c0);
        a1 = (EDT_T)(a1 + c1);
        a2 = (EDT_T)(a2 + c2);
        a3 = (EDT_T)(a3 + c3);
        a0 = a0 < a1 ? a0 : a1;
        a2 = a2 < a3 ? a2 : a3;
        a0 = a0 < a2 ? a0 : a2;
        best[l] = best[l] < a0 ? best[l] : a0;
    }
}

/* What the closed faces leave of `start` at row i. */
static inline EDT_T EDT(face)(const edt_line *a, const EDT_T *cost, int64_t i) {
    EDT_T c = EDT_BIG(a);
    if (a->closed[0]) {
        c = cost[i + 1];
    }
    if (a->closed[1] && cost[a->n - i] < c) {
        c = cost[a->n - i];
    }
    return c;
}

/* Row i of 32 columns; returns 0 if rows farther than EDT_NEAR could still be nearer. *sure is how
 * far the row before had to look, and then this one: up to there nothing is asked, since asking
 * whether all lanes are done costs as much as looking at eight rows. */
static int EDT(near)(const edt_line *a, const EDT_T *restrict f, const EDT_T *restrict cost,
                     int64_t i, int64_t *sure, EDT_T *restrict out) {
    EDT_T best[EDT_LANES];
    EDT_T c = EDT(face)(a, cost, i);
    f += i * a->stride;
    SS_SIMD
    for (int l = 0; l < EDT_LANES; ++l) {
        best[l] = f[l] < c ? f[l] : c;
    }
    EDT_T m = 1;
    int64_t k = 1;
    if (k >= *sure) {
        m = EDT(most)(best);
    }
    while (k < a->n && k <= EDT_NEAR - 3 && (k < *sure || m > cost[k])) {
        EDT(step)(f, a->stride, k, cost, best);
        k += 4;
        if (k >= *sure) {
            m = EDT(most)(best);
        }
    }
    *sure = k - 4;
    memcpy(out, best, sizeof best);
    return k >= a->n || m <= cost[k];
}

/* Row i from the rows row[lo..hi] (ascending), with the nearest row's place in `row` per lane;
 * returns the brackets of what was found in *first and *last. */
static void EDT(bracketed)(const edt_line *a, const EDT_T *restrict f, const EDT_T *restrict cost,
                           int64_t i, const int32_t *restrict row, int32_t *first, int32_t *last,
                           EDT_T *restrict out) {
    EDT_T best[EDT_LANES];
    EDT_T place[EDT_LANES]; /* p + 1, in the lanes' own type; 0: none yet */
    int32_t lo = *first, hi = *last;
    SS_SIMD
    for (int l = 0; l < EDT_LANES; ++l) {
        best[l] = EDT_BIG(a);
        place[l] = 0;
    }
    for (int32_t p = lo; p <= hi; ++p) {
        const EDT_T *restrict g = f + row[p] * a->stride;
        EDT_T c = cost[row[p] < i ? i - row[p] : row[p] - i];
        EDT_T number = (EDT_T)(p + 1);
        SS_SIMD
        for (int l = 0; l < EDT_LANES; ++l) {
            EDT_T v = (EDT_T)(g[l] + c);
            place[l] = v < best[l] ? number : place[l];
            best[l] = v < best[l] ? v : best[l];
        }
    }
    EDT_T from = (EDT_T)(hi + 1), to = (EDT_T)(lo + 1), all_from = to, all_to = from;
    _Pragma("omp simd reduction(min : from) reduction(max : to)") for (int l = 0; l < EDT_LANES;
                                                                       ++l) {
        EDT_T least = place[l] == 0 ? all_from : place[l]; /* nothing found: the whole bracket */
        EDT_T greatest = place[l] == 0 ? all_to : place[l];
        from = least < from ? least : from;
        to = greatest > to ? greatest : to;
    }
    if (lo <= hi) { /* else there are no rows at all, and the bracket stays empty */
        *first = (int32_t)from - 1;
        *last = (int32_t)to - 1;
    }
    EDT_T c = EDT(face)(a, cost, i);
    SS_SIMD
    for (int l = 0; l < EDT_LANES; ++l) {
        out[l] = best[l] < c ? best[l] : c;
    }
}

/* Rows far[0..m-1] (ascending) of 32 columns, by halving; `w` has room for 4 n numbers. */
static void EDT(far)(const edt_line *a, const EDT_T *restrict f, const EDT_T *restrict cost,
                     const int32_t *far, int32_t m, int32_t *w, EDT_T *out, int64_t out_stride) {
    int32_t *row = w, *first = w + a->n, *last = first + a->n;
    int32_t rows = 0;
    for (int64_t j = 0; j < a->n; ++j) { /* only rows in which some column has a finite value */
        EDT_T least = EDT_BIG(a);
        const EDT_T *g = f + j * a->stride;
        _Pragma("omp simd reduction(min : least)") for (int l = 0; l < EDT_LANES; ++l) {
            least = g[l] < least ? g[l] : least;
        }
        row[rows] = (int32_t)j;
        rows += least < EDT_BIG(a);
    }
    int32_t top = 1;
    while (top < m) {
        top *= 2;
    }
    for (int32_t s = top; s >= 1; s /= 2) {
        for (int32_t q = s - 1; q < m; q += 2 * s) {
            first[q] = q - s >= 0 ? first[q - s] : 0;
            last[q] = q + s < m ? last[q + s] : rows - 1;
            EDT(bracketed)(a, f, cost, far[q], row, &first[q], &last[q], out + far[q] * out_stride);
        }
    }
}

/* All rows of `blocks` x 32 columns from `tile` (row 0) to `out`. `w` has room for 4 n numbers. */
static void EDT(columns)(const edt_line *a, const EDT_T *tile, const EDT_T *cost, int64_t blocks,
                         EDT_T *out, int64_t out_stride, int32_t *w) {
    for (int64_t b = 0; b < blocks; ++b) {
        const EDT_T *f = tile + b * EDT_LANES;
        EDT_T *g = out + b * EDT_LANES;
        int32_t *far = w + 3 * a->n;
        int32_t m = 0;
        int64_t sure = 1;
        for (int64_t i = 0; i < a->n; ++i) {
            far[m] = (int32_t)i;
            m += !EDT(near)(a, f, cost, i, &sure, g + i * out_stride);
        }
        if (m > 0) {
            EDT(far)(a, f, cost, far, m, w, g, out_stride);
        }
    }
}

/* place[l] = the smallest row j with f[j] + cost[|i - j|] = g; -1 and n for the faces. Rows are
 * tried in ascending order, kept as j + 2 in the lanes' own type until every lane has one. */
static void EDT(nearest)(const edt_line *a, const EDT_T *restrict f, const EDT_T *restrict cost,
                         int64_t i, const EDT_T *restrict g, int16_t *restrict place) {
    EDT_T found[EDT_LANES];
    EDT_T m = EDT(most)(g);
    int64_t k = 0;
    while (k + 1 < a->n && cost[k + 1] <= m) {
        ++k;
    }
    int64_t to = i + k < a->n - 1 ? i + k : a->n - 1;
    EDT_T before = a->closed[0] ? cost[i + 1] : EDT_BIG(a);
    SS_SIMD
    for (int l = 0; l < EDT_LANES; ++l) {
        found[l] = (EDT_T)(g[l] == before ? 1 : 0);
    }
    for (int64_t j = i - k > 0 ? i - k : 0; j <= to; ++j) {
        const EDT_T *restrict v = f + j * a->stride;
        EDT_T c = cost[j < i ? i - j : j - i];
        EDT_T number = (EDT_T)(j + 2);
        SS_SIMD
        for (int l = 0; l < EDT_LANES; ++l) {
            EDT_T hit = (EDT_T)(v[l] + c) == g[l] ? number : (EDT_T)0;
            found[l] = found[l] == 0 ? hit : found[l];
        }
        if (j % 8 == 0) {
            EDT_T least = found[0];
            _Pragma("omp simd reduction(min : least)") for (int l = 0; l < EDT_LANES; ++l) {
                least = found[l] < least ? found[l] : least;
            }
            if (least > 0) {
                break;
            }
        }
    }
    for (int l = 0; l < EDT_LANES; ++l) { /* not found: the other face is left */
        place[l] = (int16_t)(found[l] == 0 ? (EDT_T)a->n : found[l] - 2);
    }
}

/* ---- the contiguous axis -------------------------------------------------------------------- */

/* Squares of a run of foreground [begin, end) in a row of n voxels. */
static void EDT(run)(const edt_job *job, int64_t begin, int64_t end, EDT_T *restrict out) {
    const EDT_T *restrict cost = job->cost[2];
    int64_t n = job->n[2];
    int left = begin > 0 || job->closed[2][0];
    int right = end < n || job->closed[2][1];
    int64_t half = left && right ? begin + (end - begin + 1) / 2 : (left ? end : begin);
    for (int64_t i = begin; i < half; ++i) {
        out[i] = cost[i - begin + 1];
    }
    for (int64_t i = half; i < end; ++i) {
        out[i] = right ? cost[end - i] : EDT_BIG(job);
    }
}

static void EDT(row)(const edt_job *job, const uint8_t *restrict m, EDT_T *restrict out) {
    int64_t n = job->n[2];
    memset(out, 0, (size_t)job->pitch * sizeof *out);
    for (int64_t begin = edt_find(m, 0, n, 1); begin < n;) {
        int64_t end = edt_find(m, begin, n, 0);
        EDT(run)(job, begin, end, out);
        begin = edt_find(m, end, n, 1);
    }
}

/* ---- planes and slabs ----------------------------------------------------------------------- */

/* Stores one row of squares at (z, y) of the box; returns whether one was too large for EDT_T. */
static int EDT(store)(const edt_job *job, int64_t z, int64_t y, const EDT_T *restrict g) {
    int64_t at = edt_offset(job, z, y);
    int64_t n = job->n[2];
    uint32_t over = 0;
    EDT_T big = EDT_BIG(job);
    if (job->squares) {
        int32_t *restrict out = job->squares + at;
        SS_SIMD
        for (int64_t i = 0; i < n; ++i) {
            out[i] = (int32_t)g[i];
        }
    } else if (job->root) {
        float *restrict out = job->distance + at;
        float scale = job->scale;
        SS_SIMD
        for (int64_t i = 0; i < n; ++i) {
            out[i] = sqrtf((float)g[i]) * scale;
        }
    } else {
        float *restrict out = job->distance + at;
        float scale = job->scale * job->scale;
        SS_SIMD
        for (int64_t i = 0; i < n; ++i) {
            out[i] = (float)g[i] * scale;
        }
    }
    _Pragma("omp simd reduction(| : over)") for (int64_t i = 0; i < n; ++i) {
        over |= g[i] >= big;
    }
    return over != 0;
}

/* The square of the way out of the volume from place i along an axis, if the box ends there. */
static EDT_T EDT(way_out)(const edt_job *job, int axis, int64_t i) {
    const EDT_T *cost = job->cost[axis];
    EDT_T c = job->closed[axis][0] == EDT_BORDER ? cost[i + 1] : EDT_BIG(job);
    EDT_T d = job->closed[axis][1] == EDT_BORDER ? cost[job->n[axis] - i] : EDT_BIG(job);
    return c < d ? c : d;
}

/* One row of indices: -1 where the outside is as near as any voxel. */
static void EDT(mark_outside)(const edt_job *job, int64_t z, int64_t y, const EDT_T *g) {
    int64_t *index = job->index + edt_offset(job, z, y);
    EDT_T across = EDT(way_out)(job, 0, z);
    EDT_T up = EDT(way_out)(job, 1, y);
    for (int64_t i = 0; i < job->n[2]; ++i) {
        if (g[i] == across || g[i] == up || g[i] == EDT(way_out)(job, 2, i)) {
            index[i] = -1;
        }
    }
}

/* Planes begin..end-1 of the box: along rows, then along columns. */
static void EDT(planes)(void *ctx, int64_t begin, int64_t end, int32_t thread) {
    edt_job *job = ctx;
    int64_t h = job->n[1], pitch = job->pitch, size = h * pitch;
    EDT_T *pad = edt_tile(job, thread);
    EDT_T *tile = pad + EDT_NEAR * pitch, *own = tile + (h + EDT_NEAR) * pitch;
    edt_line a = {h, pitch, {job->closed[1][0], job->closed[1][1]}, job->big};
    for (int64_t i = 0; i < EDT_NEAR * pitch; ++i) {
        pad[i] = EDT_BIG(job);
        tile[size + i] = EDT_BIG(job);
    }
    for (int64_t z = begin; z < end; ++z) {
        EDT_T *out = job->flat ? own : (EDT_T *)job->mid + z * size;
        for (int64_t y = 0; y < h; ++y) {
            EDT(row)(job, job->mask + edt_offset(job, z, y), tile + y * pitch);
        }
        EDT(columns)(&a, tile, job->cost[1], pitch / EDT_LANES, out, pitch, edt_room(job, thread));
        if (job->place[0]) {
            for (int64_t y = 0; y < h; ++y) {
                edt_row_places(job, job->mask + edt_offset(job, z, y),
                               job->place[0] + z * size + y * pitch);
                for (int64_t b = 0; b < pitch; b += EDT_LANES) {
                    EDT(nearest)(&a, tile + b, job->cost[1], y, out + y * pitch + b,
                                 job->place[1] + z * size + y * pitch + b);
                }
            }
        }
        for (int64_t y = 0; job->flat && y < h; ++y) {
            job->over[z] |= (uint8_t)EDT(store)(job, z, y, out + y * pitch);
            if (job->index) {
                edt_store_index(job, z, y, 0, job->n[2], NULL);
                EDT(mark_outside)(job, z, y, out + y * pitch);
            }
        }
    }
}

/* Slabs of `job->slab` rows each: along the first axis. */
static void EDT(slabs)(void *ctx, int64_t begin, int64_t end, int32_t thread) {
    edt_job *job = ctx;
    int64_t d = job->n[0], plane = job->n[1] * job->pitch;
    for (int64_t s = begin; s < end; ++s) {
        int64_t y0 = s * job->slab;
        int64_t rows = job->n[1] - y0 < job->slab ? job->n[1] - y0 : job->slab;
        int64_t width = rows * job->pitch;
        EDT_T *pad = edt_tile(job, thread);
        EDT_T *tile = pad + EDT_NEAR * width, *out = tile + (d + EDT_NEAR) * width;
        edt_line a = {d, width, {job->closed[0][0], job->closed[0][1]}, job->big};
        for (int64_t i = 0; i < EDT_NEAR * width; ++i) {
            pad[i] = EDT_BIG(job);
            tile[d * width + i] = EDT_BIG(job);
        }
        for (int64_t z = 0; z < d; ++z) {
            memcpy(tile + z * width, (const EDT_T *)job->mid + z * plane + y0 * job->pitch,
                   (size_t)width * sizeof *tile);
        }
        EDT(columns)(&a, tile, job->cost[0], width / EDT_LANES, out, width, edt_room(job, thread));
        for (int64_t z = 0; z < d; ++z) {
            for (int64_t y = 0; y < rows; ++y) {
                const EDT_T *g = out + z * width + y * job->pitch;
                job->over[s] |= (uint8_t)EDT(store)(job, z, y0 + y, g);
                for (int64_t b = 0; job->index && b < job->pitch; b += EDT_LANES) {
                    int16_t place[EDT_LANES];
                    EDT(nearest)(&a, tile + y * job->pitch + b, job->cost[0], z, g + b, place);
                    edt_store_index(job, z, y0 + y, b, EDT_LANES, place);
                }
                if (job->index) {
                    EDT(mark_outside)(job, z, y0 + y, g);
                }
            }
        }
    }
}
