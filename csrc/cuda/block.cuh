/* SPDX-License-Identifier: Apache-2.0
 *
 * block.cuh: the largest value of a block, sums over the threads before one, floats as integers.
 *
 * As ss_block_sum of device.cuh: all threads of a block take part, blocks are whole warps, `room`
 * is shared memory for one value per warp and may be used again at once. Integers: no order
 * matters.
 */
#ifndef SS_CUDA_BLOCK_CUH
#define SS_CUDA_BLOCK_CUH

#include "device.cuh"

/* The largest of all threads' values, in every thread. */
template <int THREADS> SS_DEVICE int32_t ss_block_max(int32_t v, int32_t *room) {
    for (int step = SS_WARP / 2; step > 0; step /= 2) {
        int32_t other = __shfl_xor_sync(SS_ALL_LANES, v, step);
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

/* Bits that order as the numbers do, all above 0; and back. */
SS_DEVICE uint32_t ss_ordered(float f) {
    uint32_t u = ss_f32_bits(f);
    return u & 0x80000000u ? ~u : u | 0x80000000u;
}
SS_DEVICE float ss_unordered(uint32_t u) {
    return ss_bits_f32(u & 0x80000000u ? u & 0x7fffffffu : ~u);
}

/* The sum over the threads before this one; *total: over all. */
template <int THREADS, typename V> SS_DEVICE V ss_block_scan(V v, V *room, V *total) {
    const int lane = threadIdx.x % SS_WARP, warp = threadIdx.x / SS_WARP;
    V upto = v;
    for (int step = 1; step < SS_WARP; step *= 2) {
        V before = __shfl_up_sync(SS_ALL_LANES, upto, step);
        upto += lane >= step ? before : 0;
    }
    if (lane == SS_WARP - 1) {
        room[warp] = upto;
    }
    __syncthreads();
    V before = 0, sum = 0;
    for (int w = 0; w < THREADS / SS_WARP; ++w) {
        before += w < warp ? room[w] : 0;
        sum += room[w];
    }
    __syncthreads();
    *total = sum;
    return before + upto - v;
}

#endif
