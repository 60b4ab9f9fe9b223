/* SPDX-License-Identifier: Apache-2.0
 *
 * resident.cuh: loops whose length only the device knows, in one launch of blocks that wait for
 * each other.
 *
 * A barrier between blocks is safe only if all of them run at the same time. That is what a
 * cooperative launch guarantees: CUDA starts all blocks together or refuses, whatever else is on
 * the GPU, and it can be captured in a graph. The grid is as large as fits at once (an occupancy
 * query: arithmetic of the host), so here it does depend on the GPU; kernels must cut their sums by
 * the problem, so that results do not. A GPU without cooperative launches, and the emulation, gets
 * one block, for which the barrier is __syncthreads.
 *
 * Problems are dealt to groups of blocks, each with a barrier of its own: `arrived`, a zeroed word.
 */
#ifndef SS_CUDA_RESIDENT_CUH
#define SS_CUDA_RESIDENT_CUH

#include "device.cuh"

typedef struct ss_groups {
    unsigned groups; /* group g takes problems g, g + groups, ... */
    unsigned blocks; /* of a group */
} ss_groups;

/* As many blocks as fit, for `problems` problems that can use `most` blocks each. */
static inline ss_groups ss_share_out(unsigned fit, int64_t problems, int64_t most) {
    ss_groups s = {1, 1};
    s.groups = (int64_t)fit < problems ? fit : (unsigned)problems;
    s.blocks = (int64_t)(fit / s.groups) < most ? fit / s.groups : (unsigned)most;
    return s;
}

/* How many blocks run at the same time at most; 1 where the GPU cannot promise it. */
template <typename... P>
static inline ss_status ss_resident_blocks(ss_exec *x, void (*kernel)(P...), int threads,
                                           unsigned *fit) {
    int device = 0, cooperative = 0, processors = 0, each = 0;
    SS_TRY(ss_cuda_check(x, cudaGetDevice(&device), "current device"));
    SS_TRY(ss_cuda_check(x,
                         cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, device),
                         "cooperative launches"));
    SS_TRY(ss_cuda_check(
        x, cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device),
        "multiprocessors"));
    SS_TRY(ss_cuda_check(
        x, cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, threads, 0), "occupancy"));
    *fit = cooperative && processors > 0 && each > 0 ? (unsigned)(processors * each) : 1;
    return SS_OK;
}

template <typename... P>
static inline ss_status ss_launch_resident_exactly(ss_exec *x, const char *name,
                                                   void (*kernel)(P...), unsigned blocks,
                                                   unsigned threads, P... p) {
    void *arguments[] = {static_cast<void *>(&p)..., nullptr};
    return ss_cuda_check(x,
                         cudaLaunchCooperativeKernel(kernel, dim3(blocks), dim3(threads), arguments,
                                                     0, (cudaStream_t)x->stream),
                         name);
}

template <typename... P, typename... A>
static inline ss_status ss_launch_resident(ss_exec *x, const char *name, void (*kernel)(P...),
                                           unsigned blocks, unsigned threads, A... a) {
    if (blocks == 1) { /* needs no promise */
        return ss_launch(x, name, kernel, dim3(1), dim3(threads), 0, a...);
    }
    return ss_launch_resident_exactly<P...>(x, name, kernel, blocks, threads, static_cast<P>(a)...);
}

typedef struct ss_group {
    uint32_t *arrived;
    uint32_t blocks;
    uint32_t target; /* blocks that have come to all barriers so far */
} ss_group;

/* Returns when all blocks of the group are here; what any of their threads wrote before is visible
 * to all threads behind it. (Thread 0's fences order the writes of its block, which __syncthreads
 * has put before them, and empty the L1 of what was read earlier. Do not read such memory through
 * const __restrict__, which CUDA may take for constant.) */
SS_DEVICE void ss_group_barrier(ss_group *g) {
    __syncthreads();
    if (g->blocks > 1) {
        g->target += g->blocks;
        if (threadIdx.x == 0) {
            __threadfence();
            atomicAdd(g->arrived, 1u);
            while ((int32_t)(*(volatile uint32_t *)g->arrived - g->target) < 0) {
                __nanosleep(20);
            }
            __threadfence();
        }
        __syncthreads();
    }
}

#endif
