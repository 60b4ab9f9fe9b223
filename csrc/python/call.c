/* SPDX-License-Identifier: Apache-2.0
 *
 * call.c: one operator call, driven by the schema; and status -> exception.
 *
 * Python calls _core.<op>(*arguments in schema order, threads=0, isa=None, allocate=None,
 * faults=None), all positional. allocate(bytes) returns the workspace, an array of so many bytes,
 * and is called only if the operator needs one; faults is an int64 array with a counter per
 * operator.
 */
#include "binding.h"

#include <string.h>

#define MAX_SLOTS 4096 /* bytes of the largest argument struct */

typedef struct call {
    const ss_op_spec *op;
    PyObject *keep; /* list of what must outlive the call */
    PyObject *device_source;
    PyObject *allocate;
    ss_exec x;
    _Alignas(16) char slots[MAX_SLOTS];
} call;

static int bad_type(const call *c, const char *label, const char *expected, PyObject *got) {
    PyErr_Format(PyExc_TypeError, "%s(): %s: expected %s, got %S", c->op->name, label, expected,
                 (PyObject *)Py_TYPE(got));
    return -1;
}

static int put_tensor(call *c, const char *label, PyObject *object, ss_tensor *t) {
    if (ss_py_tensor(object, c->op->name, label, t, c->keep) < 0) {
        return -1;
    }
    if (!c->device_source) {
        c->device_source = object; /* the first tensor decides where to run */
        c->x.device = t->device;
        c->x.device_index = t->device_index;
        if (t->device != SS_CPU) {
            return ss_py_stream(object, t, &c->x.stream);
        }
    }
    return 0;
}

/* Memory for `count` views or numbers that lives as long as the call. */
static void *put_array(call *c, Py_ssize_t count, size_t size) {
    PyObject *bytes = PyByteArray_FromStringAndSize(NULL, (Py_ssize_t)(size * (size_t)count + 1));
    int failed = !bytes || PyList_Append(c->keep, bytes) < 0;
    Py_XDECREF(bytes);
    return failed ? NULL : PyByteArray_AsString(bytes);
}

static int put_list(call *c, const ss_arg_spec *spec, PyObject *object, ss_list *list) {
    if (!PyList_Check(object) && !PyTuple_Check(object)) {
        return bad_type(c, spec->name, "a list of arrays", object);
    }
    PyObject *items = PySequence_Tuple(object);
    if (!items) {
        return -1;
    }
    Py_ssize_t n = PyTuple_Size(items);
    int failed = PyList_Append(c->keep, items) < 0;
    Py_DECREF(items); /* `keep` has it */
    if (failed) {
        return -1;
    }
    if (n > SS_MAX_LIST) {
        PyErr_Format(PyExc_ValueError, "%s(): %s: expected at most %d arrays, got %zd", c->op->name,
                     spec->name, SS_MAX_LIST, n);
        return -1;
    }
    ss_tensor *at = put_array(c, n, sizeof(ss_tensor));
    if (!at) {
        return -1;
    }
    for (Py_ssize_t i = 0; i < n; ++i) {
        char label[96];
        PyOS_snprintf(label, sizeof label, "%s[%d]", spec->name, (int)i);
        if (put_tensor(c, label, PyTuple_GetItem(items, i), &at[i]) < 0) {
            return -1;
        }
    }
    list->at = at;
    list->n = n;
    return 0;
}

static int put_doubles(call *c, const ss_arg_spec *spec, PyObject *object, ss_doubles *out) {
    PyObject *items = PySequence_Tuple(object);
    if (!items) {
        PyErr_Clear();
        return bad_type(c, spec->name, "a list of numbers", object);
    }
    Py_ssize_t n = PyTuple_Size(items);
    double *at = put_array(c, n, sizeof(double));
    int failed = !at;
    for (Py_ssize_t i = 0; !failed && i < n; ++i) {
        at[i] = PyFloat_AsDouble(PyTuple_GetItem(items, i));
        failed = at[i] == -1.0 && PyErr_Occurred();
    }
    Py_DECREF(items);
    if (failed) {
        if (PyErr_ExceptionMatches(PyExc_TypeError)) {
            PyErr_Clear();
            return bad_type(c, spec->name, "a list of numbers", object);
        }
        return -1;
    }
    out->at = at;
    out->n = n;
    return 0;
}

