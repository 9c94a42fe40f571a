/* The micro-kernel, written once with the compiler's vector extension and compiled once per level, with its own flags.
 *
 *          query tokens (lanes)
 *          v = 0      v = 1
 *      u  [ 16 ]     [ 16 ]     U x V similarities in registers: each step takes V vectors of the packed query panel
 *      u  [ 16 ]     [ 16 ]     and one broadcast element of each of U document rows
 *      :
 *
 * A similarity is the same chain of fused multiply-adds over dim at every position of its token (float32: in order;
 * bfloat16 instructions take pairs), so scores do not depend on padding, batch mates or threads, bit for bit.
 */
#include "vectors.h"
/* after it */
#include "maxima.h"

namespace latemax {
namespace {

/* A step takes 4 bytes of a row, so 16 steps take a cache line. */
constexpr int LINE = 16;

struct Float32 {
    static constexpr maxsim_dtype DTYPE = MAXSIM_F32;
    static int64_t steps(int64_t dim) { return dim; }
    static bool odd(int64_t) { return false; }
    static LATEMAX_INLINE vf step(vf sum, vf q, const char *row) { return sum + q * load<float>(row); }
    static LATEMAX_INLINE vf last(vf sum, vf, const char *) { return sum; }
};

#if defined(__AVX512BF16__)
/* Pairs of bfloat16. vdpbf16ps flushes inputs and sums below 2^-126 to 0. */
struct BFloat16 {
    static constexpr maxsim_dtype DTYPE = MAXSIM_BF16;
    static int64_t steps(int64_t dim) { return dim / 2; }
    static bool odd(int64_t dim) { return dim % 2 != 0; }
    static LATEMAX_INLINE vf pair(vf sum, vf q, uint32_t d) {
        return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)q, (__m512bh)_mm512_set1_epi32((int)d));
    }
    static LATEMAX_INLINE vf step(vf sum, vf q, const char *row) { return pair(sum, q, load<uint32_t>(row)); }
    static LATEMAX_INLINE vf last(vf sum, vf q, const char *row) { return pair(sum, q, load<uint16_t>(row)); }
};
#endif

template <class Op, int U, int V, class Vector>
LATEMAX_INLINE void step(const Vector *q, const char *const (&row)[U], int64_t at, Vector (&sum)[U][V]) {
    /* the side with fewer elements is kept in registers, the other is loaded one at a time */
    if (V <= U) {
#pragma GCC unroll 32
        for (int u = 0; u < U; ++u)
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) sum[u][v] = Op::step(sum[u][v], q[v], row[u] + at);
    } else {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v)
#pragma GCC unroll 32
            for (int u = 0; u < U; ++u) sum[u][v] = Op::step(sum[u][v], q[v], row[u] + at);
    }
}

LATEMAX_INLINE const char *row_at(const Rows &rows, int64_t i) {
    return rows.base + (rows.gather ? rows.gather[i] : i) * rows.stride;
}

/* With normalize, the factors of the vectors of rows that begin in rows j .. j + U: tiles that follow each other compute
 * each once. Roots and quotients are those of a vector: one at a time they would take longer than the squares. */
template <maxsim_dtype OF, int U>
LATEMAX_INLINE void inverse_norms(const Rows &rows, int64_t j, int64_t dim) {
    constexpr int LANES = LATEMAX_LANES;
    for (int64_t i = (j + LANES - 1) / LANES * LANES; i < j + U && i < rows.count; i += LANES) {
        vf squares[LANES];
#pragma GCC unroll 16
        for (int l = 0; l < LANES; ++l) squares[l] = squares_as<OF>(row_at(rows, within(rows, i + l)), dim);
        const vf norm = root(sums_of_lanes(squares));
        /* after the last row, the factors of the next rows of the batch are not computed yet */
        *reinterpret_cast<vf_any *>(rows.scale + i) = 1.0f / (norm < EPS ? vf{} + EPS : norm);
    }
}

/* The similarities of rows j .. j + U, without their factors. */
template <class Op>
struct Floats {
    using Vector = vf;

