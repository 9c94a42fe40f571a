#include "sm90.h"

#include "launch.h"

namespace latemax {

namespace {

/* An axis that is expanded (stride 0) or has one entry is an axis of size 1 for the copy engine. */
TensorMap map_of(const maxsim_args &a, const void *base, uint64_t tokens, int64_t stride_l, uint64_t n, int64_t stride_n,
                 uint64_t m, int64_t stride_m, int rows) {
    const bool one_n = n <= 1 || stride_n == 0, one_m = m <= 1 || stride_m == 0;
    const uint64_t bytes = element_bytes(a), row = bytes * (tokens <= 1 ? a.dim : stride_l);
    // torch gives a tensor without elements the null address, which the encoder refuses; nothing is loaded from the other
    return tensor_map(a.q.dtype, base ? base : a.scores,
                      {static_cast<uint64_t>(a.dim), tokens ? tokens : 1, one_n ? 1 : n, one_m ? 1 : m},
                      {row, one_n ? row : bytes * stride_n, one_m ? row : bytes * stride_m}, rows);
}
TensorMap map_of_queries(const maxsim_args &a, int rows) {
    if (a.q.offsets) return map_of(a, a.q.tokens, a.q.total, a.q.stride_l, 1, 0, 1, 0, rows);
    return map_of(a, a.q.tokens, a.q.l, a.q.stride_l, a.n_q, a.q.stride_n, 1, 0, rows);
}
TensorMap map_of_documents(const maxsim_args &a, int rows) {
    if (a.d.offsets) return map_of(a, a.d.tokens, a.d.total, a.d.stride_l, 1, 0, 1, 0, rows);
    return map_of(a, a.d.tokens, a.d.l, a.d.stride_l, a.n_c, a.d.stride_n, a.own ? a.n_q : 1, a.d.stride_q, rows);
}

template <int BLOCKS, int STEPS>
struct Prepare90 {
    const Device &device;

    template <class T, bool ARGMAX>
    void operator()() const {
        prepare(sm90::forward<T, BLOCKS, STEPS, ARGMAX>, device.shared_block);
    }
};

template <int BLOCKS, int STEPS>
struct Run90 {
    const Forward &f;
    const sm90::Maps &maps;
    Stream stream;

    template <class T, bool ARGMAX>
    void operator()() const {
        launch(sm90::forward<T, BLOCKS, STEPS, ARGMAX>, f.plan.grid, sm90::THREADS, sm90::shared_bytes(f.plan), stream, f,
               maps);
    }
};

struct Launch90 {
    const Forward &f;
    const sm90::Maps &maps;
    Stream stream;

    template <int BLOCKS, int STEPS>
    void run() const {
        with_types(f.a, Run90<BLOCKS, STEPS>{f, maps, stream});
    }
    /* Steps in registers: whole slabs, and one and a half. */
    template <int BLOCKS>
    void of_blocks() const {
        const int64_t bytes = f.a.dim * element_bytes(f.a);
        if (bytes <= 4 * STEP) run<BLOCKS, 4>();
        else if (bytes <= 6 * STEP) run<BLOCKS, 6>();
        else if (bytes <= 8 * STEP) run<BLOCKS, 8>();
        else run<BLOCKS, 0>();
    }
};

template <int BLOCKS>
void prepare_blocks(const Device &device) {
    with_all_types(Prepare90<BLOCKS, 0>{device});
    with_all_types(Prepare90<BLOCKS, 4>{device});
    with_all_types(Prepare90<BLOCKS, 6>{device});
    with_all_types(Prepare90<BLOCKS, 8>{device});
}

}  // namespace

void prepare_sm90(const Device &device) { prepare_blocks<1>(device), prepare_blocks<2>(device); }

Plan plan_sm90(const maxsim_args &a, const Device &device) { return sm90::plan(a, device); }

void launch_sm90(const Forward &f, const Device &, Stream stream) {
    const sm90::Maps maps{map_of_queries(f.a, f.plan.slot), map_of_documents(f.a, f.plan.tile),
                          map_of_documents(f.a, sm90::TAIL_BOX)};
    const Launch90 launch{f, maps, stream};
    if (f.plan.rows == sm90::MOST_ROWS) launch.of_blocks<2>();
    else launch.of_blocks<1>();
}

}  // namespace latemax
