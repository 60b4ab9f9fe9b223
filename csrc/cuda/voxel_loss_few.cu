/* SPDX-License-Identifier: Apache-2.0
 *
 * voxel_loss_few.cu: the sweeps for softmax over 2 to 4 classes, everything in registers.
 *
 *     p_c = e^(x_c) / s,  x_c = z_c - max z,  s = sum_c e^(x_c);   lost_c = -ln p_c = ln s - x_c
 *     labels         per class c, over its voxels: I = sum m p_c, Y = sum m, L = sum m lost_c, and
 *                    Z = sum m p_c^2 over all voxels; where all weights are 1 only the sum of L is
 *                    needed, which is ln(product of s) - sum x_y: no logarithm per voxel
 *     distributions  squared error, KL, cross entropy, entropy, W, and Dice's I, Z, Y
 *     backward       h_c of voxel_loss.cuh summed over groups, dz_c = h_c - p_c sum_k h_k
 *
 * logits [B, C, S] -> part [B, chunks, rows, 4], dlogits [B, C, S]; half precision or float. One
 * launch for each group forward, one for all backward. Bytes per voxel: C logits, label or C
 * targets, weight; C gradients backward. A thread has four neighbouring voxels: 16 bytes of logits,
 * labels, ... are one access where addresses allow it (4 elements apart, as when S is a multiple of
 * 4), else several.
 * Numerics: float, voxel_loss_math.cuh: relative error of p below 4e-7; 32 voxels of a thread, a
 * tree over its warp, then double. Logits that are not finite go through the expressions of
 * voxel_loss_any.cu. Deterministic: all orders are fixed by the problem, and every GPU gives the
 * same bits. registers <= 128
 */
#include "voxel_loss_math.cuh"

#define THREADS 256
#define WARPS (THREADS / SS_WARP)
#define EACH 4 /* neighbouring voxels of a thread */
#define STEP (THREADS * EACH)
#define TURNS 8
#define CHUNK VL_CHUNK
#define PULL (4 * STEP) /* voxels of a block backward */
static_assert(CHUNK == STEP * TURNS, "32 voxels of a thread: see label_sums");

/* ---- four neighbours ------------------------------------------------------------------------- */

/* Four elements of BYTES bytes, at an address that is a multiple of their size or of 16. */
template <int BYTES> struct four {
    uint32_t w[BYTES];
};

template <int BYTES> SS_DEVICE four<BYTES> load4(const char *q) {
    four<BYTES> v;
    if constexpr (BYTES == 1) {
        v.w[0] = *reinterpret_cast<const uint32_t *>(q);
    } else if constexpr (BYTES == 2) {
        const uint2 u = *reinterpret_cast<const uint2 *>(q);
        v.w[0] = u.x;
        v.w[1] = u.y;
    } else {
        for (int i = 0; i < BYTES / 4; ++i) {
            const uint4 u = reinterpret_cast<const uint4 *>(q)[i];
            v.w[4 * i] = u.x;
            v.w[4 * i + 1] = u.y;
            v.w[4 * i + 2] = u.z;
            v.w[4 * i + 3] = u.w;
        }
    }
    return v;
}

/* The same at any address, the first n elements; bits of the others are those of `rest`. */
template <int BYTES> SS_DEVICE four<BYTES> load_some(const char *q, int n, uint32_t rest) {
    four<BYTES> v;
    for (int i = 0; i < BYTES; ++i) {
        v.w[i] = rest;
    }
    for (int k = 0; k < EACH; ++k) {
        if (k >= n) {
            continue;
        }
        if constexpr (BYTES < 4) {
            const int per = 4 / BYTES, shift = 8 * BYTES * (k % per);
            const uint32_t mask = BYTES == 1 ? 255u : 65535u;
            const uint32_t u = BYTES == 1 ? reinterpret_cast<const uint8_t *>(q)[k]
                                          : reinterpret_cast<const uint16_t *>(q)[k];
            v.w[k / per] = (v.w[k / per] & ~(mask << shift)) | u << shift;
        } else {
            for (int i = 0; i < BYTES / 4; ++i) {
                v.w[BYTES / 4 * k + i] = reinterpret_cast<const uint32_t *>(q)[BYTES / 4 * k + i];
            }
        }
    }
    return v;
}

