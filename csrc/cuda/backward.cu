/* The gradient from the recorded argmax: instances, launches. */
#include "grad_d.h"
#include "grad_q.h"
#include "runtime.h"

namespace latemax {

namespace {

/* The kernels for one dtype and one number of elements in each lane. */
template <class T, int C>
struct Kernels {
    static void prepare_all(int shared) {
        prepare(grad_d<T, C>, shared);
        prepare(grad_q<T, C>, shared);
        prepare(sum_splits<T, C>, shared);
    }
    static void run(const Backward &b, Stream stream) {
        const int64_t rows = b.a.n_q * b.a.q.l;
        if (b.g.d) launch(grad_d<T, C>, checked(b.owners.blocks), OWNER_THREADS, b.owners.shared, stream, b);
        if (!b.g.q) return;
        const int64_t blocks = ceil_div(rows, GATHER_WARPS);
        launch(grad_q<T, C>, checked(blocks * b.splits), GATHER_THREADS, 0, stream, b);
        if (b.splits > 1) launch(sum_splits<T, C>, checked(blocks), GATHER_THREADS, 0, stream, b);
    }
    static int checked(int64_t blocks) {
        if (blocks > 0x7fffffff) throw std::runtime_error("a gradient of more than 2^31 thread blocks");
        return static_cast<int>(blocks);
    }
};

/* Calls `run` with dtype and elements in each lane as types: with every combination, or with the call's. */
template <class Run>
void with_all_kernels(const Run &run) {
    run(Kernels<F16, 4>{}), run(Kernels<F16, 8>{}), run(Kernels<F16, 16>{}), run(Kernels<F16, 32>{});
    run(Kernels<BF16, 4>{}), run(Kernels<BF16, 8>{}), run(Kernels<BF16, 16>{}), run(Kernels<BF16, 32>{});
}
template <class T, class Run>
void with_dim(int64_t dim, const Run &run) {
    if (dim <= 128) run(Kernels<T, 4>{});
    else if (dim <= 256) run(Kernels<T, 8>{});
    else if (dim <= 512) run(Kernels<T, 16>{});
    else run(Kernels<T, 32>{});
}

/* Rows are numbered in units of 8 elements, in 32 bits. */
void check_rows(const maxsim_side &side, int64_t queries) {
    const int64_t last = side.offsets ? side.total * side.stride_l
                                      : queries * side.stride_q + side.n * side.stride_n + side.l * side.stride_l;
    if (last / 8 >= 0xffffffff) throw std::runtime_error("a gradient from more than 68 GB of tokens");
}

}  // namespace

int splits(int64_t rows, int64_t n_c, int device) { return splits_of(rows, n_c, device_of(device).multiprocessors); }

void backward(const maxsim_args &a, const Gradient &g, int index, void *stream) {
    use(index);
    const Device &device = device_of(index);
    once_per_device(index, [&] { with_all_kernels([&](auto kernels) { kernels.prepare_all(device.shared_block); }); });
    const int64_t rows = a.n_q * a.q.l, documents = a.d.offsets ? a.d.total : a.d.l;
    if (!rows || !a.n_c || !documents) return;
    if (a.q.offsets) throw std::runtime_error("the gradient of ragged queries is not there");
    if (a.dim > MOST_GRADIENT_DIMS) throw std::runtime_error("a gradient of more than 1024 dims");
    check_rows(a.q, 0), check_rows(a.d, a.own ? a.n_q : 0);
    const Backward b{a, g, plan_owners(a, device.multiprocessors, device.shared_block),
                     splits_of(rows, a.n_c, device.multiprocessors)};
    const auto run = [&](auto kernels) { kernels.run(b, static_cast<Stream>(stream)); };
    if (a.q.dtype == MAXSIM_BF16) with_dim<BF16>(a.dim, run);
    else with_dim<F16>(a.dim, run);
}

}  // namespace latemax
