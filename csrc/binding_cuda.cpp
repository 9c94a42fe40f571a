/* latemax.ops._cuda: the CUDA kernels for Python, by the limited API of Python 3.10: one library for all later ones.
 *
 * Tensors come as device addresses, shapes and strides, the stream as its handle: no torch header is needed, so that one
 * build serves every torch, one without CUDA included.
 */
#include "binding.h"

#include <stdexcept>
#include <string>

#include "cuda/maxsim_cuda.h"

namespace {

using latemax::Arguments;

/* Runs without the GIL; what is thrown becomes a RuntimeError. */
template <class Work>
bool unlocked(Work work) {
    std::string failed;
    Py_BEGIN_ALLOW_THREADS
    try {
        work();
    } catch (const std::exception &error) {
        failed = *error.what() ? error.what() : "unknown error";
    }
    Py_END_ALLOW_THREADS
    if (failed.empty()) return true;
    PyErr_SetString(PyExc_RuntimeError, failed.c_str());
    return false;
}

/* (device, stream, capability, own,
 *  dtype, q, q shape, q strides, q offsets, q tokens,
 *  d, n_c, l_d, d strides, d offsets, d tokens, documents, candidates,
 *  q_mask, strides, d_mask, strides, lengths, q norms, d norms, partial, scores, argmax, normalize, empty_score) */
PyObject *forward(PyObject *, PyObject *const *args, Py_ssize_t n) {
    Arguments in(args, n);
    maxsim_args a{};
    int64_t x[4];
    const int device = static_cast<int>(in.integer());
    void *stream = in.address<void>();
    const int capability = static_cast<int>(in.integer());
    a.own = static_cast<int32_t>(in.integer());
    a.q_dtype = a.d_dtype = static_cast<maxsim_dtype>(in.integer());
    a.q = in.address<const void>();
    in.tuple(x, 3), a.n_q = x[0], a.l_q = x[1], a.dim = x[2];
    in.tuple(x, 3), a.q_stride_n = x[0], a.q_stride_l = x[1], a.q_stride_k = x[2];
    a.q_offsets = in.address<const int64_t>();
    a.q_tokens = in.integer();
    a.d = in.address<const void>();
    a.n_c = in.integer(), a.l_d = in.integer();
    in.tuple(x, 4), a.d_stride_q = x[0], a.d_stride_n = x[1], a.d_stride_l = x[2], a.d_stride_k = x[3];
    a.d_offsets = in.address<const int64_t>();
    a.d_tokens = in.integer();
    a.n_documents = in.integer();
    a.candidates = in.address<const int64_t>();
    a.q_mask = in.address<const uint8_t>();
    in.tuple(x, 2), a.q_mask_stride_n = x[0], a.q_mask_stride_l = x[1];
    a.d_mask = in.address<const uint8_t>();
    in.tuple(x, 3), a.d_mask_stride_q = x[0], a.d_mask_stride_n = x[1], a.d_mask_stride_l = x[2];
    a.d_lengths = in.address<int32_t>();
    a.q_inverse_norms = in.address<float>();
    a.d_inverse_norms = in.address<float>();
    a.partial = in.address<float>();
    a.scores = in.address<void>();
    a.argmax = in.address<int32_t>();
    a.normalize = static_cast<int32_t>(in.integer());
    a.empty_score = in.real();
    if (!in.ok() || !unlocked([&] { latemax::forward(a, device, stream, capability); })) return nullptr;
    Py_RETURN_NONE;
}

/* (l_q, device, capability) */
PyObject *parts(PyObject *, PyObject *const *args, Py_ssize_t n) {
    Arguments in(args, n);
    const int64_t l_q = in.integer();
    const int device = static_cast<int>(in.integer()), capability = static_cast<int>(in.integer());
    int count = 0;
    if (!in.ok() || !unlocked([&] { count = latemax::parts(l_q, device, capability); })) return nullptr;
    return PyLong_FromLong(count);
}

/* (device, capability) */
PyObject *load(PyObject *, PyObject *const *args, Py_ssize_t n) {
    Arguments in(args, n);
    const int device = static_cast<int>(in.integer()), capability = static_cast<int>(in.integer());
    if (!in.ok() || !unlocked([&] { latemax::load(device, capability); })) return nullptr;
    Py_RETURN_NONE;
}

/* (driver, runtime), see maxsim_cuda.h */
PyObject *versions(PyObject *, PyObject *const *args, Py_ssize_t n) {
    Arguments in(args, n);
    latemax::Versions found{};
    if (!in.ok() || !unlocked([&] { found = latemax::versions(); })) return nullptr;
    return Py_BuildValue("ii", found.driver, found.runtime);
}

PyMethodDef methods[] = {
    {"forward", reinterpret_cast<PyCFunction>(reinterpret_cast<void *>(forward)), METH_FASTCALL, nullptr},
    {"load", reinterpret_cast<PyCFunction>(reinterpret_cast<void *>(load)), METH_FASTCALL, nullptr},
    {"versions", reinterpret_cast<PyCFunction>(reinterpret_cast<void *>(versions)), METH_FASTCALL, nullptr},
    {"parts", reinterpret_cast<PyCFunction>(reinterpret_cast<void *>(parts)), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cuda", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__cuda() { return PyModule_Create(&module); }
