/* AMX: multiplies tiles of 16 rows x 32 bfloat16 with the panel, 32 x 32 sums in four tile registers. Everything else
 * is the AVX-512 code.
 *
 * The processor flushes inputs and sums below 2^-126 to 0, as vdpbf16ps does. A sum does not depend on its position in
 * the tile.
 */
#if defined(__x86_64__) && defined(__linux__)
#define LATEMAX_LANES 16
#include "kernel.h"
#include "tiles.h"

namespace latemax {
#if defined(LATEMAX_TILES)
namespace {

constexpr int ROWS = 16, DEPTH = 32;

/* Copies rows j .. j + R * ROWS to contiguous memory, padded with zeros after dim: the source of a tile load. */
template <int R>
void copy(const Rows &rows, int64_t j, int64_t dim, int64_t padded, char *out) {
    for (int u = 0; u < R * ROWS; ++u, out += 2 * padded) {
        std::memcpy(out, row_at(rows, within(rows, j + u)), 2 * dim);
        std::memset(out + 2 * dim, 0, 2 * (padded - dim));
    }
}

/* rest: if dim is no multiple of DEPTH, the last rows of the panel, followed by zeros. */
template <int R, int V, bool ARGMAX>
void multiply(const char *panel, const char *rest, const Rows &rows, int64_t j, int64_t dim,
              vf (&best)[V], vi (&at)[V]) {
    const int64_t padded = (dim + DEPTH - 1) / DEPTH * DEPTH, width = 64 * V;
    const char *row = row_at(rows, j), *next = row + R * ROWS * rows.stride;
    int64_t stride = rows.stride;
    if (rows.gather || padded != dim || j + R * ROWS > rows.count) {
        copy<R>(rows, j, dim, padded, rows.scratch);
        row = rows.scratch, stride = 2 * padded;
    }
    const int64_t below = ROWS * stride;
    LATEMAX_TILE_ZERO(0);
    if (V == 2) LATEMAX_TILE_ZERO(1);
    if (R == 2) LATEMAX_TILE_ZERO(2);
    if (R == 2 && V == 2) LATEMAX_TILE_ZERO(3);
    for (int64_t k = 0; k < padded; k += DEPTH) {
        const char *from = row + 2 * k, *q = k + DEPTH <= dim ? panel + k / 2 * width : rest;
        for (int u = 0; rows.dense && u < R * ROWS; ++u, next += 64) __builtin_prefetch(next);
        LATEMAX_TILE_LOAD(6, q, width);
        LATEMAX_TILE_LOAD(4, from, stride);
        LATEMAX_TILE_MULTIPLY(0, 4, 6);
        if (V == 2) {
            LATEMAX_TILE_LOAD(7, q + 64, width);
            LATEMAX_TILE_MULTIPLY(1, 4, 7);
        }
        if (R == 2) {
            LATEMAX_TILE_LOAD(5, from + below, stride);
            LATEMAX_TILE_MULTIPLY(2, 5, 6);
            if (V == 2) LATEMAX_TILE_MULTIPLY(3, 5, 7);
        }
    }
    /* 16 vectors of sums fit in registers together with the maxima they are compared with */
    constexpr int GROUP = 16 / V;
    vf sum[R * ROWS / GROUP][GROUP][V];
    char *to = reinterpret_cast<char *>(sum);
    LATEMAX_TILE_STORE(0, to, width);
    if (V == 2) LATEMAX_TILE_STORE(1, to + 64, width);
    if (R == 2) LATEMAX_TILE_STORE(2, to + ROWS * width, width);
    if (R == 2 && V == 2) LATEMAX_TILE_STORE(3, to + ROWS * width + 64, width);
    for (int g = 0; g < R * ROWS / GROUP; ++g) {
        if (rows.compute_scale) inverse_norms<MAXSIM_BF16, GROUP>(rows, j + g * GROUP, dim);
        fold<GROUP, V, ARGMAX>(sum[g], rows, j + g * GROUP, best, at);
    }
}

template <int V, bool ARGMAX>
void run_tiles(const char *panel, const Rows &rows, int64_t dim, float *best_out, int32_t *at_out) {
    alignas(64) char rest[ROWS * 64 * V] = {};
    if (dim % DEPTH) std::memcpy(rest, panel + dim / DEPTH * (DEPTH / 2) * 64 * V, (dim % DEPTH + 1) / 2 * 64 * V);
    vf best[V];
    vi at[V] = {};
    std::memcpy(&best, best_out, sizeof best);
    if (ARGMAX) std::memcpy(&at, at_out, sizeof at);
    const tiles::Use use;
    int64_t j = 0;
    for (; j + ROWS < rows.count; j += 2 * ROWS) multiply<2, V, ARGMAX>(panel, rest, rows, j, dim, best, at);
    if (j < rows.count) multiply<1, V, ARGMAX>(panel, rest, rows, j, dim, best, at);
    std::memcpy(best_out, &best, sizeof best);
    if (ARGMAX) std::memcpy(at_out, &at, sizeof at);
}

void run_bf16(const void *panel, int vectors, const Rows &rows, int64_t dim, float *best, int32_t *at) {
    const char *p = static_cast<const char *>(panel);
    if (vectors == 2)
        at ? run_tiles<2, true>(p, rows, dim, best, at) : run_tiles<2, false>(p, rows, dim, best, at);
    else
        at ? run_tiles<1, true>(p, rows, dim, best, at) : run_tiles<1, false>(p, rows, dim, best, at);
}

const Level level = {
    "amx_bf16", LATEMAX_LANES, 2, run_any<Float32, 24, 4, 2>, run_bf16, widen, sum_of_squares, add_scaled, &codes_avx512_vnni};
}  // namespace
const Level *const level_amx_bf16 = &level;
#else
/* the compiler lacks these intrinsics */
const Level *const level_amx_bf16 = nullptr;
#endif
}  // namespace latemax
#endif
