/* Gradient of the query tokens: each is the sum of g · d over the argmax that its documents recorded.
 *
 * A warp owns a query token and walks the documents 32 at a time: its lanes read an argmax each, then the warp adds up the
 * rows in order. The warps of a block have adjacent tokens, whose argmax share sectors of L1. Where there are few query tokens
 * the documents are split, and a second kernel adds up the parts in order.
 */
#pragma once

#include "backward.h"
#include "items.h"
#include "row.h"

namespace latemax {

/* The row of a document token, in units of 8 elements; false if there is none. */
__device__ inline bool row_of(const maxsim_args &a, int64_t query, int64_t c, int token, uint32_t &row) {
    if (!a.d.offsets) {
        row = static_cast<uint32_t>(((a.own ? query : 0) * a.d.stride_q + c * a.d.stride_n + token * a.d.stride_l) / 8);
        return true;
    }
    const int64_t id = a.candidates ? a.candidates[query * a.n_c + c] : c;
    if (id < 0 || id >= a.d.n) return false;
    const Query rows = span(a.d.offsets, id, a.d.total);
    row = token < rows.length ? static_cast<uint32_t>((rows.start + token) * a.d.stride_l / 8) : 0;
    return token < rows.length;
}

/* Rounds the gradient of query token `row` of n_q · l_q. */
template <class T, int C>
__device__ inline void write_query(const Backward &b, int64_t row, Sums<C> &sums) {
    const maxsim_args &a = b.a;
    const int dim = static_cast<int>(a.dim);
    if (a.normalize) {
        Row<C> x;
        const auto *tokens = static_cast<const uint16_t *>(a.q.tokens);
        x.load({tokens + row / a.q.l * a.q.stride_n + row % a.q.l * a.q.stride_l, dim}, 0);
        sums.template through_norm<T>(x, dim);
    }
    sums.template store<T>(static_cast<uint16_t *>(b.g.q) + row * dim, dim);
}

template <class T, int C>
__global__ void __launch_bounds__(GATHER_THREADS, C <= 8 ? 4 : 2) grad_q(const __grid_constant__ Backward b) {
    const maxsim_args &a = b.a;
    const int lane = ptx::thread_index() % 32, dim = static_cast<int>(a.dim), split = ptx::block_index() % b.splits;
    const int64_t row = static_cast<int64_t>(ptx::block_index() / b.splits) * GATHER_WARPS + ptx::thread_index() / 32;
    if (row >= a.n_q * a.q.l) return;
    const int64_t query = row / a.q.l;
    const int token = static_cast<int>(row % a.q.l);
    Sums<C> sums;
    sums.clear();
    for (int64_t first = static_cast<int64_t>(split) * 32; first < a.n_c; first += static_cast<int64_t>(b.splits) * 32) {
        const int64_t c = first + lane;
        const int best = c < a.n_c ? a.argmax[(query * a.n_c + c) * a.q.l + token] : -1;
        uint32_t offset = 0;
        const bool counts = best >= 0 && row_of(a, query, c, best, offset);
        const float weight = counts ? b.g.scores[query * b.g.stride_q + c * b.g.stride_c] : 0.0f;
        gather<T>(sums, static_cast<const uint16_t *>(a.d.tokens), counts, offset, weight, 0, dim, a.normalize, [](int) {});
    }
    if (b.splits == 1) write_query<T>(b, row, sums);
    else sums.put(b.g.parts + (split * a.n_q * a.q.l + row) * dim, dim);
}

/* Adds up the parts, a warp a query token. */
template <class T, int C>
__global__ void __launch_bounds__(GATHER_THREADS) sum_splits(const __grid_constant__ Backward b) {
    const maxsim_args &a = b.a;
    const int dim = static_cast<int>(a.dim);
    const int64_t rows = a.n_q * a.q.l;
    const int64_t row = static_cast<int64_t>(ptx::block_index()) * GATHER_WARPS + ptx::thread_index() / 32;
    if (row >= rows) return;
    Sums<C> sums;
    sums.clear();
    for (int split = 0; split < b.splits; ++split) sums.add_floats(b.g.parts + (split * rows + row) * dim, dim);
    write_query<T>(b, row, sums);
}

}  // namespace latemax
