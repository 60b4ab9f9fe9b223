/* SPDX-License-Identifier: Apache-2.0
 *
 * voxel_loss_any.cu: a forward and a backward sweep over the voxels for any sum of terms, any
 * number of classes, any dtypes.
 *
 *     p_c = e^(z_c - max z) / s,  s = sum_c e^(z_c - max z)  (sigmoid: 1 / (1 + e^-z_c), none: z_c)
 *     forward    sums over a chunk per term: Dice I, Z, Y, W per class; others num, den, W
 *     backward   dz_c = h_c - p_c sum_k h_k (softmax), h_c (others); h_c summed over groups:
 *                voxel_loss.cuh (other activations: their slope instead of p_c, and a (q_c - p_c))
 *
 * logits [B, C, S] -> part [B, chunks, rows, 4], dlogits [B, C, S]. Threads own voxels and walk
 * through their classes, whose logits they read again for every step (maximum, s, each term;
 * backward: maximum, s, sum of h, result), as a rule from a cache: of memory, C logits, label and
 * weight per voxel forward, the same and C gradients backward, and 32 bytes per row and 1024
 * voxels. What is common has faster sweeps.
 * Numerics: float, for float64 logits double; four voxels of a thread, then a tree over its warp,
 * then double. Logarithms are taken of s alone, never of p. Faulty labels and weights count as
 * weight 0. Deterministic: all orders are fixed by the problem. registers <= 128
 */
#include "voxel_loss.cuh"

#define THREADS 256
#define WARPS (THREADS / SS_WARP)
#define EACH 4
#define CHUNK (THREADS * EACH)
#define ROWS 16 /* that wait in shared memory for their sum over the warps */

SS_DEVICE float exp_of(float x) {
    return ss_expf(x);
}
SS_DEVICE double exp_of(double x) {
    return exp(x);
}
SS_DEVICE float log_of(float x) {
    return ss_logf(x);
}
SS_DEVICE double log_of(double x) {
    return log(x);
}

/* Logits are of the type of computing or, for float, shorter. */
SS_DEVICE float logit(const vl_job &j, int64_t i, float) {
    if (j.dtype == SS_F32) {
        return ss_load<float>(j.logits, i);
    }
    return j.dtype == SS_F16 ? ss_load<ss_half>(j.logits, i) : ss_load<ss_bfloat>(j.logits, i);
}
SS_DEVICE double logit(const vl_job &j, int64_t i, double) {
    return ss_load<double>(j.logits, i);
}

SS_DEVICE void store_gradient(const vl_job &j, int64_t i, float v) {
    if (j.dtype == SS_F32) {
        ss_store<float>(j.dlogits, i, v);
    } else if (j.dtype == SS_F16) {
        ss_store<ss_half>(j.dlogits, i, v);
    } else {
        ss_store<ss_bfloat>(j.dlogits, i, v);
    }
}
SS_DEVICE void store_gradient(const vl_job &j, int64_t i, double v) {
    ss_store<double>(j.dlogits, i, v);
}

/* The V voxels of a thread: at, at + THREADS, ... of sample b, those below `end`. */
template <typename R, int V> struct voxels {
    int64_t b, at, end;
    R mx[V], ln[V], r[V]; /* max z, ln s, 1 / s */
};

template <typename R, int V> SS_DEVICE bool has(const voxels<R, V> &n, int k) {
    return n.at + k * THREADS < n.end;
}

template <typename R, int V>
SS_DEVICE R logit_of(const vl_job &j, const voxels<R, V> &n, int64_t c, int k) {
    return has(n, k) ? logit(j, (n.b * j.C + c) * j.S + n.at + k * THREADS, R(0)) : R(0);
}

