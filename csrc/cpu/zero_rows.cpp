/* Finds the rows that are padding: all their numbers are zero. */
#include <algorithm>
#include <cstring>

#include "maxsim_cpu.h"
#include "threads.h"

namespace latemax {

namespace {

/* Rows of a unit of work. */
constexpr int64_t UNIT = 512;
/* Bytes that are worth another thread while it still spins from the last call, and if it sleeps. */
constexpr int64_t SHARE_BYTES = 128 << 10, WAKE_BYTES = 1 << 20;
/* Most rows are not zero, and read in their first cache line alone: lines so far apart that the processor does not fetch
 * them by itself. */
constexpr int64_t AHEAD = 16;

uint64_t load_bytes(const char *from, int64_t n) {
    uint64_t word = 0;
    std::memcpy(&word, from, n);
    return word;
}

/* Whether a number has a bit other than its sign, which `mask` leaves out: NaN has, and a subnormal number. */
bool any_bit(const char *row, int64_t bytes, uint64_t mask) {
    int64_t k = 0;
    for (; k + 8 <= bytes && k < 64; k += 8)
        if (load_bytes(row + k, 8) & mask) return true;
    for (; k + 64 <= bytes; k += 64) {
        uint64_t word[8], all = 0;
        std::memcpy(word, row + k, sizeof word);
        for (uint64_t one : word) all |= one;
        if (all & mask) return true;
    }
    for (; k + 8 <= bytes; k += 8)
        if (load_bytes(row + k, 8) & mask) return true;
    return load_bytes(row + k, bytes - k) & mask;
}

}  // namespace

bool nonzero_rows(const FloatRows &x, uint8_t *out, int threads) {
    const uint64_t mask = x.size == 2 ? 0x7fff7fff7fff7fff : x.size == 4 ? 0x7fffffff7fffffff : 0x7fffffffffffffff;
    const int64_t rows = x.n * x.l, bytes = x.dim * x.size, next = AHEAD * x.stride_l * x.size;
    const int64_t share = recent_call() ? SHARE_BYTES : WAKE_BYTES;
    threads = static_cast<int>(std::clamp<int64_t>(rows * bytes / share, 1, threads));
    std::atomic<int64_t> unit{0};
    std::atomic<bool> all{true};
    auto body = [&] {
        for (int64_t r; (r = unit.fetch_add(UNIT, std::memory_order_relaxed)) < rows;) {
            bool some = true;
            for (const int64_t end = std::min(r + UNIT, rows); r < end;) {
                const int64_t item = r / x.l, until = std::min(end, (item + 1) * x.l);
                const char *row = x.rows + (item * x.stride_n + r % x.l * x.stride_l) * x.size;
                for (; r < until; ++r, row += x.stride_l * x.size) {
                    __builtin_prefetch(row + next);
                    out[r] = any_bit(row, bytes, mask);
                    some &= out[r] != 0;
                }
            }
            if (!some) all.store(false, std::memory_order_relaxed);
        }
    };
    parallel(threads, body);
    note_call();
    return all;
}

}  // namespace latemax
