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
    Forward &f;
    const Device &device;
    Stream stream;

    template <class T, bool ARGMAX>
    void operator()() const {
        const int shared = sm80::shared_bytes(f.plan, sm80::table_bytes<N, ARGMAX>());
        if (shared > device.shared_block)
            throw std::runtime_error("dim " + std::to_string(f.a.dim) + " needs more shared memory than this GPU has");
        // 1 KB of every block is the system's; two blocks of 128 threads have 255 registers each, more would not
        const int resident = device.shared_multiprocessor / (shared + 1024) > 1 ? 2 : 1;
        plan_grid(f.plan, f.a, static_cast<int64_t>(device.multiprocessors) * resident);
        launch(sm80::forward<T, N, ARGMAX>, f.plan.grid, sm80::THREADS, shared, stream, f);
    }
};

}  // namespace

void prepare_sm80(const Device &device) {
    with_all_types(Prepare80<32>{device});
    with_all_types(Prepare80<64>{device});
}

void launch_sm80(Forward &f, const Device &device, Stream stream) {
    f.plan = plan_queries(f.a, sm80::LEAST_COLUMNS, sm80::MOST_COLUMNS, LONGEST_SM80);
    if (f.plan.rows == 32) with_types(f.a, Run80<32>{f, device, stream});
    else with_types(f.a, Run80<64>{f, device, stream});
}

}  // namespace latemax