    template <int U, int V>
    static LATEMAX_INLINE void products(const vf *panel, const Rows &rows, int64_t j, int64_t dim, vf (&sum)[U][V]) {
        const char *row[U];
        if (rows.compute_scale) inverse_norms<Op::DTYPE, U>(rows, j, dim);
#pragma GCC unroll 32
        for (int u = 0; u < U; ++u) {
            row[u] = row_at(rows, within(rows, j + u));
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) sum[u][v] = vf{};
        }
        const int64_t steps = Op::steps(dim);
        /* the norms of a vector of rows are computed before the first of them is multiplied */
        const int64_t after = rows.compute_scale ? j + U + LATEMAX_LANES : j + U;
        const char *next = rows.prefetch ? rows.prefetch + j * rows.prefetch_stride : row_at(rows, within(rows, after));
        /* of the next rows, which are not contiguous where a mask has holes */
        const int64_t apart = rows.gather && rows.dense ? row_at(rows, within(rows, after + U - 1)) + rows.stride - next : 0;
        const int64_t lines = apart / (4 * steps + 1) + 1;
        int64_t k = 0;
        for (; k + LINE <= steps; k += LINE) {
            if (apart > 0) {
                for (int64_t l = 0; l < lines; ++l, next += 4 * LINE) __builtin_prefetch(next);
            } else if (rows.dense) {
#pragma GCC unroll 32
                for (int u = 0; u < U; ++u) __builtin_prefetch(next + 4 * LINE * u);
                next += 4 * LINE * U;
            } else {
                for (int u = 0; u < U; ++u) __builtin_prefetch(row[u] + U * rows.stride + 4 * k);
            }
#pragma GCC unroll 2
            for (int64_t l = k; l < k + LINE; ++l) step<Op>(panel + l * V, row, 4 * l, sum);
        }
        for (; k < steps; ++k) step<Op>(panel + k * V, row, 4 * k, sum);
        if (Op::odd(dim)) {
#pragma GCC unroll 32
            for (int u = 0; u < U; ++u)
#pragma GCC unroll 4
                for (int v = 0; v < V; ++v) sum[u][v] = Op::last(sum[u][v], panel[k * V + v], row[u] + 4 * k);
        }
    }
};

template <class Op, int U, class Fold>
LATEMAX_INLINE void tile(const void *panel, const Rows &rows, int64_t j, int64_t dim, Fold &fold) {
    vf sum[U][Fold::VECTORS];
    Op::products(static_cast<const typename Op::Vector *>(panel), rows, j, dim, sum);
    fold.take(sum, rows, j);
}

template <class Op, int U, int TAIL, class Fold, class... Out>
void run(const void *panel, const Rows &rows, int64_t dim, Out... out) {
    Fold fold(out...);
    int64_t j = 0;
    for (; j + U <= rows.count; j += U) tile<Op, U>(panel, rows, j, dim, fold);
    for (; j < rows.count; j += TAIL) tile<Op, TAIL>(panel, rows, j, dim, fold);
    fold.store(out...);
}

/* SUMS vectors of similarities are kept in registers. TAIL is the number of rows of the last tiles for two query
 * vectors. A single query vector takes 8 rows, enough to hide the latency of its sums; each row needs an address
 * register too. */
template <class Op, int SUMS, int TAIL, int BLOCK, template <int> class Fold, class... Out>
void run_any(const void *panel, int vectors, const Rows &rows, int64_t dim, Out... out) {
    if (vectors == 1) return run<Op, 8, 8, Fold<1>>(panel, rows, dim, out...);
    if (vectors == 2) return run<Op, SUMS / 2, TAIL, Fold<2>>(panel, rows, dim, out...);
    run<Op, SUMS / BLOCK, (2 * TAIL + BLOCK - 1) / BLOCK, Fold<BLOCK>>(panel, rows, dim, out...);
}

/* A Run. */
template <class Op, int SUMS, int TAIL, int BLOCK>
void scores(const void *panel, int vectors, const Rows &rows, int64_t dim, float *best, int32_t *at) {
    if (at) return run_any<Op, SUMS, TAIL, BLOCK, BestAt>(panel, vectors, rows, dim, best, at);
    run_any<Op, SUMS, TAIL, BLOCK, Best>(panel, vectors, rows, dim, best, at);
}

}  // namespace
}  // namespace latemax
