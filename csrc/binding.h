/* Arguments of a function of an abi3 module (limited API of Python 3.10), taken one after the other. */
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdint.h>

namespace latemax {

class Arguments {
  public:
    Arguments(PyObject *const *args, Py_ssize_t n) : next_(args), end_(args + n) {}

    int64_t integer() {
        PyObject *x = take();
        const int64_t value = x ? PyLong_AsLongLong(x) : 0;
        failed_ |= value == -1 && PyErr_Occurred();
        return value;
    }
    double real() {
        PyObject *x = take();
        const double value = x ? PyFloat_AsDouble(x) : 0;
        failed_ |= value == -1 && PyErr_Occurred();
        return value;
    }
    template <class T>
    T *address() {
        return reinterpret_cast<T *>(static_cast<uintptr_t>(integer()));
    }
    /* A shape or strides of n, or 0s for None. */
    void tuple(int64_t *out, Py_ssize_t n) {
        PyObject *x = take();
        for (Py_ssize_t i = 0; i < n; ++i) out[i] = 0;
        if (!x || x == Py_None) return;
        if (!PyTuple_Check(x) || PyTuple_Size(x) != n) {
            if (!failed_) PyErr_Format(PyExc_TypeError, "expected a tuple of %zd", n);
            failed_ = true;
            return;
        }
        for (Py_ssize_t i = 0; i < n; ++i) {
            out[i] = PyLong_AsLongLong(PyTuple_GetItem(x, i));
            failed_ |= out[i] == -1 && PyErr_Occurred();
        }
    }
    bool ok() {
        if (!failed_ && next_ != end_) {
            PyErr_SetString(PyExc_TypeError, "too many arguments");
            failed_ = true;
        }
        return !failed_;
    }

  private:
    PyObject *take() {
        if (next_ == end_ && !failed_) {
            PyErr_SetString(PyExc_TypeError, "too few arguments");
            failed_ = true;
        }
        return failed_ ? nullptr : *next_++;
    }
    PyObject *const *next_, *const *end_;
    bool failed_ = false;
};

}  // namespace latemax
