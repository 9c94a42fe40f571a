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

struct Call {
    maxsim_args args{};
    const Level *level = nullptr;
    int threads = 1;
    bool own = false; /* d has an axis of queries, an expanded one included */
};

/* level, threads; dtype, address, shape and strides of q and of d; q offsets, d offsets, how many documents these have,
 * candidates, the shape [n_q, n_c] of the scores. Flat tokens have two axes. */
Call common(Arguments &in) {
    Call call;
    maxsim_args &a = call.args;
    const int64_t level = in.integer();
    call.threads = static_cast<int>(in.integer());
    int64_t shape[4], strides[4];
    a.q_dtype = static_cast<maxsim_dtype>(in.integer());
    a.q = in.address<const void>();
    in.tuple(shape, 3), in.tuple(strides, 3);
    a.l_q = shape[1], a.dim = shape[2];
    a.q_stride_n = strides[0], a.q_stride_l = strides[1], a.q_stride_k = strides[2];
    a.d_dtype = static_cast<maxsim_dtype>(in.integer());
    a.d = in.address<const void>();
    call.own = in.tuple(shape, 4) == 4;
    in.tuple(strides, 4);
    a.l_d = shape[2];
    a.d_stride_q = strides[0], a.d_stride_n = strides[1], a.d_stride_l = strides[2], a.d_stride_k = strides[3];
    a.q_offsets = in.address<const int64_t>();
    a.d_offsets = in.address<const int64_t>();
    a.n_documents = in.integer();
    a.candidates = in.address<const int64_t>();
    in.tuple(shape, 2);
    a.n_q = shape[0], a.n_c = shape[1];
    if (level >= 0 && level < n_available)
        call.level = available[level];
    else if (!PyErr_Occurred())
        PyErr_Format(PyExc_ValueError, "level must be below %d; got %lld", n_available, (long long)level);
    return call;
}

/* The first offset, or candidate, that would lead out of the tokens. */
struct Fault {
    const char *name = nullptr;
    bool is_offset = false;
    int64_t position = 0, limit = 0, before = 0, value = 0;
};

bool offsets_fail(const char *name, const int64_t *offsets, int64_t n, int64_t tokens, Fault &fault) {
    if (!offsets) return false;
    for (int64_t i = 0; i <= n; ++i) {
        const int64_t before = i ? offsets[i - 1] : 0;
        if (offsets[i] >= before && offsets[i] <= (i ? tokens : 0)) continue;
        fault = {name, true, i, tokens, before, offsets[i]};
        return true;
    }
    return false;
}

bool values_fail(const maxsim_args &a, Fault &fault) {
    if (offsets_fail("cu_seqlens_q", a.q_offsets, a.n_q, a.l_q, fault)) return true;
    if (offsets_fail("cu_seqlens_d", a.d_offsets, a.n_documents, a.l_d, fault)) return true;
    for (int64_t i = 0; a.candidates && i < a.n_q * a.n_c; ++i) {
        if (a.candidates[i] >= -1 && a.candidates[i] < a.n_documents) continue;
        fault = {"candidates", false, i, a.n_documents, 0, a.candidates[i]};
        return true;
    }
    return false;
}

PyObject *raise(const maxsim_args &a, const Fault &f) {
    if (!f.is_offset)
        return PyErr_Format(PyExc_ValueError, "candidates must be -1 or below %lld documents; got %lld at [%lld, %lld]",
                            (long long)f.limit, (long long)f.value, (long long)(f.position / a.n_c),
                            (long long)(f.position % a.n_c));
    if (!f.position) return PyErr_Format(PyExc_ValueError, "%s must start at 0; got %lld", f.name, (long long)f.value);
    return PyErr_Format(PyExc_ValueError,
                        "%s must never fall and end within the %lld tokens; got %lld after %lld at [%lld]", f.name,
                        (long long)f.limit, (long long)f.value, (long long)f.before, (long long)f.position);
}

/* Values are looked at before anything is written. */
template <class Work>
PyObject *unlocked(const maxsim_args &a, Work work) {
    bool no_memory = false;
    Fault fault;
    Py_BEGIN_ALLOW_THREADS
    try {
        if (!values_fail(a, fault)) work();
    } catch (const std::bad_alloc &) {
        no_memory = true;
    }
    Py_END_ALLOW_THREADS
    if (no_memory) return PyErr_NoMemory();
    if (fault.name) return raise(a, fault);
    Py_RETURN_NONE;
}

PyObject *forward(PyObject *, PyObject *const *args, Py_ssize_t n) {
    Arguments in(args, n);
    Call call = common(in);
    maxsim_args &a = call.args;
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
    if (!call.level || !in.ok()) return nullptr;
    return unlocked(a, [&] { latemax::forward(a, *call.level, call.threads); });
}

PyObject *backward(PyObject *, PyObject *const *args, Py_ssize_t n) {
    Arguments in(args, n);
    Call call = common(in);
    maxsim_args &a = call.args;
    latemax::Gradients out{};
    a.argmax = in.address<int32_t>();
    out.g = in.address<const float>();
    int64_t strides[2];
    in.tuple(strides, 2);
    out.g_stride_q = strides[0], out.g_stride_c = strides[1];
    out.own = call.own;
    out.grad_q = in.address<void>();
    out.grad_d = in.address<void>();
    a.normalize = static_cast<int32_t>(in.integer());
    if (!call.level || !in.ok()) return nullptr;
    return unlocked(a, [&] { latemax::backward(a, out, *call.level, call.threads); });
}

PyObject *levels(PyObject *, PyObject *) {
    PyObject *names = PyTuple_New(n_available);
    for (int i = 0; names && i < n_available; ++i)
        PyTuple_SetItem(names, i, PyUnicode_FromString(available[i]->name));
    return names;
}

PyMethodDef methods[] = {
    {"forward", reinterpret_cast<PyCFunction>(reinterpret_cast<void *>(forward)), METH_FASTCALL, nullptr},
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
