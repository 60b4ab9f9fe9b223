/* SPDX-License-Identifier: Apache-2.0
 *
 * module.c: the extension module semisam._core (PEP 489). One function per line of ops.def, a few
 * that tell about the build, and the memory of large outputs, which is the module's only state.
 */
#define SS_IMPORTS_NUMPY
#include "binding.h"

#include <string.h>

#if defined(_WIN32)
#define SS_HAS_DLOPEN 0
#else
#define SS_HAS_DLOPEN 1
#include <dlfcn.h>
#endif

/* ops.def line -> Python function. */
#define SS_OP(op, doc, args)                                                                       \
    static PyObject *py_##op(PyObject *module, PyObject *const *argv, Py_ssize_t n) {              \
        (void)module;                                                                              \
        return ss_py_call(SS_OP_##op, argv, n);                                                    \
    }
#include "../ops.def"

static PyObject *schema_of(const ss_op_spec *op) {
    static const char *const kinds[] = {"in", "opt", "list", "out", "int", "dbl", "dbls"};
    PyObject *args = PyTuple_New(op->n_args);
    for (int32_t i = 0; args && i < op->n_args; ++i) {
        const ss_arg_spec *a = &op->args[i];
        PyObject *arg =
            Py_BuildValue("(ssssdd)", a->name, kinds[a->kind], a->dtype, a->shape, a->lo, a->hi);
        if (!arg || PyTuple_SetItem(args, i, arg) < 0) {
            Py_DECREF(args);
            return NULL;
        }
    }
    return args ? Py_BuildValue("(ssN)", op->name, op->doc, args) : NULL;
}

static PyObject *schema(PyObject *module, PyObject *none) {
    (void)module;
    (void)none;
    PyObject *all = PyTuple_New(SS_OPS);
    for (int32_t i = 0; all && i < SS_OPS; ++i) {
        PyObject *op = schema_of(&ss_op_specs()[i]);
        if (!op || PyTuple_SetItem(all, i, op) < 0) {
            Py_DECREF(all);
            return NULL;
        }
    }
    return all;
}

static PyObject *build_info(PyObject *module, PyObject *none) {
    (void)module;
    (void)none;
    int32_t n = 0;
    const ss_backend *const *cpu = ss_cpu_backends(&n);
    PyObject *isas = PyTuple_New(n);
    for (int32_t i = 0; isas && i < n; ++i) {
        PyObject *name = PyUnicode_FromString(cpu[i]->isa);
        if (!name || PyTuple_SetItem(isas, i, name) < 0) {
            Py_DECREF(isas);
            return NULL;
        }
    }
    if (!isas) {
        return NULL;
    }
    return Py_BuildValue("{s:s,s:i,s:s,s:i,s:N}", "version", ss_version(), "abi", SS_ABI,
                         "compiler", __VERSION__, "cpu_count", (int)ss_cpu_count(), "isa", isas);
}

/* What a library with a backend exports: its table, or NULL and a sentence that says why not. */
typedef const ss_backend *(*backend_entry)(int32_t abi, char *error, int64_t room);

#if SS_HAS_DLOPEN
static const ss_backend *open_backend(const char *path, char *error, size_t room) {
    /* Local and never closed: nothing leaks into the process, and its functions stay. */
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        const char *why = dlerror();
        PyOS_snprintf(error, room, "cannot be loaded: %s", why ? why : "no reason given");
        return NULL;
    }
    backend_entry entry = NULL;
    void *symbol = dlsym(library, "semisam_cuda");
    memcpy(&entry, &symbol, sizeof entry); /* ISO C has no cast from object to function */
    if (!entry) {
        PyOS_snprintf(error, room, "is not a backend of semisam: it exports no semisam_cuda");
        return NULL;
    }
    return entry(SS_ABI, error, (int64_t)room);
}
#else
static const ss_backend *open_backend(const char *path, char *error, size_t room) {
    (void)path;
    PyOS_snprintf(error, room, "this system has no dlopen");
    return NULL;
}
#endif

static PyObject *load_backend(PyObject *module, PyObject *path) {
    (void)module;
    PyObject *bytes = NULL;
    if (!PyUnicode_FSConverter(path, &bytes)) {
        return NULL;
    }
    char error[512] = "gave no reason";
    const ss_backend *backend = open_backend(PyBytes_AsString(bytes), error, sizeof error);
    if (!backend || ss_add_backend(backend, error, sizeof error) != SS_OK) {
        PyErr_Format(PyExc_ImportError, "%s(): %S: %s", "load_backend", path, error);
        Py_DECREF(bytes);
        return NULL;
    }
    Py_DECREF(bytes);
    return Py_NewRef(Py_None);
}

