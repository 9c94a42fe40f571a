/* What a thread block works on: which query block against which document, and where both are in memory. */
#pragma once

#include "maxsim_cuda.h"
#include "plan.h"
#include "ptx.h"

namespace latemax {

/* What every forward kernel is given. */
struct Forward {
    maxsim_args a;
    Workspace work;
    Plan plan;
    /* A float a token, in the order of the masks' shapes: scales of codes, or what makes tokens unit vectors; NULL: all 1.
     * The sm_90 kernel takes the norms of documents from its tiles: d_factors are then scales, or NULL. */
    const float *q_factors, *d_factors;
};

constexpr int NONE = 0x7fffffff;

/* One query, or one chunk of it, in a query block. `unit` counts the segments of all queries. */
struct Segment {
    int64_t query, unit;
    int chunk;
    bool exists;
};

/* Where a query's tokens are. */
struct Query {
    int64_t start;  // row of its first token, with q_offsets
    int length;
};

/* Item i of ragged tokens, clamped to them: checking the offsets would need a device sync. */
__device__ inline Query span(const int64_t *offsets, int64_t i, int64_t tokens) {
    int64_t first = offsets[i], end = offsets[i + 1];
    first = first < 0 ? 0 : first > tokens ? tokens : first;
    end = end < first ? first : end > tokens ? tokens : end;
    return {first, static_cast<int>(end - first)};
}

__device__ inline Query query_of(const maxsim_args &a, int64_t query) {
    if (!a.q.offsets) return {0, static_cast<int>(a.q.l)};
    return span(a.q.offsets, query, a.q.total);
}

/* Segment i of a query block. The segments of a ragged query follow one another from work.units[query] on. */
__device__ inline Segment segment_of(const Forward &f, int64_t block, int i) {
    const maxsim_args &a = f.a;
    const Plan &p = f.plan;
    const int64_t index = block * p.segments + i;
    if (a.q.offsets) {
        int64_t low = 0, high = a.n_q - 1;
        while (low < high) {
            const int64_t middle = (low + high + 1) / 2;
            if (f.work.units[middle] <= index) low = middle;
            else high = middle - 1;
        }
        const int chunk = static_cast<int>(index - f.work.units[low]);
        // with own documents the last block of a query may have segments without tokens
        return {low, index, chunk, index < f.work.units[a.n_q] && (chunk == 0 || chunk * p.slot < query_of(a, low).length)};
    }
    if (a.own) {
        const int64_t per = (p.chunks + p.segments - 1) / p.segments, query = block / per;
        const int chunk = static_cast<int>(block % per) * p.segments + i;
        return {query, query * p.chunks + chunk, chunk, chunk < p.chunks};
    }
    if (p.chunks == 1) return {index, index, 0, index < a.n_q};
    return {index / p.chunks, index, static_cast<int>(index % p.chunks), index < a.n_q * p.chunks};
}
/* The query whose documents a block walks: its only one where queries have their own, else any. */
__device__ inline int64_t owner_of(const Forward &f, int64_t block) { return f.a.own ? segment_of(f, block, 0).query : 0; }

/* Query blocks: of ragged queries the host knows only the most there can be. */
__device__ inline int64_t blocks_of(const Forward &f) {
    return f.a.q.offsets ? ceil_div(f.work.units[f.a.n_q], f.plan.segments) : f.plan.blocks;
}
__device__ inline bool query_keeps(const maxsim_args &a, int64_t query, const Query &q, int token) {
    if (!a.q.mask) return true;
    const int64_t at = a.q.offsets ? (q.start + token) * a.q.mask_stride_l
                                   : query * a.q.mask_stride_n + token * a.q.mask_stride_l;
    return a.q.mask[at] != 0;
}
__device__ inline float query_factor(const Forward &f, int64_t query, const Query &q, int token) {
    return f.q_factors ? f.q_factors[(f.a.q.offsets ? q.start : query * f.a.q.l) + token] : 1.0f;
}

/* A query's argmax against its candidate c, one a token. */
__device__ inline int32_t *argmax_of(const maxsim_args &a, int64_t query, const Query &q, int64_t c) {
    return a.argmax + (a.q.offsets ? c * a.q.total + q.start : (query * a.n_c + c) * a.q.l);
}

/* What makes a token of this norm a unit vector: 1 / max(norm, 1e-12). The norm of codes is that of the integers, and theirs
 * is scale / max(scale * norm, 1e-12). */
__device__ inline float unit_factor(float norm, float scale = 1.0f) {
    const float length = scale * norm;
    // not fmaxf, which would hide a NaN
    return scale / (length < 1e-12f ? 1e-12f : length);
}

/* Where a document's tokens are. */
struct Document {
    int64_t owner, number;  // coordinates of a dense document
    int64_t start;          // row of its first token, with d_offsets
    int length;
};

/* A mask without elements has the null address: it is none, and the lengths, which only a mask fills, are not read. */
__device__ inline Document document_of(const Forward &f, int64_t query, int64_t c) {
    const maxsim_args &a = f.a;
    const int64_t owner = a.own ? query : 0;
    if (!a.d.offsets) return {owner, c, 0, a.d.mask ? f.work.d_lengths[owner * a.n_c + c] : static_cast<int>(a.d.l)};
    const int64_t id = a.candidates ? a.candidates[query * a.n_c + c] : c;
    if (id < 0 || id >= a.d.n) return {0, 0, 0, 0};
    const Query rows = span(a.d.offsets, id, a.d.total);
    return {0, 0, rows.start, a.d.mask ? f.work.d_lengths[id] : rows.length};
}
/* An invalid candidate, neither a document nor -1: scored NaN, since raising would need a device sync. */
__device__ inline bool broken_candidate(const maxsim_args &a, int64_t query, int64_t c) {
    if (!a.candidates) return false;
    const int64_t id = a.candidates[query * a.n_c + c];
    return id < -1 || id >= a.d.n;
}

__device__ inline bool document_keeps(const maxsim_args &a, const Document &d, int row) {
    if (row >= d.length) return false;
    if (!a.d.mask) return true;
    const int64_t at = a.d.offsets ? (d.start + row) * a.d.mask_stride_l
                                   : d.owner * a.d.mask_stride_q + d.number * a.d.mask_stride_n + row * a.d.mask_stride_l;
    return a.d.mask[at] != 0;
}
/* What a similarity with this document token is multiplied with; negative: the token is masked or there is none. */
__device__ inline float row_scale(const Forward &f, const Document &d, int row) {
    const maxsim_args &a = f.a;
    if (!document_keeps(a, d, row)) return -1.0f;
    if (!f.d_factors) return 1.0f;
    return f.d_factors[a.d.offsets ? d.start + row : (d.owner * a.n_c + d.number) * a.d.l + row];
}

}  // namespace latemax
