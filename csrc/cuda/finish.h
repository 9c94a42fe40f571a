/* What becomes of the maxima over one document: scores and argmax. */
#pragma once

#include "items.h"

namespace latemax {

constexpr float INFINITE = __builtin_inff();

/* Maximum and lowest index among equals; NaN counts as the greatest. */
__device__ inline void merge(float &value, int &where, float other, int at) {
    const bool nan = value != value, other_nan = other != other;
    const bool equal = value == other || (nan && other_nan);
    if (equal ? at < where : other > value || (other_nan && !nan)) value = other, where = at;
}

/* What a query token's maximum counts with: its factor; negative: masked, or no token. A NaN counts. */
__device__ inline float query_weight(const Forward &f, const Segment &segment, const Query &tokens, int token) {
    const maxsim_args &a = f.a;
    if (token >= tokens.length || !query_keeps(a, segment.query, tokens, token)) return -1.0f;
    return query_factor(f, segment.query, tokens, token);
}

/* A segment and where the tokens of its query are. */
struct Part {
    Segment segment;
    Query tokens;
};
__device__ inline Part part_of(const Forward &f, int64_t block, int i) {
    const Segment segment = segment_of(f, block, i);
    return {segment, segment.exists ? query_of(f.a, segment.query) : Query{0, 0}};
}

/* Scores and argmax of a query block against document c. Warp `worker` of `workers` takes every `workers`-th segment;
 * maxima.value(row, where) and maxima.weight(row, ...) are those of a row of the block, maxima.part(i) is segment i; `first` is the lowest valid token
 * of the document, which is the argmax where all similarities are -inf, and NONE in an empty document.
 *
 * In pieces of CHUNK tokens a lane adds tokens lane and lane + 32, the lanes meet in a fixed tree, and the pieces are
 * added in order, here or in launch_sum: a score depends neither on where its query is in the block nor on the others. */
template <bool ARGMAX, class Maxima>
__device__ inline void finish(const Forward &f, int64_t c, int first, int worker, int workers, int lane,
                              const Maxima &maxima) {
    const maxsim_args &a = f.a;
    const Plan &p = f.plan;
    for (int i = worker; i < p.segments; i += workers) {
        const auto [segment, tokens] = maxima.part(i);
        if (!segment.exists) break;
        const int64_t query = segment.query;
        float total = 0;
        for (int piece = 0; piece < p.slot; piece += CHUNK) {
            float sum = 0;
#pragma unroll
            for (int half = 0; half < CHUNK; half += 32) {
                const int row = piece + half + lane, token = segment.chunk * p.slot + row;
                if (row >= p.slot || token >= tokens.length) continue;
                const float weight = maxima.weight(i * p.slot + row, segment, tokens, token);
                const bool counts = first != NONE && !(weight < 0);
                int where = NONE;
                const float value = maxima.value(i * p.slot + row, where);
                // all similarities of codes whose scale is 0 are equal
                if (a.q.scale && weight == 0 && value == value) where = first;
                if constexpr (ARGMAX) argmax_of(a, query, tokens, c)[token] = !counts ? -1 : where == NONE ? first : where;
                if (counts) sum += f.q_factors ? value * weight : value;
            }
            for (int mask = 16; mask > 0; mask /= 2) sum += ptx::shuffle_xor(sum, mask);
            total = piece ? total + sum : sum;
        }
        if (first == NONE) {
            // the first chunk answers for the whole query, the others add nothing
            bool any = false;
            for (int token = lane; segment.chunk == 0 && token < tokens.length; token += 32)
                any |= query_keeps(a, query, tokens, token);
            total = ptx::warp_any(any) ? static_cast<float>(a.empty_score) : 0.0f;
            if (broken_candidate(a, query, c)) total = nanf("");
        }
        if (lane == 0) {
            if (in_parts(a, p)) f.work.partial[segment.unit * a.n_c + c] = total;
            else a.scores[query * a.n_c + c] = total;
        }
    }
}

}  // namespace latemax