template <typename R, int V> SS_DEVICE void normalise(const vl_job &j, voxels<R, V> *n) {
    if (j.activation != VL_SOFTMAX) {
        return;
    }
    R s[V];
    for (int k = 0; k < V; ++k) {
        n->mx[k] = logit_of(j, *n, 0, k);
        s[k] = R(0);
    }
    for (int64_t c = 1; c < j.C; ++c) {
        for (int k = 0; k < V; ++k) {
            R z = logit_of(j, *n, c, k);
            n->mx[k] = z > n->mx[k] ? z : n->mx[k];
        }
    }
    for (int64_t c = 0; c < j.C; ++c) {
        for (int k = 0; k < V; ++k) {
            s[k] += exp_of(logit_of(j, *n, c, k) - n->mx[k]);
        }
    }
    for (int k = 0; k < V; ++k) {
        n->r[k] = R(1) / s[k];
        n->ln[k] = log_of(s[k]);
    }
}

template <typename R> SS_DEVICE R probability(int32_t activation, R z, R mx, R r) {
    if (activation == VL_NONE) {
        return z;
    }
    R e = exp_of(activation == VL_SOFTMAX ? z - mx : (z > R(0) ? -z : z));
    if (activation == VL_SOFTMAX) {
        return e * r;
    }
    R one = R(1) / (R(1) + e);
    return z > R(0) ? one : e * one;
}

/* What a term says about one voxel and class: the target's q there. */
template <typename R>
SS_DEVICE R target_of(const vl_job &j, const vl_term &t, int64_t b, int64_t c, int64_t v,
                      int32_t y) {
    if (t.target) {
        return vl_number<R>(t.target, t.dtype, ((b - t.first) * j.C + c) * j.S + v);
    }
    return y == (int32_t)c + (j.C == 1) ? R(1) : R(0); /* a single channel is the foreground's */
}

/* ---- forward --------------------------------------------------------------------------------- */

template <typename R> struct row_room {
    R sum[ROWS][WARPS][4];
};

/* Sums of four numbers over a warp by six exchanges instead of twenty: half of the lanes goes on
 * with half of the numbers. */
template <typename R> SS_DEVICE void keep_row(row_room<R> *room, int row, const R *s) {
    const int lane = threadIdx.x % SS_WARP, warp = threadIdx.x / SS_WARP;
    const bool high = lane & 16, odd = lane & 8;
    R a = high ? s[2] : s[0], b = high ? s[3] : s[1];
    a += __shfl_xor_sync(SS_ALL_LANES, high ? s[0] : s[2], 16);
    b += __shfl_xor_sync(SS_ALL_LANES, high ? s[1] : s[3], 16);
    R v = odd ? b : a;
    v += __shfl_xor_sync(SS_ALL_LANES, odd ? a : b, 8);
    for (int step = 4; step > 0; step /= 2) {
        v += __shfl_xor_sync(SS_ALL_LANES, v, step);
    }
    if (lane % 8 == 0) {
        room->sum[row][warp][lane / 8] = v;
    }
}

/* Writes n rows that all warps have kept. */
template <typename R> SS_DEVICE void write_rows(row_room<R> *room, int n, double *to) {
    __syncthreads();
    const int i = threadIdx.x;
    if (i < 4 * n) {
        double sum = 0.0;
        for (int w = 0; w < WARPS; ++w) {
            sum += (double)room->sum[i / 4][w][i % 4];
        }
        to[i] = sum;
    }
    __syncthreads();
}

/* Adds one class of one voxel to the sums of a term. keep, extra, a: of cross entropy. */
template <typename R>
SS_DEVICE void add_sums(const vl_job &j, const vl_term &t, R z, R mx, R ln, R r, R m, R q, R keep,
                        R extra, R a, R *s) {
    const R lost = (mx - z) + ln; /* -ln p */
    if (t.kind == VL_DICE || t.kind == VL_MSE || t.kind == VL_ENTROPY) {
        R p = probability(j.activation, z, mx, r);
        if (t.kind == VL_DICE) {
            s[0] += m * (q * p);
            s[1] += m * (t.squared ? p * p : p);
            s[2] += m * (t.squared ? q * q : q);
            s[3] += m;
        } else if (t.kind == VL_MSE) {
            s[0] += m * ((p - q) * (p - q));
        } else {
            s[0] += m * (p * lost);
        }
    } else if (t.kind == VL_KL) {
        s[0] += m * (q == R(0) ? R(0) : q * (log_of(q) + lost));
    } else if (j.activation == VL_SOFTMAX) {
        R w = m * (keep * q + extra);
        s[0] += w == R(0) ? R(0) : w * lost; /* a class of weight 0 may have an infinite logit */
        s[1] += a * (m * q);
    } else {
        R soft = log_of(R(1) + exp_of(z > R(0) ? -z : z));
        s[0] += m * ((z > R(0) ? z : R(0)) - z * q + soft);
    }
}

