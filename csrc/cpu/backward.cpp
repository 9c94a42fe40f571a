/* Backward from the recorded argmax. One thread sums each row of a gradient, in a fixed order, so the result is
 * repeatable bit for bit with any number of threads and needs no atomics.
 *
 *     grad_q[a, i]    = sum over c of                           g[a, c] d[c, argmax[a, c, i]]     a gather
 *     grad_d[c, j]    = sum over a, i with argmax[a, c, i] = j  g[a, c] q[a, i]                   by document
 *
 * With weights w, grad_w[a, i] = <q[a, i], grad_q[a, i]>, and then grad_q[a, i] and q[a, i] above are multiplied by w[a, i].
 *
 * With normalize the sums are over unit vectors, followed by the gradient of x / max(norm, EPS); a clamped norm is a
 * constant.
 */
#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "maxsim_cpu.h"
#include "rows.h"
#include "threads.h"

namespace latemax {
namespace {

/* multiply-adds that are worth a thread of their own */
constexpr double THREAD_SUMS = 5e5;

/* Round float32 to the gradient's dtype: to nearest, ties to even. */
uint16_t to_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (x != x) return static_cast<uint16_t>(bits >> 16 | 0x40);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

uint16_t to_f16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
    if (magnitude >= 0x47800000) return static_cast<uint16_t>(sign | 0x7c00);
    if (magnitude < 0x38800000) {
        /* subnormal, below 2^-14: values are 2^-24 apart, and adding 0.5 rounds at that bit */
        float y;
        std::memcpy(&y, &magnitude, 4);
        y += 0.5f;
        uint32_t rounded;
        std::memcpy(&rounded, &y, 4);
        return static_cast<uint16_t>(sign | (rounded - 0x3f000000));
    }
    /* the carry of rounding up may reach the exponent, up to infinity, which is correct */
    return static_cast<uint16_t>(sign | (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
}

void store(maxsim_dtype dtype, const float *x, int64_t n, void *out) {
    if (dtype == MAXSIM_F32) {
        std::memcpy(out, x, static_cast<size_t>(n) * 4);
        return;
    }
    uint16_t *half = static_cast<uint16_t *>(out);
    for (int64_t k = 0; k < n; ++k) half[k] = dtype == MAXSIM_BF16 ? to_bf16(x[k]) : to_f16(x[k]);
}

/* Query a, and the slot c in which it names a document. */
struct Pair {
    int64_t a, c;
};

class Backward {
  public:
    Backward(const maxsim_args &args, const Gradients &out, const Level &level, int threads)
        : args_(args), out_(out), level_(level), own_(args.own != 0), q_tokens_(args.q.total) {
        const double sums = static_cast<double>(args.n_c * q_tokens_) * static_cast<double>(args.dim);
        threads_ = std::max(1, static_cast<int>(std::min<double>(threads, sums / THREAD_SUMS)));
    }
    void run() {
        if (args_.normalize) compute_query_norms();
        if (out_.grad_q || out_.grad_weights) queries();
        if (out_.grad_d && args_.candidates) sort_pairs();
        if (out_.grad_d) documents();
    }

  private:
    template <class Body>
    void each(int64_t n, Body body);
    void compute_query_norms();
    void queries();
    void sort_pairs();
    void documents();
    template <class Body>
    void each_query(int64_t document, Body body) const;
    void through_norm(const float *x, float norm, float *grad) const;

    float g(int64_t a, int64_t c) const { return out_.g[a * out_.g_stride_q + c * out_.g_stride_c]; }
    /* A row of q is numbered across all queries. */
    int64_t query_begin(int64_t a) const { return latemax::query_begin(args_, a); }
    const char *q(int64_t row) const {
        const int64_t a = args_.q.offsets ? 0 : row / args_.q.l, i = row - a * args_.q.l;
        return at(args_.q.tokens, args_.q.dtype, a * args_.q.stride_n + i * args_.q.stride_l);
    }
    const char *d(int64_t a, int64_t c, int64_t j) const {
        const int64_t first = args_.d.offsets ? args_.d.offsets[document_number(args_, a, c)] * args_.d.stride_l
                                              : a * args_.d.stride_q + c * args_.d.stride_n;
        return at(args_.d.tokens, args_.d.dtype, first + j * args_.d.stride_l);
    }
    /* Documents and rows in the order of grad_d. */
    int64_t n_documents() const { return args_.d.offsets ? args_.d.n : (own_ ? args_.n_q : 1) * args_.n_c; }
    int64_t document_begin(int64_t n) const { return args_.d.offsets ? args_.d.offsets[n] : n * args_.d.l; }

    const maxsim_args &args_;
    const Gradients &out_;
    const Level &level_;
    const bool own_;
    const int64_t q_tokens_;
    int threads_;
    std::vector<float> q_norms_; /* [q_tokens_] */
    /* With candidates: the pairs that name each document, ordered by query and slot. */
    std::vector<int64_t> pairs_begin_;
    std::vector<Pair> pairs_;
};

/* Runs body(first, end) on chunks of 0 .. n, about eight for each thread. */
template <class Body>
void Backward::each(int64_t n, Body body) {
    const int64_t share = std::max<int64_t>(1, n / (8 * threads_));
    std::atomic<int64_t> next{0};
    auto work = [&] {
        for (int64_t first; (first = next.fetch_add(share, std::memory_order_relaxed)) < n;)
            body(first, std::min(first + share, n));
    };
    parallel(threads_, work);
}

void Backward::compute_query_norms() {
    q_norms_.resize(q_tokens_);
    each(q_tokens_, [&](int64_t first, int64_t end) {
        for (int64_t r = first; r < end; ++r)
            q_norms_[r] = clamped_norm(level_.sum_of_squares(args_.q.dtype, q(r), args_.dim));
    });
}

/* grad = (grad - unit <unit, grad>) / norm; a zero gradient stays zero even if x holds NaN or infinity. */
void Backward::through_norm(const float *x, float norm, float *grad) const {
    bool nonzero = false;
    float dot = 0;
    for (int64_t k = 0; k < args_.dim; ++k) {
        nonzero |= grad[k] != 0;
        dot += x[k] / norm * grad[k];
    }
    if (!nonzero) {
        std::fill_n(grad, args_.dim, 0.0f);
        return;
    }
    if (!(norm > EPS)) dot = 0;
    for (int64_t k = 0; k < args_.dim; ++k) grad[k] = (grad[k] - x[k] / norm * dot) / norm;
}

void Backward::queries() {
    const int64_t dim = args_.dim;
    each(q_tokens_, [&](int64_t first, int64_t end) {
        static thread_local Buffer<float> sums, wide_memory;
        const int64_t rows = end - first;
        float *sum = sums.get(rows * dim), *wide = wide_memory.get(dim);
        std::fill_n(sum, rows * dim, 0.0f);
        const int64_t *ends = args_.q.offsets ? args_.q.offsets + 1 : nullptr;
        int64_t a = ends ? std::upper_bound(ends, ends + args_.n_q, first) - ends : first / args_.q.l;
        /* documents in the outer loop: all gathers from one run while its tokens are in cache */
        for (; a < args_.n_q && query_begin(a) < end; ++a)
            for (int64_t c = 0; c < args_.n_c; ++c) {
                const int64_t begin = query_begin(a);
                const int32_t *best = argmax_row(args_, a, c);
                const float weight = g(a, c);
                for (int64_t r = std::max(first, begin); r < std::min(end, begin + query_length(args_, a)); ++r) {
                    const int32_t j = best[r - begin];
                    if (j < 0) continue;
                    const char *row = d(a, c, j);
                    float scale = weight;
                    if (args_.normalize) scale /= clamped_norm(level_.sum_of_squares(args_.d.dtype, row, dim));
                    level_.add_scaled(args_.d.dtype, scale, row, dim, sum + (r - first) * dim);
                }
            }
        for (int64_t r = first; r < end; ++r) {
            float *grad = sum + (r - first) * dim;
            if (args_.normalize || out_.grad_weights) level_.widen(args_.q.dtype, q(r), dim, wide);
            if (out_.grad_weights) {
                float dot = 0;
                for (int64_t k = 0; k < dim; ++k) dot += (args_.normalize ? wide[k] / q_norms_[r] : wide[k]) * grad[k];
                out_.grad_weights[r] = dot;
            }
            if (!out_.grad_q) continue;
            for (int64_t k = 0; args_.weights && k < dim; ++k) grad[k] *= args_.weights[r];
            if (args_.normalize) through_norm(wide, q_norms_[r], grad);
            store(args_.q.dtype, grad, dim, static_cast<char *>(out_.grad_q) + r * dim * item_size(args_.q.dtype));
        }
    });
}

/* Counting sort of the pairs by document. */
void Backward::sort_pairs() {
    pairs_begin_.assign(args_.d.n + 1, 0);
    const int64_t n = args_.n_q * args_.n_c;
    for (int64_t p = 0; p < n; ++p)
        if (args_.candidates[p] >= 0) ++pairs_begin_[args_.candidates[p] + 1];
    for (int64_t k = 0; k < args_.d.n; ++k) pairs_begin_[k + 1] += pairs_begin_[k];
    pairs_.resize(pairs_begin_.back());
    std::vector<int64_t> next(pairs_begin_.begin(), pairs_begin_.end() - 1);
    for (int64_t p = 0; p < n; ++p)
        if (args_.candidates[p] >= 0) pairs_[next[args_.candidates[p]]++] = {p / args_.n_c, p % args_.n_c};
}

/* Calls body(a, c) for every query that was scored against the document, in order. */
template <class Body>
void Backward::each_query(int64_t document, Body body) const {
    if (!args_.n_c) return; /* candidates [n_q, 0] have no address */
    if (args_.candidates) {
        for (int64_t p = pairs_begin_[document]; p < pairs_begin_[document + 1]; ++p) body(pairs_[p].a, pairs_[p].c);
    } else if (own_) {
        body(document / args_.n_c, document % args_.n_c);
    } else {
        for (int64_t a = 0; a < args_.n_q; ++a) body(a, document);
    }
}

/* Chunks are cut by rows, not by documents, so that they hold equal work whatever the lengths. A document belongs to
 * the chunk that holds its first row. */
void Backward::documents() {
    const int64_t dim = args_.dim, n = n_documents(), all = args_.d.total;
    const int64_t size = item_size(args_.d.dtype);
    char *out = static_cast<char *>(out_.grad_d);
    auto first_document = [&](int64_t row) {
        if (!args_.d.offsets) return (row + args_.d.l - 1) / args_.d.l;
        return static_cast<int64_t>(std::lower_bound(args_.d.offsets, args_.d.offsets + n, row) - args_.d.offsets);
    };
    each(all, [&](int64_t first, int64_t end) {
        static thread_local Buffer<float> sums, wide_memory;
        float *wide = wide_memory.get(dim);
        const int64_t outside = std::max(first, args_.d.offsets ? args_.d.offsets[n] : all);
        if (outside < end) std::memset(out + outside * dim * size, 0, (end - outside) * dim * size);
        for (int64_t u = first_document(first); u < first_document(end); ++u) {
            const int64_t begin = document_begin(u), length = document_begin(u + 1) - begin;
            const bool direct = args_.d.dtype == MAXSIM_F32;
            char *rows = out + begin * dim * size;
            float *sum = direct ? reinterpret_cast<float *>(rows) : sums.get(length * dim);
            std::fill_n(sum, length * dim, 0.0f);
            const char *x = nullptr;
            each_query(u, [&](int64_t a, int64_t c) {
                const int32_t *best = argmax_row(args_, a, c);
                const int64_t row = query_begin(a);
                if (!x) x = d(a, c, 0);
                for (int64_t i = 0; i < query_length(args_, a); ++i) {
                    if (best[i] < 0) continue;
                    float scale = g(a, c);
                    if (args_.weights) scale *= args_.weights[row + i];
                    if (args_.normalize) scale /= q_norms_[row + i];
                    level_.add_scaled(args_.q.dtype, scale, q(row + i), dim, sum + best[i] * dim);
                }
            });
            for (int64_t j = 0; args_.normalize && j < length; ++j) {
                float *grad = sum + j * dim;
                if (std::all_of(grad, grad + dim, [](float v) { return v == 0; })) continue;
                level_.widen(args_.d.dtype, at(x, args_.d.dtype, j * args_.d.stride_l), dim, wide);
                through_norm(wide, clamped_norm(level_.sum_of_squares(MAXSIM_F32, wide, dim)), grad);
            }
            if (!direct) store(args_.d.dtype, sum, length * dim, rows);
        }
    });
}

}  // namespace

void backward(const maxsim_args &args, const Gradients &out, const Level &level, int threads) {
    Backward(args, out, level, threads).run();
}

}  // namespace latemax
