/* SPDX-License-Identifier: Apache-2.0
 *
 * device.cuh: what every CUDA file needs: names, launches, workspace, loads and stores, block
 * folds.
 *
 * C++17, C-like; compiled by nvcc and, in tests, by g++ against a <cuda_runtime.h> that runs a grid
 * block by block on the CPU (tests/cuda_emulation). So kernels keep to what both know: threadIdx
 * and its kin, __syncthreads (also _or, _and, _count), full-mask warp functions, integer atomics,
 * static and dynamic shared memory. No float atomics, no barriers in divergent code, no textures,
 * no grid synchronisation, no libraries.
 *
 * Host code only launches: it allocates nothing, synchronises nothing and copies nothing from host
 * memory, so that a CUDA graph can capture any call. Numbers that live on the host go to kernels by
 * value. Grids depend on the problem alone, sums are folded in a fixed order, and the build has
 * -fmad=false: results are the same bits on every GPU, and ss_math.h gives the CPU's.
 */
#ifndef SS_CUDA_DEVICE_CUH
#define SS_CUDA_DEVICE_CUH

#include <cuda_runtime.h>
#include <math.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>

#include "../semisam.h"
#include "../ss_math.h"

/* ---- names ----------------------------------------------------------------------------------- */

#define SS_CUDA(op) ss_cuda_##op
#define SS_CUDA_WORKSPACE(op) ss_cuda_##op##_workspace

/* Every operator's two functions; what no file defines is NULL in the table (backend.cu). */
extern "C" {
#define SS_OP(op, doc, args)                                                                       \
    ss_status SS_CUDA(op)(ss_exec * x, const ss_##op##_args *a);                                   \
    int64_t SS_CUDA_WORKSPACE(op)(const ss_##op##_args *a);
#include "../ops.def"
}

#define SS_KERNEL static __global__
#define SS_DEVICE static __device__ __forceinline__
#define SS_BOTH static __host__ __device__ __forceinline__ /* as SS_FN of ss_math.h */
#ifndef SS_SHARED                                          /* the emulation has its own */
#define SS_SHARED __shared__
#define SS_DYNAMIC_SHARED(T, name)                                                                 \
    extern __shared__ uint4 ss_dynamic_shared[];                                                   \
    T *name = reinterpret_cast<T *>(ss_dynamic_shared)
#endif
#define SS_WARP 32
#define SS_ALL_LANES 0xffffffffu
#define SS_MAX_SHARED 49152 /* bytes of shared memory, static and dynamic, that every GPU has */

/* ---- host: status and launches --------------------------------------------------------------- */

#if defined(__GNUC__)
__attribute__((format(printf, 3, 4), unused))
#endif
static ss_status ss_cuda_fail(ss_exec *x, ss_status status, const char *format, ...) {
    va_list ap;
    va_start(ap, format);
    vsnprintf(x->error, sizeof x->error, format, ap);
    va_end(ap);
    return status;
}

#define SS_TRY(expression)                                                                         \
    do {                                                                                           \
        ss_status ss_try_status = (expression);                                                    \
        if (ss_try_status != SS_OK) {                                                              \
            return ss_try_status;                                                                  \
        }                                                                                          \
    } while (0)

static inline ss_status ss_cuda_check(ss_exec *x, cudaError_t error, const char *what) {
    if (error == cudaSuccess) {
        return SS_OK;
    }
    (void)cudaGetLastError(); /* the next call shall not report this one's error */
    return ss_cuda_fail(x, error == cudaErrorMemoryAllocation ? SS_NO_MEMORY : SS_FAILED, "%s: %s",
                        what, cudaGetErrorString(error));
}

template <typename... P>
static inline ss_status ss_launch_exactly(ss_exec *x, const char *name, void (*kernel)(P...),
                                          dim3 grid, dim3 block, size_t shared, P... p) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) {
        return SS_OK; /* nothing to do */
    }
    void *arguments[] = {static_cast<void *>(&p)..., nullptr};
    return ss_cuda_check(
        x, cudaLaunchKernel(kernel, grid, block, arguments, shared, (cudaStream_t)x->stream), name);
}

