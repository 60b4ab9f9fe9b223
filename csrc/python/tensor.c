/* SPDX-License-Identifier: Apache-2.0
 *
 * tensor.c: any array -> ss_tensor, without a copy.
 *
 * Order: NumPy's C API; DLPack's exchange API (torch >= 2.10: on the stack, about 0.4 us); the
 * `__dlpack__` capsule that every array library has (about 10 us). An exchange API of a major
 * version that is not known here, and has no known one behind it, is none.
 */
#include "binding.h"

#include "dlpack_abi.h"

#include <string.h>

static int32_t dtype_from_numpy(int type) {
    switch (type) {
    case NPY_BOOL:
        return SS_BOOL;
    case NPY_HALF:
        return SS_F16;
    case NPY_FLOAT:
        return SS_F32;
    case NPY_DOUBLE:
        return SS_F64;
    default:
        break;
    }
    if (PyTypeNum_ISUNSIGNED(type)) {
        switch (type) {
        case NPY_UBYTE:
            return SS_U8;
        case NPY_USHORT:
            return SS_U16;
        case NPY_UINT:
            return SS_U32;
        default:
            return sizeof(npy_ulong) == 4 && type == NPY_ULONG ? SS_U32 : SS_U64;
        }
    }
    if (PyTypeNum_ISINTEGER(type)) {
        switch (type) {
        case NPY_BYTE:
            return SS_I8;
        case NPY_SHORT:
            return SS_I16;
        case NPY_INT:
            return SS_I32;
        default:
            return sizeof(npy_long) == 4 && type == NPY_LONG ? SS_I32 : SS_I64;
        }
    }
    return -1;
}

static int32_t dtype_from_dlpack(const ss_dl_tensor *t) {
    if (t->lanes != 1) {
        return -1;
    }
    int32_t size = t->bits == 8    ? 0
                   : t->bits == 16 ? 1
                   : t->bits == 32 ? 2
                   : t->bits == 64 ? 3
                                   : -1;
    static const int32_t ints[] = {SS_I8, SS_I16, SS_I32, SS_I64};
    static const int32_t uints[] = {SS_U8, SS_U16, SS_U32, SS_U64};
    static const int32_t floats[] = {-1, SS_F16, SS_F32, SS_F64};
    if (size < 0) {
        return -1;
    }
    switch (t->code) {
    case SS_DL_INT:
        return ints[size];
    case SS_DL_UINT:
        return uints[size];
    case SS_DL_FLOAT:
        return floats[size];
    case SS_DL_BFLOAT:
        return t->bits == 16 ? SS_BF16 : -1;
    case SS_DL_BOOL:
        return t->bits == 8 ? SS_BOOL : -1;
    default:
        return -1;
    }
}

static int too_many_dims(const char *op, const char *label, long long ndim) {
    PyErr_Format(PyExc_ValueError, "%s(): %s: expected at most %d dimensions, got %lld", op, label,
                 SS_MAX_DIMS, ndim);
    return -1;
}

static int wrong_dtype(const char *op, const char *label, PyObject *object) {
    PyObject *dtype = PyObject_GetAttrString(object, "dtype");
    if (!dtype) {
        PyErr_Clear();
    }
    PyErr_Format(PyExc_TypeError,
                 "%s(): %s: expected a boolean, integer or floating-point array, got dtype %S", op,
                 label, dtype ? dtype : Py_None);
    Py_XDECREF(dtype);
    return -1;
}

static int from_numpy(PyArrayObject *a, const char *op, const char *label, ss_tensor *out) {
    int ndim = PyArray_NDIM(a);
    if (ndim > SS_MAX_DIMS) {
        return too_many_dims(op, label, ndim);
    }
    int32_t dtype = dtype_from_numpy(PyArray_TYPE(a));
    if (dtype < 0 || PyArray_ISBYTESWAPPED(a)) {
        return wrong_dtype(op, label, (PyObject *)a);
    }
    int64_t size = (int64_t)ss_dtype_size(dtype);
    out->data = PyArray_DATA(a);
    out->dtype = dtype;
    out->ndim = ndim;
    out->device = SS_CPU;
    out->read_only = !PyArray_ISWRITEABLE(a);
    for (int d = 0; d < ndim; ++d) {
        out->shape[d] = PyArray_DIM(a, d);
        out->stride[d] = PyArray_STRIDE(a, d) / size;
    }
    return 0;
}

static int from_dlpack(const ss_dl_tensor *t, PyObject *object, const char *op, const char *label,
                       ss_tensor *out) {
    if (t->ndim > SS_MAX_DIMS) {
        return too_many_dims(op, label, t->ndim);
    }
    int32_t dtype = dtype_from_dlpack(t);
    if (dtype < 0) {
        return wrong_dtype(op, label, object);
    }
    int host = t->device_type == SS_DL_CPU || t->device_type == SS_DL_CUDA_HOST;
    if (!host && t->device_type != SS_DL_CUDA && t->device_type != SS_DL_CUDA_MANAGED) {
        PyErr_Format(PyExc_ValueError,
                     "%s(): %s: expected an array on the CPU or a CUDA device, got DLPack device "
                     "type %d; move it with .cpu()",
                     op, label, (int)t->device_type);
        return -1;
    }
    out->data = t->data ? (char *)t->data + t->byte_offset : NULL;
    out->dtype = dtype;
    out->ndim = t->ndim;
    out->device = host ? SS_CPU : SS_CUDA;
    out->device_index = host ? 0 : t->device_id;
    int64_t stride = 1;
    for (int32_t d = t->ndim - 1; d >= 0; --d) {
        out->shape[d] = t->shape[d];
        out->stride[d] = t->strides ? t->strides[d] : stride;
        stride *= t->shape[d];
    }
    return 0;
}

