/* Vectors of LATEMAX_LANES floats by the compiler's vector extension: loads of any dtype, and what is done with a row of
 * tokens alone. Compiled once per level, with its own flags.
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

/* The sum of the lanes of each of as many vectors, of floats or of integers: with AVX-512 45 instructions where 16 sums
 * take 160. */
template <class Vector>
LATEMAX_INLINE Vector sums_of_lanes(const Vector (&x)[LATEMAX_LANES]) {
#if defined(__AVX512F__)
    Vector quarter[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        const __m512 a = (__m512)x[4 * i], b = (__m512)x[4 * i + 1], c = (__m512)x[4 * i + 2], d = (__m512)x[4 * i + 3];
        const __m512d ab = (__m512d)((Vector)_mm512_unpacklo_ps(a, b) + (Vector)_mm512_unpackhi_ps(a, b));
        const __m512d cd = (__m512d)((Vector)_mm512_unpacklo_ps(c, d) + (Vector)_mm512_unpackhi_ps(c, d));
        quarter[i] = (Vector)_mm512_unpacklo_pd(ab, cd) + (Vector)_mm512_unpackhi_pd(ab, cd);
    }
    auto half = [](Vector x, Vector y) {
        return (Vector)_mm512_shuffle_f32x4((__m512)x, (__m512)y, 0x88) +
               (Vector)_mm512_shuffle_f32x4((__m512)x, (__m512)y, 0xdd);
    };
    return half(half(quarter[0], quarter[1]), half(quarter[2], quarter[3]));
#elif defined(__AVX2__)
    Vector half[2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
        const __m256 a = (__m256)x[4 * i], b = (__m256)x[4 * i + 1], c = (__m256)x[4 * i + 2], d = (__m256)x[4 * i + 3];
        const __m256d ab = (__m256d)((Vector)_mm256_unpacklo_ps(a, b) + (Vector)_mm256_unpackhi_ps(a, b));
        const __m256d cd = (__m256d)((Vector)_mm256_unpacklo_ps(c, d) + (Vector)_mm256_unpackhi_ps(c, d));
        half[i] = (Vector)_mm256_unpacklo_pd(ab, cd) + (Vector)_mm256_unpackhi_pd(ab, cd);
    }
    return (Vector)_mm256_permute2f128_ps((__m256)half[0], (__m256)half[1], 0x20) +
           (Vector)_mm256_permute2f128_ps((__m256)half[0], (__m256)half[1], 0x31);
#else
    Vector sums = {};
    for (int l = 0; l < LATEMAX_LANES; ++l) {
        Vector one = x[l];
        for (int w = LATEMAX_LANES / 2; w; w /= 2)
            for (int i = 0; i < w; ++i) one[i] += one[i + w];
        sums[l] = one[0];
    }
    return sums;
#endif
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
