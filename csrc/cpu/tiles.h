/* The eight tile registers of AMX, 16 rows of 64 bytes each. tests/native has the same functions for any processor. */
#ifndef LATEMAX_CPU_TILES_H
#define LATEMAX_CPU_TILES_H

#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>

namespace latemax {
namespace tiles {

/* Whether the processor multiplies bfloat16 tiles and Linux grants them to this process, which must ask once. */
inline bool permitted(bool avx512) {
    constexpr unsigned BF16 = 1u << 22, TILE = 1u << 24;
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    unsigned a, b, c, d;
    return avx512 && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & BF16) && (d & TILE) &&
           syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

#if defined(__AMX_BF16__)
#define LATEMAX_TILES
namespace {

/* What LDTILECFG reads. */
struct alignas(64) Config {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

/* Configures the tile registers for its lifetime. */
class Use {
  public:
    Use() {
        static const Config config;
        _tile_loadconfig(&config);
    }
    ~Use() { _tile_release(); }
    Use(const Use &) = delete;
};

}  // namespace

/* Macros, because the register number is part of the instruction. */
#define LATEMAX_TILE_ZERO(t) _tile_zero(t)
/* GCC 12 does not declare that the load reads memory: the barrier keeps earlier stores to that memory before it. */
#define LATEMAX_TILE_LOAD(t, from, stride)   \
    do {                                     \
        asm volatile("" ::: "memory");       \
        _tile_loadd(t, from, stride);        \
    } while (0)
#define LATEMAX_TILE_STORE(t, to, stride) _tile_stored(t, to, stride)
/* sums [16][16] += rows [16][32] x panel [16][16][2] */
#define LATEMAX_TILE_MULTIPLY(sums, rows, panel) _tile_dpbf16ps(sums, rows, panel)
#endif

}  // namespace tiles
}  // namespace latemax

#endif
