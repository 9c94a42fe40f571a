/* csrc/cpu/tiles.h for any processor: what Intel's manual says LDTILECFG, TILELOADD, TDPBF16PS, TDPBSSD and TILESTORED do. */
#ifndef LATEMAX_CPU_TILES_H
#define LATEMAX_CPU_TILES_H
#define LATEMAX_TILES

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace latemax {
namespace tiles {

inline bool has_bf16(bool) { return true; }
inline bool has_int8() { return true; }
inline bool permitted() { return true; }

inline void expect(bool good, const char *rule) {
    if (good) return;
    std::fprintf(stderr, "tile registers: %s\n", rule);
    std::abort();
}

struct Registers {
    bool configured = false;
    uint32_t tile[8][16][16];
};
inline thread_local Registers registers;

/* Arithmetic between registers, most of the time spent: no sanitizer needs to see it. */
#define UNWATCHED __attribute__((no_sanitize("thread", "address", "undefined"), optimize("O3")))

/* Rounded to nearest, denormals taken for 0 going in and coming out. */
UNWATCHED inline float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }

UNWATCHED inline float half_of(uint32_t pair, int which) {
    const uint32_t bits = which ? pair & 0xffff0000u : pair << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return flushed(x);
}

inline void zero(int t) {
    expect(registers.configured, "used before they were configured");
    std::memset(registers.tile[t], 0, sizeof registers.tile[t]);
}

inline void load(int t, const void *from, int64_t stride) {
    expect(registers.configured, "used before they were configured");
    for (int r = 0; r < 16; ++r)
        std::memcpy(registers.tile[t][r], static_cast<const char *>(from) + r * stride, 64);
}

inline void store(int t, void *to, int64_t stride) {
    expect(registers.configured, "used before they were configured");
    for (int r = 0; r < 16; ++r) std::memcpy(static_cast<char *>(to) + r * stride, registers.tile[t][r], 64);
}

UNWATCHED inline void multiply_bytes(int sums, int rows, int panel) {
    expect(registers.configured, "used before they were configured");
    int8_t row[16][64], column[16][16][4];
    std::memcpy(row, registers.tile[rows], sizeof row);
    std::memcpy(column, registers.tile[panel], sizeof column);
    for (int m = 0; m < 16; ++m)
        for (int n = 0; n < 16; ++n)
            for (int k = 0; k < 64; ++k)
                registers.tile[sums][m][n] += static_cast<uint32_t>(row[m][k] * column[k / 4][n][k % 4]);
}

UNWATCHED inline void multiply_bf16(int sums, int rows, int panel) {
    expect(registers.configured, "used before they were configured");
    float row[16][16][2], column[16][16][2];
    for (int m = 0; m < 16; ++m)
        for (int k = 0; k < 16; ++k)
            for (int i = 0; i < 2; ++i) {
                row[m][k][i] = half_of(registers.tile[rows][m][k], i);
                column[m][k][i] = half_of(registers.tile[panel][k][m], i);
            }
    for (int m = 0; m < 16; ++m)
        for (int n = 0; n < 16; ++n) {
            float chain[2] = {0, 0}, sum;
            /* the product of two bfloat16 is exact */
            for (int k = 0; k < 16; ++k)
                for (int i = 0; i < 2; ++i) chain[i] = flushed(chain[i] + row[m][k][i] * column[n][k][i]);
            std::memcpy(&sum, &registers.tile[sums][m][n], 4);
            sum = flushed(flushed(sum) + flushed(chain[0] + chain[1]));
            std::memcpy(&registers.tile[sums][m][n], &sum, 4);
        }
}

class Use {
  public:
    Use() {
        expect(!registers.configured, "configured twice");
        registers.configured = true;
    }
    ~Use() { registers.configured = false; }
    Use(const Use &) = delete;
};

}  // namespace tiles
}  // namespace latemax

#define LATEMAX_TILE_ZERO(t) ::latemax::tiles::zero(t)
#define LATEMAX_TILE_LOAD(t, from, stride) ::latemax::tiles::load(t, from, stride)
#define LATEMAX_TILE_STORE(t, to, stride) ::latemax::tiles::store(t, to, stride)
#define LATEMAX_TILE_MULTIPLY(bytes, sums, rows, panel)                  \
    (bytes == 2 ? ::latemax::tiles::multiply_bf16(sums, rows, panel)     \
                : ::latemax::tiles::multiply_bytes(sums, rows, panel))

#endif
