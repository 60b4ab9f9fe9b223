/* SPDX-License-Identifier: Apache-2.0
 *
 * semisam.h: the whole C11 interface of the core (compiles as C++17, too).
 *
 * A call needs an `ss_exec` (how to run, and room for one sentence of error text), the operator's
 * argument struct, and nothing else:
 *
 *     ss_exec x = ss_exec_cpu(0);                         // 0 threads: as many as there are cores
 *     ss_components_args a = {.mask = ss_tensor_of(m, SS_U8, 4, shape), ...};
 *     if (ss_components(&x, &a) != SS_OK) fprintf(stderr, "%s\n", x.error);
 *
 * The list of operators with names, shapes and dtypes of all arguments is `ops.def`; argument
 * structs, backend tables, checks and functions below are derived from it by the preprocessor.
 * The caller owns all memory; tensors are borrowed for the duration of one call.
 */
#ifndef SEMISAM_H
#define SEMISAM_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define SS_ABI 5
#define SS_MAX_DIMS 6   /* B C D H W and one to spare */
#define SS_MAX_LIST 128 /* tensors in one list argument */
#define SS_MAX_THREADS 256

#ifndef SS_API /* empty where the core is part of something else, such as the Python extension */
#if defined(__GNUC__)
#define SS_API __attribute__((visibility("default")))
#else
#define SS_API
#endif
#endif

typedef enum ss_dtype {
    SS_BOOL,
    SS_U8,
    SS_I8,
    SS_U16,
    SS_I16,
    SS_U32,
    SS_I32,
    SS_U64,
    SS_I64,
    SS_F16,
    SS_BF16,
    SS_F32,
    SS_F64,
    SS_DTYPES
} ss_dtype;

typedef enum ss_device { SS_CPU = 1, SS_CUDA = 2 } ss_device; /* DLPack's numbers */

typedef enum ss_status {
    SS_OK = 0,
    SS_INVALID,     /* an argument's value or shape: ValueError */
    SS_WRONG_TYPE,  /* an argument's dtype: TypeError */
    SS_NO_MEMORY,   /* MemoryError */
    SS_UNSUPPORTED, /* operator missing on this device: NotImplementedError */
    SS_FAILED       /* the device or the system failed: RuntimeError */
} ss_status;

/* A borrowed view of somebody else's memory; strides count elements. data NULL means "not given".
 */
typedef struct ss_tensor {
    void *data;
    int32_t dtype;
    int32_t ndim;
    int32_t device;
    int32_t device_index;
    int32_t read_only;
    int32_t reserved;
    int64_t shape[SS_MAX_DIMS];
    int64_t stride[SS_MAX_DIMS];
} ss_tensor;

typedef struct ss_list {
    const ss_tensor *at;
    int64_t n;
} ss_list;

typedef struct ss_doubles {
    const double *at;
    int64_t n;
} ss_doubles;

/* How to run one call. `threads` n means up to n, 0 up to as many as there are cores; they start
 * where the work is worth it. -n means n at once, whatever the work: for tests. `isa` NULL means
 * the best one here.
 * Operators on a device work in `workspace`, memory of the device that the caller owns, of at least
 * as many bytes as ss_workspace says; the CPU needs none. Values that could break memory safety,
 * such as a label used as an index, are refused on the CPU; on a device they are masked and counted
 * in faults[operator's number], device memory of SS_OPS counters, or NULL. */
typedef struct ss_exec {
    int32_t device;
    int32_t device_index;
    int32_t threads;
    int32_t reserved;
    void *stream;
    const char *isa;
    void *workspace;
    int64_t workspace_bytes;
    int64_t *faults;
    char error[256];
} ss_exec;

/* Argument structs: ss_<op>_args. */
#define SS_IN(name, dtype, shape) ss_tensor name;
#define SS_OPT(name, dtype, shape) ss_tensor name;
#define SS_LIST(name, dtype, shape) ss_list name;
#define SS_OUT(name, dtype, shape) ss_tensor name;
#define SS_INT(name, lo, hi) int64_t name;
#define SS_DBL(name, lo, hi) double name;
#define SS_DBLS(name, max) ss_doubles name;
#define SS_OP(op, doc, args)                                                                       \
    typedef struct ss_##op##_args {                                                                \
        args                                                                                       \
    } ss_##op##_args;
#include "ops.def"