/* Converts what the caller wrote to the kernel's own parameter types. */
template <typename... P, typename... A>
static inline ss_status ss_launch(ss_exec *x, const char *name, void (*kernel)(P...), dim3 grid,
                                  dim3 block, size_t shared, A... a) {
    static_assert(sizeof...(P) == sizeof...(A), "as many arguments as the kernel has parameters");
    return ss_launch_exactly<P...>(x, name, kernel, grid, block, shared, static_cast<P>(a)...);
}

/* SS_LAUNCH(x, grid, block, shared_bytes, (kernel<T, 2>), arguments...) -> ss_status. A grid with a
 * zero in it is a launch of nothing. The status says the kernel's name and CUDA's words. */
#define SS_UNWRAP(...) __VA_ARGS__
#define SS_TEXT_(...) #__VA_ARGS__
#define SS_TEXT(...) SS_TEXT_(__VA_ARGS__)
#define SS_LAUNCH(x, grid, block, shared, kernel, ...)                                             \
    ss_launch(x, SS_TEXT(SS_UNWRAP kernel), SS_UNWRAP kernel, grid, block, shared, __VA_ARGS__)

/* How many blocks of `per_block` items cover n; a grid's x may be 2^31 - 1. */
static inline unsigned ss_blocks(int64_t n, int64_t per_block) {
    return n <= 0 ? 0u : (unsigned)((n - 1) / per_block + 1);
}

static inline ss_status ss_cuda_zero(ss_exec *x, void *p, int64_t bytes) {
    if (bytes <= 0) {
        return SS_OK;
    }
    return ss_cuda_check(x, cudaMemsetAsync(p, 0, (size_t)bytes, (cudaStream_t)x->stream),
                         "memset");
}

/* Division of 0..2^31 - 1 by what the host knows: a multiplication and a shift instead of some
 * forty instructions. With s = ceil(log2 by) and factor = floor(2^(31 + s) / by) + 1, the product
 * is too large by less than n <= 2^(31 + s) / by, so the quotient is exact. */
typedef struct ss_divisor {
    uint32_t by, factor;
    int32_t shift;
} ss_divisor;

static inline ss_divisor ss_divisor_of(int64_t by) {
    ss_divisor d = {(uint32_t)by, 0, 31};
    while ((INT64_C(1) << (d.shift - 31)) < by) {
        ++d.shift;
    }
    d.factor = (uint32_t)((UINT64_C(1) << d.shift) / (uint64_t)by + 1);
    return d;
}

SS_BOTH uint32_t ss_divided(uint32_t n, ss_divisor d) {
    return (uint32_t)((uint64_t)n * d.factor >> d.shift);
}

/* ---- host: workspace ------------------------------------------------------------------------- */

/* Pieces of the workspace, each aligned to 256 bytes. With base NULL it only counts, so the
 * function that lays out a workspace is also the one that tells its size:
 *
 *     static void layout(ss_carve *w, const ss_op_args *a, pieces *p) {
 *         p->sums = ss_take<double>(w, blocks_of(a));
 *     }
 *     int64_t SS_CUDA_WORKSPACE(op)(const ss_op_args *a) {
 *         ss_carve w = {};
 *         pieces p;
 *         layout(&w, a, &p);
 *         return ss_carved(&w);
 *     }
 */
typedef struct ss_carve {
    char *base;
    int64_t used;
    int64_t room;
    int32_t overflow;
} ss_carve;

static inline ss_carve ss_carve_of(const ss_exec *x) {
    ss_carve w = {static_cast<char *>(x->workspace), 0, x->workspace_bytes, 0};
    return w;
}

template <typename T> static inline T *ss_take(ss_carve *w, int64_t n) {
    const int64_t most = INT64_MAX / 2 / (int64_t)sizeof(T);
    if (n < 0 || n > most || w->used > INT64_MAX / 2 - 256) {
        w->overflow = 1;
        return nullptr;
    }
    int64_t at = w->used;
    w->used += (n * (int64_t)sizeof(T) + 255) / 256 * 256;
    if (!w->base) {
        return nullptr;
    }
    return reinterpret_cast<T *>(w->base + at);
}

