/* SPDX-License-Identifier: Apache-2.0
 *
 * geodesic.c: length of the shortest path from every voxel to a marked one, steps between faces.
 *
 *     d(i) = min over paths of sum over steps of sqrt(h_axis^2 + (weight (I_i - I_j))^2)
 *
 * Sweeps forward and backward over the rows whose surroundings have changed, until there are none:
 * the exact minimum. A length is the float sum of its steps from the marked voxel on and float
 * addition is monotone, so every order of relaxation ends at the same bits. No marked voxel or no
 * way: +inf; NaN steps cannot be passed.
 *
 * Memory: three step lengths (12 bytes) and the distance per voxel; a row costs 36 bytes per voxel
 * to relax. Between rows that runs in lanes; along a row, where each voxel waits for the one
 * before, it does not. There are as many sweeps as the most winding shortest path has turns: tens
 * in scans, with fewer and fewer rows; at most the number of voxels. Threads take whole problems.
 */
#include "lanes.h"

typedef struct job {
    const ss_geodesic_args *a;
    int32_t *status;
    double h2[3];
} job;

typedef struct field {
    int64_t D, H, W;
    float *d;       /* the output */
    float *step[3]; /* to the next voxel along z, y, x */
    const float *image;
    uint8_t *due; /* rows to look at again */
} field;

static void fill_steps(const job *j, field *f) {
    const int64_t space = f->D * f->H * f->W;
    const int64_t stride[3] = {f->H * f->W, f->W, 1};
    const float weight = (float)j->a->weight;
    for (int32_t axis = 0; axis < 3; ++axis) {
        const float *restrict here = f->image, *restrict there = f->image + stride[axis];
        const float h2 = (float)j->h2[axis];
        float *restrict step = f->step[axis];
        /* Steps out of the volume are computed across its edges, too, and never used. */
        SS_SIMD
        for (int64_t i = 0; i < space - stride[axis]; ++i) {
            float jump = weight * (here[i] - there[i]);
            step[i] = sqrtf(h2 + jump * jump);
        }
    }
}

/* Row `to` over row `from`, `step` apart; tells whether anything became shorter. */
static int32_t relax_rows(float *restrict to, const float *restrict from,
                          const float *restrict step, int64_t n) {
    int32_t changed = 0;
    _Pragma("omp simd reduction(| : changed)") for (int64_t i = 0; i < n; ++i) {
        float d = from[i] + step[i];
        changed |= d < to[i];
        to[i] = d < to[i] ? d : to[i];
    }
    return changed;
}

static int32_t relax_along(float *d, const float *step, int64_t n) {
    int32_t changed = 0;
    for (int64_t i = 1; i < n; ++i) {
        float v = d[i - 1] + step[i - 1];
        changed |= v < d[i];
        d[i] = v < d[i] ? v : d[i];
    }
    for (int64_t i = n - 1; i > 0; --i) {
        float v = d[i] + step[i - 1];
        changed |= v < d[i - 1];
        d[i - 1] = v < d[i - 1] ? v : d[i - 1];
    }
    return changed;
}

/* Takes what the four rows around offer, then makes the row consistent; 1 if it became shorter. */
static int32_t relax_row(const field *f, int64_t row) {
    const int64_t z = row / f->H, y = row % f->H;
    const int64_t at = row * f->W, plane = f->H * f->W;
    float *d = f->d + at;
    int32_t changed = 0;
    if (z > 0) {
        changed |= relax_rows(d, d - plane, f->step[0] + at - plane, f->W);
    }
    if (y > 0) {
        changed |= relax_rows(d, d - f->W, f->step[1] + at - f->W, f->W);
    }
    if (y + 1 < f->H) {
        changed |= relax_rows(d, d + f->W, f->step[1] + at, f->W);
    }
    if (z + 1 < f->D) {
        changed |= relax_rows(d, d + plane, f->step[0] + at, f->W);
    }
    return changed | relax_along(d, f->step[2] + at, f->W);
}

