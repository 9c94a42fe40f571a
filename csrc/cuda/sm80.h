/* Forward for sm_80 and chips without a kernel of their own: cp.async and mma.sync.
 *
 * Four warps share a tile of 128 document tokens, 32 each (two m16), against N query tokens. The ring holds slabs, 128
 * tokens x 128 bytes, 16 KB; three of them, so that two are in flight while one is multiplied. Slabs are swizzled: the
 * 16 bytes of column c are at c ^ (row % 8), which keeps ldmatrix and cp.async free of bank conflicts.
 */
#pragma once

#include <type_traits>

#include "running.h"
#include "walk.h"

namespace latemax {
namespace sm80 {

constexpr int WARPS = 4, THREADS = 32 * WARPS, ROWS = 128, STAGES = 3, STAGE_BYTES = ROWS * SLAB_ROW, LEAST_COLUMNS = 32, MOST_COLUMNS = 64;

inline int shared_bytes(const Plan &p, bool argmax) {
    const auto tables = [&](auto columns) {
        constexpr int N = decltype(columns)::value;
        return argmax ? sizeof(Tables<N, true, WARPS>) : sizeof(Tables<N, false, WARPS>);
    };
    using std::integral_constant;
    const size_t bytes = p.rows == 32 ? tables(integral_constant<int, 32>{}) : tables(integral_constant<int, 64>{});
    return STAGES * STAGE_BYTES + p.slabs * p.rows * 128 + static_cast<int>(bytes);
}

__device__ inline uint32_t swizzled(int row, int chunk) { return row * 128 + ((chunk ^ (row & 7)) << 4); }

/* The loads, STAGES - 1 slabs ahead of the products, across the ends of tiles and documents. */
template <class T>
struct Loader {
    const Forward &f;
    Walk walk;
    Document document;
    int64_t base;
    int row = 0, slab = 0, thread;
    bool more;

    __device__ Loader(const Forward &f, const Walk &walk, int thread) : f(f), walk(walk), thread(thread) {
        seek();
    }
    /* To the next document that has tokens. */
    __device__ void seek() {
        row = slab = 0;
        while ((more = walk.next())) {
            document = document_of(f, owner_of(f, walk.block), walk.document);
            if (document.length) break;
        }
        const maxsim_args &a = f.a;
        if (more)
            base = a.d.offsets ? document.start * a.d.stride_l
                               : document.owner * a.d.stride_q + document.number * a.d.stride_n;
    }
    __device__ void load(uint32_t stage) {
        if (more) {
            const maxsim_args &a = f.a;
            const auto *from = static_cast<const typename T::Stored *>(a.d.tokens) + base;
            const int chunk = thread % 8, column = (slab * SLAB_ROW + chunk * 16) / BYTES<T>;
#pragma unroll
            for (int i = 0; i < ROWS * 8 / THREADS; ++i) {
                const int r = i * (THREADS / 8) + thread / 8;
                const bool there = row + r < document.length && column < a.dim;
                ptx::cp_async_16(stage + swizzled(r, chunk), there ? from + (row + r) * a.d.stride_l + column : from,
                                 there ? 16 : 0);
            }
            if (++slab == f.plan.slabs) {
                slab = 0, row += ROWS;
                if (row >= document.length) seek();
            }
        }
        // an empty group too: groups are counted
        ptx::cp_async_commit();
    }
};

/* A block's query tokens, slab by slab; those that are not there are zeros. */
template <class T, int N>
__device__ inline void load_queries(const Forward &f, int64_t block, uint32_t to, int thread) {
    const maxsim_args &a = f.a;
    for (int i = thread; i < f.plan.slabs * N * 8; i += THREADS) {
        const int chunk = i % 8, column = i / 8 % N, slab = i / 8 / N, p = column / f.plan.slot;
        const Segment segment = segment_of(f, block, p);
        const int token = segment.chunk * f.plan.slot + column % f.plan.slot;
        const auto *from = static_cast<const typename T::Stored *>(a.q.tokens);
        const int first = (slab * SLAB_ROW + chunk * 16) / BYTES<T>;
        bool there = p < f.plan.segments && segment.exists && first < a.dim;
        if (there) {
            const Query q = query_of(a, segment.query);
            there = token < q.length;
            if (there)
                from += (a.q.offsets ? q.start * a.q.stride_l : segment.query * a.q.stride_n) + token * a.q.stride_l +
                        first;
        }
        ptx::cp_async_16(to + slab * (N * 128) + swizzled(column, chunk), from, there ? 16 : 0);
    }
}

/* acc[32, N] += one slab of documents times one of queries. */
template <class T, int N>
__device__ __forceinline__ void multiply(typename T::Sum (&acc)[2][N / 2], uint32_t documents, uint32_t queries, int steps, int lane) {
    const int a_row = lane % 16, a_chunk = lane / 16, b_row = lane % 8 + lane / 16 * 8, b_chunk = lane / 8 % 2;
#pragma unroll 1
    for (int k = 0; k < steps; ++k) {
        uint32_t d[2][4];
#pragma unroll
        for (int m = 0; m < 2; ++m) ptx::ldmatrix_x4(d[m], documents + swizzled(16 * m + a_row, 2 * k + a_chunk));
#pragma unroll
        for (int n = 0; n < N; n += 16) {
            uint32_t q[4];
            ptx::ldmatrix_x4(q, queries + swizzled(n + b_row, 2 * k + b_chunk));
#pragma unroll
            for (int m = 0; m < 2; ++m) {
                ptx::mma(T{}, &acc[m][n / 2], d[m], q[0], q[1]);
                ptx::mma(T{}, &acc[m][n / 2 + 4], d[m], q[2], q[3]);
            }
        }
    }
}

/* The maxima of a block's columns, from the lines of its warps. */
template <int N, bool ARGMAX>
struct Maxima {
    const Forward &f;
    int64_t block;
    const float (*values)[N];
    const int (*wheres)[N];

