/* The micro-kernel over codes: integer sums in registers, 4 bytes of a row by 4 bytes of a lane a step (Form).
 *
 * A sum is exact, so a similarity is the same at every position of its token. Included by codes_*.cpp, once per set of
 * instructions.
 */
#include "kernel.h"

namespace latemax {
namespace {

typedef uint32_t vu __attribute__((vector_size(LATEMAX_LANES * 4)));
typedef int32_t vi_any __attribute__((vector_size(LATEMAX_LANES * 4), aligned(4), may_alias));

LATEMAX_INLINE vf to_float(vi x) {
#if defined(__AVX512F__)
    return (vf)_mm512_cvtepi32_ps((__m512i)x);
#elif defined(__AVX2__)
    return (vf)_mm256_cvtepi32_ps((__m256i)x);
#else
    return __builtin_convertvector(x, vf);
#endif
}

LATEMAX_INLINE vi broadcast(const char *row) { return vi{} + load<int32_t>(row); }

/* Sums of 2 products of 16 bits. */
LATEMAX_INLINE vi pairs(vi x, vi y) {
#if defined(__AVX512F__)
    return (vi)_mm512_madd_epi16((__m512i)x, (__m512i)y);
#elif defined(__AVX2__)
    return (vi)_mm256_madd_epi16((__m256i)x, (__m256i)y);
#elif defined(__SSE2__) && LATEMAX_LANES == 4
    return (vi)_mm_madd_epi16((__m128i)x, (__m128i)y);
#else
    return (x << 16 >> 16) * (y << 16 >> 16) + (x >> 16) * (y >> 16);
#endif
}

struct SixteenBits {
    static constexpr Form FORM = I16;
    static constexpr int64_t BLOCK = I16_STEPS;
    static LATEMAX_INLINE vi start(const vi *) { return vi{}; }
    static LATEMAX_INLINE vi step(vi sum, vi q, const char *row) {
#if defined(__AVX512VNNI__)
        return (vi)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)q, (__m512i)broadcast(row));
#else
        return sum + pairs(q, broadcast(row));
#endif
    }
    static LATEMAX_INLINE vf total(vi sum) { return to_float(sum); }
};

/* Rows hold code + 128, without a sign. */
struct EightBits {
    static constexpr Form FORM = I8;
    static constexpr int64_t BLOCK = MOST_CODE_DIMS;
    /* - 128 x the sum of the query token's codes */
    static LATEMAX_INLINE vi start(const vi *extra) { return *extra; }
    static LATEMAX_INLINE vi step(vi sum, vi q, const char *row) {
#if defined(__AVX512VNNI__)
        return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)broadcast(row), (__m512i)q);
#elif defined(__AVX512BW__)
        return sum + pairs((vi)_mm512_maddubs_epi16((__m512i)broadcast(row), (__m512i)q), vi{} + 0x10001);
#elif defined(__AVX2__)
        return sum + pairs((vi)_mm256_maddubs_epi16((__m256i)broadcast(row), (__m256i)q), vi{} + 0x10001);
#else
        for (int i = 0; i < 4; ++i) sum += (int32_t)(uint8_t)row[i] * (q << (24 - 8 * i) >> 24);
        return sum;
#endif
    }
    static LATEMAX_INLINE vf total(vi sum) { return to_float(sum); }
};

/* Sums are the bits that differ; without an instruction that counts in 32 bits, counted in bytes, at most 31 times 8. */
struct Bits {
    static constexpr Form FORM = BITS;
    static LATEMAX_INLINE vi start(const vi *) { return vi{}; }
#if defined(__AVX512VPOPCNTDQ__)
    static constexpr int64_t BLOCK = MOST_CODE_DIMS;
    static LATEMAX_INLINE vi step(vi sum, vi q, const char *row) {
        return sum + (vi)_mm512_popcnt_epi32((__m512i)(q ^ broadcast(row)));
    }
    static LATEMAX_INLINE vf total(vi sum) { return to_float(sum); }
#else
    static constexpr int64_t BLOCK = 31;
#if defined(__AVX512BW__)
    static LATEMAX_INLINE vi step(vi sum, vi q, const char *row) {
        const __m512i x = (__m512i)(q ^ broadcast(row)), low = _mm512_set1_epi8(15);
        const __m512i table = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
        const __m512i high = _mm512_and_si512(_mm512_srli_epi16(x, 4), low);
        const __m512i one = _mm512_shuffle_epi8(table, _mm512_and_si512(x, low));
        return (vi)_mm512_add_epi8(_mm512_add_epi8((__m512i)sum, one), _mm512_shuffle_epi8(table, high));
    }
    static LATEMAX_INLINE vf total(vi sum) {
        return to_float(pairs((vi)_mm512_maddubs_epi16((__m512i)sum, _mm512_set1_epi8(1)), vi{} + 0x10001));
    }
#elif defined(__AVX2__)
    static LATEMAX_INLINE vi step(vi sum, vi q, const char *row) {
        const __m256i x = (__m256i)(q ^ broadcast(row)), low = _mm256_set1_epi8(15);
        const __m256i table = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
        const __m256i high = _mm256_and_si256(_mm256_srli_epi16(x, 4), low);
        const __m256i one = _mm256_shuffle_epi8(table, _mm256_and_si256(x, low));
        return (vi)_mm256_add_epi8(_mm256_add_epi8((__m256i)sum, one), _mm256_shuffle_epi8(table, high));
    }
    static LATEMAX_INLINE vf total(vi sum) {
        return to_float(pairs((vi)_mm256_maddubs_epi16((__m256i)sum, _mm256_set1_epi8(1)), vi{} + 0x10001));
    }
#else
    /* no byte reaches 256, so that the sum needs no carry between them */
    static LATEMAX_INLINE vi step(vi sum, vi q, const char *row) {
        vu x = (vu)(q ^ broadcast(row));
        x -= x >> 1 & 0x55555555;
        x = (x & 0x33333333) + (x >> 2 & 0x33333333);
        return (vi)((vu)sum + ((x & 0x0f0f0f0f) + (x >> 4 & 0x0f0f0f0f)));
    }
    static LATEMAX_INLINE vf total(vi sum) {
        const vi two = (sum & 0xff00ff) + (sum >> 8 & 0xff00ff);
        return to_float((two & 0xffff) + (two >> 16 & 0xffff));
    }
#endif
#endif
};

