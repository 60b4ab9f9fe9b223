/* SPDX-License-Identifier: Apache-2.0
 *
 * dlpack_abi.h: the parts of DLPack's ABI (major version 1, and the unversioned capsules before it)
 * that tensor.c reads. Layouts follow the DLPack specification.
 */
#ifndef SS_DLPACK_ABI_H
#define SS_DLPACK_ABI_H

#include <stdint.h>

#define SS_DLPACK_MAJOR 1
#define SS_DLPACK_READ_ONLY ((uint64_t)1)

enum { SS_DL_INT = 0, SS_DL_UINT = 1, SS_DL_FLOAT = 2, SS_DL_BFLOAT = 4, SS_DL_BOOL = 6 };
enum { SS_DL_CPU = 1, SS_DL_CUDA = 2, SS_DL_CUDA_HOST = 3, SS_DL_CUDA_MANAGED = 13 };

typedef struct ss_dl_version {
    uint32_t major;
    uint32_t minor;
} ss_dl_version;

typedef struct ss_dl_tensor {
    void *data;
    int32_t device_type;
    int32_t device_id;
    int32_t ndim;
    uint8_t code;
    uint8_t bits;
    uint16_t lanes;
    int64_t *shape;
    int64_t *strides; /* elements; may be NULL (contiguous) before DLPack 1.2 */
    uint64_t byte_offset;
} ss_dl_tensor;

typedef struct ss_dl_managed {
    ss_dl_tensor tensor;
    void *context;
    void (*deleter)(struct ss_dl_managed *);
} ss_dl_managed;

typedef struct ss_dl_managed_versioned {
    ss_dl_version version;
    void *context;
    void (*deleter)(struct ss_dl_managed_versioned *);
    uint64_t flags;
    ss_dl_tensor tensor;
} ss_dl_managed_versioned;

typedef struct ss_dl_exchange {
    ss_dl_version version;
    struct ss_dl_exchange *previous;
    void *allocate;
    void *managed_from_py;
    void *managed_to_py;
    int (*tensor_from_py)(void *object, ss_dl_tensor *out); /* may be NULL */
    int (*current_stream)(int32_t device_type, int32_t device_id, void **out);
} ss_dl_exchange;

#endif