template <int BYTES> SS_DEVICE four<BYTES> load4(const char *q, int n, bool wide) {
    return wide ? load4<BYTES>(q) : load_some<BYTES>(q, n, 0);
}

template <int BYTES> SS_DEVICE void store4(char *to, int n, bool wide, four<BYTES> v) {
    if (wide) {
        if constexpr (BYTES == 2) {
            *reinterpret_cast<uint2 *>(to) = make_uint2(v.w[0], v.w[1]);
        } else {
            *reinterpret_cast<uint4 *>(to) = make_uint4(v.w[0], v.w[1], v.w[2], v.w[3]);
        }
        return;
    }
    for (int k = 0; k < EACH; ++k) {
        if (k >= n) {
            continue;
        }
        if constexpr (BYTES == 2) {
            reinterpret_cast<uint16_t *>(to)[k] = (uint16_t)(v.w[k / 2] >> (16 * (k % 2)));
        } else {
            reinterpret_cast<uint32_t *>(to)[k] = v.w[k];
        }
    }
}

SS_DEVICE float number(float, const four<4> &v, int k) {
    return ss_bits_f32(v.w[k]);
}
SS_DEVICE float number(ss_half, const four<2> &v, int k) {
    ss_half h = {(uint16_t)(v.w[k / 2] >> (16 * (k % 2)))};
    return ss_value(h);
}
SS_DEVICE float number(ss_bfloat, const four<2> &v, int k) {
    return ss_bits_f32(k % 2 ? v.w[k / 2] & 0xffff0000u : v.w[k / 2] << 16);
}

SS_DEVICE four<4> rounded(float, const float *v) {
    return {{ss_f32_bits(v[0]), ss_f32_bits(v[1]), ss_f32_bits(v[2]), ss_f32_bits(v[3])}};
}
template <typename T> SS_DEVICE four<2> rounded(T, const float *v) {
    four<2> out;
    for (int i = 0; i < 2; ++i) {
        out.w[i] = (uint32_t)ss_rounded<T>::from(v[2 * i]).bits |
                   (uint32_t)ss_rounded<T>::from(v[2 * i + 1]).bits << 16;
    }
    return out;
}

/* Where element i of an array is. */
SS_DEVICE const char *address(const void *p, int64_t i, int64_t bytes) {
    return static_cast<const char *>(p) + i * bytes;
}

/* C rows of four numbers from element `at`, `stride` elements apart, of a dtype that
 * voxel_loss.cu calls readable. */
template <int C>
SS_DEVICE void numbers4(const void *p, int32_t dtype, int64_t at, int64_t stride, int n, bool wide,
                        float (*v)[EACH]) {
    if (dtype == SS_F32) {
        for (int c = 0; c < C; ++c) {
            four<4> u = load4<4>(address(p, at + c * stride, 4), n, wide);
            for (int k = 0; k < EACH; ++k) {
                v[c][k] = number(float(), u, k);
            }
        }
    } else if (dtype == SS_F16 || dtype == SS_BF16) {
        four<2> u[C];
        for (int c = 0; c < C; ++c) {
            u[c] = load4<2>(address(p, at + c * stride, 2), n, wide);
        }
        for (int c = 0; c < C; ++c) {
            for (int k = 0; k < EACH; ++k) {
                v[c][k] =
                    dtype == SS_F16 ? number(ss_half(), u[c], k) : number(ss_bfloat(), u[c], k);
            }
        }
    } else {
        for (int c = 0; c < C; ++c) {
            four<1> u = load4<1>(address(p, at + c * stride, 1), n, wide);
            for (int k = 0; k < EACH; ++k) {
                v[c][k] = (float)(u.w[0] >> (8 * k) & 255u);
            }
        }
    }
}

/* Four labels as they are in memory. */
typedef struct raw_labels {
    uint32_t w[8];
} raw_labels;

template <int BYTES> SS_DEVICE void take(raw_labels *to, const four<BYTES> &v) {
    for (int i = 0; i < BYTES; ++i) {
        to->w[i] = v.w[i];
    }
}

template <bool WIDE> SS_DEVICE void read_labels(const char *q, int bytes, int n, raw_labels *to) {
    const uint32_t none = 0xffffffffu;
    if (bytes == 1) {
        take(to, WIDE ? load4<1>(q) : load_some<1>(q, n, none));
    } else if (bytes == 8) {
        take(to, WIDE ? load4<8>(q) : load_some<8>(q, n, none));
    } else if (bytes == 4) {
        take(to, WIDE ? load4<4>(q) : load_some<4>(q, n, none));
    } else {
        take(to, WIDE ? load4<2>(q) : load_some<2>(q, n, none));
    }
}

