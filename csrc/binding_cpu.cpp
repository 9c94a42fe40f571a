/* latemax.ops._cpu: the native CPU kernels for Python, built on the limited API of Python 3.10, so that one library serves
 * every later version.
 *
 * Tensors are passed as addresses, shapes and strides: the caller has checked them and keeps them alive.
 */
#include "binding.h"
#include "binding_items.h"

#include <new>

#include "cpu/maxsim_cpu.h"

namespace {

using latemax::Arguments;
using latemax::Level;

const Level *available[8];
int n_available = 0;

/* The instruction-set level and the number of threads that a call asks for. */
struct Target {
    const Level *level = nullptr;
    int threads = 1;
};

Target target(Arguments &in) {
    Target t;
    const int64_t level = in.integer();
    t.threads = static_cast<int>(in.integer());
    if (level >= 0 && level < n_available)
        t.level = available[level];
    else if (!PyErr_Occurred())
        PyErr_Format(PyExc_ValueError, "level must be below %d; got %lld", n_available, (long long)level);
    return t;
}

/* The first offset, or candidate, that would lead out of the tokens. */
struct Fault {
    const char *name = nullptr;
    bool is_offset = false;
    int64_t position = 0, limit = 0, before = 0, value = 0;
};

constexpr const char *QUERY_IDS = "query_ids";

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
    if (offsets_fail("cu_seqlens_q", a.q.offsets, a.q.n, a.q.total, fault)) return true;
    if (offsets_fail("cu_seqlens_d", a.d.offsets, a.d.n, a.d.total, fault)) return true;
    for (int64_t i = 0; a.query_ids && i < a.n_q; ++i) {
        if (a.query_ids[i] >= 0 && a.query_ids[i] < a.q.n) continue;
        fault = {QUERY_IDS, false, i, a.q.n, 0, a.query_ids[i]};
        return true;
    }
    for (int64_t i = 0; a.candidates && i < a.n_q * a.n_c; ++i) {
        if (a.candidates[i] >= -1 && a.candidates[i] < a.d.n) continue;
        fault = {"candidates", false, i, a.d.n, 0, a.candidates[i]};
        return true;
    }
    return false;
}

PyObject *raise(const maxsim_args &a, const Fault &f) {
    if (f.name == QUERY_IDS)
        return PyErr_Format(PyExc_ValueError, "query_ids must be below %lld queries; got %lld at [%lld]", (long long)f.limit,
                            (long long)f.value, (long long)f.position);
    if (!f.is_offset)
        return PyErr_Format(PyExc_ValueError, "candidates must be -1 or below %lld documents; got %lld at [%lld, %lld]",
                            (long long)f.limit, (long long)f.value, (long long)(f.position / a.n_c),
                            (long long)(f.position % a.n_c));
    if (!f.position) return PyErr_Format(PyExc_ValueError, "%s must start at 0; got %lld", f.name, (long long)f.value);
    return PyErr_Format(PyExc_ValueError,
                        "%s must never fall and end within the %lld tokens; got %lld after %lld at [%lld]", f.name,
                        (long long)f.limit, (long long)f.value, (long long)f.before, (long long)f.position);
}

/* Runs work without the interpreter's lock; false and a MemoryError if it needs more memory than there is. */
template <class Work>
bool unlocked(Work work) {
    bool no_memory = false;
    Py_BEGIN_ALLOW_THREADS
    try {
        work();
    } catch (const std::bad_alloc &) {
        no_memory = true;
    }
    Py_END_ALLOW_THREADS
    if (no_memory) PyErr_NoMemory();
    return !no_memory;
}

/* Offsets and candidates are checked before anything is written. */
template <class Work>
PyObject *checked(const maxsim_args &a, Work work) {
    Fault fault;
    const bool done = unlocked([&] {
        if (!values_fail(a, fault)) work();
    });
    if (!done) return nullptr;
    if (fault.name) return raise(a, fault);
    Py_RETURN_NONE;
}

/* level, threads, the call, codes */
PyObject *forward(PyObject *, PyObject *const *args, Py_ssize_t n) {
    Arguments in(args, n);
    const Target t = target(in);
    maxsim_args a = latemax::read_call(in);
    latemax::read_codes(in, a);
    if (!t.level || !in.ok()) return nullptr;
    return checked(a, [&] { latemax::forward(a, *t.level, t.threads); });
}

/* level, threads, the call (its argmax is read), g and its strides, grad_q, grad_d, grad_weights */
PyObject *backward(PyObject *, PyObject *const *args, Py_ssize_t n) {
    Arguments in(args, n);
    const Target t = target(in);
    const maxsim_args a = latemax::read_call(in);
    latemax::Gradients out{};
    out.g = in.address<const float>();
    int64_t strides[2];
    in.tuple(strides, 2);
    out.g_stride_q = strides[0], out.g_stride_c = strides[1];
    out.grad_q = in.address<void>();
    out.grad_d = in.address<void>();
    out.grad_weights = in.address<float>();
    if (!t.level || !in.ok()) return nullptr;
    return checked(a, [&] { latemax::backward(a, out, *t.level, t.threads); });
}

/* threads, bytes of a number, address, shape and strides of x, out */
PyObject *nonzero_rows(PyObject *, PyObject *const *args, Py_ssize_t n) {
    Arguments in(args, n);
    const int threads = static_cast<int>(in.integer());
    latemax::FloatRows x{};
    x.size = in.integer();
    x.rows = in.address<const char>();
    int64_t shape[3], strides[3];
    in.tuple(shape, 3), in.tuple(strides, 3);
    x.n = shape[0], x.l = shape[1], x.dim = shape[2], x.stride_n = strides[0], x.stride_l = strides[1];
    uint8_t *out = in.address<uint8_t>();
    bool all = true;
    if (!in.ok() || !unlocked([&] { all = latemax::nonzero_rows(x, out, threads); })) return nullptr;
    return PyBool_FromLong(all);
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
    {"nonzero_rows", reinterpret_cast<PyCFunction>(reinterpret_cast<void *>(nonzero_rows)), METH_FASTCALL, nullptr},
    {"levels", levels, METH_NOARGS, nullptr},
    {"read_items", reinterpret_cast<PyCFunction>(reinterpret_cast<void *>(latemax::read_items)), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cpu", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__cpu() {
    n_available = latemax::levels(available);
    return PyModule_Create(&module);
}