/* Operator numbers: SS_OP_<op>. */
typedef enum ss_op {
#define SS_OP(op, doc, args) SS_OP_##op,
#include "ops.def"
    SS_OPS
} ss_op;

/* One backend per device (and instruction set): a table of kernels; NULL where there is none. */
typedef struct ss_backend {
    int32_t abi;
    int32_t device;
    const char *name;
    const char *isa;
#define SS_OP(op, doc, args) ss_status (*op)(ss_exec *, const ss_##op##_args *);
#include "ops.def"
/* Bytes of workspace that a call needs; NULL: none. Negative: more than can be counted. */
#define SS_OP(op, doc, args) int64_t (*op##_workspace)(const ss_##op##_args *);
#include "ops.def"
} ss_backend;

/* The operators: check every argument against the schema, then run on the device of `x`. */
#define SS_OP(op, doc, args) SS_API ss_status ss_##op(ss_exec *x, const ss_##op##_args *a);
#include "ops.def"

/* The schema as data: what ops.def says, for bindings and tools. */
typedef enum ss_kind {
    SS_KIND_IN,
    SS_KIND_OPT,
    SS_KIND_LIST,
    SS_KIND_OUT,
    SS_KIND_INT,
    SS_KIND_DBL,
    SS_KIND_DBLS
} ss_kind;

typedef struct ss_arg_spec {
    const char *name;
    const char *dtype; /* see ops.def */
    const char *shape;
    double lo, hi; /* INT and DBL: inclusive; DBLS: hi is the largest count */
    int32_t kind;
} ss_arg_spec;

typedef struct ss_op_spec {
    const char *name;
    const char *doc;
    const ss_arg_spec *args;
    int32_t n_args;
    int32_t size; /* of the argument struct */
} ss_op_spec;

SS_API const ss_op_spec *ss_op_specs(void); /* SS_OPS entries */
SS_API size_t ss_kind_size(int32_t kind);   /* bytes of one slot in an argument struct */
/* Checks `args` (an ss_<op>_args) and runs it; `args` is changed: "S*" shapes come out flattened.
 */
SS_API ss_status ss_run(ss_exec *x, int32_t op, void *args);
/* Checks `args` and tells how many bytes of workspace ss_run needs for them; `args` stays. */
SS_API ss_status ss_workspace(ss_exec *x, int32_t op, const void *args, int64_t *bytes);

SS_API const char *ss_version(void);
SS_API const char *ss_dtype_name(int32_t dtype);
SS_API size_t ss_dtype_size(int32_t dtype);
SS_API int64_t ss_count(const ss_tensor *t); /* elements; -1 if the product overflows */
SS_API const ss_backend *const *ss_cpu_backends(int32_t *n); /* best first; all that run here */
/* A backend from a library of its own, once, before the first call that needs it: it serves the
 * device that it names; one for the CPU serves calls that ask for its instruction set by name. */
SS_API ss_status ss_add_backend(const ss_backend *backend, char *error, size_t room);
SS_API const ss_backend *ss_added_backend(int32_t device); /* NULL if there is none */
/* Whether a backend has an operator. */
SS_API int32_t ss_has(const ss_backend *backend, int32_t op);
SS_API int32_t ss_cpu_count(void);
/* Memory for large outputs, aligned to 64; NULL: there is none. What is given back (NULL does
 * nothing) waits, with large memory that kernels worked in, for the next call: at most so many
 * bytes, 64 MiB unless told. */
SS_API void *ss_block_new(size_t bytes);
SS_API void ss_block_free(void *data);
SS_API void ss_keep_at_most(size_t bytes);
SS_API size_t ss_kept(void);

static inline ss_exec ss_exec_cpu(int32_t threads) {
    ss_exec x = {SS_CPU, 0, 0, 0, NULL, NULL, NULL, 0, NULL, {0}};
    x.threads = threads;
    return x;
}

/* A C-contiguous tensor over `data`. */
static inline ss_tensor ss_tensor_of(void *data, int32_t dtype, int32_t ndim,
                                     const int64_t *shape) {
    ss_tensor t = {data, dtype, ndim, SS_CPU, 0, 0, 0, {0}, {0}};
    int64_t stride = 1;
    for (int32_t d = ndim - 1; d >= 0; --d) {
        t.shape[d] = shape[d];
        t.stride[d] = stride;
        stride *= shape[d];
    }
    return t;
}

#ifdef __cplusplus
}
#endif
#endif