/* Labels -> classes, -1 where ignored, faulty or behind the n-th; returns whether all four are
 * classes. What does not fit into 32 bits becomes INT32_MIN, which is no class and not ignored. */
template <int C>
SS_DEVICE bool classes4(const vl_slot &s, const raw_labels &l, int n, int32_t *y, int32_t *faults) {
    if (s.label_bytes == 1) {
        for (int k = 0; k < EACH; ++k) {
            y[k] = (int32_t)(l.w[0] >> (8 * k) & 255u);
        }
    } else if (s.label_bytes == 8) {
        for (int k = 0; k < EACH; ++k) {
            const int32_t low = (int32_t)l.w[2 * k];
            y[k] = (int32_t)l.w[2 * k + 1] == low >> 31 ? low : INT32_MIN;
        }
    } else if (s.label_bytes == 4) {
        for (int k = 0; k < EACH; ++k) {
            y[k] = (int32_t)l.w[k];
        }
    } else {
        for (int k = 0; k < EACH; ++k) {
            y[k] = (int32_t)(l.w[k / 2] >> (16 * (k % 2)) & 65535u);
        }
    }
    bool all = !s.inside;
    if (C == 3) {
        for (int k = 0; k < EACH; ++k) {
            all &= (uint32_t)y[k] < (uint32_t)C;
        }
    } else {
        all &= (uint32_t)(y[0] | y[1] | y[2] | y[3]) < (uint32_t)C;
    }
    if (all) {
        return true;
    }
    for (int k = 0; k < EACH; ++k) {
        const bool skip = s.ignores_raw && y[k] == s.raw;
        const bool inside = (uint32_t)y[k] < (uint32_t)C;
        *faults += k < n && !inside && !skip;
        y[k] = k < n && inside && !skip ? y[k] : -1;
    }
    return false;
}

/* Weights: 1 if there are none, 0 behind the n-th and where negative. */
SS_DEVICE void weights4(const vl_slot &s, int64_t at, int n, bool wide, float *m, int32_t *faults) {
    if (s.weight) {
        float v[1][EACH];
        numbers4<1>(s.weight, s.weight_dtype, at, 0, n, wide, v);
        for (int k = 0; k < EACH; ++k) {
            *faults += v[0][k] < 0.0f;
            m[k] = v[0][k] < 0.0f ? 0.0f : v[0][k];
        }
        return;
    }
    for (int k = 0; k < EACH; ++k) {
        m[k] = k < n ? 1.0f : 0.0f;
    }
}

/* ---- softmax --------------------------------------------------------------------------------- */

/* Four voxels: probabilities, x = z - max z (two classes: x[1] = z_1 - z_0 alone), and s. */
template <int C> struct softmax4 {
    float p[C][EACH], x[C][EACH], s[EACH];
};

/* x_c. NaN may get lost; s keeps it. */
template <int C> SS_DEVICE float x_of(const softmax4<C> &o, int c, int k) {
    if constexpr (C == 2) {
        return fminf(c ? o.x[1][k] : -o.x[1][k], 0.0f);
    }
    return o.x[c][k];
}

template <int C> SS_DEVICE void quick(softmax4<C> *o) { /* x holds the logits, all finite */
    for (int k = 0; k < EACH; ++k) {
        if constexpr (C == 2) {
            const float d = o->x[1][k];
            const float e = vl_exp_quick(-fabsf(d));
            const float s = 1.0f + e, r = vl_reciprocal(s), low = e * r;
            o->p[0][k] = d > 0.0f ? low : r;
            o->p[1][k] = d > 0.0f ? r : low;
            o->s[k] = s;
            continue;
        }
        float top = o->x[0][k], s = 0.0f;
        for (int c = 1; c < C; ++c) {
            top = fmaxf(top, o->x[c][k]);
        }
        for (int c = 0; c < C; ++c) {
            o->x[c][k] -= top;
            o->p[c][k] = vl_exp_quick(o->x[c][k]);
            s += o->p[c][k];
        }
        const float r = vl_reciprocal(s);
        for (int c = 0; c < C; ++c) {
            o->p[c][k] *= r;
        }
        o->s[k] = s;
    }
}

