/* SPDX-License-Identifier: Apache-2.0
 *
 * voxel_loss_rows.h: a block of voxels as rows in the first-level cache, in REAL (float, double).
 *
 * Reading: logits [C] rows of any dtype, labels -> y (-1 where ignored), weights -> m (0 where
 * ignored), targets as distributions; rows are padded with weight 0 to whole lanes. Activation:
 * probabilities p, and for softmax max z and ln s, s = sum e^(z - max). Wrong labels and negative
 * weights are noted in the block and named when the sweep is over.
 * Least traffic: every input once; rows are in scratch unless the tensor's memory will do.
 * The file that includes this defines the names that voxel_loss_sweep.h lists.
 */

typedef struct vl_block {
    const vl_plan *plan;
    int64_t b;      /* sample */
    int64_t offset; /* first voxel */
    int64_t n;      /* voxels */
    int64_t lanes;  /* n rounded up to whole lanes */
    int64_t room;   /* of a row of scratch */
    const REAL **z; /* rows of logits */
    REAL **h;       /* rows of gradient */
    REAL *zs, *p, *hs, *mx, *ls, *s, *q, *w, *m;
    int32_t *y;
    int64_t bad_label; /* the first label that is no class, if any */
    int32_t bad;       /* 1: a label, 2: a weight */
} vl_block;

/* ---- reading -------------------------------------------------------------------------------- */

/* A row of n values of any dtype, padded with zeros to whole lanes; `buffer` may be used. */
static const REAL *load_row(const ss_tensor *t, int64_t offset, int64_t n, int64_t lanes,
                            REAL *restrict buffer) {
    const REAL *row = buffer;
    if (t->dtype == VL_REAL_DTYPE) {
        row = (const REAL *)t->data + offset;
    } else if (t->dtype <= SS_U8) {
        const uint8_t *restrict src = (const uint8_t *)t->data + offset;
        VL_SIMD
        for (int64_t i = 0; i < n; ++i) {
            buffer[i] = (REAL)src[i];
        }
    } else if (sizeof(REAL) == sizeof(float) && t->dtype >= SS_F16) {
        row = (const REAL *)(const void *)ss_load_f32(t, offset, n, (float *)(void *)buffer);
    } else {
        for (int64_t i = 0; i < n; ++i) {
            buffer[i] = (REAL)ss_at(t, offset + i);
        }
    }
    if (lanes == n) {
        return row;
    }
    if (row != buffer) {
        memcpy(buffer, row, (size_t)n * sizeof(REAL));
    }
    memset(buffer + n, 0, (size_t)(lanes - n) * sizeof(REAL));
    return buffer;
}

/* Labels of one dtype -> y, -1 where ignored or wrong; returns whether any was wrong. */
#define VL_LABELS(name, type, wide)                                                                \
    static int32_t name(const void *data, int64_t offset, int64_t n, int32_t classes,              \
                        int64_t ignored, int32_t *restrict y) {                                    \
        const type *restrict src = (const type *)data + offset;                                    \
        const wide most = (wide)classes;                                                           \
        const int some = ignored >= 0 ? ignored <= (int64_t)(((uint64_t)1 << 31) - 1)              \
                                      : ignored >= -((int64_t)1 << 31);                            \
        const wide ignore = some ? (wide)ignored : (wide)classes;                                  \
        int32_t bad = 0;                                                                           \
        _Pragma("omp simd reduction(| : bad)") for (int64_t i = 0; i < n; ++i) {                   \
            wide v = (wide)src[i];                                                                 \
            int32_t inside = (v >= 0) & (v < most);                                                \
            int32_t skip = (v == ignore) & some;                                                   \
            y[i] = inside & !skip ? (int32_t)v : -1;                                               \
            bad |= !(inside | skip);                                                               \
        }                                                                                          \
        return bad;                                                                                \
    }
