/* latemax.ops._cpu: the native CPU kernels for Python, by the limited API of Python 3.10: one library for all later ones.
 *
 * Tensors come as addresses, shapes and strides: their owner has checked them and keeps them alive.
 */
#include "binding.h"

#include <new>

#include "cpu/maxsim_cpu.h"

namespace {

using latemax::Arguments;
using latemax::Level;

const Level *available[8];
int n_available = 0;

/* level, threads, then q and d: dtype, address, shape, strides. Own candidates have a 4-D d; flat tokens a 2-D one. */
const Level *common(Arguments &in, maxsim_args &a, int &threads, bool flat) {
    const int64_t level = in.integer();
    threads = static_cast<int>(in.integer());
    int64_t shape[4], strides[4];
    a.q_dtype = static_cast<maxsim_dtype>(in.integer());
    a.q = in.address<const void>();
    in.tuple(shape, 3), in.tuple(strides, 3);
    a.n_q = shape[0], a.l_q = shape[1], a.dim = shape[2];
    a.q_stride_n = strides[0], a.q_stride_l = strides[1], a.q_stride_k = strides[2];
    a.d_dtype = static_cast<maxsim_dtype>(in.integer());
    a.d = in.address<const void>();
    const int n = flat ? 2 : 4;
    in.tuple(shape, n), in.tuple(strides, n);
    a.l_d = shape[n - 2];
    a.d_stride_l = strides[n - 2], a.d_stride_k = strides[n - 1];
    if (!flat) a.n_c = shape[1], a.d_stride_q = strides[0], a.d_stride_n = strides[1];
    if (level >= 0 && level < n_available) return available[level];
    if (!PyErr_Occurred()) PyErr_Format(PyExc_ValueError, "level must be below %d; got %lld", n_available, (long long)level);
    return nullptr;
}

template <class Work>
PyObject *unlocked(Work work) {
    bool failed = false;
    Py_BEGIN_ALLOW_THREADS
    try {
        work();
    } catch (const std::bad_alloc &) {
        failed = true;
    }
    Py_END_ALLOW_THREADS
    if (failed) return PyErr_NoMemory();
    Py_RETURN_NONE;
}

PyObject *forward(PyObject *, PyObject *const *args, Py_ssize_t n) {
    Arguments in(args, n);
    maxsim_args a{};
    int threads;
    const Level *level = common(in, a, threads, false);
    int64_t strides[3];
    a.q_mask = in.address<const uint8_t>();
    in.tuple(strides, 2);
    a.q_mask_stride_n = strides[0], a.q_mask_stride_l = strides[1];
    a.d_mask = in.address<const uint8_t>();
    in.tuple(strides, 3);
    a.d_mask_stride_q = strides[0], a.d_mask_stride_n = strides[1], a.d_mask_stride_l = strides[2];
    a.scores = in.address<void>();
    a.argmax = in.address<int32_t>();
    a.normalize = static_cast<int32_t>(in.integer());
    a.empty_score = in.real();
    if (!level || !in.ok()) return nullptr;
    return unlocked([&] { latemax::forward(a, *level, threads); });
}

/* Flat tokens with offsets, and where asked for candidates of every query. */
PyObject *forward_packed(PyObject *, PyObject *const *args, Py_ssize_t n) {
    Arguments in(args, n);
    maxsim_args a{};
    int threads;
    const Level *level = common(in, a, threads, true);
    a.q_mask = in.address<const uint8_t>();
    int64_t strides[2];
    in.tuple(strides, 2);
    a.q_mask_stride_n = strides[0], a.q_mask_stride_l = strides[1];
    a.d_offsets = in.address<const int64_t>();
    a.n_documents = in.integer();
    a.candidates = in.address<const int64_t>();
    a.n_c = in.integer();
    a.scores = in.address<void>();
    a.argmax = in.address<int32_t>();
    a.normalize = static_cast<int32_t>(in.integer());
    a.empty_score = in.real();
    if (!level || !in.ok()) return nullptr;
    for (int64_t i = 0; i < a.n_documents; ++i)
        if (a.d_offsets[i] < 0 || a.d_offsets[i] > a.d_offsets[i + 1] || a.d_offsets[i + 1] > a.l_d)
            return PyErr_Format(PyExc_ValueError, "offsets must rise from 0 to at most %lld; got %lld, %lld at %lld",
                                (long long)a.l_d, (long long)a.d_offsets[i], (long long)a.d_offsets[i + 1], (long long)i);
    for (int64_t i = 0; a.candidates && i < a.n_q * a.n_c; ++i)
        if (a.candidates[i] < -1 || a.candidates[i] >= a.n_documents)
            return PyErr_Format(PyExc_ValueError, "candidates must be -1 or below %lld; got %lld",
                                (long long)a.n_documents, (long long)a.candidates[i]);
    return unlocked([&] { latemax::forward(a, *level, threads); });
}

PyObject *backward(PyObject *, PyObject *const *args, Py_ssize_t n) {
    Arguments in(args, n);
    maxsim_args a{};
    int threads;
    const Level *level = common(in, a, threads, false);
    latemax::Gradients out{};
    a.argmax = in.address<int32_t>();
    out.g = in.address<const float>();
    int64_t strides[2];
    in.tuple(strides, 2);
    out.g_stride_q = strides[0], out.g_stride_c = strides[1];
    out.own = in.integer() != 0;
    out.grad_q = in.address<void>();
    out.grad_d = in.address<void>();
    a.normalize = static_cast<int32_t>(in.integer());
    if (!level || !in.ok()) return nullptr;
    return unlocked([&] { latemax::backward(a, out, *level, threads); });
}

PyObject *levels(PyObject *, PyObject *) {
    PyObject *names = PyTuple_New(n_available);
    for (int i = 0; names && i < n_available; ++i)
        PyTuple_SetItem(names, i, PyUnicode_FromString(available[i]->name));
    return names;
}

PyMethodDef methods[] = {
    {"forward", reinterpret_cast<PyCFunction>(reinterpret_cast<void *>(forward)), METH_FASTCALL, nullptr},
    {"forward_packed", reinterpret_cast<PyCFunction>(reinterpret_cast<void *>(forward_packed)), METH_FASTCALL, nullptr},
    {"backward", reinterpret_cast<PyCFunction>(reinterpret_cast<void *>(backward)), METH_FASTCALL, nullptr},
    {"levels", levels, METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cpu", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__cpu() {
    n_available = latemax::levels(available);
    return PyModule_Create(&module);
}