static PyObject *tells_stream(PyObject *module, PyObject *type) {
    (void)module;
    return PyBool_FromLong(ss_py_tells_stream(type));
}

static PyObject *operators_of(const ss_backend *backend) {
    PyObject *names = PyList_New(0);
    for (int32_t op = 0; names && op < SS_OPS; ++op) {
        PyObject *name = ss_has(backend, op) ? PyUnicode_FromString(ss_op_specs()[op].name) : NULL;
        if ((name && PyList_Append(names, name) < 0) || PyErr_Occurred()) {
            Py_CLEAR(names);
        }
        Py_XDECREF(name);
    }
    return names;
}

static PyObject *backends(PyObject *module, PyObject *none) {
    (void)module;
    (void)none;
    int32_t n = 0;
    const ss_backend *all[] = {ss_cpu_backends(&n)[0], ss_added_backend(SS_CPU),
                               ss_added_backend(SS_CUDA)};
    PyObject *found = PyDict_New();
    for (size_t i = 0; found && i < sizeof all / sizeof all[0]; ++i) {
        PyObject *names = all[i] ? operators_of(all[i]) : NULL;
        if ((names && PyDict_SetItemString(found, all[i]->name, names) < 0) || PyErr_Occurred()) {
            Py_CLEAR(found);
        }
        Py_XDECREF(names);
    }
    return found;
}

/* A number of bytes, or -1 with an exception. */
static Py_ssize_t bytes_of(PyObject *object, const char *function) {
    Py_ssize_t n = PyNumber_AsSsize_t(object, PyExc_OverflowError);
    if (n < 0 && !PyErr_Occurred()) {
        PyErr_Format(PyExc_ValueError, "%s(): bytes: expected 0 or more, got %zd", function, n);
    }
    return n;
}

static PyObject *empty(PyObject *module, PyObject *object) {
    (void)module;
    Py_ssize_t n = bytes_of(object, "empty");
    return n < 0 ? NULL : ss_py_block(n);
}

static PyObject *keep_at_most(PyObject *module, PyObject *object) {
    (void)module;
    Py_ssize_t n = bytes_of(object, "keep_at_most");
    if (n < 0) {
        return NULL;
    }
    ss_keep_at_most((size_t)n);
    return Py_NewRef(Py_None);
}

static PyObject *kept(PyObject *module, PyObject *none) {
    (void)module;
    (void)none;
    return PyLong_FromSize_t(ss_kept());
}

/* A cast through void(*)(void) is how CPython's own modules store fast-call functions. */
#define SS_METHOD(f) ((PyCFunction)(void (*)(void))(f))

static PyMethodDef methods[] = {
#define SS_OP(op, doc, args) {#op, SS_METHOD(py_##op), METH_FASTCALL, #op "(*args, /)\n--\n\n" doc},
#include "../ops.def"
    {"schema", schema, METH_NOARGS, "schema()\n--\n\nWhat ops.def says, as nested tuples."},
    {"build_info", build_info, METH_NOARGS, "build_info()\n--\n\nHow the core was built."},
    {"load_backend", load_backend, METH_O,
     "load_backend(path, /)\n--\n\nLoad a library with a backend; ImportError says why not."},
    {"backends", backends, METH_NOARGS,
     "backends()\n--\n\nNames of the backends in this process, each with its operators."},
    {"tells_stream", tells_stream, METH_O,
     "tells_stream(type, /)\n--\n\nWhether arrays of a type tell the core their current stream."},
    {"empty", empty, METH_O,
     "empty(bytes, /)\n--\n\nA new uint8 array; its memory is used again when it has died."},
    {"keep_at_most", keep_at_most, METH_O,
     "keep_at_most(bytes, /)\n--\n\nThe bound on memory that waits for the next call."},
    {"kept", kept, METH_NOARGS, "kept()\n--\n\nBytes of memory that wait for the next call."},
    {NULL, NULL, 0, NULL},
};

static int exec_module(PyObject *module) {
    (void)module;
    return PyArray_ImportNumPyAPI();
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, exec_module},
#ifdef Py_mod_multiple_interpreters
    {Py_mod_multiple_interpreters, Py_MOD_MULTIPLE_INTERPRETERS_NOT_SUPPORTED}, /* as NumPy */
#endif
#if PY_VERSION_HEX >= 0x030D0000
    {Py_mod_gil, Py_MOD_GIL_NOT_USED}, /* memory.c is atomic */
#endif
    {0, NULL},
};

static PyModuleDef definition = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "semisam._core",
    .m_doc = "The C core of semisam: one function per operator, on arrays that the caller owns.",
    .m_size = 0,
    .m_methods = methods,
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__core(void) {
    return PyModuleDef_Init(&definition);
}