/* One pass over the rows whose surroundings have changed, forward or backward. */
static int32_t sweep(const field *f, int32_t backward) {
    const int64_t rows = f->D * f->H;
    int32_t changed = 0;
    for (int64_t n = 0; n < rows; ++n) {
        const int64_t row = backward ? rows - 1 - n : n;
        if (!f->due[row]) {
            continue;
        }
        f->due[row] = 0;
        if (relax_row(f, row)) {
            const int64_t y = row % f->H;
            changed = 1;
            f->due[row >= f->H ? row - f->H : row] = 1;
            f->due[y > 0 ? row - 1 : row] = 1;
            f->due[y + 1 < f->H ? row + 1 : row] = 1;
            f->due[row + f->H < rows ? row + f->H : row] = 1;
        }
    }
    return changed;
}

static ss_status run_problem(ss_exec *x, const job *j, int64_t n) {
    const int64_t *shape = j->a->mask.shape;
    const int64_t space = shape[1] * shape[2] * shape[3];
    const int64_t length = (space + 15) / 16 * 16;
    const uint8_t *restrict mask = (const uint8_t *)j->a->mask.data + n * space;
    float *restrict d = (float *)j->a->distance.data + n * space;
    float *scratch = ss_scratch(x, 5 * length, sizeof(float));
    if (!scratch) {
        return SS_NO_MEMORY;
    }
    field f = {shape[1],
               shape[2],
               shape[3],
               d,
               {scratch, scratch + length, scratch + 2 * length},
               ss_load_f32(&j->a->image, n / j->a->classes * space, space, scratch + 3 * length),
               NULL};
    f.due = (uint8_t *)(scratch + 4 * length);
    memset(f.due, 1, (size_t)(f.D * f.H));
    fill_steps(j, &f);
    int32_t any = 0;
    for (int64_t i = 0; i < space; ++i) {
        d[i] = mask[i] ? 0.0f : INFINITY;
        any |= mask[i];
    }
    /* Each pair of sweeps settles at least one voxel, so this ends. */
    for (int64_t i = 0; any && i < space; ++i) {
        if (!(sweep(&f, 0) | sweep(&f, 1))) {
            break;
        }
    }
    ss_scratch_free(scratch);
    return SS_OK;
}

static void run_problems(void *ctx, int64_t begin, int64_t end, int32_t thread) {
    const job *j = ctx;
    (void)thread;
    for (int64_t n = begin; n < end; ++n) {
        ss_exec own = ss_exec_cpu(1); /* error texts of several threads must not mix */
        j->status[n] = run_problem(&own, j, n);
    }
}

ss_status SS_CPU(geodesic)(ss_exec *x, const ss_geodesic_args *a) {
    const int64_t n = a->mask.shape[0], b = a->image.shape[0];
    job j = {.a = a, .h2 = {1.0, 1.0, 1.0}};
    if (a->classes > n || n / a->classes != b || n % a->classes != 0) {
        return ss_fail(x, SS_INVALID,
                       "mask: expected %lld x %lld problems (images x classes), got %lld",
                       (long long)b, (long long)a->classes, (long long)n);
    }
    if (a->spacing.n != 0 && a->spacing.n != 3) {
        return ss_fail(x, SS_INVALID, "spacing: expected 3 numbers, got %lld",
                       (long long)a->spacing.n);
    }
    for (int64_t i = 0; i < a->spacing.n; ++i) {
        double h = a->spacing.at[i];
        if (!(h >= 1e-9 && h <= 1e9)) {
            return ss_fail(x, SS_INVALID, "spacing: expected numbers from 1e-9 to 1e9, got %g", h);
        }
        j.h2[i] = h * h;
    }
    j.status = ss_scratch(x, n, sizeof(int32_t));
    if (!j.status) {
        return SS_NO_MEMORY;
    }
    ss_parallel_for(x, n, 1, run_problems, &j);
    ss_status status = SS_OK;
    for (int64_t i = 0; i < n && status == SS_OK; ++i) {
        status = j.status[i];
    }
    ss_scratch_free(j.status);
    return status == SS_OK ? SS_OK : ss_fail(x, status, "could not allocate scratch memory");
}
