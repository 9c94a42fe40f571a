#include "queries.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "codes.h"
#include "threads.h"

namespace latemax {

namespace {
constexpr int64_t KEEP_BYTES = 1 << 20;
/* a smaller panel is packed before another thread would be awake */
constexpr int64_t SHARE_BYTES = 64 << 10;
}

Queries::Queries(const maxsim_args &args, const Level &level, Form form)
    : args_(args), level_(level), form_(form), height_(panel_height(args, form)) {
    row_begin.resize(args.q.n + 1);
    token.reserve(args.q.total);
    for (int64_t a = 0; a < args.q.n; ++a) {
        const int64_t length = query_length(args, a);
        const Item query = item(args.q, 0, a);
        for (int64_t i = 0; i < length; ++i)
            if (!query.mask || query.mask[i * query.mask_stride]) token.push_back(static_cast<int32_t>(i));
        row_begin[a + 1] = static_cast<int64_t>(token.size());
    }
}

void Queries::add(int64_t query_first, int64_t query_end, int64_t row_first, int64_t row_end) {
    const int64_t vectors = (row_end - row_first + level_.lanes - 1) / level_.lanes;
    parts.push_back({query_first, query_end, row_first, row_end, vectors_, vectors});
    vectors_ += vectors;
}

void Queries::cut(bool each, int64_t wanted, bool split) {
    const int64_t n_q = args_.q.n;
    if (each) {
        /* a query that no row names is not packed */
        std::vector<char> named(n_q, !args_.query_ids);
        for (int64_t a = 0; args_.query_ids && a < args_.n_q; ++a) named[args_.query_ids[a]] = 1;
        for (int64_t a = 0; a < n_q; ++a) add(a, a + 1, row_begin[a], row_begin[named[a] ? a + 1 : a]);
    } else if (split) {
        /* at least two vectors: a single one leaves registers unused and runs slower */
        const int64_t pair = 2 * level_.lanes;
        const int64_t share = std::max((rows() + wanted * pair - 1) / (wanted * pair), int64_t{1}) * pair;
        for (int64_t r = 0; r < rows(); r += share) add(0, n_q, r, std::min(r + share, rows()));
        if (!rows()) add(0, n_q, 0, 0);
    } else {
        const int64_t share = std::max<int64_t>(1, (rows() + wanted - 1) / wanted);
        for (int64_t a = 0, end = 1; a < n_q; a = end++) {
            while (end < n_q && row_begin[end] - row_begin[a] < share) ++end;
            add(a, end, row_begin[a], row_begin[end]);
        }
    }
}

void Queries::pack(int threads) {
    /* a small panel keeps its memory between calls: the page faults of fresh memory cost more than packing */
    static thread_local Buffer<char> kept;
    const int64_t bytes = vectors_ * level_.lanes * height_ * 4;
    panel_ = (bytes > KEEP_BYTES ? own_ : kept).get(bytes);
    const bool codes = form_ > BF16;
    if (codes || (args_.normalize && form_ == BF16)) scale.resize(rows());
    if (codes) infinite.resize(rows());
    if (args_.upper) error.resize(rows());
    struct Block {
        size_t part;
        int64_t vector;
    };
    std::vector<Block> blocks;
    for (size_t p = 0; p < parts.size(); ++p)
        for (int64_t v = 0; v < parts[p].vectors; v += block(parts[p], v)) blocks.push_back({p, v});
    std::atomic<size_t> next{0};
    auto body = [&] {
        static thread_local Buffer<float> wide_memory;
        float *wide = wide_memory.get(args_.dim);
        for (size_t b; (b = next.fetch_add(1, std::memory_order_relaxed)) < blocks.size();) {
            const Part &part = parts[blocks[b].part];
            const int64_t v = blocks[b].vector, stride = this->block(part, v) * level_.lanes;
            char *block = const_cast<char *>(panel(part, v));
            const int64_t first = part.row_first + v * level_.lanes;
            int64_t query = std::upper_bound(row_begin.begin(), row_begin.end(), first) - row_begin.begin() - 1;
            for (int64_t lane = 0; lane < stride; ++lane) {
                const int64_t row = first + lane;
                char *out = block + 4 * lane;
                if (row >= part.row_end) {
                    for (int64_t k = 0; k < height_; ++k) std::memset(out + 4 * k * stride, 0, 4);
                    continue;
                }
                while (row >= row_begin[query + 1]) ++query;
                if (codes) {
                    const CodeToken t = pack_codes(args_, level_, form_, query, token[row], out, stride, wide);
                    scale[row] = t.scale, infinite[row] = t.infinite;
                    if (args_.upper) error[row] = t.error;
                } else {
                    pack_row(query, row, out, stride, wide);
                }
            }
        }
    };
    parallel(bytes < SHARE_BYTES ? 1 : threads, body);
}

void Queries::pack_row(int64_t query, int64_t row, char *out, int64_t stride, float *wide) {
    const int64_t dim = args_.dim, step = args_.q.stride_k;
    const bool bf16 = form_ == BF16;
    const Item from = item(args_.q, 0, query);
    const char *x = from.tokens + token[row] * from.stride;
    const bool plain = bf16 && !args_.normalize;
    if (plain) {
        for (int64_t k = 0; k < dim; ++k) std::memcpy(out + 4 * (k / 2) * stride + k % 2 * 2, x + 2 * k * step, 2);
    } else {
        widen_row(level_, args_.q.dtype, x, step, dim, wide);
        float factor = 1.0f;
        if (args_.normalize) {
            const float norm = clamped_norm(level_.sum_of_squares(MAXSIM_F32, wide, dim));
            if (bf16 && std::isfinite(norm)) {
                /* a power of two keeps bfloat16 exact and its products in range; the rest of the norm is applied to the
                 * maximum */
                int exponent = 0;
                std::frexp(norm, &exponent);
                factor = std::ldexp(1.0f, -exponent);
                scale[row] = 1.0f / std::ldexp(norm, -exponent);
            } else {
                for (int64_t k = 0; k < dim; ++k) wide[k] /= norm;
                if (bf16) scale[row] = 1.0f;
            }
        }
        for (int64_t k = 0; k < dim; ++k) {
            const float value = wide[k] * factor;
            if (bf16)
                std::memcpy(out + 4 * (k / 2) * stride + k % 2 * 2, reinterpret_cast<const char *>(&value) + 2, 2);
            else
                std::memcpy(out + 4 * k * stride, &value, 4);
        }
    }
    if (bf16 && dim % 2) std::memset(out + 4 * (dim / 2) * stride + 2, 0, 2);
}

}  // namespace latemax
