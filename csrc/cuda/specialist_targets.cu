/* SPDX-License-Identifier: Apache-2.0
 *
 * specialist_targets.cu: which voxels a generalist is asked for, per sample and foreground class c.
 *
 *     top = max P_c;  th = threshold if top >= threshold, else top / 2 if top >= p_min, else skip
 *     target = {P_c >= th},  region = {H(P) / ln C <= tau_p};  everywhere if th < threshold
 *     spread = max |sum_c P_c - 1| (NaN where one is), max(0, -min P): is it a distribution at all?
 *
 * prob [B, C, S], F = C - 1 -> target, region [B, F, S], skip [B, F], spread [B, 2]; both masks of
 * a skipped class are empty. tau_p >= 1 restricts nothing and costs no logarithm. Memory: every
 * probability of the foreground is read twice and that of the background once (then from cache), 2
 * F / C bytes are written per probability. Launches: two memsets, maxima by integer atomics on
 * ordered bits, masks. Numerics: float, the CPU's expressions: the same bits. Deterministic: maxima
 * do not depend on order. registers <= 64
 */
#include "block.cuh"

#define THREADS 256
#define CHUNK 8192 /* voxels whose maximum one block finds */

struct targets_job {
    const void *prob;
    int64_t batch, classes, voxels, chunks, blocks; /* of the masks, per sample */
    double threshold, p_min;
    float high, limit; /* the threshold in float, rounded up; tau_p ln C */
    int32_t everywhere;
    uint32_t *top; /* [batch, classes], as ordered bits; 0: nothing yet */
    uint8_t *target, *region, *skip;
    int32_t
        *spread; /* [batch, 2], as bits of floats that are not negative: these order as they do */
};

template <typename T> SS_KERNEL void k_specialist_targets_top(targets_job j) {
    SS_SHARED float warp[THREADS / 32];
    int64_t f = j.classes - 1, row = blockIdx.x / j.chunks, chunk = blockIdx.x % j.chunks;
    int64_t at = row / f * j.classes + 1 + row % f;
    float top = -INFINITY;
    for (int k = 0; k < CHUNK / THREADS; ++k) {
        int64_t v = chunk * CHUNK + k * THREADS + threadIdx.x;
        if (v < j.voxels) {
            float p = (float)ss_load<T>(j.prob, at * j.voxels + v);
            top = p > top ? p : top;
        }
    }
    for (int step = 16; step > 0; step /= 2) {
        float other = __shfl_xor_sync(SS_ALL_LANES, top, step);
        top = other > top ? other : top;
    }
    if (threadIdx.x % 32 == 0) {
        warp[threadIdx.x / 32] = top;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int k = 1; k < THREADS / 32; ++k) {
            top = warp[k] > top ? warp[k] : top;
        }
        atomicMax(&j.top[at], ss_ordered(top));
    }
}

/* Threshold of a class from its maximum; NaN if it is to be skipped. */
SS_DEVICE float threshold_for(const targets_job &j, float top) {
    if ((double)top >= j.threshold) {
        return j.high;
    }
    return (double)top >= j.p_min ? 0.5f * top : NAN;
}

/* -p ln p, 0 for 0; NaN stays. */
SS_DEVICE float entropy_of(float p) {
    float floored = p < 1.17549435e-38f ? 1.17549435e-38f : p;
    return -p * ss_log_bounded(floored);
}