VL_LABELS(labels_u8, uint8_t, int32_t)
VL_LABELS(labels_i8, int8_t, int32_t)
VL_LABELS(labels_u16, uint16_t, int32_t)
VL_LABELS(labels_i16, int16_t, int32_t)
VL_LABELS(labels_i32, int32_t, int32_t)
VL_LABELS(labels_u32, uint32_t, int64_t)
VL_LABELS(labels_i64, int64_t, int64_t)

static int32_t read_labels(const ss_tensor *t, int64_t offset, int64_t n, int32_t classes,
                           int64_t ignore, int32_t *y) {
    switch (t->dtype) {
    case SS_BOOL:
    case SS_U8:
        return labels_u8(t->data, offset, n, classes, ignore, y);
    case SS_I8:
        return labels_i8(t->data, offset, n, classes, ignore, y);
    case SS_U16:
        return labels_u16(t->data, offset, n, classes, ignore, y);
    case SS_I16:
        return labels_i16(t->data, offset, n, classes, ignore, y);
    case SS_I32:
        return labels_i32(t->data, offset, n, classes, ignore, y);
    case SS_U32:
        return labels_u32(t->data, offset, n, classes, ignore, y);
    default: /* u64 beyond int64 comes out negative: no class */
        return labels_i64(t->data, offset, n, classes, ignore, y);
    }
}

static void name_bad_label(vl_block *k, const ss_tensor *t, int64_t offset, int64_t ignore) {
    int64_t classes = k->plan->C == 1 ? 2 : k->plan->C;
    for (int64_t i = 0; i < k->n; ++i) {
        double v = ss_at(t, offset + i);
        if ((v < 0 || v >= (double)classes) && v != (double)ignore) {
            k->bad = 1;
            k->bad_label = v > 0x1p62 ? INT64_MAX : (int64_t)v;
            return;
        }
    }
}

/* Labels y and weights m of one slot for this block. */
static void read_slot(vl_block *k, int32_t index) {
    const vl_slot *slot = &k->plan->slot[index];
    int64_t offset = (k->b - slot->first) * k->plan->S + k->offset;
    int32_t *restrict y = k->y + index * k->room;
    REAL *restrict m = k->m + index * k->room;
    int64_t lanes = k->lanes;
    if (slot->target >= 0) {
        const ss_tensor *t = &k->plan->targets[slot->target];
        int32_t classes = k->plan->C == 1 ? 2 : (int32_t)k->plan->C;
        if (read_labels(t, offset, k->n, classes, slot->ignore, y) && !k->bad) {
            name_bad_label(k, t, offset, slot->ignore);
        }
    } else {
        memset(y, 0, (size_t)k->n * sizeof *y);
    }
    for (int64_t i = k->n; i < lanes; ++i) {
        y[i] = -1;
    }
    if (slot->weight < 0) {
        VL_SIMD
        for (int64_t i = 0; i < lanes; ++i) {
            m[i] = y[i] >= 0 ? (REAL)1 : (REAL)0;
        }
        return;
    }
    const REAL *restrict w = load_row(&k->plan->weights[slot->weight], offset, k->n, lanes, k->w);
    int32_t negative = 0;
    _Pragma("omp simd reduction(| : negative)") for (int64_t i = 0; i < lanes; ++i) {
        m[i] = y[i] >= 0 ? w[i] : (REAL)0;
        negative |= w[i] < 0;
    }
    if (negative && !k->bad) {
        k->bad = 2;
    }
}

static void read_logits(vl_block *k) {
    const vl_plan *p = k->plan;
    for (int64_t c = 0; c < p->C; ++c) {
        k->z[c] = load_row(p->logits, (k->b * p->C + c) * p->S + k->offset, k->n, k->lanes,
                           k->zs + c * k->room);
    }
}

