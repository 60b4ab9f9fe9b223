/* SPDX-License-Identifier: Apache-2.0
 *
 * cuda_runtime.h: what csrc/cuda/device.cuh needs of CUDA, as host C++, for tests without a GPU.
 *
 * A launch runs its grid at once, block by block; the threads of a block are fibers that give way
 * to each other at barriers and warp functions only (emulation.cpp). Memory of the device is memory
 * of the host. Barriers that not all threads reach, warp functions with lanes missing and launches
 * that a GPU would refuse are errors with a sentence. Shared memory starts as garbage (0xff).
 */
#ifndef SS_EMULATED_CUDA_RUNTIME_H
#define SS_EMULATED_CUDA_RUNTIME_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <utility>

#define SS_EMULATED 1
#define SS_BACKEND_DEVICE SS_CPU
#define SS_BACKEND_NAME "emulated"
#define SS_BACKEND_ISA "emulated"

#define __global__ __attribute__((unused))
#define __device__ __attribute__((unused))
#define __host__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define SS_SHARED __attribute__((section("ss_shared"), aligned(16))) static
#define SS_DYNAMIC_SHARED(T, name) T *name = static_cast<T *>(ss_emulated_dynamic_shared())

/* ---- vectors and indices --------------------------------------------------------------------- */

#define SS_VECTORS(T, name)                                                                        \
    struct alignas(2 * sizeof(T)) name##2 {                                                        \
        T x, y;                                                                                    \
    };                                                                                             \
    struct name##3 {                                                                               \
        T x, y, z;                                                                                 \
    };                                                                                             \
    struct alignas(sizeof(T) < 8 ? 4 * sizeof(T) : 16) name##4 {                                   \
        T x, y, z, w;                                                                              \
    };                                                                                             \
    static inline name##2 make_##name##2(T x, T y) {                                               \
        return {x, y};                                                                             \
    }                                                                                              \
    static inline name##4 make_##name##4(T x, T y, T z, T w) {                                     \
        return {x, y, z, w};                                                                       \
    }
SS_VECTORS(unsigned char, uchar)
SS_VECTORS(unsigned short, ushort)
SS_VECTORS(int, int)
SS_VECTORS(unsigned, uint)
SS_VECTORS(float, float)
SS_VECTORS(double, double)
SS_VECTORS(long long, longlong)
SS_VECTORS(unsigned long long, ulonglong)
#undef SS_VECTORS

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {
    }
};

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
static const int warpSize = 32;

/* ---- the runtime ----------------------------------------------------------------------------- */

typedef enum cudaError {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorMemoryAllocation = 2,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorLaunchFailure = 719
} cudaError_t;
typedef struct CUstream_st *cudaStream_t;
typedef enum cudaMemcpyKind { cudaMemcpyDeviceToDevice = 3 } cudaMemcpyKind;

extern "C" {
const char *cudaGetErrorString(cudaError_t error);
cudaError_t ss_emulated_launch(dim3 grid, dim3 block, size_t shared, void (*run)(void *),
                               void *context);
cudaError_t ss_emulated_cooperative(dim3 grid, dim3 block, size_t shared, void (*run)(void *),
                                    void *context);
int ss_emulated_attribute(int attribute);
void ss_emulated_nap(void);
void *ss_emulated_dynamic_shared(void);
void ss_emulated_sync(int line);
int ss_emulated_sync_count(int line, int predicate);
/* The values that the 32 lanes of this warp brought, once all have; lane: of the caller. */
const uint64_t *ss_emulated_warp(int line, unsigned mask, uint64_t value, unsigned *lane);
}

static inline cudaError_t cudaGetLastError(void) {
    return cudaSuccess;
}
static inline cudaError_t cudaGetDevice(int *device) {
    *device = 0;
    return cudaSuccess;
}
static inline cudaError_t cudaSetDevice(int device) {
    return device == 0 ? cudaSuccess : cudaErrorInvalidValue;
}
static inline cudaError_t cudaGetDeviceCount(int *n) {
    *n = 1;
    return cudaSuccess;
}
static inline cudaError_t cudaMemsetAsync(void *p, int value, size_t bytes, cudaStream_t) {
    memset(p, value, bytes);
    return cudaSuccess;
}
static inline cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind,
                                          cudaStream_t) {
    memcpy(to, from, bytes);
    return cudaSuccess;
}

