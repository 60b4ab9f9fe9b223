/* SPDX-License-Identifier: Apache-2.0
 *
 * blocks.c: arrays in memory that is used again when they have died (ss_block_new).
 */
#include "binding.h"

static const char name_of_owner[] = "semisam_block";

static void array_died(PyObject *owner) {
    ss_block_free(PyCapsule_GetPointer(owner, name_of_owner));
}

PyObject *ss_py_block(Py_ssize_t bytes) {
    void *data = ss_block_new((size_t)bytes);
    if (!data) {
        return PyErr_NoMemory();
    }
    PyObject *owner = PyCapsule_New(data, name_of_owner, array_died);
    if (!owner) {
        ss_block_free(data);
        return NULL;
    }
    npy_intp n = bytes;
    PyObject *array = PyArray_SimpleNewFromData(1, &n, NPY_UINT8, data);
    if (!array) {
        Py_DECREF(owner);
        return NULL;
    }
    if (PyArray_SetBaseObject((PyArrayObject *)array, owner) < 0) { /* has taken `owner` */
        Py_DECREF(array);
        return NULL;
    }
    return array;
}
