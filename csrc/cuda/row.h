/* A row of tokens, C elements in each lane of a warp: packets of 4 or 8 elements, those of neighbouring lanes adjacent. */
#pragma once

#include "ptx.h"

namespace latemax {

template <int C>
struct Row {
    static constexpr int PACKET = C < 8 ? C : 8, PACKETS = C / PACKET, WORDS = PACKET / 2;
    uint32_t words[PACKETS][WORDS];

    static __device__ int column(int packet) { return (packet * 32 + ptx::thread_index() % 32) * PACKET; }

    /* Where the lane's packets of the first row are. Packets from column `dim` on are read from column 0, so that no load is
     * conditional: ptxas would wait for each before it issues the next. Nobody uses them. */
    struct Bases {
        const char *packets[PACKETS];

        __device__ Bases(const uint16_t *row, int dim) {
#pragma unroll
            for (int p = 0; p < PACKETS; ++p)
                packets[p] = reinterpret_cast<const char *>(row + (column(p) < dim ? column(p) : 0));
        }
    };
    /* The row `offset` times 8 elements after the first. */
    __device__ void load(const Bases &bases, uint32_t offset) {
#pragma unroll
        for (int p = 0; p < PACKETS; ++p)
            ptx::load_words(words[p], bases.packets[p] + static_cast<uint64_t>(offset) * 16);
    }
    template <class T>
    __device__ float get(int i) const {
        return ptx::to_float(T{}, static_cast<uint16_t>(words[i / PACKET][i % PACKET / 2] >> i % 2 * 16));
    }
    /* 1 / max(norm, 1e-12), in every lane; NaN if an element is. */
    template <class T>
    __device__ float inverse_norm(int dim) const;
};

/* Calls work(i, column) for the lane's elements in columns before `dim`. */
template <int C, class Work>
__device__ inline void each_column(int dim, const Work &work) {
    using R = Row<C>;
#pragma unroll
    for (int p = 0; p < R::PACKETS; ++p)
        if (R::column(p) < dim)
#pragma unroll
            for (int e = 0; e < R::PACKET; ++e) work(p * R::PACKET + e, R::column(p) + e);
}

__device__ inline float warp_sum(float x) {
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) x += ptx::shuffle_xor(x, mask);
    return x;
}

template <int C>
template <class T>
__device__ float Row<C>::inverse_norm(int dim) const {
    float sum = 0;
    each_column<C>(dim, [&](int i, int) { sum += get<T>(i) * get<T>(i); });
    const float norm = sqrtf(warp_sum(sum));
    // not fmaxf, which would hide a NaN
    return 1.0f / (norm < 1e-12f ? 1e-12f : norm);
}

/* Sums of a row. */
template <int C>
struct Sums {
    float values[C];

    __device__ void clear() {
#pragma unroll
        for (float &x : values) x = 0;
    }
    template <class T>
    __device__ void add(const Row<C> &row, float weight) {
#pragma unroll
        for (int i = 0; i < C; ++i) values[i] += weight * row.template get<T>(i);
    }
    /* To a row of floats in memory. */
    __device__ void put(float *row, int dim) const {
        each_column<C>(dim, [&](int i, int column) { row[column] = values[i]; });
    }
    __device__ void add_to(float *row, int dim) const {
        each_column<C>(dim, [&](int i, int column) { row[column] += values[i]; });
    }
    __device__ void add_floats(const float *row, int dim) {
        each_column<C>(dim, [&](int i, int column) { values[i] += row[column]; });
    }
    /* The gradient of the token x, of which these are the gradient of its unit vector. A token whose norm was clamped was
     * divided by a constant; one without a gradient gets 0, whatever (a masked NaN) it holds. */
    template <class T>
    __device__ void through_norm(const Row<C> &x, int dim) {
        const float inverse = x.template inverse_norm<T>(dim);
        float along = 0;
        bool any = false;
        each_column<C>(dim, [&](int i, int) {
            along += x.template get<T>(i) * inverse * values[i];
            any |= values[i] != 0;
        });
        along = warp_sum(along);
        if (!(inverse < 0.999e12f)) along = 0;
        any = ptx::warp_any(any);
#pragma unroll
        for (int i = 0; i < C; ++i)
            values[i] = any ? (values[i] - x.template get<T>(i) * inverse * along) * inverse : 0.0f;
    }
    /* Rounded to T. */
    template <class T>
    __device__ void store(uint16_t *row, int dim) const {
        using R = Row<C>;
#pragma unroll
        for (int p = 0; p < R::PACKETS; ++p) {
            uint32_t words[R::WORDS];
#pragma unroll
            for (int w = 0; w < R::WORDS; ++w) {
                const int i = p * R::PACKET + 2 * w;
                words[w] = ptx::from_float(T{}, values[i]) | static_cast<uint32_t>(ptx::from_float(T{}, values[i + 1])) << 16;
            }
            if (R::column(p) < dim) ptx::store_words(row + R::column(p), words);
        }
    }
};

/* Rows of 32 entries, summed in order. Each lane has decoded one: whether it counts, where its row is (in units of 8 elements;
 * some row that exists, if it does not count) and its weight. `next` is called before each whose bit is set in `starts`.
 *
 * 2 KB of rows are in flight in a warp: 20 warps of a multiprocessor have 40 KB, more than twice what L2 needs at 24 bytes
 * a clock and 600 clocks. */
template <class T, int C, class Next>
__device__ inline void gather(Sums<C> &sums, const uint16_t *first_row, bool counts, uint32_t offset, float weight, uint32_t starts,
                              int dim, bool normalize, const Next &next) {
    constexpr int AT_ONCE = 32 / C;
    const typename Row<C>::Bases bases(first_row, dim);
    uint32_t left = ptx::ballot(counts);
    for (int first = 0; left; first += AT_ONCE, left >>= AT_ONCE, starts >>= AT_ONCE) {
        Row<C> rows[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) rows[i].load(bases, ptx::shuffle(offset, first + i));
        if (normalize) {
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) {
                const float inverse = rows[i].template inverse_norm<T>(dim);
                if (ptx::thread_index() % 32 == first + i) weight *= inverse;
            }
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
            if (!(left >> i & 1)) continue;
            if (starts >> i & 1) next(first + i);
            sums.template add<T>(rows[i], ptx::shuffle(weight, first + i));
        }
    }
}

}  // namespace latemax
