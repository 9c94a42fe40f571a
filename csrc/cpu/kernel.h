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
 *
 * Everything is in an unnamed namespace: a function that the linker shared between levels could run instructions that
 * the processor does not have.
 */
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "level.h"

namespace latemax {
namespace {

typedef float vf __attribute__((vector_size(LATEMAX_LANES * 4)));
typedef int32_t vi __attribute__((vector_size(LATEMAX_LANES * 4)));
typedef float vf_any __attribute__((vector_size(LATEMAX_LANES * 4), aligned(4), may_alias));

#define LATEMAX_INLINE inline __attribute__((always_inline))

/* A step takes 4 bytes of a row, so 16 steps take a cache line. */
constexpr int LINE = 16;

template <class T>
LATEMAX_INLINE T load(const void *from) {
    T x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

/* x where it is greater, else y; y also where either is NaN. */
LATEMAX_INLINE vf greater(vf x, vf y) {
#if defined(__AVX512F__)
    return (vf)_mm512_max_ps((__m512)x, (__m512)y);
#elif defined(__AVX2__)
    return (vf)_mm256_max_ps((__m256)x, (__m256)y);
#else
    return x > y ? x : y;
#endif
}

/* Collects whether any similarity was NaN; one comparison covers two vectors. */
class SawNaN {
  public:
    LATEMAX_INLINE void look(vf x, vf y) {
#if defined(__AVX512F__)
        seen_ |= _mm512_cmp_ps_mask((__m512)x, (__m512)y, _CMP_UNORD_Q);
#elif defined(__AVX2__)
        seen_ |= (vi)_mm256_cmp_ps((__m256)x, (__m256)y, _CMP_UNORD_Q);
#else
        seen_ |= (x != x) | (y != y);
#endif
    }
    LATEMAX_INLINE bool ever() const {
#if defined(__AVX512F__)
        return seen_ != 0;
#elif defined(__AVX2__)
        return !_mm256_testz_si256((__m256i)seen_, (__m256i)seen_);
#else
        int32_t all = 0;
        for (int i = 0; i < LATEMAX_LANES; ++i) all |= seen_[i];
        return all != 0;
#endif
    }

  private:
#if defined(__AVX512F__)
    __mmask16 seen_ = 0;
#else
    vi seen_ = {};
#endif
};

inline float one_f16(uint16_t h) {
    const uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = (h >> 10) & 31, fraction = h & 1023;
    uint32_t bits;
    if (exponent == 31) {
        bits = sign | 0x7f800000 | fraction << 13;
    } else if (exponent) {
        bits = sign | (exponent + 112) << 23 | fraction << 13;
    } else {
        /* subnormal: fraction x 2^-24, exact in float32 */
        const float x = (float)fraction * 0x1p-24f;
        std::memcpy(&bits, &x, 4);
        bits |= sign;
    }
    return load<float>(&bits);
}

inline float one_bf16(uint16_t h) {
    const uint32_t bits = (uint32_t)h << 16;
    return load<float>(&bits);
}

inline float one(maxsim_dtype of, const void *x, int64_t i) {
    if (of == MAXSIM_F32) return static_cast<const float *>(x)[i];
    const uint16_t h = static_cast<const uint16_t *>(x)[i];
    return of == MAXSIM_BF16 ? one_bf16(h) : one_f16(h);
}

/* The LANES elements from x + i, as float32. */
template <maxsim_dtype OF>
LATEMAX_INLINE vf wide(const void *x, int64_t i) {
    if (OF == MAXSIM_F32) return *reinterpret_cast<const vf_any *>(static_cast<const float *>(x) + i);
    const uint16_t *h = static_cast<const uint16_t *>(x) + i;
#if defined(__AVX512F__)
    const __m256i narrow = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(h));
    if (OF == MAXSIM_F16) return (vf)_mm512_cvtph_ps(narrow);
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16);
#elif defined(__AVX2__)
    const __m128i narrow = _mm_loadu_si128(reinterpret_cast<const __m128i *>(h));
    if (OF == MAXSIM_F16) return (vf)_mm256_cvtph_ps(narrow);
    return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(narrow), 16);
#else
    vf out;
    for (int l = 0; l < LATEMAX_LANES; ++l) out[l] = OF == MAXSIM_BF16 ? one_bf16(h[l]) : one_f16(h[l]);
    return out;
#endif
}

