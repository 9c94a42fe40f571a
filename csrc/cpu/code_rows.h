/* Rewrites rows of codes to what code_kernel.h multiplies. Included by codes_*.cpp after it. */
namespace latemax {
namespace {

/* Each writes one row; those of int8 codes return lanes whose sum is that of their squares, if asked. */
LATEMAX_INLINE vi copy_bits(const char *from, int64_t dim, char *to) {
    const int64_t bytes = (dim + 7) / 8;
    std::memcpy(to, from, bytes);
    std::memset(to + bytes, 0, (dim + 31) / 32 * 4 - bytes);
    return vi{};
}

/* 1 and -1. dim is a multiple of 8; the least significant bit of a byte comes first. */
LATEMAX_INLINE vi bits_to_i16(const char *from, int64_t dim, char *to) {
    int16_t *out = reinterpret_cast<int16_t *>(to);
    int64_t k = 0;
#if defined(__AVX512BW__)
    for (; k + 32 <= dim; k += 32)
        _mm512_storeu_si512(out + k, _mm512_mask_blend_epi16(load<__mmask32>(from + k / 8), _mm512_set1_epi16(-1),
                                                              _mm512_set1_epi16(1)));
#elif defined(__AVX2__)
    const __m256i bit = _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, (short)0x8000);
    for (; k + 16 <= dim; k += 16) {
        const __m256i bits = _mm256_set1_epi16(load<int16_t>(from + k / 8));
        const __m256i unset = _mm256_cmpeq_epi16(_mm256_and_si256(bits, bit), _mm256_setzero_si256());
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(out + k), _mm256_or_si256(unset, _mm256_set1_epi16(1)));
    }
#endif
    for (; k < dim; ++k) out[k] = (from[k / 8] >> k % 8 & 1) * 2 - 1;
    return vi{};
}

template <bool NORM>
LATEMAX_INLINE vi int8_to_i16(const char *from, int64_t dim, char *to) {
    const int8_t *code = reinterpret_cast<const int8_t *>(from);
    int16_t *out = reinterpret_cast<int16_t *>(to);
    vi sum = {};
    int64_t k = 0;
#if defined(__AVX2__)
    for (; k + 2 * LATEMAX_LANES <= dim; k += 2 * LATEMAX_LANES) {
#if defined(__AVX512BW__)
        const vi x = (vi)_mm512_cvtepi8_epi16(load<__m256i>(code + k));
#else
        const vi x = (vi)_mm256_cvtepi8_epi16(load<__m128i>(code + k));
#endif
        std::memcpy(out + k, &x, sizeof x);
        if (NORM) sum += pairs(x, x);
    }
#endif
    int32_t rest = 0;
    for (; k < dim; ++k) {
        out[k] = code[k];
        if (NORM) rest += code[k] * code[k];
    }
    if (dim % 2) out[dim] = 0;
    return sum + vi{rest};
}

/* Adds 128. WRITE: else only the sum of squares. */
template <bool WRITE, bool NORM>
LATEMAX_INLINE vi int8_to_i8(const char *from, int64_t dim, char *to) {
    vi sum = {};
    int64_t k = 0;
#if defined(__AVX512VNNI__)
    const __m512i sign = _mm512_set1_epi8((char)0x80);
    auto take = [&](__m512i x) {
        const __m512i size = _mm512_abs_epi8(x);
        if (NORM) sum = (vi)_mm512_dpbusd_epi32((__m512i)sum, size, size);
        return _mm512_xor_si512(x, sign);
    };
    for (; k + 64 <= dim; k += 64) {
        const __m512i above = take(_mm512_loadu_si512(from + k));
        if (WRITE) _mm512_storeu_si512(to + k, above);
    }
    if (k < dim) {
        /* zeros add nothing; a masked store takes many cycles */
        alignas(64) char last[64];
        _mm512_store_si512(last, take(_mm512_maskz_loadu_epi8(((__mmask64)1 << (dim - k)) - 1, from + k)));
        if (WRITE) std::memcpy(to + k, last, (dim - k + 3) / 4 * 4);
    }
    return sum;
#else
#if defined(__AVX2__)
    for (; k + 32 <= dim; k += 32) {
        const __m256i x = load<__m256i>(from + k), above = _mm256_xor_si256(x, _mm256_set1_epi8((char)0x80));
        if (WRITE) std::memcpy(to + k, &above, 32);
#if defined(__AVX512BW__)
        const vi wide = (vi)_mm512_cvtepi8_epi16(x);
        if (NORM) sum += pairs(wide, wide);
#else
        const vi low = (vi)_mm256_cvtepi8_epi16(_mm256_castsi256_si128(x));
        const vi high = (vi)_mm256_cvtepi8_epi16(_mm256_extracti128_si256(x, 1));
        if (NORM) sum += pairs(low, low) + pairs(high, high);
#endif
    }
#endif
    int32_t rest = 0;
    for (; k < dim; ++k) {
        if (WRITE) to[k] = from[k] ^ (char)0x80;
        if (NORM) rest += (signed char)from[k] * (signed char)from[k];
    }
    for (; WRITE && k % 4; ++k) to[k] = 0;
    return sum + vi{rest};
#endif
}

