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

inline bool has(unsigned feature) {
    constexpr unsigned TILE = 1u << 24;
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & TILE) && (d & feature);
}
/* Whether the processor multiplies tiles of bfloat16, or of bytes. */
inline bool has_bf16(bool avx512) { return avx512 && has(1u << 22); }
inline bool has_int8() { return has(1u << 25); }

/* Whether Linux grants tiles to this process, which must ask once. */
inline bool permitted() {
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

#if defined(__AMX_TILE__)
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
/* sums [16][16] += rows [16][64 / bytes] x panel [16][16][4 / bytes] */
#define LATEMAX_TILE_MULTIPLY(bytes, sums, rows, panel) \
    do {                                                \
        if constexpr (bytes == 2)                       \
            _tile_dpbf16ps(sums, rows, panel);          \
        else                                            \
            _tile_dpbssd(sums, rows, panel);            \
    } while (0)
#endif

}  // namespace tiles
}  // namespace latemax

#endif