template <typename R>
SS_DEVICE void term_forward(const vl_job &j, int32_t i, const voxels<R, EACH> &n, row_room<R> *room,
                            double *part, int32_t *faults) {
    const vl_term &t = j.term[i];
    int32_t y[EACH], met = 0;
    R m[EACH], s[4] = {R(0), R(0), R(0), R(0)}, sum = R(0);
    for (int k = 0; k < EACH; ++k) {
        y[k] = -1;
        m[k] = R(0);
        if (has(n, k)) {
            const int64_t v = (n.b - t.first) * j.S + n.at + k * THREADS;
            vl_read_slot(j.slot[t.slot], v, j.C == 1 ? 2 : j.C, &y[k], &m[k], &met);
        }
        sum += m[k];
    }
    *faults += t.owner ? met : 0;
    int waiting = 0;
    for (int64_t c = 0; c < j.C; ++c) {
        const double a = t.kind == VL_CE ? vl_class_weight(j, t.number, c) : 0.0;
        const R keep = (R)(a * (1.0 - t.smoothing)), extra = (R)(a * t.smoothing / (double)j.C);
        for (int k = 0; k < EACH; ++k) {
            R q = R(0);
            if (t.kind != VL_ENTROPY && has(n, k)) {
                q = target_of<R>(j, t, n.b, c, n.at + k * THREADS, y[k]);
            }
            add_sums(j, t, logit_of(j, n, c, k), n.mx[k], n.ln[k], n.r[k], m[k], q, keep, extra,
                     (R)a, s);
        }
        if (t.kind == VL_DICE) {
            keep_row(room, waiting++, s);
            s[0] = s[1] = s[2] = s[3] = R(0);
            if (waiting == ROWS || c + 1 == j.C) {
                write_rows(room, waiting, part + 4 * (t.row + c + 1 - waiting));
                waiting = 0;
            }
        }
    }
    if (t.kind != VL_DICE) {
        const bool weighted = t.kind == VL_CE && t.hard && j.activation == VL_SOFTMAX;
        s[1] = weighted ? s[1] : sum;
        s[2] = sum;
        keep_row(room, 0, s);
        write_rows(room, 1, part + 4 * t.row);
    }
}

SS_DEVICE bool is_covered(const vl_job &j, int64_t b) {
    bool covered = false;
    for (int32_t i = 0; i < j.terms; ++i) {
        covered |= vl_covers(j.term[i], b);
    }
    return covered;
}

template <typename R>
SS_KERNEL void __launch_bounds__(THREADS, 2) k_voxel_loss_any_forward(const vl_job j) {
    SS_SHARED row_room<R> room;
    voxels<R, EACH> n = {};
    n.b = blockIdx.x / (uint32_t)j.chunks; /* 64 bits would be a call */
    const int64_t from = (int64_t)(blockIdx.x % (uint32_t)j.chunks) * CHUNK;
    n.at = from + threadIdx.x;
    n.end = from + CHUNK < j.S ? from + CHUNK : j.S;
    int32_t faults = 0;
    vl_prepare(j.done);
    if (!is_covered(j, n.b)) {
        return;
    }
    normalise(j, &n);
    for (int32_t i = 0; i < j.terms; ++i) {
        if (vl_covers(j.term[i], n.b)) {
            term_forward(j, i, n, &room, j.part + (int64_t)blockIdx.x * j.rows * 4, &faults);
        }
    }
    vl_count_faults<THREADS>(j.faults, faults);
}