template <int C> SS_DEVICE void careful(softmax4<C> *o, const float (*z)[EACH]) {
    for (int k = 0; k < EACH; ++k) {
        float top = z[0][k], s = 0.0f;
        for (int c = 1; c < C; ++c) {
            top = z[c][k] > top ? z[c][k] : top;
        }
        for (int c = 0; c < C; ++c) {
            const float x = z[c][k] - top;
            o->p[c][k] = ss_expf(x);
            o->x[c][k] = C == 2 ? o->x[c][k] : x;
            s += o->p[c][k];
        }
        const float r = vl_reciprocal(s);
        for (int c = 0; c < C; ++c) {
            o->p[c][k] *= r;
        }
        o->s[k] = s;
    }
}

template <int C, typename T> SS_DEVICE void normalise(const four<sizeof(T)> *z, softmax4<C> *o) {
    float odd = 0.0f, v[C][EACH]; /* odd: NaN as soon as a logit, or a difference,
                                     is not finite */
    for (int c = 0; c < C; ++c) {
        for (int k = 0; k < EACH; ++k) {
            v[c][k] = number(T(), z[c], k);
        }
    }
    for (int c = 0; c < C; ++c) {
        for (int k = 0; k < EACH; ++k) {
            o->x[c][k] = C == 2 ? v[1][k] - v[0][k] : v[c][k];
            odd = C == 2 && c == 0 ? odd : fmaf(o->x[c][k], 0.0f, odd);
        }
    }
    if (odd == 0.0f) {
        quick(o);
    } else {
        careful(o, v);
    }
}

/* C rows of four logits, `stride` bytes apart. */
template <int C, typename T>
SS_DEVICE void read_logits(const char *q, int64_t stride, int n, bool wide, four<sizeof(T)> *z) {
    for (int c = 0; c < C; ++c) {
        z[c] = load4<sizeof(T)>(q + c * stride, n, wide);
    }
}

/* ---- forward: sums of a block ---------------------------------------------------------------- */

template <int ROWS> struct room {
    float warp[ROWS][WARPS][4];
    double sum[ROWS][4];
};

template <int ROWS> SS_DEVICE void sum_up(room<ROWS> *r) {
    __syncthreads();
    const int i = threadIdx.x;
    if (i < 4 * ROWS) {
        double sum = 0.0;
        for (int w = 0; w < WARPS; ++w) {
            sum += (double)r->warp[i / 4][w][i % 4];
        }
        r->sum[i / 4][i % 4] = sum;
    }
    __syncthreads();
}

/* A voxel that does not count: class 0, with nothing to add to any sum. */
template <int C> SS_DEVICE void leave_out(softmax4<C> *o, int32_t *y, int k) {
    for (int c = 0; c < C; ++c) {
        o->p[c][k] = o->x[c][k] = 0.0f;
    }
    o->s[k] = 1.0f;
    y[k] = 0;
}

/* Sums of a thread; those of voxels that count 1 each are simpler. */
template <int C> struct label_sums {
    float i[C], z[C], l[C], y[C]; /* weighted: l and y of each class, else l[0] of all */
    float product;                /* of s: <= 4^32 */
    uint32_t n;                   /* how many of class 1, or of each class in bytes */
    uint32_t n0;                  /* how many voxels, less those that do not count */
};

template <int C>
SS_DEVICE void add_plain(label_sums<C> *sum, const softmax4<C> &o, const int32_t *y) {
    sum->n0 += EACH;
    if constexpr (C == 2) {
        sum->n += (uint32_t)(y[0] + y[1] + y[2] + y[3]);
    }
    for (int k = 0; k < EACH; ++k) {
        float x = o.x[0][k];
        if constexpr (C == 2) {
            const bool one = y[k] != 0;
            x = fminf(one ? o.x[1][k] : -o.x[1][k], 0.0f);
            sum->i[0] += one ? 0.0f : o.p[0][k];
            sum->i[1] += one ? o.p[1][k] : 0.0f;
        } else {
            sum->n += 1u << (8 * y[k]);
            for (int c = 0; c < C; ++c) {
                if (y[k] == c) {
                    sum->i[c] += o.p[c][k];
                    x = o.x[c][k];
                }
            }
        }
        sum->l[0] -= x;
        sum->product *= o.s[k];
    }
}