template <maxsim_dtype OF>
void widen_as(const void *x, int64_t n, float *out) {
    int64_t i = 0;
    for (; i + LATEMAX_LANES <= n; i += LATEMAX_LANES) *reinterpret_cast<vf_any *>(out + i) = wide<OF>(x, i);
    for (; i < n; ++i) out[i] = one(OF, x, i);
}

/* In the order of a tree: lane l with l + LANES / 2, and so on. */
LATEMAX_INLINE float sum_of_lanes(vf x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)x);
#else
    float lane[LATEMAX_LANES];
    std::memcpy(lane, &x, sizeof lane);
    for (int w = LATEMAX_LANES / 2; w; w /= 2)
        for (int l = 0; l < w; ++l) lane[l] += lane[l + w];
    return lane[0];
#endif
}

LATEMAX_INLINE vf root(vf x) {
#if defined(__AVX512F__)
    return (vf)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
    return (vf)_mm256_sqrt_ps((__m256)x);
#else
    for (int l = 0; l < LATEMAX_LANES; ++l) x[l] = __builtin_sqrtf(x[l]);
    return x;
#endif
}

/* Lanes whose sum is that of the squares. Several chains: a single one (8 dependent additions for dim 128) would take
 * longer than the loads. */
template <maxsim_dtype OF>
LATEMAX_INLINE vf squares_as(const void *x, int64_t n) {
    vf sum[4] = {};
    int64_t i = 0;
#if defined(__AVX512BF16__)
    if (OF == MAXSIM_BF16) {
        const char *from = static_cast<const char *>(x);
        auto add = [&](int c, const char *at) {
            const __m512bh v = (__m512bh)_mm512_loadu_si512(at);
            sum[c] = (vf)_mm512_dpbf16_ps((__m512)sum[c], v, v);
        };
        for (; i + 64 <= n; i += 64) add(0, from + 2 * i), add(1, from + 2 * i + 64);
        for (; i + 32 <= n; i += 32) add(0, from + 2 * i);
    }
#endif
    for (; i + 4 * LATEMAX_LANES <= n; i += 4 * LATEMAX_LANES)
#pragma GCC unroll 4
        for (int c = 0; c < 4; ++c) {
            const vf v = wide<OF>(x, i + c * LATEMAX_LANES);
            sum[c] += v * v;
        }
    for (; i + LATEMAX_LANES <= n; i += LATEMAX_LANES) {
        const vf v = wide<OF>(x, i);
        sum[0] += v * v;
    }
    if (i < n) {
        float rest[LATEMAX_LANES] = {};
        for (int l = 0; i < n; ++i, ++l) rest[l] = one(OF, x, i);
        const vf v = load<vf>(rest);
        sum[0] += v * v;
    }
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

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

/* Indices beyond the end repeat the last row, which changes no maximum. */
LATEMAX_INLINE int64_t within(const Rows &rows, int64_t i) { return i < rows.count ? i : rows.count - 1; }

LATEMAX_INLINE const char *row_at(const Rows &rows, int64_t i) {
    return rows.base + (rows.gather ? rows.gather[i] : i) * rows.stride;
}

#if defined(__AVX512F__)
/* The sum of the lanes of each of 16 vectors: 45 instructions where 16 sums take 160. */
LATEMAX_INLINE vf sums_of_lanes(vf (&x)[16]) {
    vf quarter[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        const __m512 a = (__m512)x[4 * i], b = (__m512)x[4 * i + 1], c = (__m512)x[4 * i + 2], d = (__m512)x[4 * i + 3];
        const __m512d ab = (__m512d)_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
        const __m512d cd = (__m512d)_mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
        quarter[i] = (vf)_mm512_unpacklo_pd(ab, cd) + (vf)_mm512_unpackhi_pd(ab, cd);
    }
    auto half = [](vf x, vf y) {
        return (vf)_mm512_shuffle_f32x4((__m512)x, (__m512)y, 0x88) + (vf)_mm512_shuffle_f32x4((__m512)x, (__m512)y, 0xdd);
    };
    return half(half(quarter[0], quarter[1]), half(quarter[2], quarter[3]));
}
#endif

/* The factors of rows j .. j + U with normalize. Roots and quotients are those of a vector: one at a time they would take
 * longer than the squares. */
template <maxsim_dtype OF, int U>
LATEMAX_INLINE void inverse_norms(const Rows &rows, int64_t j, int64_t dim) {
    constexpr int VECTORS = (U + LATEMAX_LANES - 1) / LATEMAX_LANES;
    float factor[VECTORS * LATEMAX_LANES] = {};
#if defined(__AVX512F__)
    vf squares[16] = {};
    static_assert(U <= 16, "one vector of factors");
#pragma GCC unroll 16
    for (int u = 0; u < U; ++u) squares[u] = squares_as<OF>(row_at(rows, within(rows, j + u)), dim);
    *reinterpret_cast<vf_any *>(factor) = sums_of_lanes(squares);
#else
    for (int u = 0; u < U; ++u) factor[u] = sum_of_lanes(squares_as<OF>(row_at(rows, within(rows, j + u)), dim));
#endif
    for (int i = 0; i < VECTORS * LATEMAX_LANES; i += LATEMAX_LANES) {
        const vf norm = root(*reinterpret_cast<vf_any *>(factor + i));
        *reinterpret_cast<vf_any *>(factor + i) = 1.0f / (norm < EPS ? vf{} + EPS : norm);
    }
    /* a group of a tile may start after the last row */
    for (int u = 0; u < U && j + u < rows.count; ++u) rows.scale[j + u] = factor[u];
}

/* Folds the similarities of rows j .. j + U into the running maxima. */
template <int U, int V, bool ARGMAX>
LATEMAX_INLINE void fold(vf (&sum)[U][V], const Rows &rows, int64_t j, vf (&best)[V], vi (&at)[V]) {
    if (rows.scale) {
#pragma GCC unroll 32
        for (int u = 0; u < U; ++u)
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) sum[u][v] *= rows.scale[within(rows, j + u)];
    }
    SawNaN nan;
#pragma GCC unroll 32
    for (int i = 0; i < U * V; i += 2) nan.look(sum[i / V][i % V], sum[(i + 1) % (U * V) / V][(i + 1) % V]);
#pragma GCC unroll 32
    for (int u = 0; u < U; ++u) {
        const int64_t i = within(rows, j + u);
        const int32_t number = ARGMAX ? (int32_t)(rows.number ? rows.number[i] : rows.first + i) : 0;
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            if (ARGMAX) at[v] = sum[u][v] > best[v] ? vi{} + number : at[v];
            best[v] = greater(sum[u][v], best[v]);
        }
    }
    /* comparisons with NaN are false, so the first NaN of a query token is written here, and stays */
    if (__builtin_expect(nan.ever(), 0)) {
#pragma GCC unroll 32
        for (int u = 0; u < U; ++u) {
            const int64_t i = within(rows, j + u);
            const int32_t number = ARGMAX ? (int32_t)(rows.number ? rows.number[i] : rows.first + i) : 0;
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) {
                const vi first = (sum[u][v] != sum[u][v]) & (best[v] == best[v]);
                best[v] = first ? sum[u][v] : best[v];
                if (ARGMAX) at[v] = first ? vi{} + number : at[v];
            }
        }
    }
}

