/* SPDX-License-Identifier: Apache-2.0
 *
 * geodesic.c: length of the shortest path from every voxel to a marked one, steps between faces.
 *
 *     d(i) = min over paths of sum over steps of sqrt(h_axis^2 + (weight (I_i - I_j))^2)
 *
 * Sweeps forward and backward until nothing changes, which is the exact minimum: a length is the
 * float sum of its steps from the marked voxel on, float addition is monotone, so every order of
 * relaxation ends at the same bits. No marked voxel or no way: +inf; NaN steps cannot be passed.
 *
 * Memory: three step lengths (12 bytes) and the distance per voxel; a sweep reads 16 and writes 4.
 * Between rows a sweep works in lanes; along a row, where each voxel waits for the one before, it
 * does not. The number of sweeps is that of the turns of the most winding shortest path: few in
 * scans, at most the number of voxels. Threads take whole problems.
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

/* One pass over all rows, forward or backward; each takes from the rows that came before it. */
static int32_t sweep(const field *f, int32_t backward) {
    const int64_t rows = f->D * f->H;
    int32_t changed = 0;
    for (int64_t n = 0; n < rows; ++n) {
        const int64_t row = backward ? rows - 1 - n : n;
        const int64_t z = row / f->H, y = row % f->H;
        const int64_t at = row * f->W, plane = f->H * f->W;
        float *d = f->d + at;
        if (!backward && z > 0) {
            changed |= relax_rows(d, d - plane, f->step[0] + at - plane, f->W);
        }
        if (!backward && y > 0) {
            changed |= relax_rows(d, d - f->W, f->step[1] + at - f->W, f->W);
        }
        if (backward && z + 1 < f->D) {
            changed |= relax_rows(d, d + plane, f->step[0] + at, f->W);
        }
        if (backward && y + 1 < f->H) {
            changed |= relax_rows(d, d + f->W, f->step[1] + at, f->W);
        }
        changed |= relax_along(d, f->step[2] + at, f->W);
    }
    return changed;
}

static ss_status run_problem(ss_exec *x, const job *j, int64_t n) {
    const int64_t *shape = j->a->mask.shape;
    const int64_t space = shape[1] * shape[2] * shape[3];
    const int64_t length = (space + 15) / 16 * 16;
    const uint8_t *restrict mask = (const uint8_t *)j->a->mask.data + n * space;
    float *restrict d = (float *)j->a->distance.data + n * space;
    float *scratch = ss_scratch(x, 4 * length, sizeof(float));
    if (!scratch) {
        return SS_NO_MEMORY;
    }
    field f = {shape[1],
               shape[2],
               shape[3],
               d,
               {scratch, scratch + length, scratch + 2 * length},
               ss_load_f32(&j->a->image, n / j->a->classes * space, space, scratch + 3 * length)};
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