template <int C>
SS_DEVICE void add_weighted(label_sums<C> *sum, const softmax4<C> &o, const int32_t *y,
                            const float *m) {
    for (int k = 0; k < EACH; ++k) {
        const float ln = vl_log_quick(o.s[k]);
        for (int c = 0; c < C; ++c) {
            if (y[k] == c) {
                sum->i[c] = fmaf(m[k], o.p[c][k], sum->i[c]);
                sum->l[c] = fmaf(m[k], ln - x_of(o, c, k), sum->l[c]);
                sum->y[c] += m[k];
            }
        }
    }
}

/* Sums of m p^2 (linear: m p). */
template <int C, bool WEIGHTED>
SS_DEVICE void add_squares(label_sums<C> *sum, const softmax4<C> &o, const float *m, int squared) {
    if (squared) {
        for (int k = 0; k < EACH; ++k) {
            for (int c = 0; c < C; ++c) {
                const float p = WEIGHTED ? m[k] * o.p[c][k] : o.p[c][k];
                sum->z[c] = fmaf(p, o.p[c][k], sum->z[c]);
            }
        }
        return;
    }
    for (int k = 0; k < EACH; ++k) {
        for (int c = 0; c < C; ++c) {
            sum->z[c] += WEIGHTED ? m[k] * o.p[c][k] : o.p[c][k];
        }
    }
}

/* Labels: cross entropy, Dice or both. Not WEIGHTED: voxels count 1 or 0, and classes the same. */
template <typename T, int C, bool WEIGHTED>
SS_KERNEL void __launch_bounds__(THREADS, C == 2 ? 4 : (C == 3 || !WEIGHTED ? 3 : 2))
    k_voxel_loss_few_labels(const vl_group g) {
    SS_SHARED room<C> shared;
    const vl_place at = vl_place_of(g);
    vl_prepare(g.done);
    const int64_t slot = (at.b - g.first) * g.S + at.from + threadIdx.x * EACH;
    const int64_t stride = g.S * (int64_t)sizeof(T), bytes = g.slot.label_bytes;
    const char *logit = address(g.logits, at.b * C * g.S + at.from + threadIdx.x * EACH, sizeof(T));
    const char *label = address(g.slot.label, slot, bytes);
    const int32_t end = (int32_t)(at.end - at.from);
    label_sums<C> sum = {};
    sum.product = 1.0f;
    int32_t faults = 0;
    for (int32_t v = threadIdx.x * EACH; v < end; v += STEP) {
        const int n = end - v; /* or more than there are */
        four<sizeof(T)> z[C];
        raw_labels labels;
        softmax4<C> o;
        int32_t y[EACH];
        float m[EACH];
        if (g.wide) {
            read_logits<C, T>(logit, stride, EACH, true, z);
            read_labels<true>(label, bytes, EACH, &labels);
        } else {
            read_logits<C, T>(logit, stride, n, false, z);
            read_labels<false>(label, bytes, n, &labels);
        }
        if (WEIGHTED) {
            weights4(g.slot, slot + v - threadIdx.x * EACH, n, g.wide, m, &faults);
        }
        logit += STEP * sizeof(T);
        label += STEP * bytes;
        normalise<C, T>(z, &o);
        if (!classes4<C>(g.slot, labels, n, y, &faults)) {
            for (int k = 0; k < EACH; ++k) {
                if (WEIGHTED) {
                    m[k] = y[k] < 0 ? 0.0f : m[k];
                }
                if (y[k] < 0) {
                    leave_out(&o, y, k);
                    --sum.n0;
                }
            }
        }
        if (WEIGHTED) {
            add_weighted(&sum, o, y, m);
        } else {
            add_plain(&sum, o, y);
        }
        add_squares<C, WEIGHTED>(&sum, o, m, g.squared);
    }
    if (!WEIGHTED) {
        sum.l[0] += vl_log_quick(sum.product);
        uint32_t others = 0;
        for (int c = 1; c < C; ++c) {
            const uint32_t n = C == 2 ? sum.n : sum.n >> (8 * c) & 255u;
            sum.y[c] = (float)n;
            others += n;
        }
        sum.y[0] = (float)(sum.n0 - others);
    }
    for (int c = 0; c < C; ++c) {
        vl_keep(shared.warp[c], sum.i[c], sum.z[c], sum.y[c], sum.l[c]);
    }
    sum_up(&shared);
    if (threadIdx.x == 0) {
        vl_write_labels(g, shared.sum, at.part);
    }
    vl_count_faults<THREADS>(g.faults, faults);
}

