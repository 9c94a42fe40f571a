/* The running maximum of the sm_80 kernel, where document tokens are the rows of the accumulator. */
#pragma once

#include "finish.h"

namespace latemax {

/* A thread's columns of an accumulator that is [16 rows, N] over a warp: rows lane / 4 and + 8, columns 8 j + 2 (lane % 4)
 * and + 1. Everything stays elementwise until `reduce`. */
template <int N, bool ARGMAX>
struct Running {
    static constexpr int COUNT = N / 4;
    float best[COUNT];
    int where[ARGMAX ? COUNT : 1];
    int first;  // the lowest valid row: it wins where all similarities are -inf; NONE in an empty document

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int k = 0; k < COUNT; ++k) best[k] = -INFINITE;
#pragma unroll
        for (int k = 0; k < (ARGMAX ? COUNT : 1); ++k) where[k] = NONE;
        first = NONE;
    }

    __device__ __forceinline__ void element(int k, float value, int row) {
        if constexpr (ARGMAX) {
            // greater, or the first NaN
            const bool wins = !(value <= best[k]) && best[k] == best[k];
            best[k] = wins ? value : best[k];
            where[k] = wins ? row : where[k];
        } else {
            best[k] = ptx::max_nan(best[k], value);
        }
    }

    /* The accumulator of rows `row` and `row + 8`; scales as of row_scale, looked at unless all rows are plain. An integer
     * beyond 2^24 is rounded to float, and the product is: both by at most 2^-24, of the 2^-12 that codes are allowed. */
    template <class Sum>
    __device__ __forceinline__ void take(const Sum *acc, int row, float scale, float scale8, bool plain) {
        if (plain) {
            first = row < first ? row : first;
#pragma unroll
            for (int k = 0; k < COUNT; ++k) {
                const int at = 4 * (k / 2) + k % 2;
                element(k, static_cast<float>(acc[at]), row);
                element(k, static_cast<float>(acc[at + 2]), row + 8);
            }
            return;
        }
        // a NaN norm is no mask
        const bool out = scale < 0, out8 = scale8 < 0;
        const int lowest = !out ? row : !out8 ? row + 8 : NONE;
        first = lowest < first ? lowest : first;
#pragma unroll
        for (int k = 0; k < COUNT; ++k) {
            const int at = 4 * (k / 2) + k % 2;
            element(k, out ? -INFINITE : static_cast<float>(acc[at]) * scale, row);
            element(k, out8 ? -INFINITE : static_cast<float>(acc[at + 2]) * scale8, row + 8);
        }
    }

    /* One exchange between lanes: each keeps half of the columns, so that 7 N / 32 shuffles do instead of 3 N / 4. */
    template <int HALF>
    __device__ __forceinline__ void exchange(int lane, int mask) {
        const bool upper = lane & mask;
#pragma unroll
        for (int k = 0; k < HALF; ++k) {
            const float mine = upper ? best[k + HALF] : best[k];
            const float other = ptx::shuffle_xor(upper ? best[k] : best[k + HALF], mask);
            if constexpr (ARGMAX) {
                const int my_where = upper ? where[k + HALF] : where[k];
                const int at = ptx::shuffle_xor(upper ? where[k] : where[k + HALF], mask);
                best[k] = mine, where[k] = my_where;
                merge(best[k], where[k], other, at);
            } else {
                best[k] = ptx::max_nan(mine, other);
            }
        }
    }

    /* Over the rows of this warp, to its line of the tables. */
    __device__ __forceinline__ void reduce(int lane, float *values, int *wheres, int *firsts) {
        exchange<COUNT / 2>(lane, 16);
        exchange<COUNT / 4>(lane, 8);
        exchange<COUNT / 8>(lane, 4);
#pragma unroll
        for (int mask = 4; mask < 32; mask *= 2) {
            const int other = ptx::shuffle_xor(first, mask);
            first = other < first ? other : first;
        }
        const int from = (lane & 16 ? COUNT / 2 : 0) + (lane & 8 ? COUNT / 4 : 0) + (lane & 4 ? COUNT / 8 : 0);
#pragma unroll
        for (int k = 0; k < COUNT / 8; ++k) {
            const int column = 8 * ((from + k) / 2) + 2 * (lane % 4) + (from + k) % 2;
            values[column] = best[k];
            if constexpr (ARGMAX) wheres[column] = where[k];
        }
        if (lane == 0) *firsts = first;
    }
};

/* Where the warps of a block meet: a line a warp, twice, so that a warp may start on the next document at once. */
template <int N, bool ARGMAX, int WARPS>
struct Tables {
    float values[2][WARPS][N];
    int wheres[2][ARGMAX ? WARPS : 1][N];
    int firsts[2][WARPS];
};

}  // namespace latemax
