#include "sm80.h"

#include "launch.h"

namespace latemax {

namespace {

template <int N>
struct Prepare80 {
    const Device &device;

    template <class T, bool ARGMAX>
    void operator()() const {
        prepare(sm80::forward<T, N, ARGMAX>, device.shared_block);
    }
};

template <int N>
struct Run80 {
    const Forward &f;
    Stream stream;

    template <class T, bool ARGMAX>
    void operator()() const {
        launch(sm80::forward<T, N, ARGMAX>, f.plan.grid, sm80::THREADS, sm80::shared_bytes(f.plan, f.a.argmax), stream, f);
    }
};

}  // namespace

void prepare_sm80(const Device &device) {
    with_all_types(Prepare80<32>{device});
    with_all_types(Prepare80<64>{device});
}

Plan plan_sm80(const maxsim_args &a, const Device &device) {
    Plan p = plan_queries(a, sm80::LEAST_COLUMNS, sm80::MOST_COLUMNS, LONGEST_SM80);
    p.tile = sm80::ROWS;
    const int shared = sm80::shared_bytes(p, a.argmax);
    if (shared > device.shared_block)
        throw std::runtime_error("dim " + std::to_string(a.dim) + " needs more shared memory than this GPU has");
    // 1 KB of every block is the system's; two blocks of 128 threads have 255 registers each, more would not
    const int resident = device.shared_multiprocessor / (shared + 1024) > 1 ? 2 : 1;
    plan_grid(p, a, static_cast<int64_t>(device.multiprocessors) * resident);
    return p;
}

void launch_sm80(const Forward &f, const Device &, Stream stream) {
    if (f.plan.rows == 32) with_types(f.a, Run80<32>{f, stream});
    else with_types(f.a, Run80<64>{f, stream});
}

}  // namespace latemax