/* Distributions, and entropy, which needs none. */
template <typename T, int C>
SS_KERNEL void __launch_bounds__(THREADS, 2) k_voxel_loss_few_targets(const vl_group g) {
    SS_SHARED room<C + 2> shared;
    const vl_place at = vl_place_of(g);
    vl_prepare(g.done);
    const int64_t logits = at.b * C * g.S + at.from, slot = (at.b - g.first) * g.S;
    const int32_t end = (int32_t)(at.end - at.from);
    const bool dice = g.row[VL_DICE] >= 0, mse = g.row[VL_MSE] >= 0, kl = g.row[VL_KL] >= 0;
    const bool ce = g.row[VL_CE] >= 0, entropy = g.row[VL_ENTROPY] >= 0;
    float si[C], sz[C], sy[C], s_mse = 0.0f, s_kl = 0.0f, s_ce = 0.0f, s_entropy = 0.0f, sw = 0.0f;
    for (int c = 0; c < C; ++c) {
        si[c] = sz[c] = sy[c] = 0.0f;
    }
    int32_t faults = 0;
    for (int32_t v = threadIdx.x * EACH; v < end; v += STEP) {
        const int n = end - v; /* or more than there are */
        four<sizeof(T)> z[C];
        softmax4<C> o;
        float m[EACH], q[C][EACH];
        read_logits<C, T>(address(g.logits, logits + v, sizeof(T)), g.S * sizeof(T), n, g.wide, z);
        if (g.target) {
            numbers4<C>(g.target, g.dtype, slot * C + at.from + v, g.S, n, g.wide, q);
        }
        weights4(g.slot, slot + at.from + v, n, g.wide, m, &faults);
        normalise<C, T>(z, &o);
        for (int k = 0; k < EACH; ++k) {
            sw += m[k];
        }
        if (mse || dice) {
            for (int k = 0; k < EACH; ++k) {
                for (int c = 0; c < C; ++c) {
                    const float p = o.p[c][k], t = q[c][k], d = p - t;
                    s_mse = fmaf(m[k], d * d, s_mse);
                    si[c] = fmaf(m[k], t * p, si[c]);
                    sz[c] = fmaf(m[k], g.squared ? p * p : p, sz[c]);
                    sy[c] = fmaf(m[k], g.squared ? t * t : t, sy[c]);
                }
            }
        }
        if (kl || ce || entropy) {
            for (int k = 0; k < EACH; ++k) {
                const float ln = vl_log_quick(o.s[k]);
                for (int c = 0; c < C; ++c) {
                    const float lost = ln - x_of(o, c, k);
                    if (entropy) {
                        s_entropy += m[k] * (o.p[c][k] * lost);
                    }
                    if (kl) {
                        const float t = q[c][k];
                        s_kl += m[k] * (t == 0.0f ? 0.0f : t * (ss_logf(t) + lost));
                    }
                    if (ce) {
                        const float w = m[k] * fmaf(g.keep[c], q[c][k], g.extra[c]);
                        s_ce += w == 0.0f ? 0.0f : w * lost;
                    }
                }
            }
        }
    }
    for (int c = 0; c < C; ++c) {
        vl_keep(shared.warp[c], si[c], sz[c], sy[c], sw);
    }
    vl_keep(shared.warp[C], s_mse, s_kl, s_ce, s_entropy);
    vl_keep(shared.warp[C + 1], sw, 0.0f, 0.0f, 0.0f);
    sum_up(&shared);
    if (threadIdx.x == 0) {
        const double *sum = shared.sum[C], w = shared.sum[C + 1][0];
        const int kinds[] = {VL_MSE, VL_KL, VL_CE, VL_ENTROPY};
        for (int i = 0; i < 4; ++i) {
            if (g.row[kinds[i]] >= 0) {
                vl_write_row(at.part + 4 * g.row[kinds[i]], sum[i], w, w, 0.0);
            }
        }
        for (int c = 0; c < C && dice; ++c) {
            const double *s = shared.sum[c];
            vl_write_row(at.part + 4 * (g.row[VL_DICE] + c), s[0], s[1], s[2], s[3]);
        }
    }
    vl_count_faults<THREADS>(g.faults, faults);
}