template <typename... P> struct ss_emulated_call {
    void (*kernel)(P...);
    void **arguments;
    template <size_t... I> void run(std::index_sequence<I...>) {
        kernel(*static_cast<P *>(arguments[I])...);
    }
    static void thread(void *self) {
        static_cast<ss_emulated_call *>(self)->run(std::index_sequence_for<P...>());
    }
};

template <typename... P>
static inline cudaError_t cudaLaunchKernel(void (*kernel)(P...), dim3 grid, dim3 block,
                                           void **arguments, size_t shared, cudaStream_t) {
    ss_emulated_call<P...> call = {kernel, arguments};
    return ss_emulated_launch(grid, block, shared, ss_emulated_call<P...>::thread, &call);
}

/* Blocks of a cooperative launch run at the same time, each in a process of its own
 * (emulation.cpp). */
template <typename... P>
static inline cudaError_t cudaLaunchCooperativeKernel(void (*kernel)(P...), dim3 grid, dim3 block,
                                                      void **arguments, size_t shared,
                                                      cudaStream_t) {
    ss_emulated_call<P...> call = {kernel, arguments};
    return ss_emulated_cooperative(grid, block, shared, ss_emulated_call<P...>::thread, &call);
}
typedef enum cudaDeviceAttr {
    cudaDevAttrMultiProcessorCount = 16,
    cudaDevAttrCooperativeLaunch = 95
} cudaDeviceAttr;
static inline cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int) {
    *value = ss_emulated_attribute(attribute);
    return cudaSuccess;
}
template <typename... P>
static inline cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, void (*)(P...),
                                                                        int, size_t) {
    *blocks = 1;
    return cudaSuccess;
}
#define __nanosleep(ns) ss_emulated_nap() /* what a thread does that waits for another block */

/* ---- barriers and warp functions: the line tells which one, so that a mix-up shows -------------
 */

#define __syncthreads() ss_emulated_sync(__LINE__)
#define __syncthreads_count(predicate) ss_emulated_sync_count(__LINE__, predicate)
#define __syncthreads_or(predicate) (ss_emulated_sync_count(__LINE__, predicate) != 0)
#define __syncthreads_and(predicate) (ss_emulated_sync_count(__LINE__, !(predicate)) == 0)
#define __syncwarp(...) ((void)ss_emulated_ballot(__LINE__, 0xffffffffu, 0))
#define __threadfence() __atomic_thread_fence(__ATOMIC_SEQ_CST)
#define __threadfence_block() ((void)0)

template <typename V> static inline uint64_t ss_emulated_bits(V v) {
    static_assert(sizeof v <= 8, "a warp function takes 4 or 8 bytes");
    uint64_t u = 0;
    memcpy(&u, &v, sizeof v);
    return u;
}
template <typename V> static inline V ss_emulated_value(uint64_t u) {
    V v;
    memcpy(&v, &u, sizeof v);
    return v;
}

template <typename V>
static inline V ss_emulated_shfl(int line, int how, unsigned mask, V v, unsigned by,
                                 unsigned width = 32) {
    static_assert(sizeof v >= 4, "CUDA has no shuffle of fewer than 4 bytes");
    unsigned lane = 0;
    const uint64_t *all = ss_emulated_warp(line, mask, ss_emulated_bits(v), &lane);
    unsigned first = lane & ~(width - 1), at = lane & (width - 1), from = at;
    switch (how) {
    case 0:
        from = by & (width - 1);
        break;
    case 1:
        from = at + by < width ? at + by : at;
        break;
    case 2:
        from = at >= by ? at - by : at;
        break;
    default:
        return ss_emulated_value<V>(all[(lane ^ by) < first + width ? (lane ^ by) & 31 : lane]);
    }
    return ss_emulated_value<V>(all[first + from]);
}
#define __shfl_sync(...) ss_emulated_shfl(__LINE__, 0, __VA_ARGS__)
#define __shfl_down_sync(...) ss_emulated_shfl(__LINE__, 1, __VA_ARGS__)
#define __shfl_up_sync(...) ss_emulated_shfl(__LINE__, 2, __VA_ARGS__)
#define __shfl_xor_sync(...) ss_emulated_shfl(__LINE__, 3, __VA_ARGS__)

static inline unsigned ss_emulated_ballot(int line, unsigned mask, int predicate) {
    unsigned lane = 0, set = 0;
    const uint64_t *all = ss_emulated_warp(line, mask, predicate != 0, &lane);
    for (unsigned i = 0; i < 32; ++i) {
        set |= (unsigned)all[i] << i;
    }
    return set;
}
#define __ballot_sync(mask, predicate) ss_emulated_ballot(__LINE__, mask, predicate)
#define __any_sync(mask, predicate) (ss_emulated_ballot(__LINE__, mask, predicate) != 0)
#define __all_sync(mask, predicate) (ss_emulated_ballot(__LINE__, mask, predicate) == 0xffffffffu)
static inline unsigned __activemask(void) {
    return 0xffffffffu;
}