/* The integer sums over steps k .. end. `lines` are prefetched every LINE steps, from `next`. */
template <class Op, int U, int V>
LATEMAX_INLINE void block(const vi *panel, const vi *extra, const char *const (&row)[U], int64_t k, int64_t end,
                          int64_t lines, const char *&next, vf (&out)[U][V]) {
    vi sum[U][V];
#pragma GCC unroll 32
    for (int u = 0; u < U; ++u)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sum[u][v] = Op::start(extra + v);
    for (; k + LINE <= end; k += LINE) {
        for (int64_t l = 0; l < lines; ++l, next += 4 * LINE) __builtin_prefetch(next);
#pragma GCC unroll 2
        for (int64_t l = k; l < k + LINE; ++l) step<Op>(panel + l * V, row, 4 * l, sum);
    }
    for (; k < end; ++k) step<Op>(panel + k * V, row, 4 * k, sum);
#pragma GCC unroll 32
    for (int u = 0; u < U; ++u)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) out[u][v] = Op::total(sum[u][v]);
}

/* The products of rows j .. j + U, without the rows' factors. */
template <class Op>
struct Integers {
    using Vector = vi;

    template <int U, int V>
    static LATEMAX_INLINE void products(const vi *panel, const Rows &rows, int64_t j, int64_t dim, vf (&out)[U][V]) {
        const char *row[U];
#pragma GCC unroll 32
        for (int u = 0; u < U; ++u) row[u] = row_at(rows, within(rows, j + u));
        const int64_t steps = steps_of(Op::FORM, dim);
        const vi *extra = panel + steps * V;
        const char *next = rows.prefetch + j * rows.prefetch_stride;
        const int64_t lines = rows.prefetch ? (U * rows.prefetch_stride + 4 * steps - 1) / (4 * steps) : 0;
        block<Op>(panel, extra, row, 0, steps < Op::BLOCK ? steps : Op::BLOCK, lines, next, out);
        constexpr bool FACTORS = Op::FORM == I16;
#pragma GCC unroll 32
        for (int u = 0; u < U; ++u)
#pragma GCC unroll 4
            for (int v = 0; FACTORS && v < V; ++v) out[u][v] *= (vf)extra[v];
        if constexpr (Op::BLOCK < MOST_CODE_DIMS)
            for (int64_t k = Op::BLOCK, b = V; k < steps; k += Op::BLOCK, b += V) {
                vf more[U][V];
                block<Op>(panel, extra, row, k, steps < k + Op::BLOCK ? steps : k + Op::BLOCK, lines, next, more);
#pragma GCC unroll 32
                for (int u = 0; u < U; ++u)
#pragma GCC unroll 4
                    for (int v = 0; v < V; ++v) out[u][v] += FACTORS ? more[u][v] * (vf)extra[b + v] : more[u][v];
            }
#pragma GCC unroll 32
        for (int u = 0; u < U; ++u)
#pragma GCC unroll 4
            for (int v = 0; Op::FORM == BITS && v < V; ++v) out[u][v] = (float)dim - 2.0f * out[u][v];
    }
};

/* A Bounds. */
template <class Op, int SUMS, int TAIL, int BLOCK>
void bounds(const void *panel, int vectors, const Rows &rows, int64_t dim, float *lower, float *upper,
            const float *factor) {
    run_any<Op, SUMS, TAIL, BLOCK, Limits>(panel, vectors, rows, dim, lower, upper, factor);
}

}  // namespace
}  // namespace latemax
