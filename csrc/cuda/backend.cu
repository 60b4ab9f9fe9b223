/* SPDX-License-Identifier: Apache-2.0
 *
 * backend.cu: the table of CUDA operators and the one function that the library exports.
 *
 * registers <= 0: no kernels here.
 */
#include "device.cuh"

#ifndef SS_CUDA_ARCHS
#define SS_CUDA_ARCHS "unknown"
#endif
#ifndef SS_BACKEND_DEVICE /* the emulation of tests answers on the CPU, under a name of its own */
#define SS_BACKEND_DEVICE SS_CUDA
#define SS_BACKEND_NAME "cuda"
#define SS_BACKEND_ISA (archs + sizeof SS_MARK - 1)
#endif

/* For semisam.info(), which reads it out of the file where no driver lets the table be asked. */
#define SS_MARK "semisam: CUDA code for "
__attribute__((used)) static const char archs[] = SS_MARK SS_CUDA_ARCHS;

/* Weak: an operator that no file defines is NULL in the table, and core.c says that it is missing.
 */
extern "C" {
#define SS_OP(op, doc, args)                                                                       \
    __attribute__((weak)) ss_status SS_CUDA(op)(ss_exec *, const ss_##op##_args *);                \
    __attribute__((weak)) int64_t SS_CUDA_WORKSPACE(op)(const ss_##op##_args *);
#include "../ops.def"
}

static ss_status enter(ss_exec *x) {
    int device = -1;
    SS_TRY(ss_cuda_check(x, cudaGetDevice(&device), "current device"));
    if (x->device == SS_CUDA && device != x->device_index) {
        return ss_cuda_check(x, cudaSetDevice(x->device_index), "device of the tensors");
    }
    return SS_OK;
}

/* The caller's device is the current one already where a framework guards it; a C program that only
 * fills an ss_exec gets it set. */
#define SS_OP(op, doc, args)                                                                       \
    static ss_status run_##op(ss_exec *x, const ss_##op##_args *a) {                               \
        SS_TRY(enter(x));                                                                          \
        return SS_CUDA(op)(x, a);                                                                  \
    }
#include "../ops.def"

extern "C" __attribute__((visibility("default")))
const ss_backend *semisam_cuda(int32_t abi, char *error, int64_t room) {
    static ss_backend table; /* zeros, then always the same values: two first callers do no harm */
    if (abi != SS_ABI) {
        snprintf(error, (size_t)room, "has ABI %d, and this semisam needs %d: build both together",
                 SS_ABI, (int)abi);
        return nullptr;
    }
    int devices = 0;
    cudaError_t status = cudaGetDeviceCount(&devices);
    if (status != cudaSuccess || devices == 0) {
        (void)cudaGetLastError();
        snprintf(error, (size_t)room, "finds no usable GPU: %s",
                 status == cudaSuccess ? "the driver lists no device" : cudaGetErrorString(status));
        return nullptr;
    }
    table.abi = SS_ABI;
    table.device = SS_BACKEND_DEVICE;
    table.name = SS_BACKEND_NAME;
    table.isa = SS_BACKEND_ISA;
#define SS_OP(op, doc, args)                                                                       \
    table.op = SS_CUDA(op) ? run_##op : nullptr;                                                   \
    table.op##_workspace = SS_CUDA_WORKSPACE(op);
#include "../ops.def"
    return &table;
}
