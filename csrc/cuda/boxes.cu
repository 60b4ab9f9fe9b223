/* SPDX-License-Identifier: Apache-2.0
 *
 * boxes.cu: the bounding box of every mask of a batch.
 *
 *     lo = min index, hi = max index (inclusive) per axis;  side = hi - lo + 1
 *     box = (max(lo - margin side, 0), min(hi + margin side, size - 1)), all lo first, then all hi
 *
 * mask [N, D, H, W] -> box [N, 6] in array order, found [N]; an empty mask gives zeros and false.
 * Memory: 1 byte read per voxel, 16 at once where rows allow it. Two launches: blocks of voxels to
 * boxes of their own, then one block per mask. Numerics: integers, then one double expression
 * rounded to float, as on the CPU. Deterministic: minima and maxima. registers <= 64
 */
#include "device.cuh"

#define THREADS 256
#define PIECE 16
#define TURNS 8
#define CHUNK (THREADS * PIECE * TURNS)

struct boxes_extent {
    int32_t v[6]; /* lo z y x, then -hi, so that all are minima */
};

SS_DEVICE boxes_extent nowhere() {
    boxes_extent e = {{INT32_MAX, INT32_MAX, INT32_MAX, INT32_MAX, INT32_MAX, INT32_MAX}};
    return e;
}

SS_DEVICE void include(boxes_extent *e, int64_t at, int64_t h, int64_t w) {
    int64_t row = at / w;
    int32_t x = (int32_t)(at - row * w), z = (int32_t)(row / h), y = (int32_t)(row - z * h);
    const int32_t v[6] = {z, y, x, -z, -y, -x};
    for (int k = 0; k < 6; ++k) {
        e->v[k] = v[k] < e->v[k] ? v[k] : e->v[k];
    }
}

/* Minima over the block, in thread 0. */
SS_DEVICE void fold(boxes_extent *e, boxes_extent *warp) {
    for (int k = 0; k < 6; ++k) {
        for (int step = 16; step > 0; step /= 2) {
            int32_t other = __shfl_xor_sync(SS_ALL_LANES, e->v[k], step);
            e->v[k] = other < e->v[k] ? other : e->v[k];
        }
    }
    if (threadIdx.x % 32 == 0) {
        warp[threadIdx.x / 32] = *e;
    }
    __syncthreads();
    for (int i = 1; threadIdx.x == 0 && i < THREADS / 32; ++i) {
        for (int k = 0; k < 6; ++k) {
            e->v[k] = warp[i].v[k] < e->v[k] ? warp[i].v[k] : e->v[k];
        }
    }
}

template <bool VECTOR>
SS_KERNEL void k_boxes_scan(const uint8_t *mask, int64_t voxels, int64_t h, int64_t w,
                            int64_t chunks, boxes_extent *part) {
    SS_SHARED boxes_extent warp[THREADS / 32];
    int64_t n = blockIdx.x / chunks, chunk = blockIdx.x % chunks;
    const uint8_t *m = mask + n * voxels;
    boxes_extent e = nowhere();
    for (int turn = 0; turn < TURNS; ++turn) {
        int64_t from = chunk * CHUNK + ((int64_t)turn * THREADS + threadIdx.x) * PIECE;
        if (VECTOR) { /* a piece lies in one row and begins on 16 bytes */
            if (from < voxels) {
                ss_vec16<uint32_t> v = ss_load16((const uint32_t *)(const void *)(m + from));
                for (int k = 0; k < 4; ++k) {
                    if (v.v[k]) { /* its first and its last byte that is not 0 */
                        include(&e, from + 4 * k + (__ffs((int)v.v[k]) - 1) / 8, h, w);
                        include(&e, from + 4 * k + 3 - __clz((int)v.v[k]) / 8, h, w);
                    }
                }
            }
            continue;
        }
        from = chunk * CHUNK + (int64_t)turn * THREADS * PIECE + threadIdx.x;
        for (int k = 0; k < PIECE; ++k, from += THREADS) {
            if (from < voxels && m[from]) {
                include(&e, from, h, w);
            }
        }
    }
    fold(&e, warp);
    if (threadIdx.x == 0) {
        part[blockIdx.x] = e;
    }
}

SS_KERNEL void k_boxes_fold(const boxes_extent *part, int64_t chunks, int64_t d, int64_t h,
                            int64_t w, double margin, float *box, uint8_t *found) {
    SS_SHARED boxes_extent warp[THREADS / 32];
    boxes_extent e = nowhere();
    for (int64_t i = threadIdx.x; i < chunks; i += THREADS) {
        for (int k = 0; k < 6; ++k) {
            int32_t v = part[blockIdx.x * chunks + i].v[k];
            e.v[k] = v < e.v[k] ? v : e.v[k];
        }
    }
    fold(&e, warp);
    if (threadIdx.x != 0) {
        return;
    }
    bool any = e.v[0] != INT32_MAX;
    found[blockIdx.x] = any;
    for (int axis = 0; axis < 3; ++axis) {
        double lo = 0.0, hi = 0.0;
        if (any) {
            double most = (double)((axis == 0 ? d : (axis == 1 ? h : w)) - 1);
            double grow = margin * (double)(-e.v[axis + 3] - e.v[axis] + 1);
            lo = (double)e.v[axis] - grow;
            hi = (double)-e.v[axis + 3] + grow;
            lo = lo < 0.0 ? 0.0 : lo;
            hi = hi > most ? most : hi;
        }
        box[6 * blockIdx.x + axis] = (float)lo;
        box[6 * blockIdx.x + axis + 3] = (float)hi;
    }
}

static boxes_extent *layout(ss_carve *w, const ss_boxes_args *a, int64_t *chunks) {
    const int64_t *s = a->mask.shape;
    *chunks = (s[1] * s[2] * s[3] + CHUNK - 1) / CHUNK;
    return ss_take<boxes_extent>(w, s[0] * *chunks);
}

int64_t SS_CUDA_WORKSPACE(boxes)(const ss_boxes_args *a) {
    ss_carve w = {};
    int64_t chunks;
    (void)layout(&w, a, &chunks);
    return ss_carved(&w);
}

ss_status SS_CUDA(boxes)(ss_exec *x, const ss_boxes_args *a) {
    const int64_t *s = a->mask.shape, voxels = s[1] * s[2] * s[3];
    const uint8_t *mask = (const uint8_t *)a->mask.data;
    ss_carve w = ss_carve_of(x);
    int64_t chunks;
    boxes_extent *part = layout(&w, a, &chunks);
    if (s[1] > INT32_MAX || s[2] > INT32_MAX || s[3] > INT32_MAX) {
        return ss_cuda_fail(x, SS_INVALID, "mask: expected sides below 2^31");
    }
    unsigned blocks = ss_blocks(s[0] * chunks, 1);
    if (s[3] % PIECE == 0 && ss_aligned16(mask)) {
        SS_TRY(SS_LAUNCH(x, blocks, THREADS, 0, (k_boxes_scan<true>), mask, voxels, s[2], s[3],
                         chunks, part));
    } else {
        SS_TRY(SS_LAUNCH(x, blocks, THREADS, 0, (k_boxes_scan<false>), mask, voxels, s[2], s[3],
                         chunks, part));
    }
    return SS_LAUNCH(x, ss_blocks(s[0], 1), THREADS, 0, (k_boxes_fold), part, chunks, s[1], s[2],
                     s[3], a->margin, (float *)a->box.data, (uint8_t *)a->found.data);
}