static int put_int(call *c, const ss_arg_spec *spec, PyObject *object, int64_t *out) {
    PyObject *index = PyNumber_Index(object);
    if (!index) {
        PyErr_Clear();
        return bad_type(c, spec->name, "an integer", object);
    }
    long long v = PyLong_AsLongLong(index);
    Py_DECREF(index);
    if (v == -1 && PyErr_Occurred()) {
        PyErr_Clear();
        PyErr_Format(PyExc_ValueError, "%s(): %s: expected an integer of 64 bits, got %S",
                     c->op->name, spec->name, object);
        return -1;
    }
    *out = v;
    return 0;
}

static int put_slot(call *c, const ss_arg_spec *spec, PyObject *object, char *p) {
    void *slot = p;
    switch (spec->kind) {
    case SS_KIND_LIST:
        return put_list(c, spec, object, slot);
    case SS_KIND_DBLS:
        return put_doubles(c, spec, object, slot);
    case SS_KIND_INT:
        return put_int(c, spec, object, slot);
    case SS_KIND_DBL: {
        double v = PyFloat_AsDouble(object);
        if (v == -1.0 && PyErr_Occurred()) {
            PyErr_Clear();
            return bad_type(c, spec->name, "a number", object);
        }
        memcpy(slot, &v, sizeof v);
        return 0;
    }
    case SS_KIND_OPT:
        if (object == Py_None) {
            return 0; /* slots start as zeros: not given */
        }
        return put_tensor(c, spec->name, object, slot);
    default:
        return put_tensor(c, spec->name, object, slot);
    }
}

static int put_isa(call *c, PyObject *object) {
    PyObject *bytes = PyUnicode_Check(object) ? PyUnicode_AsUTF8String(object) : NULL;
    if (!bytes) {
        PyErr_Clear();
        return bad_type(c, "isa", "a name such as v3", object);
    }
    int failed = PyList_Append(c->keep, bytes) < 0;
    Py_DECREF(bytes);
    if (failed) {
        return -1;
    }
    c->x.isa = PyBytes_AsString(bytes);
    return 0;
}

/* Memory for the kernels' own use, checked: writable, on the call's device, without gaps. */
static int put_memory(call *c, const char *label, PyObject *object, ss_tensor *t) {
    if (ss_py_tensor(object, c->op->name, label, t, c->keep) < 0) {
        return -1;
    }
    int64_t stride = 1;
    int gaps = 0;
    for (int32_t d = t->ndim - 1; d >= 0; --d) {
        gaps |= t->shape[d] != 1 && t->stride[d] != stride;
        stride *= t->shape[d];
    }
    if (gaps || t->read_only || t->device != c->x.device || t->device_index != c->x.device_index) {
        PyErr_Format(PyExc_ValueError,
                     "%s(): %s: expected a writable contiguous array on the call's device",
                     c->op->name, label);
        return -1;
    }
    return 0;
}

static int put_faults(call *c, PyObject *object) {
    ss_tensor t;
    if (put_memory(c, "faults", object, &t) < 0) {
        return -1;
    }
    if (t.dtype != SS_I64 || ss_count(&t) != SS_OPS) {
        PyErr_Format(PyExc_ValueError, "%s(): faults: expected %d numbers of dtype i64",
                     c->op->name, (int)SS_OPS);
        return -1;
    }
    c->x.faults = t.data;
    return 0;
}

