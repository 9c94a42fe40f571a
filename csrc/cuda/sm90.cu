#include "sm90.h"

#include "launch.h"

namespace latemax {

namespace {

/* An axis that is expanded (stride 0) or has one entry is an axis of size 1 for the copy engine. */
TensorMap map_of(const maxsim_args &a, const void *base, uint64_t tokens, int64_t stride_l, uint64_t n, int64_t stride_n,
                 uint64_t m, int64_t stride_m, int rows) {
    const bool one_n = n <= 1 || stride_n == 0, one_m = m <= 1 || stride_m == 0;
    const uint64_t row = tokens <= 1 ? 2 * a.dim : 2 * stride_l;
    // torch gives a tensor without elements the null address, which the encoder refuses; nothing is loaded from the other
    return tensor_map(a.q_dtype == MAXSIM_BF16, base ? base : a.scores,
                      {static_cast<uint64_t>(a.dim), tokens ? tokens : 1, one_n ? 1 : n, one_m ? 1 : m},
                      {row, one_n ? row : 2 * stride_n, one_m ? row : 2 * stride_m}, rows);
}

struct Prepare90 {
    const Device &device;

    template <class T, int N, bool ARGMAX>
    void operator()() const {
        prepare(sm90::forward<T, N, ARGMAX>, device.shared_block);
    }
};

struct Run90 {
    Forward &f;
    const Device &device;
    Stream stream;

    template <class T, int N, bool ARGMAX>
    void operator()() const {
        Plan &p = f.plan;
        const maxsim_args &a = f.a;
        const int tables = sm90::table_bytes<N, ARGMAX>();
        // room for a ring of four stages comes first, then a second query buffer, then a longer ring
        const auto fits = [&] { return sm90::shared_bytes(p, tables) <= device.shared_block; };
        const int64_t query_blocks = ceil_div(p.blocks, device.multiprocessors);
        p.stages = 4;
        p.query_buffers = query_blocks > 1 ? sm90::MOST_QUERY_BUFFERS : 1;
        if (!fits()) p.query_buffers = 1;
        if (!fits() && p.teams > 1) {
            p.teams = 1;
            p.blocks = p.groups * (a.own ? a.n_q : 1);
        }
        while (!fits() && p.stages > 2) --p.stages;
        if (!fits())
            throw std::runtime_error("dim " + std::to_string(a.dim) + " needs more shared memory than this GPU has");
        while (p.stages < sm90::MOST_STAGES && (++p.stages, fits())) {
        }
        if (!fits()) --p.stages;
        plan_grid(p, a, device.multiprocessors);
        const TensorMap q_map = a.q_offsets
                                    ? map_of(a, a.q, a.q_tokens, a.q_stride_l, 1, 0, 1, 0, p.slot)
                                    : map_of(a, a.q, a.l_q, a.q_stride_l, a.n_q, a.q_stride_n, 1, 0, p.slot);
        const TensorMap d_map =
            a.d_offsets ? map_of(a, a.d, a.d_tokens, a.d_stride_l, 1, 0, 1, 0, sm90::ROWS)
                        : map_of(a, a.d, a.l_d, a.d_stride_l, a.n_c, a.d_stride_n, a.own ? a.n_q : 1, a.d_stride_q, sm90::ROWS);
        launch(sm90::forward<T, N, ARGMAX>, p.grid, sm90::THREADS, sm90::shared_bytes(p, tables), stream, f, q_map, d_map);
    }
};

}  // namespace

void prepare_sm90(const Device &device) { each_instance<32, 64, 128>(Prepare90{device}); }

void launch_sm90(Forward &f, const Device &device, Stream stream) {
    const Run90 run{f, device, stream};
    if (f.plan.columns == 32) with_argmax<32>(f.a, run);
    else if (f.plan.columns == 64) with_argmax<64>(f.a, run);
    else with_argmax<128>(f.a, run);
}

}  // namespace latemax
