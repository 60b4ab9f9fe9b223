/* SPDX-License-Identifier: Apache-2.0
 *
 * answer_mask.cu: what an answer calls foreground, and whether it says anything, in one sweep.
 *
 *     mask = {z > 0},   span = (min z, max z) per row, both NaN where a z is NaN
 *
 * logits [N, S] -> mask [N, S], span [N, 2]. Memory: 4 bytes read (float) and 1 written per voxel.
 * Launches: one memset, one sweep with extremes by integer atomics on ordered bits, one thread per
 * row that writes them. Numerics: comparisons alone, in float: the CPU's bits. Deterministic:
 * extremes do not depend on order. registers <= 48
 */
#include "block.cuh"

#define THREADS 256
#define CHUNK 8192 /* voxels of a block */

struct answer_job {
    const void *logits;
    int64_t rows, voxels, chunks;
    uint8_t *mask;
    uint32_t *most; /* [rows, 2]: of -z and of z, as ordered bits; all bits: NaN */
    float *span;
};

SS_DEVICE uint32_t block_most(uint32_t v, uint32_t *room) {
    for (int step = SS_WARP / 2; step > 0; step /= 2) {
        uint32_t other = __shfl_xor_sync(SS_ALL_LANES, v, step);
        v = other > v ? other : v;
    }
    if (threadIdx.x % SS_WARP == 0) {
        room[threadIdx.x / SS_WARP] = v;
    }
    __syncthreads();
    for (int w = 0; w < THREADS / SS_WARP; ++w) {
        v = room[w] > v ? room[w] : v;
    }
    __syncthreads();
    return v;
}

template <typename T> SS_KERNEL void k_answer_mask(answer_job j) {
    SS_SHARED uint32_t room[THREADS / SS_WARP];
    const int64_t row = blockIdx.x / j.chunks, chunk = blockIdx.x % j.chunks;
    float low = INFINITY, high = -INFINITY;
    bool bad = false;
    for (int k = 0; k < CHUNK / THREADS; ++k) {
        const int64_t v = chunk * CHUNK + k * THREADS + threadIdx.x;
        if (v < j.voxels) {
            const float z = (float)ss_load<T>(j.logits, row * j.voxels + v);
            low = z < low ? z : low;
            high = z > high ? z : high;
            bad |= z != z;
            j.mask[row * j.voxels + v] = z > 0.0f;
        }
    }
    const uint32_t most[2] = {bad ? 0xffffffffu : ss_ordered(-low),
                              bad ? 0xffffffffu : ss_ordered(high)};
    for (int k = 0; k < 2; ++k) {
        const uint32_t m = block_most(most[k], room);
        if (threadIdx.x == 0) {
            atomicMax(&j.most[2 * row + k], m);
        }
    }
}

SS_KERNEL void k_answer_span(answer_job j) {
    const int64_t row = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (row < j.rows) {
        const float low = ss_unordered(j.most[2 * row]), high = ss_unordered(j.most[2 * row + 1]);
        /* 0 and -0 are equal, and which of them is found depends on order: 0 it is. */
        j.span[2 * row] = low != low ? NAN : 0.0f - low;
        j.span[2 * row + 1] = high != high ? NAN : high + 0.0f;
    }
}

template <typename T> static ss_status run(ss_exec *x, const answer_job &j) {
    SS_TRY(SS_LAUNCH(x, ss_blocks(j.rows * j.chunks, 1), THREADS, 0, (k_answer_mask<T>), j));
    return SS_LAUNCH(x, ss_blocks(j.rows, THREADS), THREADS, 0, (k_answer_span), j);
}

int64_t SS_CUDA_WORKSPACE(answer_mask)(const ss_answer_mask_args *a) {
    ss_carve w = {};
    (void)ss_take<uint32_t>(&w, a->logits.shape[0] * 2);
    return ss_carved(&w);
}

ss_status SS_CUDA(answer_mask)(ss_exec *x, const ss_answer_mask_args *a) {
    ss_carve w = ss_carve_of(x);
    answer_job j = {};
    j.logits = a->logits.data;
    j.rows = a->logits.shape[0];
    j.voxels = a->logits.shape[1];
    j.chunks = (j.voxels + CHUNK - 1) / CHUNK;
    j.mask = (uint8_t *)a->mask.data;
    j.most = ss_take<uint32_t>(&w, j.rows * 2);
    j.span = (float *)a->span.data;
    SS_TRY(ss_cuda_zero(x, j.most, j.rows * 2 * (int64_t)sizeof *j.most));
    SS_FOR_FLOAT(a->logits.dtype, T, return run<T>(x, j));
    return SS_UNSUPPORTED;
}
