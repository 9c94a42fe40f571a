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
    /* A shape or strides of at most n axes, 0s in front of it; returns how many it has: 0 for None. */
    Py_ssize_t tuple(int64_t *out, Py_ssize_t n) {
        PyObject *x = take();
        for (Py_ssize_t i = 0; i < n; ++i) out[i] = 0;
        if (!x || x == Py_None) return 0;
        const Py_ssize_t has = PyTuple_Check(x) ? PyTuple_Size(x) : n + 1;
        if (has > n) {
            PyErr_Format(PyExc_TypeError, "expected a tuple of at most %zd", n);
            failed_ = true;
            return 0;
        }
        for (Py_ssize_t i = 0; i < has; ++i) {
            int64_t &value = out[n - has + i];
            value = PyLong_AsLongLong(PyTuple_GetItem(x, i));
            failed_ |= value == -1 && PyErr_Occurred();
        }
        return has;
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
