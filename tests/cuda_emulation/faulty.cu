/* SPDX-License-Identifier: Apache-2.0
 *
 * faulty.cu: kernels that are wrong on purpose, each in one way that the emulation must tell, and
 * one that is right.
 */
#include "../../csrc/cuda/device.cuh"

#define THREADS 96

/* The right one: reverses a block's numbers through shared memory and adds the warp's lane sums. */
SS_KERNEL void k_right(int64_t *out, int64_t extra) {
    SS_SHARED int64_t room[THREADS];
    room[threadIdx.x] = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    __syncthreads();
    int64_t v = room[THREADS - 1 - threadIdx.x];
    out[blockIdx.x * THREADS + threadIdx.x] = v + ss_warp_sum((int64_t)threadIdx.x) + extra;
}

/* Half of the threads waits at another barrier. */
SS_KERNEL void k_two_barriers(int64_t *out) {
    if (threadIdx.x < 32) {
        __syncthreads();
    } else {
        __syncthreads();
    }
    out[threadIdx.x] = 1;
}

/* One warp waits for a lane that waits for the block. */
SS_KERNEL void k_lane_at_barrier(int64_t *out) {
    if (threadIdx.x == 5) {
        __syncthreads();
    }
    out[threadIdx.x] = __shfl_sync(SS_ALL_LANES, (int)threadIdx.x, 0);
}

SS_KERNEL void k_lane_gone(int64_t *out) {
    if (threadIdx.x == 40) {
        return;
    }
    out[threadIdx.x] = __any_sync(SS_ALL_LANES, threadIdx.x == 3);
}

SS_KERNEL void k_half_mask(int64_t *out) {
    out[threadIdx.x] = __ballot_sync(0xffffu, 1);
}

/* Reads what nobody wrote. */
SS_KERNEL void k_uninitialised(int64_t *out) {
    SS_SHARED int64_t room[THREADS];
    out[threadIdx.x] = room[threadIdx.x];
}

/* A barrier is missing: what a thread sees depends on who came first. */
SS_KERNEL void k_race(int64_t *out) {
    SS_SHARED int64_t room[THREADS];
    room[threadIdx.x] = threadIdx.x;
    out[threadIdx.x] = room[THREADS - 1 - threadIdx.x];
}

extern "C" __attribute__((visibility("default"))) int32_t faulty(int32_t which, int64_t *out,
                                                                 char *text) {
    ss_exec x = ss_exec_cpu(0);
    ss_status status = SS_INVALID;
    switch (which) {
    case 0:
        status = SS_LAUNCH(&x, 3, THREADS, 0, (k_right), out, 1000);
        break;
    case 1:
        status = SS_LAUNCH(&x, 1, THREADS, 0, (k_two_barriers), out);
        break;
    case 2:
        status = SS_LAUNCH(&x, 1, THREADS, 0, (k_lane_at_barrier), out);
        break;
    case 3:
        status = SS_LAUNCH(&x, 1, THREADS, 0, (k_lane_gone), out);
        break;
    case 4:
        status = SS_LAUNCH(&x, 1, THREADS, 0, (k_half_mask), out);
        break;
    case 5:
        status = SS_LAUNCH(&x, 1, THREADS, 0, (k_uninitialised), out);
        break;
    case 6:
        status = SS_LAUNCH(&x, 1, THREADS, 0, (k_race), out);
        break;
    case 7:
        status = SS_LAUNCH(&x, 1, 100, 0, (k_race), out);
        break;
    default:
        status = SS_LAUNCH(&x, 1, THREADS, SS_MAX_SHARED + 1, (k_race), out);
        break;
    }
    snprintf(text, sizeof x.error, "%s", x.error);
    return status;
}