/* ---- backward -------------------------------------------------------------------------------- */

/* h_c += m (p_c (u q_c + v p_c + e) - a q_c - d) for labels: q_c is 0 or 1, so that two pairs of
 * factors are chosen from. by: u v e f and a d of each class. */
template <int C>
SS_DEVICE void pull_labels(const float4 *by, const int32_t *y, const float *m, const softmax4<C> &o,
                           float (*h)[EACH]) {
    for (int c = 0; c < C; ++c) {
        const float4 f = by[2 * c], d = by[2 * c + 1];
        const float e_hit = f.z + f.x, d_hit = d.y + d.x;
        for (int k = 0; k < EACH; ++k) {
            const bool hit = y[k] == c;
            const float slope = fmaf(f.y, o.p[c][k], hit ? e_hit : f.z);
            h[c][k] = fmaf(m[k], fmaf(o.p[c][k], slope, hit ? -d_hit : -d.y), h[c][k]);
        }
    }
}

/* The same for a distribution. */
template <int C>
SS_DEVICE void pull_target(const float4 *by, const float (*q)[EACH], const float *m,
                           const softmax4<C> &o, float (*h)[EACH]) {
    for (int c = 0; c < C; ++c) {
        const float4 f = by[2 * c], d = by[2 * c + 1];
        for (int k = 0; k < EACH; ++k) {
            const float slope = fmaf(f.x, q[c][k], fmaf(f.y, o.p[c][k], f.z));
            const float direct = fmaf(d.x, q[c][k], d.y);
            h[c][k] = fmaf(m[k], fmaf(o.p[c][k], slope, -direct), h[c][k]);
        }
    }
}

/* h_c += m p_c f lost_c: entropy. */
template <int C>
SS_DEVICE void pull_entropy(const float4 *by, const float *m, const softmax4<C> &o,
                            float (*h)[EACH]) {
    for (int k = 0; k < EACH; ++k) {
        const float ln = vl_log_quick(o.s[k]);
        for (int c = 0; c < C; ++c) {
            h[c][k] += o.p[c][k] * (m[k] * by[2 * c].w * (ln - x_of(o, c, k)));
        }
    }
}

/* What a group says about four voxels. */
template <int C> struct said {
    raw_labels labels;
    float q[C][EACH], m[EACH];
};

/* Reads it from voxel v of sample b on. */
template <int C>
SS_DEVICE void listen(const vl_job &j, const vl_term &t, int64_t b, int64_t v, int n, said<C> *o) {
    const vl_slot &s = j.slot[t.slot];
    const int64_t slot = (b - t.first) * j.S;
    int32_t faults = 0; /* which forward has counted */
    if (s.label) {
        const char *label = address(s.label, slot + v, s.label_bytes);
        if (j.wide) {
            read_labels<true>(label, s.label_bytes, EACH, &o->labels);
        } else {
            read_labels<false>(label, s.label_bytes, n, &o->labels);
        }
    } else if (t.target) {
        numbers4<C>(t.target, t.dtype, slot * C + v, j.S, n, j.wide, o->q);
    } else {
        for (int c = 0; c < C; ++c) {
            for (int k = 0; k < EACH; ++k) {
                o->q[c][k] = 0.0f;
            }
        }
    }
    weights4(s, slot + v, n, j.wide, o->m, &faults);
}

/* Adds what group i pulls at four voxels. */
template <int C>
SS_DEVICE void pull(const vl_job &j, int32_t i, int64_t b, int n, said<C> *it, const softmax4<C> &o,
                    float (*h)[EACH]) {
    const vl_slot &s = j.slot[j.term[i].slot];
    const float4 *by = static_cast<const float4 *>(j.factor) + ((i * j.B + b) * C) * 2;
    if (!s.label) {
        pull_target<C>(by, it->q, it->m, o, h);
        if (j.term[i].entropy) {
            pull_entropy<C>(by, it->m, o, h);
        }
        return;
    }
    int32_t y[EACH], faults = 0;
    if (!classes4<C>(s, it->labels, n, y, &faults)) {
        for (int k = 0; k < EACH; ++k) {
            it->m[k] = y[k] >= 0 ? it->m[k] : 0.0f;
        }
    }
    pull_labels<C>(by, y, it->m, o, h);
}