/* ---- backward -------------------------------------------------------------------------------- */

/* h_c of one voxel. */
template <typename R>
SS_DEVICE R pull(const vl_job &j, int64_t b, int64_t c, int64_t v, R z, R mx, R ln, R p) {
    R h = R(0), slope = p;
    if (j.activation != VL_SOFTMAX) {
        slope = j.activation == VL_NONE ? R(1) : p * (R(1) - p);
    }
    for (int32_t i = 0; i < j.terms; ++i) {
        const vl_term &t = j.term[i];
        if (!vl_covers(t, b)) {
            continue;
        }
        int32_t y, faults = 0;
        R m;
        vl_read_slot(j.slot[t.slot], (b - t.first) * j.S + v, j.C == 1 ? 2 : j.C, &y, &m, &faults);
        const R q = target_of<R>(j, t, b, c, v, y);
        const R *by = static_cast<const R *>(j.factor) + ((i * j.B + b) * j.C + c) * 8;
        R g = by[0] * q + by[1] * p + by[2];
        if (t.entropy) {
            g += by[3] * ((mx - z) + ln);
        }
        h += slope * (m * g);
        h -= m * (by[4] * (j.activation == VL_SIGMOID ? q - p : q) + by[5]);
    }
    return h;
}

template <typename R>
SS_KERNEL void __launch_bounds__(THREADS, 2) k_voxel_loss_any_backward(const vl_job j) {
    voxels<R, 1> n = {};
    n.b = blockIdx.x / (uint32_t)j.chunks; /* 64 bits would be a call */
    n.at = (int64_t)(blockIdx.x % (uint32_t)j.chunks) * THREADS + threadIdx.x;
    n.end = j.S;
    if (!has(n, 0)) {
        return;
    }
    const bool covered = is_covered(j, n.b), softmax = j.activation == VL_SOFTMAX;
    R s = R(0);
    if (covered) {
        normalise(j, &n);
    }
    for (int pass = covered && softmax ? 0 : 1; pass < 2; ++pass) {
        for (int64_t c = 0; c < j.C; ++c) {
            R d = R(0);
            if (covered) {
                R z = logit_of(j, n, c, 0);
                R p = probability(j.activation, z, n.mx[0], n.r[0]);
                d = pull(j, n.b, c, n.at, z, n.mx[0], n.ln[0], p);
                s -= pass == 0 ? d : R(0);
                d += softmax ? p * s : R(0);
            }
            if (pass == 1) {
                store_gradient(j, (n.b * j.C + c) * j.S + n.at, d);
            }
        }
    }
}

/* ---- launches -------------------------------------------------------------------------------- */

int64_t ss_vl_any_chunk(void) {
    return CHUNK;
}

ss_status ss_vl_any_forward(ss_exec *x, const vl_job *j) {
    unsigned blocks = ss_blocks(j->B * j->chunks, 1);
    if (j->dtype == SS_F64) {
        return SS_LAUNCH(x, blocks, THREADS, 0, (k_voxel_loss_any_forward<double>), *j);
    }
    return SS_LAUNCH(x, blocks, THREADS, 0, (k_voxel_loss_any_forward<float>), *j);
}

ss_status ss_vl_any_backward(ss_exec *x, const vl_job *j) {
    vl_job k = *j;
    k.chunks = (j->S + THREADS - 1) / THREADS;
    unsigned blocks = ss_blocks(k.B * k.chunks, 1);
    if (j->dtype == SS_F64) {
        return SS_LAUNCH(x, blocks, THREADS, 0, (k_voxel_loss_any_backward<double>), k);
    }
    return SS_LAUNCH(x, blocks, THREADS, 0, (k_voxel_loss_any_backward<float>), k);
}
