/* SPDX-License-Identifier: Apache-2.0
 *
 * binding.h: what the four files of the Python binding share. Needs semisam.h only.
 */
#ifndef SS_BINDING_H
#define SS_BINDING_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#define NPY_NO_DEPRECATED_API NPY_2_0_API_VERSION
#define NPY_TARGET_VERSION NPY_2_0_API_VERSION
#define PY_ARRAY_UNIQUE_SYMBOL semisam_ARRAY_API
#ifndef SS_IMPORTS_NUMPY
#define NO_IMPORT_ARRAY
#endif
#include <numpy/arrayobject.h>

#include "../semisam.h"

/* Views `object`'s memory as a tensor. Returns 0, or -1 with an exception set that names `label`.
 * What keeps the memory alive beyond the object itself is appended to `keep` (a list). */
int ss_py_tensor(PyObject *object, const char *op, const char *label, ss_tensor *out,
                 PyObject *keep);

/* The stream on which the framework that owns `object` is working; NULL if it did not say. */
int ss_py_stream(PyObject *object, const ss_tensor *t, void **stream);
/* Whether arrays of a type say it, in a way that is known here. */
int ss_py_tells_stream(PyObject *type);

/* Converts arguments by the schema, checks, runs without the GIL; None or NULL with an exception.
 */
PyObject *ss_py_call(int32_t op, PyObject *const *args, Py_ssize_t n);

/* A new uint8 array, not initialised, whose memory is used again when it has died. */
PyObject *ss_py_block(Py_ssize_t bytes);

#endif