/* ---- atomics: one thread of a block runs at a time, but blocks may be processes -----------------
 */

template <typename T, typename F> static inline T ss_emulated_atomic(T *p, F change) {
    T old = __atomic_load_n(p, __ATOMIC_SEQ_CST);
    while (!__atomic_compare_exchange_n(p, &old, change(old), false, __ATOMIC_SEQ_CST,
                                        __ATOMIC_SEQ_CST)) {
    }
    return old;
}
#define SS_ATOMIC(f, T, expression)                                                                \
    static inline T f(T *p, T v) {                                                                 \
        return ss_emulated_atomic(p, [=](T old) { return static_cast<T>(expression); });           \
    }
#define SS_ATOMICS(T)                                                                              \
    SS_ATOMIC(atomicAdd, T, old + v)                                                               \
    SS_ATOMIC(atomicMin, T, old < v ? old : v)                                                     \
    SS_ATOMIC(atomicMax, T, old > v ? old : v)                                                     \
    SS_ATOMIC(atomicAnd, T, old &v)                                                                \
    SS_ATOMIC(atomicOr, T, old | v)                                                                \
    SS_ATOMIC(atomicXor, T, old ^ v)                                                               \
    SS_ATOMIC(atomicExch, T, ((void)old, v))                                                       \
    static inline T atomicCAS(T *p, T expected, T v) {                                             \
        return ss_emulated_atomic(p, [=](T old) { return old == expected ? v : old; });            \
    }
SS_ATOMICS(int)
SS_ATOMICS(unsigned)
SS_ATOMICS(unsigned long long)
#undef SS_ATOMICS
#undef SS_ATOMIC

/* ---- integer and bit functions -----------------------------------------------------------------
 */

static inline int __popc(unsigned v) {
    return __builtin_popcount(v);
}
static inline int __popcll(unsigned long long v) {
    return __builtin_popcountll(v);
}
static inline int __clz(int v) {
    return v ? __builtin_clz((unsigned)v) : 32;
}
static inline int __clzll(long long v) {
    return v ? __builtin_clzll((unsigned long long)v) : 64;
}
static inline int __ffs(int v) {
    return __builtin_ffs(v);
}
static inline int __ffsll(long long v) {
    return __builtin_ffsll(v);
}
static inline unsigned __brev(unsigned v) {
    unsigned r = 0;
    for (int i = 0; i < 32; ++i) {
        r |= (v >> i & 1u) << (31 - i);
    }
    return r;
}
static inline unsigned __umulhi(unsigned a, unsigned b) {
    return (unsigned)((uint64_t)a * b >> 32);
}
static inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned long long)((unsigned __int128)a * b >> 64);
}
static inline unsigned __float_as_uint(float f) {
    return (unsigned)ss_emulated_bits(f);
}
static inline int __float_as_int(float f) {
    return (int)(unsigned)ss_emulated_bits(f);
}
static inline float __uint_as_float(unsigned u) {
    return ss_emulated_value<float>(u);
}
static inline float __int_as_float(int u) {
    return ss_emulated_value<float>((unsigned)u);
}
static inline long long __double_as_longlong(double d) {
    return (long long)ss_emulated_bits(d);
}
static inline double __longlong_as_double(long long u) {
    return ss_emulated_value<double>((uint64_t)u);
}

#define SS_MIN_MAX(T)                                                                              \
    static inline T min(T a, T b) {                                                                \
        return a < b ? a : b;                                                                      \
    }                                                                                              \
    static inline T max(T a, T b) {                                                                \
        return a > b ? a : b;                                                                      \
    }
SS_MIN_MAX(int)
SS_MIN_MAX(unsigned)
SS_MIN_MAX(long)
SS_MIN_MAX(unsigned long)
SS_MIN_MAX(long long)
SS_MIN_MAX(unsigned long long)
#undef SS_MIN_MAX
static inline float min(float a, float b) {
    return fminf(a, b);
}
static inline float max(float a, float b) {
    return fmaxf(a, b);
}
static inline double min(double a, double b) {
    return fmin(a, b);
}
static inline double max(double a, double b) {
    return fmax(a, b);
}

#endif
