#ifndef LATEMAX_CPU_THREADS_H
#define LATEMAX_CPU_THREADS_H

#include <atomic>
#include <new>

namespace latemax {

/* Whether the last call ended within 2 ms: workers spin for some milliseconds before they sleep. The second of a row of
 * small calls wakes them, and one that stands alone waits for nobody. */
bool worked_lately();
void note_work();

/* Runs body(data) on up to `threads` threads, the caller among them, and returns when all have ended. */
void parallel(int threads, void (*body)(void *), void *data);

/* Want of memory on any thread is thrown on the caller's. */
template <class Body>
void parallel(int threads, Body &body) {
    struct Shared {
        Body &body;
        std::atomic<bool> failed{false};
    } shared{body};
    parallel(
        threads,
        [](void *data) {
            Shared &mine = *static_cast<Shared *>(data);
            try {
                mine.body();
            } catch (const std::bad_alloc &) {
                mine.failed = true;
            }
        },
        &shared);
    if (shared.failed) throw std::bad_alloc();
}

}  // namespace latemax

#endif