template <class Op, int U, int V, bool ARGMAX>
LATEMAX_INLINE void tile(const vf *panel, const Rows &rows, int64_t j, int64_t dim, vf (&best)[V], vi (&at)[V]) {
    const char *row[U];
    vf sum[U][V];
    if (rows.compute_scale) inverse_norms<Op::DTYPE, U>(rows, j, dim);
#pragma GCC unroll 32
    for (int u = 0; u < U; ++u) {
        row[u] = row_at(rows, within(rows, j + u));
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sum[u][v] = vf{};
    }
    const int64_t steps = Op::steps(dim);
    const char *next = rows.prefetch ? rows.prefetch + j * rows.prefetch_stride : row_at(rows, within(rows, j + U));
    /* of the next rows, which are not contiguous where a mask has holes */
    const int64_t apart = rows.gather && rows.dense ? row_at(rows, within(rows, j + 2 * U - 1)) + rows.stride - next : 0;
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
    fold<U, V, ARGMAX>(sum, rows, j, best, at);
}

template <class Op, int U, int TAIL, int V, bool ARGMAX>
void run(const vf *panel, const Rows &rows, int64_t dim, float *best_out, int32_t *at_out) {
    vf best[V];
    vi at[V] = {};
    std::memcpy(&best, best_out, sizeof best);
    if (ARGMAX) std::memcpy(&at, at_out, sizeof at);
    int64_t j = 0;
    for (; j + U <= rows.count; j += U) tile<Op, U, V, ARGMAX>(panel, rows, j, dim, best, at);
    for (; j < rows.count; j += TAIL) tile<Op, TAIL, V, ARGMAX>(panel, rows, j, dim, best, at);
    std::memcpy(best_out, &best, sizeof best);
    if (ARGMAX) std::memcpy(at_out, &at, sizeof at);
}

