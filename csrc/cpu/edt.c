/* SPDX-License-Identifier: Apache-2.0
 *
 * edt.c: exact squared Euclidean distance of every voxel to the nearest 0-voxel.
 */
#include "edt.h"

#include <math.h>

#include "lanes.h"

/* g[i] = min over j of f[j] + (w (i - j))^2, and over both ends' outsides if border. */
static void line(double *f, double *g, int64_t n, double w, int border) {
    for (int64_t i = 0; i < n; ++i) {
        double best = f[i];
        int64_t edge = i + 1 < n - i ? i + 1 : n - i;
        if (border && w * w * (double)(edge * edge) < best) {
            best = w * w * (double)(edge * edge);
        }
        for (int64_t k = 1; k < n && w * w * (double)(k * k) < best; ++k) {
            double c = w * w * (double)(k * k);
            if (i - k >= 0 && f[i - k] + c < best) {
                best = f[i - k] + c;
            }
            if (i + k < n && f[i + k] + c < best) {
                best = f[i + k] + c;
            }
        }
        g[i] = best;
    }
}

static void volume(const uint8_t *mask, const int64_t s[3], const double w[3], int border,
                   double *d, double *f, double *g) {
    int64_t n = s[0] * s[1] * s[2];
    int64_t step[3] = {s[1] * s[2], s[2], 1};
    for (int64_t i = 0; i < n; ++i) {
        d[i] = mask[i] ? INFINITY : 0.0;
    }
    for (int axis = 2; axis >= 0; --axis) {
        for (int64_t i = 0; i < n; ++i) {
            if (i / step[axis] % s[axis] != 0) {
                continue;
            }
            for (int64_t k = 0; k < s[axis]; ++k) {
                f[k] = d[i + k * step[axis]];
            }
            line(f, g, s[axis], w[axis], border == 1 || (border == 2 && axis > 0));
            for (int64_t k = 0; k < s[axis]; ++k) {
                d[i + k * step[axis]] = g[k];
            }
        }
    }
}

static ss_status run(ss_exec *x, const uint8_t *mask, const int64_t s[3], const double w[3],
                     int border, int32_t *out_i, float *out_f) {
    if (s[0] > SS_EDT_SIDE || s[1] > SS_EDT_SIDE || s[2] > SS_EDT_SIDE) {
        return ss_fail(x, SS_INVALID, "mask: expected sides of at most %d, got (%lld, %lld, %lld)",
                       SS_EDT_SIDE, (long long)s[0], (long long)s[1], (long long)s[2]);
    }
    int64_t n = s[0] * s[1] * s[2];
    double *d = ss_scratch(x, n, sizeof *d);
    double *f = ss_scratch(x, 2 * SS_EDT_SIDE, sizeof *f);
    if (d && f) {
        volume(mask, s, w, border, d, f, f + SS_EDT_SIDE);
        for (int64_t i = 0; i < n; ++i) {
            if (out_i) {
                out_i[i] = isinf(d[i]) ? SS_EDT_FAR : (int32_t)d[i];
            } else {
                out_f[i] = (float)d[i];
            }
        }
    }
    ss_status status = d && f ? SS_OK : SS_NO_MEMORY;
    ss_scratch_free(d);
    ss_scratch_free(f);
    return status;
}

ss_status SS_CPU(edt_unit)(ss_exec *x, const uint8_t *mask, const int64_t shape[3], int border,
                           int32_t *out) {
    const double unit[3] = {1.0, 1.0, 1.0};
    return run(x, mask, shape, unit, border, out, NULL);
}

ss_status SS_CPU(edt_spaced)(ss_exec *x, const uint8_t *mask, const int64_t shape[3],
                             const double spacing[3], int border, float *out) {
    return run(x, mask, shape, spacing, border, NULL, out);
}
