/* SPDX-License-Identifier: Apache-2.0
 *
 * voxel_loss_many.cu: the sweeps for softmax over 5 to 16 classes, one voxel of a thread at a time.
 *
 *     p_c = e^(x_c) / s,  x_c = z_c - max z,  s = sum_c e^(x_c);   lost_c = -ln p_c = ln s - x_c
 *     labels      per class c, over its voxels: I = sum m p_c, Y = sum m, L = sum m lost_c, and
 *                 Z = sum m p_c^2 over all voxels; cross entropy and Dice follow from them
 *     backward    h_c of voxel_loss.cuh summed over groups, dz_c = h_c - p_c sum_k h_k
 *
 * logits [B, C, S] -> part [B, chunks, rows, 4], dlogits [B, C, S]; half precision or float. The
 * logits of a voxel are in registers (room for 8 or 16 classes); the sums of the label's class,
 * which only the device knows, are in shared memory, a column per thread. Bytes per voxel: C
 * logits, label, weight; C gradients backward, which reads its factors from a cache.
 * Numerics: float, voxel_loss_math.cuh; 64 voxels of a thread, a tree over its warp, then double.
 * Deterministic: all orders are fixed by the problem, and every GPU gives the same bits.
 * registers <= 128
 */
#include "voxel_loss_math.cuh"

#define THREADS 128
#define WARPS (THREADS / SS_WARP)
#define CHUNK VL_CHUNK
static_assert(CHUNK % THREADS == 0, "whole turns");

/* One voxel: p_c and max z, ln s on demand. Classes from C on have p_c = 0 or next to it. */
template <int CAP> struct voxel {
    float p[CAP], top, s;
};

template <typename T, int CAP>
SS_DEVICE voxel<CAP> softmax_of(const T *logit, int64_t stride, int32_t classes) {
    voxel<CAP> o;
    float odd = 0.0f;
    for (int c = 0; c < CAP; ++c) {
        o.p[c] = c < classes ? ss_load<T>(logit, c * stride) : -3.4028235e38f;
    }
    o.top = o.p[0];
    for (int c = 0; c < CAP; ++c) {
        odd = fmaf(o.p[c], 0.0f, odd); /* NaN as soon as a logit is not finite */
        o.top = fmaxf(o.top, o.p[c]);
    }
    const bool finite = odd == 0.0f;
    bool lost = false;
    uint32_t none = 0;
    if (!finite) { /* as without shortcuts: NaN and inf make all NaN, e^-inf is 0 */
        lost = o.top == -INFINITY || o.top == INFINITY;
        for (int c = 0; c < CAP; ++c) {
            lost |= o.p[c] != o.p[c];
            none |= o.p[c] == -INFINITY ? 1u << c : 0u;
        }
    }
    o.s = 0.0f;
    for (int c = 0; c < CAP; ++c) {
        o.p[c] = vl_exp_quick(o.p[c] - o.top);
        o.p[c] = none >> c & 1u ? 0.0f : o.p[c];
        o.s += c < classes ? o.p[c] : 0.0f;
    }
    o.s = lost ? NAN : o.s;
    const float r = vl_reciprocal(o.s);
    for (int c = 0; c < CAP; ++c) {
        o.p[c] *= r;
    }
    return o;
}

template <int CAP> struct columns {
    float i[CAP][THREADS], y[CAP][THREADS], l[CAP][THREADS];
};

template <typename T, int CAP>
SS_KERNEL void __launch_bounds__(THREADS, 4) k_voxel_loss_many_labels(const vl_group g) {
    SS_SHARED columns<CAP> own;
    SS_SHARED float room[CAP][WARPS][4];
    SS_SHARED double total[CAP][4];
    const vl_place at = vl_place_of(g);
    vl_prepare(g.done);
    const int32_t classes = (int32_t)g.C, end = (int32_t)(at.end - at.from);
    const int tid = threadIdx.x;
    const int64_t slot = (at.b - g.first) * g.S + at.from;
    const T *logit = static_cast<const T *>(g.logits) + at.b * g.C * g.S + at.from;
    float sz[CAP];
    int32_t faults = 0;
    for (int c = 0; c < CAP; ++c) {
        sz[c] = own.i[c][tid] = own.y[c][tid] = own.l[c][tid] = 0.0f;
    }
    for (int32_t v = tid; v < end; v += THREADS) {
        int32_t y;
        float m;
        vl_read_slot(g.slot, slot + v, classes, &y, &m, &faults);
        const float z = y >= 0 ? ss_load<T>(logit + v, y * g.S) : 0.0f;
        const voxel<CAP> o = softmax_of<T, CAP>(logit + v, g.S, classes);
        for (int c = 0; c < CAP; ++c) {
            sz[c] = fmaf(m * o.p[c], g.squared ? o.p[c] : 1.0f, sz[c]);
        }
        if (y >= 0) {
            const float x = z - o.top, r = vl_reciprocal(o.s);
            const float p = z == -INFINITY ? 0.0f : vl_exp_quick(x) * r;
            const float lost = vl_log_quick(o.s) - x;
            own.i[y][tid] += m * p;
            own.y[y][tid] += m;
            own.l[y][tid] += m == 0.0f ? 0.0f : m * lost;
        }
    }
    for (int c = 0; c < CAP; ++c) {
        vl_keep(room[c], own.i[c][tid], sz[c], own.y[c][tid], own.l[c][tid]);
    }
    __syncthreads();
    if (tid < 4 * CAP) {
        double sum = 0.0;
        for (int w = 0; w < WARPS; ++w) {
            sum += (double)room[tid / 4][w][tid % 4];
        }
        total[tid / 4][tid % 4] = sum;
    }
    __syncthreads();
    if (tid == 0) {
        vl_write_labels(g, total, at.part);
    }
    vl_count_faults<THREADS>(g.faults, faults);
}