template <typename T, int C>
SS_KERNEL void __launch_bounds__(THREADS, C == 2 ? 3 : 2)
    k_voxel_loss_few_backward(const vl_job j) {
    const int64_t b = blockIdx.x / (uint32_t)j.chunks;
    const int64_t from = (int64_t)(blockIdx.x % (uint32_t)j.chunks) * PULL;
    const int64_t logits = b * C * j.S, stride = j.S * (int64_t)sizeof(T);
    const int64_t end = from + PULL < j.S ? from + PULL : j.S;
    for (int64_t v = from + threadIdx.x * EACH; v < end; v += STEP) {
        const int n = end - v < EACH ? (int)(end - v) : EACH;
        four<sizeof(T)> z[C];
        softmax4<C> o;
        float h[C][EACH];
        for (int c = 0; c < C; ++c) {
            for (int k = 0; k < EACH; ++k) {
                h[c][k] = 0.0f;
            }
        }
        bool covered = false;
        for (int32_t i = 0; i < j.terms; ++i) {
            if (!vl_covers(j.term[i], b)) {
                continue;
            }
            said<C> it;
            if (!covered) { /* all loads before what needs them */
                read_logits<C, T>(address(j.logits, logits + v, sizeof(T)), stride, n, j.wide, z);
            }
            listen<C>(j, j.term[i], b, v, n, &it);
            if (!covered) {
                normalise<C, T>(z, &o);
                covered = true;
            }
            pull<C>(j, i, b, n, &it, o, h);
        }
        for (int k = 0; k < EACH && covered; ++k) {
            float s = 0.0f;
            for (int c = 0; c < C; ++c) {
                s -= h[c][k];
            }
            for (int c = 0; c < C; ++c) {
                h[c][k] = fmaf(o.p[c][k], s, h[c][k]);
            }
        }
        char *to = static_cast<char *>(j.dlogits) + (logits + v) * (int64_t)sizeof(T);
        for (int c = 0; c < C; ++c) {
            store4(to + c * stride, n, j.wide, rounded(T(), h[c]));
        }
    }
}

/* ---- launches -------------------------------------------------------------------------------- */

template <typename T, int C> static ss_status run_forward(ss_exec *x, const vl_group *g) {
    const unsigned blocks = ss_blocks((g->last - g->first) * g->chunks, 1);
    if (!g->slot.label) {
        return SS_LAUNCH(x, blocks, THREADS, 0, (k_voxel_loss_few_targets<T, C>), *g);
    }
    if (g->weighted) {
        return SS_LAUNCH(x, blocks, THREADS, 0, (k_voxel_loss_few_labels<T, C, true>), *g);
    }
    return SS_LAUNCH(x, blocks, THREADS, 0, (k_voxel_loss_few_labels<T, C, false>), *g);
}

template <typename T, int C> static ss_status run_backward(ss_exec *x, const vl_job *j) {
    vl_job k = *j;
    k.chunks = (j->S + PULL - 1) / PULL;
    return SS_LAUNCH(x, ss_blocks(k.B * k.chunks, 1), THREADS, 0, (k_voxel_loss_few_backward<T, C>),
                     k);
}

#define FOR_CLASSES(T, f, classes, x, a)                                                           \
    return (classes) == 2 ? f<T, 2>(x, a) : ((classes) == 3 ? f<T, 3>(x, a) : f<T, 4>(x, a))

ss_status ss_vl_few_forward(ss_exec *x, const vl_group *g) {
    switch (g->logits_dtype) {
    case SS_F16:
        FOR_CLASSES(ss_half, run_forward, g->C, x, g);
    case SS_BF16:
        FOR_CLASSES(ss_bfloat, run_forward, g->C, x, g);
    default:
        FOR_CLASSES(float, run_forward, g->C, x, g);
    }
}

ss_status ss_vl_few_backward(ss_exec *x, const vl_job *j) {
    switch (j->dtype) {
    case SS_F16:
        FOR_CLASSES(ss_half, run_backward, j->C, x, j);
    case SS_BF16:
        FOR_CLASSES(ss_bfloat, run_backward, j->C, x, j);
    default:
        FOR_CLASSES(float, run_backward, j->C, x, j);
    }
}
