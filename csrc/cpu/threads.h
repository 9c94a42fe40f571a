#ifndef LATEMAX_CPU_THREADS_H
#define LATEMAX_CPU_THREADS_H

#include <atomic>
#include <new>

namespace latemax {

/* Whether the last call ended within the last 2 ms. Workers spin for some milliseconds before they sleep: the second of
 * a series of small calls wakes them, and an isolated small call does not wait for them. */
bool recent_call();
void note_call();

/* Runs body(data) on up to `threads` threads, the caller included, and returns when all have finished. */
void parallel(int threads, void (*body)(void *), void *data);

/* bad_alloc on a worker is rethrown on the calling thread. */
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