/* Row c of a term's target as a distribution: its memory, or one-hot labels in scratch. */
static const REAL *target_row(vl_block *k, const vl_term *t, int64_t c) {
    const vl_plan *p = k->plan;
    if (!t->hard) {
        int64_t offset = ((k->b - t->first) * p->C + c) * p->S + k->offset;
        return load_row(&p->targets[t->target], offset, k->n, k->lanes, k->q);
    }
    const int32_t *restrict y = k->y + t->slot * k->room;
    const int32_t label = vl_label(p, c);
    REAL *restrict q = k->q;
    VL_SIMD
    for (int64_t i = 0; i < k->lanes; ++i) {
        q[i] = y[i] == label ? (REAL)1 : (REAL)0;
    }
    return q;
}

/* ---- activation ----------------------------------------------------------------------------- */

static void softmax_two(vl_block *k) {
    const REAL *restrict z0 = k->z[0], *restrict z1 = k->z[1];
    REAL *restrict p0 = k->p, *restrict p1 = k->p + k->room;
    REAL *restrict mx = k->mx, *restrict ls = k->ls;
    VL_SIMD
    for (int64_t i = 0; i < k->lanes; ++i) {
        REAL a = z0[i], b = z1[i];
        REAL top = a > b ? a : b;
        REAL e = VL_EXP(a > b ? b - a : a - b);
        REAL s = (REAL)1 + e + (top - top); /* inf - inf: an infinite logit gives NaN */
        REAL r = (REAL)1 / s;
        p0[i] = a > b ? r : e * r;
        p1[i] = a > b ? e * r : r;
        mx[i] = top;
        ls[i] = s;
    }
}

static void softmax_any(vl_block *k) {
    const int64_t n = k->lanes;
    REAL *restrict mx = k->mx, *restrict ls = k->ls;
    memcpy(mx, k->z[0], (size_t)n * sizeof(REAL));
    for (int64_t c = 1; c < k->plan->C; ++c) {
        const REAL *restrict z = k->z[c];
        VL_SIMD
        for (int64_t i = 0; i < n; ++i) {
            mx[i] = z[i] > mx[i] ? z[i] : mx[i];
        }
    }
    memset(ls, 0, (size_t)n * sizeof(REAL));
    for (int64_t c = 0; c < k->plan->C; ++c) {
        const REAL *restrict z = k->z[c];
        REAL *restrict p = k->p + c * k->room;
        VL_SIMD
        for (int64_t i = 0; i < n; ++i) {
            REAL e = VL_EXP(z[i] - mx[i]);
            p[i] = e;
            ls[i] += e;
        }
    }
    REAL *restrict r = k->q;
    VL_SIMD
    for (int64_t i = 0; i < n; ++i) {
        r[i] = (REAL)1 / ls[i];
    }
    for (int64_t c = 0; c < k->plan->C; ++c) {
        REAL *restrict p = k->p + c * k->room;
        VL_SIMD
        for (int64_t i = 0; i < n; ++i) {
            p[i] *= r[i];
        }
    }
}

/* Probabilities into k->p; for softmax also max z and, if wanted, ln s. */
static void activate(vl_block *k, int want_log) {
    if (k->plan->activation == VL_SOFTMAX) {
        (k->plan->C == 2 ? softmax_two : softmax_any)(k);
        REAL *restrict ls = k->ls;
        VL_SIMD
        for (int64_t i = 0; i < k->lanes * want_log; ++i) {
            ls[i] = VL_LOG(ls[i]);
        }
        return;
    }
    for (int64_t c = 0; c < k->plan->C; ++c) {
        const REAL *restrict z = k->z[c];
        REAL *restrict p = k->p + c * k->room;
        if (k->plan->activation == VL_NONE) {
            memcpy(p, z, (size_t)k->lanes * sizeof(REAL));
            continue;
        }
        VL_SIMD
        for (int64_t i = 0; i < k->lanes; ++i) {
            REAL e = VL_EXP(z[i] > 0 ? -z[i] : z[i]);
            REAL r = (REAL)1 / ((REAL)1 + e);
            p[i] = z[i] > 0 ? r : e * r;
        }
    }
}