/* The exchange table of a type, or NULL without an exception. */
static const ss_dl_exchange *exchange_of(PyObject *type) {
    PyObject *capsule = PyObject_GetAttrString(type, "__dlpack_c_exchange_api__");
    if (!capsule) {
        PyErr_Clear();
        return NULL;
    }
    const ss_dl_exchange *api = PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
    Py_DECREF(capsule); /* the table itself is static */
    while (api && api->version.major != SS_DLPACK_MAJOR) {
        api = api->previous;
    }
    if (!api) {
        PyErr_Clear();
    }
    return api;
}

static void release_versioned(PyObject *capsule) {
    ss_dl_managed_versioned *m = PyCapsule_GetPointer(capsule, "semisam_versioned");
    if (m && m->deleter) {
        m->deleter(m);
    }
}

static void release_managed(PyObject *capsule) {
    ss_dl_managed *m = PyCapsule_GetPointer(capsule, "semisam_managed");
    if (m && m->deleter) {
        m->deleter(m);
    }
}

static int keep_alive(PyObject *keep, void *managed, const char *name, PyCapsule_Destructor drop) {
    PyObject *owner = PyCapsule_New(managed, name, drop);
    int failed = !owner || PyList_Append(keep, owner) < 0;
    Py_XDECREF(owner);
    return failed ? -1 : 0;
}

/* torch refuses the capsule of a tensor that requires a gradient, which the exchange API does not;
 * gradients are registered outside of the operators. */
static PyObject *without_gradient(PyObject *object) {
    PyObject *asked = PyObject_GetAttrString(object, "requires_grad");
    int required = asked ? PyObject_IsTrue(asked) : 0;
    if (!asked || required < 0) {
        PyErr_Clear(); /* not torch */
    }
    Py_XDECREF(asked);
    return required > 0 ? PyObject_CallMethod(object, "detach", NULL) : Py_NewRef(object);
}

static PyObject *ask_for_capsule(PyObject *object) {
    PyObject *plain = without_gradient(object);
    PyObject *method = plain ? PyObject_GetAttrString(plain, "__dlpack__") : NULL;
    PyObject *args = method ? PyTuple_New(0) : NULL;
    PyObject *names = args ? Py_BuildValue("{s(ii)}", "max_version", SS_DLPACK_MAJOR, 0) : NULL;
    PyObject *capsule = names ? PyObject_Call(method, args, names) : NULL;
    if (!capsule && names && PyErr_ExceptionMatches(PyExc_TypeError)) {
        PyErr_Clear(); /* a library from before DLPack 1.0 does not know max_version */
        capsule = PyObject_Call(method, args, NULL);
    }
    Py_XDECREF(plain);
    Py_XDECREF(method);
    Py_XDECREF(args);
    Py_XDECREF(names);
    return capsule;
}

static int from_capsule(PyObject *object, const char *op, const char *label, ss_tensor *out,
                        PyObject *keep) {
    PyObject *capsule = ask_for_capsule(object);
    if (!capsule) {
        return -1;
    }
    int status = -1;
    if (PyCapsule_IsValid(capsule, "dltensor_versioned")) {
        ss_dl_managed_versioned *m = PyCapsule_GetPointer(capsule, "dltensor_versioned");
        if (PyCapsule_SetName(capsule, "used_dltensor_versioned") == 0 &&
            keep_alive(keep, m, "semisam_versioned", release_versioned) == 0) {
            status = from_dlpack(&m->tensor, object, op, label, out);
            out->read_only = (m->flags & SS_DLPACK_READ_ONLY) != 0;
        }
    } else if (PyCapsule_IsValid(capsule, "dltensor")) {
        ss_dl_managed *m = PyCapsule_GetPointer(capsule, "dltensor");
        if (PyCapsule_SetName(capsule, "used_dltensor") == 0 &&
            keep_alive(keep, m, "semisam_managed", release_managed) == 0) {
            status = from_dlpack(&m->tensor, object, op, label, out);
        }
    } else {
        PyErr_Format(PyExc_TypeError, "%s(): %s: __dlpack__() returned no DLPack capsule", op,
                     label);
    }
    Py_DECREF(capsule);
    return status;
}

int ss_py_tensor(PyObject *object, const char *op, const char *label, ss_tensor *out,
                 PyObject *keep) {
    memset(out, 0, sizeof *out);
    if (PyArray_Check(object)) {
        return from_numpy((PyArrayObject *)object, op, label, out);
    }
    const ss_dl_exchange *api = exchange_of((PyObject *)Py_TYPE(object));
    if (api && api->tensor_from_py) {
        ss_dl_tensor t;
        memset(&t, 0, sizeof t);
        return api->tensor_from_py(object, &t) == 0 ? from_dlpack(&t, object, op, label, out) : -1;
    }
    if (PyObject_HasAttrString(object, "__dlpack__")) {
        return from_capsule(object, op, label, out, keep);
    }
    PyErr_Format(PyExc_TypeError, "%s(): %s: expected a NumPy array or a torch tensor, got %S", op,
                 label, (PyObject *)Py_TYPE(object));
    return -1;
}

int ss_py_tells_stream(PyObject *type) {
    const ss_dl_exchange *api = exchange_of(type);
    return api && api->current_stream;
}

int ss_py_stream(PyObject *object, const ss_tensor *t, void **stream) {
    const ss_dl_exchange *api = exchange_of((PyObject *)Py_TYPE(object));
    *stream = NULL;
    if (!api || !api->current_stream) {
        return 0; /* the legacy default stream: ops.py makes the current one wait for it */
    }
    return api->current_stream(t->device, t->device_index, stream) == 0 ? 0 : -1;
}