template <typename T>
SS_DEVICE void voxel_masks(const targets_job &j, int64_t b, int64_t v, int32_t spread[2]) {
    const int64_t from = b * j.classes * j.voxels + v, f = j.classes - 1;
    float p = (float)ss_load<T>(j.prob, from);
    float sum = p, least = p, h = j.everywhere ? 0.0f : entropy_of(p);
    for (int64_t c = 1; c < j.classes; ++c) {
        p = (float)ss_load<T>(j.prob, from + c * j.voxels);
        sum += p;
        least = p < least ? p : least;
        h += j.everywhere ? 0.0f : entropy_of(p);
    }
    spread[0] = (int32_t)(ss_f32_bits(sum - 1.0f) & 0x7fffffffu);
    spread[1] = least < 0.0f ? (int32_t)ss_f32_bits(-least) : 0;
    for (int64_t c = 1; c < j.classes; ++c) {
        float th = threshold_for(j, ss_unordered(j.top[b * j.classes + c]));
        p = (float)ss_load<T>(j.prob, from + c * j.voxels);
        int64_t to = (b * f + c - 1) * j.voxels + v;
        bool all = j.everywhere || th != th || (double)th < j.threshold;
        j.target[to] = p >= th; /* false for NaN: skipped */
        j.region[to] = all ? th == th : h <= j.limit && least >= 0.0f;
        if (v == 0) {
            j.skip[b * f + c - 1] = th != th;
        }
    }
}

template <typename T> SS_KERNEL void k_specialist_targets_masks(targets_job j) {
    SS_SHARED int32_t room[THREADS / SS_WARP];
    const int64_t b = blockIdx.x / j.blocks;
    const int64_t v = blockIdx.x % j.blocks * THREADS + threadIdx.x;
    int32_t spread[2] = {0, 0};
    if (v < j.voxels) {
        voxel_masks<T>(j, b, v, spread);
    }
    for (int k = 0; k < 2; ++k) {
        const int32_t most = ss_block_max<THREADS>(spread[k], room);
        if (threadIdx.x == 0 && most > 0) {
            atomicMax(&j.spread[2 * b + k], most);
        }
    }
}

template <typename T> static ss_status run(ss_exec *x, const targets_job &j) {
    unsigned blocks = ss_blocks(j.batch * (j.classes - 1) * j.chunks, 1);
    SS_TRY(SS_LAUNCH(x, blocks, THREADS, 0, (k_specialist_targets_top<T>), j));
    return SS_LAUNCH(x, ss_blocks(j.batch * j.blocks, 1), THREADS, 0,
                     (k_specialist_targets_masks<T>), j);
}

int64_t SS_CUDA_WORKSPACE(specialist_targets)(const ss_specialist_targets_args *a) {
    ss_carve w = {};
    (void)ss_take<uint32_t>(&w, a->prob.shape[0] * a->prob.shape[1]);
    return ss_carved(&w);
}

ss_status SS_CUDA(specialist_targets)(ss_exec *x, const ss_specialist_targets_args *a) {
    const int64_t *s = a->prob.shape;
    if (s[1] < 2 || a->F != s[1] - 1) {
        return ss_cuda_fail(x, SS_INVALID,
                            "prob: expected [B, C, ...] with C = F + 1 = %lld, got C = %lld",
                            (long long)a->F + 1, (long long)s[1]);
    }
    ss_carve w = ss_carve_of(x);
    targets_job j = {};
    j.prob = a->prob.data;
    j.batch = s[0];
    j.classes = s[1];
    j.voxels = s[2];
    j.chunks = (s[2] + CHUNK - 1) / CHUNK;
    j.blocks = (s[2] + THREADS - 1) / THREADS;
    j.threshold = a->threshold;
    j.p_min = a->p_min;
    j.high = (float)a->threshold;
    j.high = (double)j.high < a->threshold ? nextafterf(j.high, INFINITY) : j.high;
    j.limit = (float)(a->tau_p * log((double)s[1]));
    j.everywhere = a->tau_p >= 1.0;
    j.top = ss_take<uint32_t>(&w, s[0] * s[1]);
    j.target = (uint8_t *)a->target.data;
    j.region = (uint8_t *)a->region.data;
    j.skip = (uint8_t *)a->skip.data;
    j.spread = (int32_t *)a->spread.data;
    SS_TRY(ss_cuda_zero(x, j.spread, s[0] * 2 * (int64_t)sizeof *j.spread));
    SS_TRY(ss_cuda_zero(x, j.top, s[0] * s[1] * (int64_t)sizeof *j.top));
    SS_FOR_FLOAT(a->prob.dtype, T, return run<T>(x, j));
    return SS_UNSUPPORTED;
}
