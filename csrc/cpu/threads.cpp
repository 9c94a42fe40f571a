/* Uses torch's worker threads if it finds them: two pools would spin against each other on the same cores.
 *
 * Torch loads its OpenMP runtime with global symbols. GOMP_parallel is the entry that the compiler emits for `omp
 * parallel`; both the GNU and the LLVM runtime have it. Looked up at run time, so that the library depends on neither.
 */
#include "threads.h"

#include <dlfcn.h>
#include <pthread.h>

#include <chrono>
#include <system_error>
#include <thread>
#include <vector>

namespace latemax {

namespace {
using Clock = std::chrono::steady_clock;
constexpr Clock::duration SPIN = Clock::duration(std::chrono::milliseconds(2));
std::atomic<Clock::rep> last_call{0};

/* The OpenMP runtimes wait for ever in a forked child, which has none of the parent's worker threads. */
std::atomic<bool> forked{false};
const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });
}  // namespace

bool recent_call() {
    const Clock::rep last = last_call.load(std::memory_order_relaxed);
    return last && Clock::now().time_since_epoch().count() - last < SPIN.count();
}

void note_call() { last_call.store(Clock::now().time_since_epoch().count(), std::memory_order_relaxed); }

void parallel(int threads, void (*body)(void *), void *data) {
    if (threads <= 1) return body(data);
#if !defined(LATEMAX_OWN_THREADS)
    using Parallel = void (*)(void (*)(void *), void *, unsigned, unsigned);
    static const Parallel openmp = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    if (openmp && !forked) return openmp(body, data, static_cast<unsigned>(threads), 0);
#endif
    std::vector<std::thread> others;
    try {
        while (static_cast<int>(others.size()) < threads - 1) others.emplace_back(body, data);
    } catch (const std::system_error &) {
        /* no more threads available: the running ones share the work */
    }
    body(data);
    for (std::thread &other : others) other.join();
}

}  // namespace latemax
