/* SPDX-License-Identifier: Apache-2.0
 *
 * mask_logits.cu: the mask prompt of a promptable model from a probability map.
 *
 *     out[n, cell] = clip(ln(m / (1 - m)), -10, 10),
 *     m = clip(mean of prob[n] over the cell, 0, 1)
 *
 * prob [N, D, H, W] -> logits [N, d, h, w]; cells are those of adaptive average pooling. Memory: 4
 * bytes read per voxel (float), 4 written per cell; lanes of a warp own neighbouring cells, whose
 * voxels share cache lines. One launch, no workspace.
 * Numerics: columns are summed over the lines of a cell first, then column by column, in double, as
 * the CPU does: the same bits. Deterministic: one thread sums a cell. registers <= 64
 */
#include "device.cuh"

#define THREADS 128

struct mask_logits_sizes {
    int64_t n, depth, height, width; /* of prob */
    int64_t d, h, w;
};

SS_DEVICE int64_t cell_begin(int64_t i, int64_t size, int64_t cells) {
    /* floor(i size / cells) without overflow: size = q cells + r */
    return i * (size / cells) + i * (size % cells) / cells;
}

SS_DEVICE int64_t cell_end(int64_t i, int64_t size, int64_t cells) {
    int64_t next = i + 1;
    return next * (size / cells) + (next * (size % cells) + cells - 1) / cells;
}

template <typename T>
SS_KERNEL void k_mask_logits(const void *prob, float *out, mask_logits_sizes s) {
    int64_t cell = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (cell >= s.n * s.d * s.h * s.w) {
        return;
    }
    int64_t row = cell / s.w, k = cell % s.w;
    int64_t n = row / s.h / s.d, i = row / s.h % s.d, j = row % s.h;
    int64_t d0 = cell_begin(i, s.depth, s.d), d1 = cell_end(i, s.depth, s.d);
    int64_t h0 = cell_begin(j, s.height, s.h), h1 = cell_end(j, s.height, s.h);
    int64_t w0 = cell_begin(k, s.width, s.w), w1 = cell_end(k, s.width, s.w);
    double sum = 0.0;
    for (int64_t column = w0; column < w1; ++column) {
        double lines = 0.0;
        for (int64_t z = d0; z < d1; ++z) {
            for (int64_t y = h0; y < h1; ++y) {
                int64_t at = ((n * s.depth + z) * s.height + y) * s.width + column;
                lines += (double)ss_load<T>(prob, at);
            }
        }
        sum += lines;
    }
    double mean = sum / (double)((d1 - d0) * (h1 - h0) * (w1 - w0));
    mean = mean < 0.0 ? 0.0 : mean;
    mean = mean > 1.0 ? 1.0 : mean;
    float v = ss_logf((float)mean) - ss_logf((float)(1.0 - mean));
    v = v < -10.0f ? -10.0f : v;
    out[cell] = v > 10.0f ? 10.0f : v;
}

ss_status SS_CUDA(mask_logits)(ss_exec *x, const ss_mask_logits_args *a) {
    const int64_t *p = a->prob.shape;
    if (a->d > p[1] || a->h > p[2] || a->w > p[3]) {
        return ss_cuda_fail(
            x, SS_INVALID,
            "size: expected at most the input's (%lld, %lld, %lld), got (%lld, %lld, %lld)",
            (long long)p[1], (long long)p[2], (long long)p[3], (long long)a->d, (long long)a->h,
            (long long)a->w);
    }
    mask_logits_sizes s = {p[0], p[1], p[2], p[3], a->d, a->h, a->w};
    unsigned blocks = ss_blocks(s.n * s.d * s.h * s.w, THREADS);
    SS_FOR_FLOAT(a->prob.dtype, T,
                 return SS_LAUNCH(x, blocks, THREADS, 0, (k_mask_logits<T>), a->prob.data,
                                  (float *)a->logits.data, s));
    return SS_UNSUPPORTED;
}

int64_t SS_CUDA_WORKSPACE(mask_logits)(const ss_mask_logits_args *a) {
    (void)a;
    return 0;
}