    __device__ Part part(int i) const { return part_of(f, block, i); }
    __device__ float value(int column, int &where) const {
        float best = values[0][column];
        if constexpr (ARGMAX) where = wheres[0][column];
        for (int w = 1; w < WARPS; ++w) {
            if constexpr (ARGMAX) merge(best, where, values[w][column], wheres[w][column]);
            else best = ptx::max_nan(best, values[w][column]);
        }
        return best;
    }
    __device__ float weight(int, const Segment &segment, const Query &tokens, int token) const {
        return query_weight(f, segment, tokens, token);
    }
};

template <class T, int N, bool ARGMAX>
__global__ void __launch_bounds__(THREADS, 2) forward(const __grid_constant__ Forward f) {
    const maxsim_args &a = f.a;
    const int thread = ptx::thread_index(), warp = thread / 32, lane = thread % 32;
    char *shared = ptx::dynamic_shared();
    const uint32_t ring = ptx::shared_address(shared), queries = ring + STAGES * STAGE_BYTES;
    auto &tables = *reinterpret_cast<Tables<N, ARGMAX, WARPS> *>(shared + STAGES * STAGE_BYTES + f.plan.slabs * N * 128);

    Walk walk(f, ptx::block_index(), ptx::grid_size());
    Loader<T> loader(f, walk, thread);
    int stage = 0, buffer = 0;
    for (int s = 0; s < STAGES - 1; ++s) loader.load(ring + s * STAGE_BYTES);

    Running<N, ARGMAX> running;
    while (walk.next()) {
        if (walk.moved) {
            // the last queries are read no more: the barrier after the tiles came later
            load_queries<T, N>(f, walk.block, queries, thread);
            ptx::cp_async_commit();
            ptx::cp_async_wait<0>();
            ptx::block_barrier();
        }
        const Document document = document_of(f, owner_of(f, walk.block), walk.document);
        running.clear();
        for (int start = 0; start < document.length; start += ROWS) {
            const bool plain = start + ROWS <= document.length && !a.d.mask && !f.d_factors;
            const int row = start + 32 * warp + lane / 4;
            float scales[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) scales[i] = plain ? 1.0f : row_scale(f, document, row + 8 * i);
            typename T::Sum acc[2][N / 2] = {};
            for (int slab = 0; slab < f.plan.slabs; ++slab) {
                // this slab has arrived for every thread, and the one that is loaded next is read no more
                ptx::cp_async_wait<STAGES - 2>();
                ptx::block_barrier();
                loader.load(ring + (stage + STAGES - 1) % STAGES * STAGE_BYTES);
                const int left = static_cast<int>(a.dim) * BYTES<T> - SLAB_ROW * slab;
                const int steps = left < SLAB_ROW ? (left + STEP - 1) / STEP : SLAB_ROW / STEP;
                multiply<T, N>(acc, ring + stage * STAGE_BYTES + warp * 32 * 128, queries + slab * (N * 128), steps, lane);
                stage = (stage + 1) % STAGES;
            }
            running.take(acc[0], row, scales[0], scales[1], plain);
            running.take(acc[1], row + 16, scales[2], scales[3], plain);
        }
        running.reduce(lane, tables.values[buffer][warp], tables.wheres[buffer][ARGMAX ? warp : 0],
                       &tables.firsts[buffer][warp]);
        ptx::block_barrier();
        int first = NONE;
        for (int w = 0; w < WARPS; ++w) first = tables.firsts[buffer][w] < first ? tables.firsts[buffer][w] : first;
        finish<ARGMAX>(f, walk.document, first, warp, WARPS, lane,
                       Maxima<N, ARGMAX>{f, walk.block, tables.values[buffer], tables.wheres[buffer]});
        buffer ^= 1;
    }
}

}  // namespace sm80
}  // namespace latemax
