/* SPDX-License-Identifier: Apache-2.0
 *
 * fuzz_edt.c: edt against the definition: the minimum over all 0-voxels, with or without a border.
 */
#include "fuzz.h"

static double square(double v) {
    return v * v;
}

/* The nearest 0-voxel of voxel p by looking at all of them, the shell around the volume included.
 */
static double brute(const uint8_t *mask, const int64_t *s, const double *spacing, int border,
                    const int64_t *p) {
    double best = INFINITY;
    int64_t from[3], to[3];
    for (int d = 0; d < 3; ++d) {
        int open = border == 1 || (border == 2 && d > 0);
        from[d] = open ? -1 : 0;
        to[d] = s[1 + d] + open;
    }
    for (int64_t z = from[0]; z < to[0]; ++z) {
        for (int64_t y = from[1]; y < to[1]; ++y) {
            for (int64_t x = from[2]; x < to[2]; ++x) {
                int inside = z >= 0 && z < s[1] && y >= 0 && y < s[2] && x >= 0 && x < s[3];
                if (inside && mask[(z * s[2] + y) * s[3] + x]) {
                    continue;
                }
                double d2 = square(spacing[0] * (double)(z - p[0])) +
                            square(spacing[1] * (double)(y - p[1])) +
                            square(spacing[2] * (double)(x - p[2]));
                best = d2 < best ? d2 : best;
            }
        }
    }
    return best;
}

static double to_voxel(const int64_t *s, const double *spacing, const int64_t *p, int64_t q) {
    return square(spacing[0] * (double)(q / s[3] / s[2] - p[0])) +
           square(spacing[1] * (double)(q / s[3] % s[2] - p[1])) +
           square(spacing[2] * (double)(q % s[3] - p[2]));
}

static void check_voxel(const uint8_t *mask, const int64_t *s, const double *spacing, int border,
                        int64_t i, double got, const int64_t *index) {
    const int64_t p[3] = {i / s[3] / s[2], i / s[3] % s[2], i % s[3]};
    double expected = brute(mask, s, spacing, border, p);
    double most = 4e-7 * expected; /* squares and a sum in float: three roundings */
    if (!(got == expected || fabs(got - expected) <= most)) {
        wrong("distance", i, got, expected);
    }
    if (index && border == 0 && expected < INFINITY) {
        int64_t q = index[i];
        if (q < 0 || q >= s[1] * s[2] * s[3] || mask[q]) {
            wrong("index is no 0-voxel", i, (double)q, 0.0);
        }
        if (fabs(to_voxel(s, spacing, p, q) - expected) > most) {
            wrong("index is farther", i, to_voxel(s, spacing, p, q), expected);
        }
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static const double spacings[] = {1.0, 0.5, 1.25, 3.0, 7.5};
    bytes b = {data, size};
    int64_t s[4], index_shape[5];
    take_shape(&b, s);
    uint8_t options = take(&b);
    int border = options % 3, want_index = options / 4 % 2, spaced = options / 8 % 2;
    double spacing[3] = {1.0, 1.0, 1.0};
    for (int d = 0; spaced && d < 3; ++d) {
        spacing[d] = spacings[take(&b) % 5];
    }
    int64_t n = s[1] * s[2] * s[3];
    uint8_t *mask = malloc((size_t)n);
    float *distance = malloc((size_t)n * sizeof *distance);
    int64_t *index = malloc((size_t)n * sizeof *index);
    take_mask(&b, mask, n, 2);
    index_shape[0] = want_index;
    memcpy(index_shape + 1, s, sizeof s);
    ss_exec x = ss_exec_cpu(options / 16 % 2 ? -2 : 1);
    ss_edt_args a = {.border = border, .squared = 1, .want_index = want_index};
    a.mask = ss_tensor_of(mask, SS_U8, 4, s);
    a.spacing = (ss_doubles){spacing, spaced ? 3 : 0};
    a.distance = ss_tensor_of(distance, SS_F32, 4, s);
    a.index = ss_tensor_of(index, SS_I64, 5, index_shape);
    must_run(ss_edt(&x, &a), &x);
    for (int64_t i = 0; i < n; ++i) {
        check_voxel(mask, s, spacing, border, i, (double)distance[i], want_index ? index : NULL);
    }
    free(mask);
    free(distance);
    free(index);
    return 0;
}
