/* SPDX-License-Identifier: Apache-2.0
 *
 * voxel_loss_math.cuh: what the sweeps of voxel_loss_few.cu and voxel_loss_many.cu share: cheap
 * exp, ln and reciprocal, and the way from a block's numbers to rows of sums.
 *
 * Fused multiply-adds are written out: they are the same on every GPU, and -fmad=false only keeps
 * the compiler from making its own.
 */
#ifndef SS_CUDA_VOXEL_LOSS_MATH_CUH
#define SS_CUDA_VOXEL_LOSS_MATH_CUH

#include "voxel_loss.cuh"

/* e^x for finite x <= 0; e^-87 below that. Relative error 2e-7 + 2e-8 |x|. */
SS_DEVICE float vl_exp_quick(float x) {
    const float big = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    x = fmaxf(x, -87.0f);
    float t = fmaf(x, 1.44269504f, big);
    float f = fmaf(x, 1.44269504f, big - t);
    float p = fmaf(1.326472731e-03f, f, 9.671512991e-03f);
    p = fmaf(p, f, 5.550733581e-02f);
    p = fmaf(p, f, 2.402224243e-01f);
    p = fmaf(p, f, 6.931470037e-01f);
    p = fmaf(p, f, 1.0f);
    return ss_bits_f32(ss_f32_bits(p) + (ss_f32_bits(t) << 23));
}

/* ln x for 1 <= x < 2^120: as ss_log_bounded. NaN stays. */
SS_DEVICE float vl_log_quick(float x) {
    int32_t shifted = (int32_t)(ss_f32_bits(x) - 0x3f3504f3u);
    float m = ss_bits_f32((uint32_t)((shifted & 0x007fffff) + 0x3f3504f3));
    float r = m - 1.0f;
    float p = fmaf(8.672189713e-02f, r, -1.437900811e-01f);
    p = fmaf(p, r, 1.497799307e-01f);
    p = fmaf(p, r, -1.656442583e-01f);
    p = fmaf(p, r, 1.995487511e-01f);
    p = fmaf(p, r, -2.500169873e-01f);
    p = fmaf(p, r, 3.333416581e-01f);
    p = fmaf(p, r, -0.5f);
    return fmaf((float)(shifted >> 23), 6.93147181e-1f, fmaf(p, r * r, r)) + (x - x);
}

/* 1 / x, rounded correctly, for 1 <= x <= 2^100 and NaN: what the division does there, without
 * its test for numbers that are too large or too small. */
SS_DEVICE float vl_reciprocal(float x) {
#if defined(__CUDA_ARCH__)
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return fmaf(r, -fmaf(r, x, -1.0f), r);
#else
    return 1.0f / x;
#endif
}

/* Sums of four numbers over a warp by six exchanges instead of twenty: half of the lanes goes on
 * with half of the numbers. To warp [warps][4]. */
SS_DEVICE void vl_keep(float (*room)[4], float s0, float s1, float s2, float s3) {
    const int lane = threadIdx.x % SS_WARP, warp = threadIdx.x / SS_WARP;
    const bool high = lane & 16, odd = lane & 8;
    float a = high ? s2 : s0, b = high ? s3 : s1;
    a += __shfl_xor_sync(SS_ALL_LANES, high ? s0 : s2, 16);
    b += __shfl_xor_sync(SS_ALL_LANES, high ? s1 : s3, 16);
    float v = odd ? b : a;
    v += __shfl_xor_sync(SS_ALL_LANES, odd ? a : b, 8);
    for (int step = 4; step > 0; step /= 2) {
        v += __shfl_xor_sync(SS_ALL_LANES, v, step);
    }
    if (lane % 8 == 0) {
        room[warp][lane / 8] = v;
    }
}

SS_DEVICE void vl_write_row(double *row, double s0, double s1, double s2, double s3) {
    row[0] = s0;
    row[1] = s1;
    row[2] = s2;
    row[3] = s3;
}

/* Where a block of a group is. */
typedef struct vl_place {
    int64_t b, from, end; /* voxels of sample b */
    double *part;
} vl_place;

SS_DEVICE vl_place vl_place_of(const vl_group &g) {
    const uint32_t sample = blockIdx.x / (uint32_t)g.chunks;
    const uint32_t chunk = blockIdx.x % (uint32_t)g.chunks;
    vl_place p;
    p.b = g.first + sample;
    p.from = (int64_t)chunk * VL_CHUNK;
    p.end = p.from + VL_CHUNK < g.S ? p.from + VL_CHUNK : g.S;
    p.part = g.part + (p.b * g.chunks + chunk) * g.rows * 4;
    return p;
}

/* Sums of the block per class, I Z Y L -> rows of cross entropy and Dice. */
SS_DEVICE void vl_write_labels(const vl_group &g, const double (*sum)[4], double *part) {
    double num = 0.0, den = 0.0, w = 0.0;
    for (int64_t c = 0; c < g.C; ++c) {
        num += g.a[c] == 0.0 ? 0.0 : g.a[c] * sum[c][3];
        den += g.a[c] * sum[c][2];
        w += sum[c][2];
    }
    if (g.row[VL_CE] >= 0) {
        vl_write_row(part + 4 * g.row[VL_CE], num, den, w, 0.0);
    }
    for (int64_t c = 0; c < g.C && g.row[VL_DICE] >= 0; ++c) {
        vl_write_row(part + 4 * (g.row[VL_DICE] + c), sum[c][0], sum[c][1], sum[c][2], w);
    }
}

#endif