/* What may follow the schema's own arguments; the head of this file says what. */
static int put_options(call *c, PyObject *const *args, Py_ssize_t n) {
    static const ss_arg_spec spec = {.name = "threads", .kind = SS_KIND_INT};
    if (n > 0) {
        int64_t threads = 0;
        if (put_int(c, &spec, args[0], &threads) < 0) {
            return -1;
        }
        if (threads < -SS_MAX_THREADS || threads > SS_MAX_THREADS) {
            PyErr_Format(PyExc_ValueError,
                         "%s(): threads: expected 0 (automatic) to %d, or as many below 0 (at "
                         "once), got %lld",
                         c->op->name, SS_MAX_THREADS, (long long)threads);
            return -1;
        }
        c->x.threads = (int32_t)threads;
    }
    if (n > 1 && args[1] != Py_None && put_isa(c, args[1]) < 0) {
        return -1;
    }
    if (n > 2 && args[2] != Py_None) {
        c->allocate = args[2];
    }
    return n > 3 && args[3] != Py_None ? put_faults(c, args[3]) : 0;
}

static PyObject *raise_status(ss_status status, const char *text) {
    PyObject *type = status == SS_INVALID       ? PyExc_ValueError
                     : status == SS_WRONG_TYPE  ? PyExc_TypeError
                     : status == SS_NO_MEMORY   ? PyExc_MemoryError
                     : status == SS_UNSUPPORTED ? PyExc_NotImplementedError
                                                : PyExc_RuntimeError;
    PyErr_SetString(type, text);
    return NULL;
}

/* Asks the caller for the workspace that the operator needs. */
static int put_workspace(call *c, int32_t op) {
    int64_t bytes = 0;
    ss_status status = ss_workspace(&c->x, op, c->slots, &bytes);
    if (status != SS_OK) {
        raise_status(status, c->x.error);
        return -1;
    }
    if (bytes <= 0) {
        return 0; /* ss_run tells about a negative size */
    }
    PyObject *array = PyObject_CallFunction(c->allocate, "L", (long long)bytes);
    int failed = !array || PyList_Append(c->keep, array) < 0;
    Py_XDECREF(array); /* `keep` has it */
    ss_tensor t;
    if (failed || put_memory(c, "workspace", array, &t) < 0) {
        return -1;
    }
    c->x.workspace = t.data;
    c->x.workspace_bytes = ss_count(&t) * (int64_t)ss_dtype_size(t.dtype);
    return 0;
}

static PyObject *run(call *c, int32_t op, PyObject *const *args, Py_ssize_t n) {
    const int32_t n_args = c->op->n_args;
    if (n < n_args || n > n_args + 4) {
        PyErr_Format(PyExc_TypeError,
                     "%s(): expected %d arguments (and threads, isa, allocate, faults), got %zd",
                     c->op->name, (int)n_args, n);
        return NULL;
    }
    char *p = c->slots;
    for (int32_t i = 0; i < n_args; ++i) {
        if (put_slot(c, &c->op->args[i], args[i], p) < 0) {
            return NULL;
        }
        p += ss_kind_size(c->op->args[i].kind);
    }
    if (put_options(c, args + n_args, n - n_args) < 0) {
        return NULL;
    }
    if (c->allocate && put_workspace(c, op) < 0) {
        return NULL;
    }
    ss_status status;
    Py_BEGIN_ALLOW_THREADS status = ss_run(&c->x, op, c->slots);
    Py_END_ALLOW_THREADS if (status != SS_OK) {
        return raise_status(status, c->x.error);
    }
    return Py_NewRef(Py_None);
}

PyObject *ss_py_call(int32_t op, PyObject *const *args, Py_ssize_t n) {
    call c;
    memset(&c, 0, sizeof c);
    c.op = &ss_op_specs()[op];
    c.x.device = SS_CPU;
    if (c.op->size > MAX_SLOTS) {
        PyErr_Format(PyExc_SystemError, "%s(): argument struct too large", c.op->name);
        return NULL;
    }
    c.keep = PyList_New(0);
    if (!c.keep) {
        return NULL;
    }
    PyObject *result = run(&c, op, args, n);
    Py_DECREF(c.keep);
    return result;
}
