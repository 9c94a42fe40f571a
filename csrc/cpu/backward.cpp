/* Backward from the recorded winners. Every row of a gradient is summed by one thread in one order: repeatable bit for
 * bit, whatever the number of threads, and without atomics.
 *
 *     grad_q[a, i]    = sum over c of            g[a, c] d[c, argmax[a, c, i]]     a gather
 *     grad_d[c, j]    = sum over a, i that j won  g[a, c] q[a, i]                  documents own their rows
 *
 * With normalize the same of unit vectors, then through x / max(norm, EPS); a clamped norm is a constant.
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

constexpr double THREAD_SUMS = 5e5;

/* float32 to the gradient's dtype, to nearest, ties to even. */
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
        /* below 2^-14: 2^-24 apart; adding 0.5 rounds at that place */
        float y;
        std::memcpy(&y, &magnitude, 4);
        y += 0.5f;
        uint32_t rounded;
        std::memcpy(&rounded, &y, 4);
        return static_cast<uint16_t>(sign | (rounded - 0x3f000000));
    }
    /* the carry of rounding up may reach the exponent, and infinity, as it should */
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

class Backward {
  public:
    Backward(const maxsim_args &args, const Gradients &out, const Level &level, int threads)
        : args_(args), out_(out), level_(level), own_(out.own) {
        const double sums = static_cast<double>(args.n_q * args.n_c) * static_cast<double>(args.l_q * args.dim);
        threads_ = std::max(1, static_cast<int>(std::min<double>(threads, sums / THREAD_SUMS)));
    }
    void run() {
        if (args_.normalize) measure_queries();
        if (out_.grad_q) queries();
        if (out_.grad_d) documents();
    }

  private:
    template <class Body>
    void each(int64_t n, Body body);
    void measure_queries();
    void queries();
    void documents();
    void through_norm(const float *x, float norm, float *grad) const;

    float g(int64_t a, int64_t c) const { return out_.g[a * out_.g_stride_q + c * out_.g_stride_c]; }
    const int32_t *argmax(int64_t a, int64_t c) const { return args_.argmax + (a * args_.n_c + c) * args_.l_q; }
    const char *q(int64_t a, int64_t i) const {
        return at(args_.q, args_.q_dtype, a * args_.q_stride_n + i * args_.q_stride_l);
    }
    const char *d(int64_t a, int64_t c, int64_t j) const {
        return at(args_.d, args_.d_dtype, a * args_.d_stride_q + c * args_.d_stride_n + j * args_.d_stride_l);
    }

    const maxsim_args &args_;
    const Gradients &out_;
    const Level &level_;
    const bool own_;
    int threads_;
    std::vector<float> q_norms_; /* [n_q * l_q] */
};

/* body(first, past) over chunks of 0 .. n, a few for each thread. */
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

void Backward::measure_queries() {
    q_norms_.resize(args_.n_q * args_.l_q);
    each(args_.n_q * args_.l_q, [&](int64_t first, int64_t past) {
        for (int64_t r = first; r < past; ++r)
            q_norms_[r] = clamped_norm(level_.sum_of_squares(args_.q_dtype, q(r / args_.l_q, r % args_.l_q), args_.dim));
    });
}

/* grad = (grad - unit <unit, grad>) / norm; 0 where nothing was given, whatever x holds. */
void Backward::through_norm(const float *x, float norm, float *grad) const {
    bool given = false;
    float along = 0;
    for (int64_t k = 0; k < args_.dim; ++k) {
        given |= grad[k] != 0;
        along += x[k] / norm * grad[k];
    }
    if (!given) {
      std::fill_n(grad, args_.dim, 0.0f);
      return;
    }
    if (!(norm > EPS)) along = 0;
    for (int64_t k = 0; k < args_.dim; ++k) grad[k] = (grad[k] - x[k] / norm * along) / norm;
}

void Backward::queries() {
    const int64_t dim = args_.dim, l_q = args_.l_q;
    each(args_.n_q * l_q, [&](int64_t first, int64_t past) {
        static thread_local Buffer<float> sums, wide_memory;
        const int64_t rows = past - first;
        float *sum = sums.get(rows * dim), *wide = wide_memory.get(dim);
        std::fill_n(sum, rows * dim, 0.0f);
        /* documents outside: each is gathered from while its tokens are in cache */
        for (int64_t a = first / l_q; a * l_q < past; ++a)
            for (int64_t c = 0; c < args_.n_c; ++c) {
                const int32_t *won = argmax(a, c);
                const float weight = g(a, c);
                for (int64_t r = std::max(first, a * l_q); r < std::min(past, (a + 1) * l_q); ++r) {
                    const int32_t j = won[r - a * l_q];
                    if (j < 0) continue;
                    const char *row = d(a, c, j);
                    float scale = weight;
                    if (args_.normalize) scale /= clamped_norm(level_.sum_of_squares(args_.d_dtype, row, dim));
                    level_.add_scaled(args_.d_dtype, scale, row, dim, sum + (r - first) * dim);
                }
            }
        for (int64_t r = first; r < past; ++r) {
            float *grad = sum + (r - first) * dim;
            if (args_.normalize) {
                level_.widen(args_.q_dtype, q(r / l_q, r % l_q), dim, wide);
                through_norm(wide, q_norms_[r], grad);
            }
            store(args_.q_dtype, grad, dim, static_cast<char *>(out_.grad_q) + r * dim * item_size(args_.q_dtype));
        }
    });
}

void Backward::documents() {
    const int64_t dim = args_.dim, l_q = args_.l_q, l_d = args_.l_d, n_c = args_.n_c;
    each(own_ ? args_.n_q * n_c : n_c, [&](int64_t first, int64_t past) {
        static thread_local Buffer<float> sums, wide_memory;
        float *wide = wide_memory.get(dim);
        for (int64_t unit = first; unit < past; ++unit) {
            const int64_t c = own_ ? unit % n_c : unit;
            const int64_t a_first = own_ ? unit / n_c : 0, a_past = own_ ? a_first + 1 : args_.n_q;
            char *out = static_cast<char *>(out_.grad_d) + unit * l_d * dim * item_size(args_.d_dtype);
            const bool direct = args_.d_dtype == MAXSIM_F32;
            float *sum = direct ? reinterpret_cast<float *>(out) : sums.get(l_d * dim);
            std::fill_n(sum, l_d * dim, 0.0f);
            for (int64_t a = a_first; a < a_past; ++a) {
                const int32_t *won = argmax(a, c);
                for (int64_t i = 0; i < l_q; ++i) {
                    if (won[i] < 0) continue;
                    float scale = g(a, c);
                    if (args_.normalize) scale /= q_norms_[a * l_q + i];
                    level_.add_scaled(args_.q_dtype, scale, q(a, i), dim, sum + won[i] * dim);
                }
            }
            for (int64_t j = 0; args_.normalize && j < l_d; ++j) {
                float *grad = sum + j * dim;
                if (std::all_of(grad, grad + dim, [](float x) { return x == 0; })) continue;
                level_.widen(args_.d_dtype, d(a_first, c, j), dim, wide);
                through_norm(wide, clamped_norm(level_.sum_of_squares(MAXSIM_F32, wide, dim)), grad);
            }
            if (!direct) store(args_.d_dtype, sum, l_d * dim, out);
        }
    });
}

}  // namespace

void backward(const maxsim_args &args, const Gradients &out, const Level &level, int threads) {
    Backward(args, out, level, threads).run();
}

}  // namespace latemax