/* The number of bytes taken; -1 if that cannot be counted, which core.c reports. */
static inline int64_t ss_carved(const ss_carve *w) {
    return w->overflow ? -1 : w->used;
}

/* The counter of an operator for values that were masked because they would break memory safety, or
 * NULL if nobody wants to know. */
#define SS_FAULTS SS_OPS
#define SS_FAULTS_OF(x, op)                                                                        \
    ((x)->faults ? reinterpret_cast<unsigned long long *>((x)->faults + SS_OP_##op) : nullptr)

/* ---- dtypes ---------------------------------------------------------------------------------- */

struct ss_half {
    uint16_t bits;
};
struct ss_bfloat {
    uint16_t bits;
};

/* ss_float<T>: what one computes with: double for double, float for the others. */
template <typename T> struct ss_float_of {
    typedef float type;
};
template <> struct ss_float_of<double> {
    typedef double type;
};
template <typename T> using ss_float = typename ss_float_of<T>::type;

SS_DEVICE float ss_value(ss_half h) {
#if defined(__CUDA_ARCH__)
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h.bits));
    return f;
#else
    return ss_f16_f32(h.bits);
#endif
}
SS_DEVICE float ss_value(ss_bfloat h) {
    return ss_bf16_f32(h.bits);
}
template <typename T> SS_DEVICE T ss_value(T v) {
    return v;
}

template <typename T> struct ss_rounded {
    template <typename V> SS_DEVICE T from(V v) {
        return static_cast<T>(v);
    }
};
template <> struct ss_rounded<ss_half> {
    SS_DEVICE ss_half from(float v) {
        ss_half h;
#if defined(__CUDA_ARCH__)
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h.bits) : "f"(v));
        h.bits = v == v ? h.bits : ss_f32_f16(v);
#else
        h.bits = ss_f32_f16(v);
#endif
        return h;
    }
};
template <> struct ss_rounded<ss_bfloat> {
    SS_DEVICE ss_bfloat from(float v) {
        ss_bfloat h;
        h.bits = ss_f32_bf16(v);
        return h;
    }
};

/* Element i of an array of T as a number to compute with: float or double, or the integer itself.
 */
template <typename T> SS_DEVICE auto ss_load(const void *p, int64_t i) {
    return ss_value(static_cast<const T *>(p)[i]);
}
template <typename T, typename V> SS_DEVICE void ss_store(void *p, int64_t i, V v) {
    static_cast<T *>(p)[i] = ss_rounded<T>::from(v);
}

/* 16 bytes at once: ss_vec16<T>::n elements; `p` must be aligned to 16 bytes, and where one stores,
 * it must be global memory. */
template <typename T> struct alignas(16) ss_vec16 {
    enum { n = 16 / sizeof(T) };
    T v[16 / sizeof(T)];
};
template <typename T> SS_DEVICE ss_vec16<T> ss_load16(const T *p) {
    union {
        uint4 raw;
        ss_vec16<T> vec;
    } u;
    u.raw = *reinterpret_cast<const uint4 *>(p);
    return u.vec;
}
template <typename T> SS_DEVICE void ss_store16(T *p, const ss_vec16<T> &vec) {
    union {
        uint4 raw;
        ss_vec16<T> vec;
    } u;
    u.vec = vec;
#if defined(__CUDA_ARCH__) /* of an assignment nvcc may make four stores */
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)),
                 "r"(u.raw.x), "r"(u.raw.y), "r"(u.raw.z), "r"(u.raw.w)
                 : "memory");
#else
    *reinterpret_cast<uint4 *>(p) = u.raw;
#endif
}
static inline int ss_aligned16(const void *p) {
    return ((uintptr_t)p & 15) == 0;
}

/* Runs a statement with T as the type of a dtype: SS_FOR_FLOAT(dtype, T, return run<T>(x, a)).
 * Falls through for other dtypes, which core.c has refused already. */
#define SS_CASE_OF(name, type, T, ...)                                                             \
    case name: {                                                                                   \
        typedef type T;                                                                            \
        __VA_ARGS__;                                                                               \
    } break;