/* ---- backward -------------------------------------------------------------------------------- */

/* What one group pulls at the logits of a voxel. */
template <typename T, int CAP>
SS_DEVICE void pull(const vl_job &j, int32_t i, int64_t b, int64_t v, const T *logit,
                    const voxel<CAP> &o, float *h) {
    const vl_term &t = j.term[i];
    const int32_t classes = (int32_t)j.C;
    int32_t y, faults = 0;
    float m;
    vl_read_slot(j.slot[t.slot], (b - t.first) * j.S + v, classes, &y, &m, &faults);
    y = j.slot[t.slot].label ? y : -1;
    const int64_t target = (b - t.first) * j.C * j.S + v;
    const float4 *by = static_cast<const float4 *>(j.factor) + (i * j.B + b) * j.C * 2;
    const float ln = t.entropy ? vl_log_quick(o.s) : 0.0f;
    for (int c = 0; c < CAP; ++c) {
        if (c >= classes) {
            continue;
        }
        const float4 f = by[2 * c], d = by[2 * c + 1]; /* u v e f, a d */
        float q = y == c ? 1.0f : 0.0f;
        if (t.target) {
            q = vl_short(t.target, t.dtype, target + c * j.S);
        }
        float slope = fmaf(f.x, q, fmaf(f.y, o.p[c], f.z));
        if (t.entropy) {
            slope = fmaf(f.w, ln - (ss_load<T>(logit, c * j.S) - o.top), slope);
        }
        h[c] += m * (o.p[c] * slope - fmaf(d.x, q, d.y));
    }
}

template <typename T, int CAP>
SS_KERNEL void __launch_bounds__(THREADS, 4) k_voxel_loss_many_backward(const vl_job j) {
    const int64_t b = blockIdx.x / (uint32_t)j.chunks;
    const int64_t v = (int64_t)(blockIdx.x % (uint32_t)j.chunks) * THREADS + (int64_t)threadIdx.x;
    if (v >= j.S) {
        return;
    }
    const int32_t classes = (int32_t)j.C;
    const T *logit = static_cast<const T *>(j.logits) + b * j.C * j.S + v;
    T *to = static_cast<T *>(j.dlogits) + b * j.C * j.S + v;
    bool covered = false;
    float h[CAP], s = 0.0f;
    voxel<CAP> o;
    for (int c = 0; c < CAP; ++c) {
        h[c] = o.p[c] = 0.0f;
    }
    for (int32_t i = 0; i < j.terms; ++i) {
        if (!vl_covers(j.term[i], b)) {
            continue;
        }
        if (!covered) {
            o = softmax_of<T, CAP>(logit, j.S, classes);
            covered = true;
        }
        pull<T, CAP>(j, i, b, v, logit, o, h);
    }
    for (int c = 0; c < CAP; ++c) {
        s -= c < classes ? h[c] : 0.0f;
    }
    for (int c = 0; c < CAP; ++c) {
        if (c < classes) {
            ss_store<T>(to, c * j.S, fmaf(o.p[c], s, h[c]));
        }
    }
}

/* ---- launches -------------------------------------------------------------------------------- */

template <typename T> static ss_status run_forward(ss_exec *x, const vl_group *g) {
    const unsigned blocks = ss_blocks((g->last - g->first) * g->chunks, 1);
    if (g->C <= 8) {
        return SS_LAUNCH(x, blocks, THREADS, 0, (k_voxel_loss_many_labels<T, 8>), *g);
    }
    return SS_LAUNCH(x, blocks, THREADS, 0, (k_voxel_loss_many_labels<T, 16>), *g);
}

template <typename T> static ss_status run_backward(ss_exec *x, const vl_job *j) {
    vl_job k = *j;
    k.chunks = (j->S + THREADS - 1) / THREADS;
    const unsigned blocks = ss_blocks(k.B * k.chunks, 1);
    if (j->C <= 8) {
        return SS_LAUNCH(x, blocks, THREADS, 0, (k_voxel_loss_many_backward<T, 8>), k);
    }
    return SS_LAUNCH(x, blocks, THREADS, 0, (k_voxel_loss_many_backward<T, 16>), k);
}

ss_status ss_vl_many_forward(ss_exec *x, const vl_group *g) {
    switch (g->logits_dtype) {
    case SS_F16:
        return run_forward<ss_half>(x, g);
    case SS_BF16:
        return run_forward<ss_bfloat>(x, g);
    default:
        return run_forward<float>(x, g);
    }
}

ss_status ss_vl_many_backward(ss_exec *x, const vl_job *j) {
    switch (j->dtype) {
    case SS_F16:
        return run_backward<ss_half>(x, j);
    case SS_BF16:
        return run_backward<ss_bfloat>(x, j);
    default:
        return run_backward<float>(x, j);
    }
}