template <bool NORM, class Row>
LATEMAX_INLINE void each_row(const Codes &c, int64_t first, int64_t n, int32_t *squares, Row row) {
    const int64_t bytes = c.to ? 4 * steps_of(c.form, c.dim) : 0, dim = c.dim, stride = c.stride;
    const char *from = c.base + (c.gather ? 0 : first * stride);
    char *to = c.to + first * bytes;
    for (int64_t i = 0; i < n; i += LATEMAX_LANES) {
        vi lanes[LATEMAX_LANES];
        for (int64_t l = 0; l < LATEMAX_LANES; ++l, to += bytes) {
            lanes[l] = vi{};
            if (i + l < n) lanes[l] = row(from + (c.gather ? c.gather[first + i + l] : i + l) * stride, dim, to);
        }
        if (NORM) *reinterpret_cast<vi_any *>(squares + i) = sums_of_lanes(lanes);
    }
}

/* Writes n rows, unless they are in place; squares [n]. */
inline void write_rows(const Codes &c, int64_t first, int64_t n, int32_t *squares) {
    const bool norm = c.normalize || c.radius;
    auto copied = [](const char *x, int64_t dim, char *to) { return copy_bits(x, dim, to); };
    auto signs = [](const char *x, int64_t dim, char *to) { return bits_to_i16(x, dim, to); };
    auto wide = [](const char *x, int64_t dim, char *to) { return int8_to_i16<false>(x, dim, to); };
    auto wide_norm = [](const char *x, int64_t dim, char *to) { return int8_to_i16<true>(x, dim, to); };
    auto up = [](const char *x, int64_t dim, char *to) { return int8_to_i8<true, false>(x, dim, to); };
    auto up_norm = [](const char *x, int64_t dim, char *to) { return int8_to_i8<true, true>(x, dim, to); };
    auto only_norm = [](const char *x, int64_t dim, char *to) { return int8_to_i8<false, true>(x, dim, to); };
    if (!c.to && c.form == BITS) return;
    if (!c.to) return norm ? each_row<true>(c, first, n, squares, only_norm) : void();
    if (c.form == BITS) return each_row<false>(c, first, n, squares, copied);
    if (c.from == MAXSIM_BITS) return each_row<false>(c, first, n, squares, signs);
    if (c.form == I8) return norm ? each_row<true>(c, first, n, squares, up_norm) : each_row<false>(c, first, n, squares, up);
    norm ? each_row<true>(c, first, n, squares, wide_norm) : each_row<false>(c, first, n, squares, wide);
}

/* Rows in their new form, and factors and radii. A norm computed here is off by less than a relative 2^-22, and 2^-20
 * covers the few operations of a radius; 2^-100 covers what underflows in a product. */
inline void rewrite(const Codes &c) {
    const bool norms = c.normalize || c.radius;
    int32_t squares[64];
    constexpr float UP = 1 + 0x1p-20f, DOWN = 1 - 0x1p-20f;
    const float inf = __builtin_inff();
    for (int64_t first = 0; first < c.count; first += 64) {
        const int64_t n = c.count - first < 64 ? c.count - first : 64;
        write_rows(c, first, n, squares);
        for (int64_t i = 0; norms && i < n; i += LATEMAX_LANES) {
            vf_any *const scale = reinterpret_cast<vf_any *>(c.scale + first + i);
            const vf given = *scale;
            const vf norm = c.from == MAXSIM_BITS ? vf{} + c.norm_of_bits : root(to_float(*reinterpret_cast<vi_any *>(squares + i)));
            const vf length = given * norm;
            const vi tiny = length < EPS;
            if (!c.radius) {
                *scale = tiny ? given / EPS : 1.0f / norm;
                continue;
            }
            vf_any *const radius = reinterpret_cast<vf_any *>(c.radius + first + i);
            const vf error = *radius;
            vf factor = given, apart = error, size = length;
            if (c.normalize) {
                /* of unit vectors; tokens that may be shorter than EPS, or of no direction, are within 2 */
                const vf sum = 2.0f * length * DOWN - error;
                const vf near = 2.0f * error / sum * UP;
                apart = ((length * DOWN - error > 2 * EPS) & (near < 2.0f)) ? near : vf{} + 2.0f;
                factor = norm > 0.0f ? 1.0f / norm : vf{};
                size = vf{} + 1.0f;
            }
            const vf all = (apart * (1.0f + c.query_error) + size * (c.query_error + c.rounding)) * UP + 0x1p-100f;
            const vi known = (error < inf) & (all < inf) & (factor < inf);
            *radius = known ? all : vf{} + inf;
            *scale = known ? factor : vf{};
        }
    }
}

}  // namespace
}  // namespace latemax
