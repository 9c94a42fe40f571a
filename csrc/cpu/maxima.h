/* Running maxima over the rows of one document, kept in registers from the first row to the last. A kernel hands them
 * tile after tile: the products of U rows with V vectors of query tokens. Included by kernel.h.
 */
namespace latemax {
namespace {

/* Indices beyond the end repeat the last row, which changes no maximum. */
LATEMAX_INLINE int64_t within(const Rows &rows, int64_t i) { return i < rows.count ? i : rows.count - 1; }

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

/* Maxima of V vectors of query tokens and, with AT, the token number of each. */
template <int V, bool AT>
class Maxima {
  public:
    static constexpr int VECTORS = V;

    LATEMAX_INLINE Maxima(const float *best, const int32_t *at) {
        std::memcpy(&best_, best, sizeof best_);
        if (AT) std::memcpy(&at_, at, sizeof at_);
    }
    LATEMAX_INLINE void store(float *best, int32_t *at) const {
        std::memcpy(best, &best_, sizeof best_);
        if (AT) std::memcpy(at, &at_, sizeof at_);
    }
    /* Of rows j .. j + U. */
    template <int U>
    LATEMAX_INLINE void take(vf (&sum)[U][V], const Rows &rows, int64_t j) {
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
            const int32_t number = number_of(rows, j + u);
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) {
                if (AT) at_[v] = sum[u][v] > best_[v] ? vi{} + number : at_[v];
                best_[v] = greater(sum[u][v], best_[v]);
            }
        }
        /* comparisons with NaN are false, so the first NaN of a query token is written here, and stays */
        if (__builtin_expect(nan.ever(), 0)) {
#pragma GCC unroll 32
            for (int u = 0; u < U; ++u) {
                const int32_t number = number_of(rows, j + u);
#pragma GCC unroll 4
                for (int v = 0; v < V; ++v) {
                    const vi first = (sum[u][v] != sum[u][v]) & (best_[v] == best_[v]);
                    best_[v] = first ? sum[u][v] : best_[v];
                    if (AT) at_[v] = first ? vi{} + number : at_[v];
                }
            }
        }
    }

  private:
    static LATEMAX_INLINE int32_t number_of(const Rows &rows, int64_t j) {
        if (!AT) return 0;
        const int64_t i = within(rows, j);
        return (int32_t)(rows.number ? rows.number[i] : rows.first + i);
    }
    vf best_[V];
    vi at_[V] = {};
};

template <int V>
using Best = Maxima<V, false>;
template <int V>
using BestAt = Maxima<V, true>;

/* Bounds of the maxima: a similarity is within the row's radius times a factor of the query token. An infinite radius
 * times that is no NaN: the factor is not 0. */
template <int V>
class Limits {
  public:
    static constexpr int VECTORS = V;

    LATEMAX_INLINE Limits(const float *lower, const float *upper, const float *factor) {
        std::memcpy(&lower_, lower, sizeof lower_);
        std::memcpy(&upper_, upper, sizeof upper_);
        std::memcpy(&factor_, factor, sizeof factor_);
    }
    LATEMAX_INLINE void store(float *lower, float *upper, const float *) const {
        std::memcpy(lower, &lower_, sizeof lower_);
        std::memcpy(upper, &upper_, sizeof upper_);
    }
    template <int U>
    LATEMAX_INLINE void take(const vf (&sum)[U][V], const Rows &rows, int64_t j) {
#pragma GCC unroll 32
        for (int u = 0; u < U; ++u) {
            const int64_t i = within(rows, j + u);
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) {
                const vf x = sum[u][v] * rows.scale[i];
                lower_[v] = greater(x - factor_[v] * rows.radius[i], lower_[v]);
                upper_[v] = greater(x + factor_[v] * rows.radius[i], upper_[v]);
            }
        }
    }

  private:
    vf lower_[V], upper_[V], factor_[V];
};

}  // namespace
}  // namespace latemax
