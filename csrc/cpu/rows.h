/* Access to token rows of any dtype, stride and alignment. */
#ifndef LATEMAX_CPU_ROWS_H
#define LATEMAX_CPU_ROWS_H

#include <cmath>
#include <cstdlib>
#include <memory>
#include <new>

#include "level.h"

namespace latemax {

inline bool is_code(maxsim_dtype dtype) { return dtype >= MAXSIM_I8; }

inline int64_t item_size(maxsim_dtype dtype) { return dtype == MAXSIM_F32 ? 4 : is_code(dtype) ? 1 : 2; }

/* max(norm, EPS); NaN stays NaN. */
inline float clamped_norm(float squares) {
    const float norm = std::sqrt(squares);
    return norm < EPS ? EPS : norm;
}

inline const char *at(const void *base, maxsim_dtype dtype, int64_t element) {
    return static_cast<const char *>(base) + element * item_size(dtype);
}

/* Where the tokens and the mask of one item are. */
struct Item {
    const char *tokens = nullptr;
    int64_t stride = 0; /* bytes between tokens */
    const uint8_t *mask = nullptr;
    int64_t mask_stride = 0;
    const float *scale = nullptr, *error = nullptr; /* of codes: those of its first token */
};

/* Item n of a side; of own candidates, that of a query. */
inline Item item(const maxsim_side &s, int64_t query, int64_t n) {
    const int64_t size = item_size(s.dtype), first = s.offsets ? s.offsets[n] : query * s.scale_stride_q + n * s.l;
    const float *scale = s.scale ? s.scale + first : nullptr, *error = s.error ? s.error + first : nullptr;
    if (s.separate) {
        const maxsim_item &x = s.separate[n];
        return {static_cast<const char *>(x.tokens), x.stride_l * size, x.mask, 1, scale, error};
    }
    const int64_t token = s.offsets ? s.offsets[n] * s.stride_l : query * s.stride_q + n * s.stride_n;
    const int64_t masked = s.offsets ? s.offsets[n] * s.mask_stride_l : query * s.mask_stride_q + n * s.mask_stride_n;
    return {at(s.tokens, s.dtype, token), s.stride_l * size, s.mask ? s.mask + masked : nullptr, s.mask_stride_l,
            scale, error};
}

/* The argmax of row a against its candidate c, one per query token. */
inline int32_t *argmax_row(const maxsim_args &args, int64_t a, int64_t c) {
    const bool ragged = args.q.offsets && !args.query_ids;
    return args.argmax + (ragged ? c * args.q.total + args.q.offsets[a] : (a * args.n_c + c) * args.q.l);
}

/* The number of query a's first token across all queries. */
inline int64_t query_begin(const maxsim_args &args, int64_t a) {
    return args.q.offsets ? args.q.offsets[a] : a * args.q.l;
}

/* The query of row a of candidates and outputs. */
inline int64_t query_number(const maxsim_args &args, int64_t a) { return args.query_ids ? args.query_ids[a] : a; }

inline int64_t query_length(const maxsim_args &args, int64_t a) {
    return args.q.offsets ? args.q.offsets[a + 1] - args.q.offsets[a] : args.q.l;
}

/* The ragged document that is candidate c of query a, or -1. */
inline int64_t document_number(const maxsim_args &args, int64_t a, int64_t c) {
    return args.candidates ? args.candidates[a * args.n_c + c] : c;
}

/* Converts a row to float32; stride counts elements. */
inline void widen_row(const Level &level, maxsim_dtype dtype, const void *x, int64_t stride, int64_t n, float *out) {
    if (stride == 1) return level.widen(dtype, x, n, out);
    for (int64_t k = 0; k < n; ++k) level.widen(dtype, at(x, dtype, k * stride), 1, out + k);
}

/* Cache-line aligned memory that only grows: fresh memory in each call would cost a page fault every 4 KiB. */
template <class T>
class Buffer {
  public:
    T *get(int64_t n) {
        if (n > size_) {
            const size_t bytes = (static_cast<size_t>(n) * sizeof(T) + 63) / 64 * 64;
            memory_.reset(static_cast<T *>(std::aligned_alloc(64, bytes)));
            size_ = memory_ ? n : 0;
            if (!memory_) throw std::bad_alloc();
        }
        return memory_.get();
    }

  private:
    struct Free {
        void operator()(T *memory) const { std::free(memory); }
    };
    std::unique_ptr<T, Free> memory_;
    int64_t size_ = 0;
};

}  // namespace latemax

#endif
