/* The micro-kernel over AMX tiles: 16 rows x 64 bytes times the panel, 32 x 32 sums in four tile registers. The panel is
 * that of the other kernels with 16 lanes. A sum does not depend on its position in the tile. Included after the kernel
 * that has the element, which is bfloat16 or a signed byte.
 */
#include "tiles.h"

#if defined(LATEMAX_TILES)
namespace latemax {
namespace {

constexpr int ROWS = 16, DEPTH = 64;

/* Copies rows j .. j + R * ROWS to contiguous memory, padded with zeros: the source of a tile load. */
template <int R>
void copy(const Rows &rows, int64_t j, int64_t bytes, int64_t padded, char *out) {
    for (int u = 0; u < R * ROWS; ++u, out += padded) {
        std::memcpy(out, row_at(rows, within(rows, j + u)), bytes);
        std::memset(out + bytes, 0, padded - bytes);
    }
}

/* rest: if a row is no multiple of DEPTH, the last steps of the panel, followed by zeros. */
template <class Op, int R, class Fold>
void multiply(const char *panel, const char *rest, const Rows &rows, int64_t j, int64_t dim, Fold &fold) {
    constexpr int V = Fold::VECTORS;
    const int64_t bytes = Op::BYTES * dim, padded = (bytes + DEPTH - 1) / DEPTH * DEPTH, width = 64 * V;
    const char *row = row_at(rows, j), *next = row + R * ROWS * rows.stride;
    int64_t stride = rows.stride;
    if (rows.gather || padded != bytes || j + R * ROWS > rows.count) {
        copy<R>(rows, j, bytes, padded, rows.scratch);
        row = rows.scratch, stride = padded;
    }
    if (rows.prefetch) next = rows.prefetch + j * rows.prefetch_stride;
    const int lines = rows.dense || rows.prefetch ? R * ROWS : 0;
    const int64_t below = ROWS * stride;
    LATEMAX_TILE_ZERO(0);
    if (V == 2) LATEMAX_TILE_ZERO(1);
    if (R == 2) LATEMAX_TILE_ZERO(2);
    if (R == 2 && V == 2) LATEMAX_TILE_ZERO(3);
    for (int64_t k = 0; k < padded; k += DEPTH) {
        const char *from = row + k, *q = k + DEPTH <= bytes ? panel + k / 4 * width : rest;
        for (int u = 0; u < lines; ++u, next += 64) __builtin_prefetch(next);
        LATEMAX_TILE_LOAD(6, q, width);
        LATEMAX_TILE_LOAD(4, from, stride);
        LATEMAX_TILE_MULTIPLY(Op::BYTES, 0, 4, 6);
        if (V == 2) {
            LATEMAX_TILE_LOAD(7, q + 64, width);
            LATEMAX_TILE_MULTIPLY(Op::BYTES, 1, 4, 7);
        }
        if (R == 2) {
            LATEMAX_TILE_LOAD(5, from + below, stride);
            LATEMAX_TILE_MULTIPLY(Op::BYTES, 2, 5, 6);
            if (V == 2) LATEMAX_TILE_MULTIPLY(Op::BYTES, 3, 5, 7);
        }
    }
    if (rows.compute_scale) inverse_norms<MAXSIM_BF16, R * ROWS>(rows, j, dim);
    /* 16 vectors of sums fit in registers together with the maxima they are compared with */
    constexpr int GROUP = 16 / V;
    typename Op::Vector sum[R * ROWS / GROUP][GROUP][V];
    char *to = reinterpret_cast<char *>(sum);
    LATEMAX_TILE_STORE(0, to, width);
    if (V == 2) LATEMAX_TILE_STORE(1, to + 64, width);
    if (R == 2) LATEMAX_TILE_STORE(2, to + ROWS * width, width);
    if (R == 2 && V == 2) LATEMAX_TILE_STORE(3, to + ROWS * width + 64, width);
    for (int g = 0; g < R * ROWS / GROUP; ++g) {
        vf group[GROUP][V];
#pragma GCC unroll 16
        for (int u = 0; u < GROUP; ++u)
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v) group[u][v] = Op::total(sum[g][u][v]);
        fold.take(group, rows, j + g * GROUP);
    }
}

template <class Op, class Fold, class... Out>
void run_tiles(const char *panel, const Rows &rows, int64_t dim, Out... out) {
    constexpr int V = Fold::VECTORS;
    alignas(64) char rest[ROWS * 64 * V] = {};
    const int64_t bytes = Op::BYTES * dim, left = bytes % DEPTH;
    if (left) std::memcpy(rest, panel + bytes / DEPTH * ROWS * 64 * V, (left + 3) / 4 * 64 * V);
    Fold fold(out...);
    const tiles::Use use;
    int64_t j = 0;
    for (; j + ROWS < rows.count; j += 2 * ROWS) multiply<Op, 2>(panel, rest, rows, j, dim, fold);
    if (j < rows.count) multiply<Op, 1>(panel, rest, rows, j, dim, fold);
    fold.store(out...);
}

template <class Op, template <int> class Fold, class... Out>
void tiles_any(const void *panel, int vectors, const Rows &rows, int64_t dim, Out... out) {
    const char *p = static_cast<const char *>(panel);
    if (vectors == 2) return run_tiles<Op, Fold<2>>(p, rows, dim, out...);
    run_tiles<Op, Fold<1>>(p, rows, dim, out...);
}

/* A Run. */
template <class Op>
void tile_scores(const void *panel, int vectors, const Rows &rows, int64_t dim, float *best, int32_t *at) {
    if (at) return tiles_any<Op, BestAt>(panel, vectors, rows, dim, best, at);
    tiles_any<Op, Best>(panel, vectors, rows, dim, best, at);
}

}  // namespace
}  // namespace latemax
#endif
