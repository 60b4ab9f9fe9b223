/* SPDX-License-Identifier: Apache-2.0
 *
 * overlap.cu: voxel counts behind Dice and Jaccard, all cases and classes in one pass.
 *
 *     counts[n, c] = (|A|, |G|, |A & G|),  A = {y_pred[n] = c}, G = {y[n] = c}
 *
 * y_pred, y [N, S] -> counts [N, C, 3]; a reference voxel with the ignored label counts nowhere. A
 * label that is no class and not the ignored one takes its voxel out of both maps and is counted in
 * faults (on the CPU: an error). Memory: each label read once. One launch behind a memset. A warp
 * counts equal pairs among its 32 voxels by ballots, so that uniform regions cost one addition per
 * warp and block; tables are in shared memory, for more than MOST classes in global memory.
 * Numerics: integers, the CPU's exactly. Deterministic: integer additions. registers <= 48
 */
#include "labels.cuh"

#define THREADS 256
#define TURNS 4
#define CHUNK (THREADS * SS_LABEL_TURNS * TURNS)
#define MOST 4000 /* classes: 3 * 4000 * 4 bytes, beside what ss_count_bad needs */

struct overlap_job {
    ss_label_maps maps;
    int64_t size, chunks, classes; /* voxels of a case; blocks of a case */
    bool shared;
    unsigned long long *counts, *faults;
};

/* n more voxels with this pair of labels. */
SS_DEVICE void add(const overlap_job &j, uint32_t *own, unsigned long long *table, uint32_t pair,
                   uint32_t n) {
    const uint32_t p = pair >> 16, g = pair & 0xffffu;
    const bool use[3] = {p != SS_NO_LABEL, g != SS_NO_LABEL, p == g && p != SS_NO_LABEL};
    for (uint32_t k = 0; k < 3; ++k) {
        const uint32_t at = 3 * (k == 1 ? g : p) + k;
        if (use[k] && j.shared) {
            atomicAdd(&own[at], n);
        } else if (use[k]) {
            atomicAdd(&table[at], static_cast<unsigned long long>(n));
        }
    }
}

SS_KERNEL void k_overlap(overlap_job j) {
    SS_DYNAMIC_SHARED(uint32_t, own);
    SS_SHARED int room[THREADS / SS_WARP];
    const int64_t n = blockIdx.x / j.chunks, chunk = blockIdx.x % j.chunks;
    const int32_t cells = j.shared ? (int32_t)(3 * j.classes) : 0;
    const uint32_t lane = threadIdx.x % SS_WARP;
    unsigned long long *table = j.counts + n * 3 * j.classes;
    for (int32_t i = (int32_t)threadIdx.x; i < cells; i += THREADS) {
        own[i] = 0;
    }
    __syncthreads();
    uint32_t kept = SS_NO_PAIR, held = 0; /* pairs of the lane in front, not added yet */
    int bad = 0;
    for (int turn = 0; turn < TURNS; ++turn) {
        const int64_t at = chunk * CHUNK + turn * THREADS * SS_LABEL_TURNS + threadIdx.x;
        uint32_t pair[SS_LABEL_TURNS];
        bad += ss_label_pairs<THREADS>(j.maps, n * j.size + at, (n + 1) * j.size, pair);
        for (int k = 0; k < SS_LABEL_TURNS; ++k) {
            const uint32_t lead = __shfl_sync(SS_ALL_LANES, pair[k], 0);
            const uint32_t same = __ballot_sync(SS_ALL_LANES, pair[k] == lead);
            if (lead != kept) {
                if (held && lane == 0) {
                    add(j, own, table, kept, held);
                }
                kept = lead;
                held = 0;
            }
            held += (uint32_t)__popc(same);
            for (uint32_t left = ~same; left;) {
                const uint32_t from = (uint32_t)__ffs((int)left) - 1;
                const uint32_t next = __shfl_sync(SS_ALL_LANES, pair[k], from);
                const uint32_t equal = __ballot_sync(SS_ALL_LANES, pair[k] == next);
                if (lane == from) {
                    add(j, own, table, next, (uint32_t)__popc(equal));
                }
                left &= ~equal;
            }
        }
    }
    if (held && lane == 0) {
        add(j, own, table, kept, held);
    }
    ss_count_bad<THREADS>(j.faults, bad, room); /* has a barrier, which the table needs as well */
    for (int32_t i = (int32_t)threadIdx.x; i < cells; i += THREADS) {
        if (own[i]) {
            atomicAdd(&table[i], static_cast<unsigned long long>(own[i]));
        }
    }
}

int64_t SS_CUDA_WORKSPACE(overlap)(const ss_overlap_args *) {
    return 0;
}

ss_status SS_CUDA(overlap)(ss_exec *x, const ss_overlap_args *a) {
    overlap_job j = {};
    const int64_t n = a->y.shape[0];
    j.maps = ss_label_maps_of(&a->y_pred, &a->y, a->num_classes, a->has_ignore, a->ignore_index);
    j.size = a->y.shape[1];
    j.chunks = (j.size + CHUNK - 1) / CHUNK;
    j.classes = a->num_classes;
    j.shared = a->num_classes <= MOST;
    j.counts = (unsigned long long *)a->counts.data;
    j.faults = SS_FAULTS_OF(x, overlap);
    SS_TRY(ss_cuda_zero(x, a->counts.data, n * 3 * j.classes * (int64_t)sizeof(int64_t)));
    const size_t shared = j.shared ? (size_t)(3 * j.classes) * sizeof(uint32_t) : 0;
    return SS_LAUNCH(x, ss_blocks(n * j.chunks, 1), THREADS, shared, (k_overlap), j);
}
