// ulab_kernels for CPython: run(program, table, first, count[, index[, base]]), as on a board.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "ul_core.h"
#include "ul_index.h"

static const char run_doc[] =
    "run(program, table, first, count[, index[, base]]) -> records done, or a negative UL_E_ code.\n\n"
    "program: bytes-like, a PROGRAM section, aligned to 4 bytes. table: 7 bytes-like objects (or None) in the order\n"
    "of UL_BUF_*; ARENA, TRAIN, STATE and SCRATCH must be writable. Without index, INPUT and TARGET hold one sample\n"
    "exactly; with it (from 0 on), they are arrays of samples of which the index-th is used. With base, FROZEN holds only\n"
    "what these records need of it, from that byte on; nobody checks that.";

static int writable(int buffer) {
    return buffer == UL_BUF_ARENA || buffer == UL_BUF_TRAIN || buffer == UL_BUF_STATE || buffer == UL_BUF_SCRATCH;
}

static PyObject *run(PyObject *self, PyObject *args) {
    (void)self;
    Py_buffer program, views[UL_BUFFERS];
    PyObject *sequence;
    unsigned int first, count;
    int index = -1;
    Py_ssize_t base = -1;
    if (!PyArg_ParseTuple(args, "y*OII|in", &program, &sequence, &first, &count, &index, &base)) {
        return NULL;
    }
    PyObject *result = NULL;
    int opened = 0;
    PyObject *const items = PySequence_Fast(sequence, "run: the table is not a list");
    if (items == NULL) {
        goto done;
    }
    if (PySequence_Fast_GET_SIZE(items) != UL_BUFFERS) {
        PyErr_Format(PyExc_ValueError, "run: the table has %zd buffers, expected %d", PySequence_Fast_GET_SIZE(items),
            UL_BUFFERS);
        goto done;
    }
    ul_buffer table[UL_BUFFERS];
    for (int b = 0; b < UL_BUFFERS; b++) {
        PyObject *const item = PySequence_Fast_GET_ITEM(items, b);
        views[b].obj = NULL;
        table[b] = (ul_buffer){NULL, 0, 0, 0};
        if (item != Py_None) {
            if (PyObject_GetBuffer(item, &views[b], writable(b) ? PyBUF_WRITABLE : PyBUF_SIMPLE) < 0) {
                goto done;
            }
            table[b] = (ul_buffer){views[b].buf, (size_t)views[b].len, 0, 0};
        }
        opened++;
    }
    if (base >= 0) {
        table[UL_BUF_FROZEN].base = (size_t)base;
        table[UL_BUF_FROZEN].is_part = 1;
    }
    int32_t code = ul_index(program.buf, (size_t)program.len, table, index);
    if (code == 0) {
        code = ul_run(program.buf, (size_t)program.len, table, first, count);
    }
    result = PyLong_FromLong(code);
done:
    for (int b = 0; b < opened; b++) {
        if (views[b].obj) {
            PyBuffer_Release(&views[b]);
        }
    }
    Py_XDECREF(items);
    PyBuffer_Release(&program);
    return result;
}

static PyMethodDef methods[] = {{"run", run, METH_VARARGS, run_doc}, {NULL, NULL, 0, NULL}};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "ulab_kernels", "Integer kernels of ulearn.", -1, methods,
    NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit_ulab_kernels(void);
PyMODINIT_FUNC PyInit_ulab_kernels(void) {
    return PyModule_Create(&module);
}