#define SS_FOR_FLOAT(dtype, T, ...)                                                                \
    switch (dtype) {                                                                               \
        SS_CASE_OF(SS_F16, ss_half, T, __VA_ARGS__)                                                \
        SS_CASE_OF(SS_BF16, ss_bfloat, T, __VA_ARGS__)                                             \
        SS_CASE_OF(SS_F32, float, T, __VA_ARGS__)                                                  \
        SS_CASE_OF(SS_F64, double, T, __VA_ARGS__)                                                 \
    default:                                                                                       \
        break;                                                                                     \
    }
#define SS_FOR_INT(dtype, T, ...)                                                                  \
    switch (dtype) {                                                                               \
        SS_CASE_OF(SS_BOOL, uint8_t, T, __VA_ARGS__)                                               \
        SS_CASE_OF(SS_U8, uint8_t, T, __VA_ARGS__)                                                 \
        SS_CASE_OF(SS_I8, int8_t, T, __VA_ARGS__)                                                  \
        SS_CASE_OF(SS_U16, uint16_t, T, __VA_ARGS__)                                               \
        SS_CASE_OF(SS_I16, int16_t, T, __VA_ARGS__)                                                \
        SS_CASE_OF(SS_U32, uint32_t, T, __VA_ARGS__)                                               \
        SS_CASE_OF(SS_I32, int32_t, T, __VA_ARGS__)                                                \
        SS_CASE_OF(SS_U64, uint64_t, T, __VA_ARGS__)                                               \
        SS_CASE_OF(SS_I64, int64_t, T, __VA_ARGS__)                                                \
    default:                                                                                       \
        break;                                                                                     \
    }

/* ---- device: atomics on the standard 64-bit types ---------------------------------------------
 */

/* CUDA declares them for unsigned long long alone, and uint64_t is unsigned long on Linux. */
#define SS_ATOMIC64(f)                                                                             \
    SS_DEVICE unsigned long f(unsigned long *p, unsigned long v) {                                 \
        return f(reinterpret_cast<unsigned long long *>(p), static_cast<unsigned long long>(v));   \
    }
SS_ATOMIC64(atomicAdd)
SS_ATOMIC64(atomicMin)
SS_ATOMIC64(atomicMax)
SS_ATOMIC64(atomicAnd)
SS_ATOMIC64(atomicOr)
SS_ATOMIC64(atomicExch)
#undef SS_ATOMIC64
SS_DEVICE unsigned long atomicCAS(unsigned long *p, unsigned long expected, unsigned long v) {
    return atomicCAS(reinterpret_cast<unsigned long long *>(p),
                     static_cast<unsigned long long>(expected), static_cast<unsigned long long>(v));
}

/* ---- device: folds in a fixed order -----------------------------------------------------------
 */

/* The sum over a warp's lanes, in every lane: a tree of fixed shape. All 32 lanes take part. */
template <typename V> SS_DEVICE V ss_warp_sum(V v) {
    for (int step = SS_WARP / 2; step > 0; step /= 2) {
        v += __shfl_xor_sync(SS_ALL_LANES, v, step);
    }
    return v;
}

/* The sum over a block of THREADS threads (a multiple of 32), in every thread. `room` is shared
 * memory for THREADS / 32 values; it may be used again at once. All threads take part. */
template <int THREADS, typename V> SS_DEVICE V ss_block_sum(V v, V *room) {
    v = ss_warp_sum(v);
    if (threadIdx.x % SS_WARP == 0) {
        room[threadIdx.x / SS_WARP] = v;
    }
    __syncthreads();
    V sum = room[0];
    for (int w = 1; w < THREADS / SS_WARP; ++w) {
        sum += room[w];
    }
    __syncthreads();
    return sum;
}

/* Counts the threads of a block that met a fault. All threads take part; `counter` may be NULL. */
SS_DEVICE void ss_count_faults(unsigned long long *counter, int fault) {
    int n = __syncthreads_count(fault);
    if (n > 0 && counter && threadIdx.x == 0 && threadIdx.y == 0 && threadIdx.z == 0) {
        atomicAdd(counter, static_cast<unsigned long long>(n));
    }
}

#endif
