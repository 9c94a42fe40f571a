/* Reads the positional arguments of an abi3 module's function (limited API of Python 3.10), and the arguments of a MaxSim
 * call, which both bindings share. The Python side is latemax/ops/backends/pointers.py. */
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdint.h>

#include "maxsim.h"

namespace latemax {

template <class T>
T *pointer(int64_t address) {
    return reinterpret_cast<T *>(static_cast<uintptr_t>(address));
}

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
        return pointer<T>(integer());
    }
    /* A shape or strides of at most n axes, right-aligned in `out` after zeros; returns the number of axes, 0 for None. */
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
    bool more() const { return next_ != end_; }
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

/* dtype, address, shape, strides, ragged items, mask, strides of the mask. Ragged items: None, or their offsets, their
 * number, and the table of separate items or 0. A side of two axes without them is one item. */
inline void read_side(Arguments &in, maxsim_side &side, int64_t *dim) {
    int64_t x[4];
    side.dtype = static_cast<maxsim_dtype>(in.integer());
    side.tokens = in.address<const void>();
    const Py_ssize_t axes = in.tuple(x, 4);
    const int64_t queries = axes == 4 ? x[0] : 1, items = axes > 2 ? x[1] : 1;
    side.l = x[2], *dim = x[3];
    side.total = queries * items * x[2];
    in.tuple(x, 4);
    side.stride_q = x[0], side.stride_n = x[1], side.stride_l = x[2], side.stride_k = x[3];
    const bool ragged = in.tuple(x, 3);
    side.offsets = pointer<const int64_t>(x[0]);
    side.n = ragged ? x[1] : items;
    side.separate = pointer<const maxsim_item>(x[2]);
    side.mask = in.address<const uint8_t>();
    in.tuple(x, 3);
    side.mask_stride_q = x[0], side.mask_stride_n = x[1], side.mask_stride_l = x[2];
}

/* The sides q and d, candidates, query numbers, own, the shape of the scores, scores, argmax, normalize, empty_score,
 * weights, mean. */
inline maxsim_args read_call(Arguments &in) {
    maxsim_args a{};
    read_side(in, a.q, &a.dim);
    read_side(in, a.d, &a.dim);
    a.candidates = in.address<const int64_t>();
    int64_t x[2];
    /* None, or their address and the longest query */
    if (in.tuple(x, 2)) a.query_ids = pointer<const int64_t>(x[0]), a.q.l = x[1];
    a.own = static_cast<int32_t>(in.integer());
    int64_t shape[2];
    in.tuple(shape, 2), a.n_q = shape[0], a.n_c = shape[1];
    a.scores = in.address<float>();
    a.argmax = in.address<int32_t>();
    a.normalize = static_cast<int32_t>(in.integer());
    a.empty_score = in.real();
    a.weights = in.address<const float>();
    a.mean = static_cast<int32_t>(in.integer());
    return a;
}

/* Only where documents are codes: dim, scale and error of the queries or 0 and 0, of the documents, the upper bounds or 0,
 * coarse. */
inline void read_codes(Arguments &in, maxsim_args &a) {
    if (!in.more()) return;
    a.dim = in.integer();
    a.q.scale = in.address<const float>(), a.q.error = in.address<const float>();
    a.d.scale = in.address<const float>(), a.d.error = in.address<const float>();
    if (a.own && !a.d.offsets) a.d.scale_stride_q = a.d.n * a.d.l;
    a.upper = in.address<float>();
    a.coarse = static_cast<int32_t>(in.integer());
}

}  // namespace latemax
