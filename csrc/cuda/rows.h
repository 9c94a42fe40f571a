/* The running maximum of the sm_90 kernel, where query tokens are the rows of the accumulator and a maximum runs along a
 * thread's own registers. */
#pragma once

#include "finish.h"

namespace latemax {

/* Halves a list by one bit of an index: the selects of all levels of a tree of 16 leaves are 11. */
template <int COUNT>
__device__ __forceinline__ void halve(float *x, bool upper) {
#pragma unroll
    for (int i = 0; i < COUNT / 2; ++i) x[i] = upper ? x[i + COUNT / 2] : x[i];
}

/* The maximum of COUNT values and, in binary from the top, the number of the first that equals it: a tree of maxima and
 * one descent. */
template <int COUNT, bool ARGMAX>
struct Tree {
    static constexpr int BITS = Tree<COUNT / 2, ARGMAX>::BITS + 1;

    static __device__ __forceinline__ float run(const float (&x)[COUNT], bool *bits) {
        constexpr int HALF = COUNT / 2;
        float upper[HALF];
#pragma unroll
        for (int i = 0; i < HALF; ++i) upper[i] = ptx::max_nan(x[2 * i], x[2 * i + 1]);
        const float most = Tree<HALF, ARGMAX>::run(upper, bits);
        if constexpr (ARGMAX) {
            // the left value of each pair, down to that of the pair which holds the maximum
            float left[HALF];
#pragma unroll
            for (int i = 0; i < HALF; ++i) left[i] = x[2 * i];
            if constexpr (HALF >= 8) halve<8>(left, bits[BITS - 4]);
            if constexpr (HALF >= 4) halve<4>(left, bits[BITS - 3]);
            if constexpr (HALF >= 2) halve<2>(left, bits[BITS - 2]);
            // a NaN equals nothing, and where the maximum is NaN the first NaN is meant
            bits[BITS - 1] = !(left[0] == most || left[0] != left[0]);
        }
        return most;
    }
};
template <bool ARGMAX>
struct Tree<1, ARGMAX> {
    static constexpr int BITS = 0;

    static __device__ __forceinline__ float run(const float (&x)[1], bool *) { return x[0]; }
};

template <class T>
using Accumulator = typename T::Sum[32];  // a thread's part of 64 query tokens x 64 document tokens, see wgmma.h

/* A thread's part of 64 query tokens: rows 16 warp + lane / 4 and + 8, of each the columns 8 j + 2 (lane % 4) + (0, 1). */
template <bool ARGMAX>
struct Rows {
    float best[2];
    int where[2];

    __device__ __forceinline__ void clear() {
        best[0] = best[1] = -INFINITE;
        where[0] = where[1] = NONE;
    }

    /* COLUMNS columns from FIRST on of an accumulator that begins with the document's token `start`; value(h, k, at) is the
     * similarity of row h in column `at`, the k-th of this thread. */
    template <int FIRST, int COLUMNS, class Value>
    __device__ __forceinline__ void columns(int start, int lane, const Value &value) {
        constexpr int COUNT = COLUMNS / 4, BITS = Tree<COUNT, ARGMAX>::BITS;
        const int column = FIRST + 2 * (lane % 4);
        float line[2][COUNT];
#pragma unroll
        for (int k = 0; k < COUNT; ++k)
#pragma unroll
            for (int h = 0; h < 2; ++h) line[h][k] = value(h, k + FIRST / 4, column + 8 * (k / 2) + k % 2);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            bool bits[BITS];
            const float most = Tree<COUNT, ARGMAX>::run(line[h], bits);
            if constexpr (ARGMAX) {
                int at = bits[BITS - 1];
#pragma unroll
                for (int i = 0; i < BITS - 1; ++i) at += bits[i] << (BITS + 1 - i);
                // greater, or the first NaN
                const bool moved = !(most <= best[h]) && best[h] == best[h];
                best[h] = moved ? most : best[h];
                where[h] = moved ? start + column + at : where[h];
            } else {
                best[h] = ptx::max_nan(best[h], most);
            }
        }
    }

    template <class Sum>
    __device__ static __forceinline__ Sum element(const Sum (&acc)[32], int h, int k) {
        return acc[4 * (k / 2) + 2 * h + k % 2];
    }
    /* A similarity: an element, of codes times the token's scale. An integer beyond 2^24 is rounded to float, and the product
     * is: both by at most 2^-24, of the 2^-12 that codes are allowed. */
    __device__ static __forceinline__ float similarity(float x, const float *, int) { return x; }
    __device__ static __forceinline__ float similarity(int32_t x, const float *scales, int at) {
        return static_cast<float>(x) * scales[at];
    }

    /* All 64 columns. */
    template <class Sum>
    __device__ __forceinline__ void take(const Sum (&acc)[32], int start, const float *scales, int lane) {
        columns<0, 64>(start, lane, [&](int h, int k, int at) { return similarity(element(acc, h, k), scales, at); });
    }
    /* A similarity is multiplied with its token's scale; where that is negative the token is out. */
    template <class Sum>
    __device__ __forceinline__ void take_scaled(const Sum (&acc)[32], int start, const float *scales, int lane) {
        columns<0, 64>(start, lane, [&](int h, int k, int at) {
            const float scale = scales[at];
            return scale < 0 ? -INFINITE : static_cast<float>(element(acc, h, k)) * scale;
        });
    }
    /* The last `tokens` of a document, in groups of 16 columns, which leaves out most of those without a token. */
    template <int FIRST = 0, class Sum>
    __device__ __forceinline__ void take_tail(const Sum (&acc)[32], int start, int tokens, const float *scales, int lane) {
        if (tokens < FIRST + 16) {
            columns<FIRST, 16>(start, lane, [&](int h, int k, int at) {
                return at < tokens ? similarity(element(acc, h, k), scales, at) : -INFINITE;
            });
            return;
        }
        columns<FIRST, 16>(start, lane, [&](int h, int k, int at) { return similarity(element(acc, h, k), scales, at); });
        if constexpr (FIRST < 48)
            if (tokens > FIRST + 16) take_tail<FIRST + 16>(acc, start, tokens, scales, lane);
    }

    /* Over the four lanes of a row, to the tables of the query block; ready for the next document. */
    __device__ __forceinline__ void store(int lane, float *values, int *wheres) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
#pragma unroll
            for (int mask = 1; mask < 4; mask *= 2) {
                const float other = ptx::shuffle_xor(best[h], mask);
                if constexpr (ARGMAX) merge(best[h], where[h], other, ptx::shuffle_xor(where[h], mask));
                else best[h] = ptx::max_nan(best[h], other);
            }
            if (lane % 4 == 0) {
                values[lane / 4 + 8 * h] = best[h];
                if constexpr (ARGMAX) wheres[lane / 4 + 8 * h] = where[h];
            }
        }
        clear();
    }
};

}  // namespace latemax