template <class Op, int U, int TAIL, int V>
void run_with(const void *panel, const Rows &rows, int64_t dim, float *best, int32_t *at) {
    const vf *p = static_cast<const vf *>(panel);
    at ? run<Op, U, TAIL, V, true>(p, rows, dim, best, at) : run<Op, U, TAIL, V, false>(p, rows, dim, best, at);
}

/* SUMS vectors of similarities are kept in registers. TAIL is the number of rows of the last tiles for two query
 * vectors. A single query vector takes 8 rows, enough to hide the latency of its sums; each row needs an address
 * register too. */
template <class Op, int SUMS, int TAIL, int BLOCK>
void run_any(const void *panel, int vectors, const Rows &rows, int64_t dim, float *best, int32_t *at) {
    if (vectors == 1) return run_with<Op, 8, 8, 1>(panel, rows, dim, best, at);
    if (vectors == 2) return run_with<Op, SUMS / 2, TAIL, 2>(panel, rows, dim, best, at);
    run_with<Op, SUMS / BLOCK, (2 * TAIL + BLOCK - 1) / BLOCK, BLOCK>(panel, rows, dim, best, at);
}

template <maxsim_dtype OF>
void add_scaled_as(float a, const void *x, int64_t n, float *y) {
    int64_t i = 0;
    for (; i + LATEMAX_LANES <= n; i += LATEMAX_LANES) {
        vf_any *to = reinterpret_cast<vf_any *>(y + i);
        *to = *to + a * wide<OF>(x, i);
    }
    for (; i < n; ++i) y[i] += a * one(OF, x, i);
}

inline void widen(maxsim_dtype from, const void *x, int64_t n, float *out) {
    if (from == MAXSIM_F32) return widen_as<MAXSIM_F32>(x, n, out);
    if (from == MAXSIM_BF16) return widen_as<MAXSIM_BF16>(x, n, out);
    widen_as<MAXSIM_F16>(x, n, out);
}

inline float sum_of_squares(maxsim_dtype of, const void *x, int64_t n) {
    if (of == MAXSIM_F32) return sum_of_lanes(squares_as<MAXSIM_F32>(x, n));
    if (of == MAXSIM_BF16) return sum_of_lanes(squares_as<MAXSIM_BF16>(x, n));
    return sum_of_lanes(squares_as<MAXSIM_F16>(x, n));
}

inline void add_scaled(maxsim_dtype of, float a, const void *x, int64_t n, float *y) {
    if (of == MAXSIM_F32) return add_scaled_as<MAXSIM_F32>(a, x, n, y);
    if (of == MAXSIM_BF16) return add_scaled_as<MAXSIM_BF16>(a, x, n, y);
    add_scaled_as<MAXSIM_F16>(a, x, n, y);
}

}  // namespace
}  // namespace latemax
