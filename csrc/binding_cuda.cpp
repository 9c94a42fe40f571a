/* latemax.ops._cuda: the CUDA kernels for Python, built on the limited API of Python 3.10, so that one library serves every
 * later version.
 *
 * Tensors are passed as device addresses, shapes and strides, the stream as its handle. No torch header is needed, so one
 * build serves every torch, including one without CUDA.
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

/* device, stream, capability, scratch memory, the call, codes */
PyObject *forward(PyObject *, PyObject *const *args, Py_ssize_t n) {
    Arguments in(args, n);
    const int device = static_cast<int>(in.integer());
    void *stream = in.address<void>();
    const int capability = static_cast<int>(in.integer());
    void *scratch = in.address<void>();
    maxsim_args a = latemax::read_call(in);
    latemax::read_codes(in, a);
    if (!in.ok() || !unlocked([&] { latemax::forward(a, scratch, device, stream, capability); })) return nullptr;
    Py_RETURN_NONE;
}

/* device, stream, the call, gradient of the scores, its strides, pairs, pair_starts, grad_q, grad_d, parts */
PyObject *backward(PyObject *, PyObject *const *args, Py_ssize_t n) {
    Arguments in(args, n);
    const int device = static_cast<int>(in.integer());
    void *stream = in.address<void>();
    const maxsim_args a = latemax::read_call(in);
    latemax::Gradient g{};
    g.scores = in.address<const float>();
    int64_t strides[2];
    in.tuple(strides, 2), g.stride_q = strides[0], g.stride_c = strides[1];
    g.pairs = in.address<const int64_t>();
    g.pair_starts = in.address<const int64_t>();
    g.q = in.address<void>();
    g.d = in.address<void>();
    g.parts = in.address<float>();
    if (!in.ok() || !unlocked([&] { latemax::backward(a, g, device, stream); })) return nullptr;
    Py_RETURN_NONE;
}

/* (rows, n_c, device) */
PyObject *splits(PyObject *, PyObject *const *args, Py_ssize_t n) {
    Arguments in(args, n);
    const int64_t rows = in.integer(), n_c = in.integer();
    const int device = static_cast<int>(in.integer());
    int count = 0;
    if (!in.ok() || !unlocked([&] { count = latemax::splits(rows, n_c, device); })) return nullptr;
    return PyLong_FromLong(count);
}

/* (device, capability, the call, codes) -> bytes */
PyObject *scratch_bytes(PyObject *, PyObject *const *args, Py_ssize_t n) {
    Arguments in(args, n);
    const int device = static_cast<int>(in.integer()), capability = static_cast<int>(in.integer());
    maxsim_args a = latemax::read_call(in);
    latemax::read_codes(in, a);
    int64_t bytes = 0;
    if (!in.ok() || !unlocked([&] { bytes = latemax::scratch_bytes(a, device, capability); })) return nullptr;
    return PyLong_FromLongLong(bytes);
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
    {"backward", reinterpret_cast<PyCFunction>(reinterpret_cast<void *>(backward)), METH_FASTCALL, nullptr},
    {"splits", reinterpret_cast<PyCFunction>(reinterpret_cast<void *>(splits)), METH_FASTCALL, nullptr},
    {"versions", reinterpret_cast<PyCFunction>(reinterpret_cast<void *>(versions)), METH_FASTCALL, nullptr},
    {"scratch_bytes", reinterpret_cast<PyCFunction>(reinterpret_cast<void *>(scratch_bytes)), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cuda", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__cuda() { return PyModule_Create(&module); }
