/* Warpgroup 0 of the sm_90 kernel: loads, inverse norms, scores. */
#pragma once

#include "sm90_shared.h"

namespace latemax {
namespace sm90 {

struct Maps {
    TensorMap queries, documents, tails;
};

__device__ inline void load_queries(const Forward &f, const Shared &s, const Maps &maps, int64_t block, int buffer) {
    const maxsim_args &a = f.a;
    const Plan &p = f.plan;
    const uint32_t full = Shared::at(s.meta->query_full[buffer]), to = s.queries + buffer * query_bytes(p);
    int segments = 0;
    while (segments < p.segments && segment_of(f, block, segments).exists) ++segments;
    ptx::mbarrier_arrive_expect(full, segments * p.slabs * p.slot * 128);
    for (int i = 0; i < segments; ++i) {
        const Segment segment = segment_of(f, block, i);
        const int row = static_cast<int>(query_of(a, segment.query).start) + segment.chunk * p.slot;
        const int query = a.q.offsets || a.q.stride_n == 0 ? 0 : static_cast<int>(segment.query);
        for (int slab = 0; slab < p.slabs; ++slab)
            ptx::tensor_load(to + (slab * p.rows + i * p.slot) * 128, &maps.queries, full, p.columns * slab, row, query, 0);
    }
}

__device__ inline void produce(const Forward &f, const Shared &s, const Maps &maps, int lane) {
    const maxsim_args &a = f.a;
    const Plan &p = f.plan;
    const int parts = parts_of(p), slabs = stage_slabs(p);
    // codes have scales everywhere, and their consumers look for those that are left out only where there is a mask
    const bool scaled = a.d.mask || (a.normalize && !f.d_factors), with_scales = scaled || f.d_factors;
    Ring ring(p.stages), buffers(p.query_buffers);
    /* A stage without a document's tokens. */
    const auto post = [&](const Tile &tile) {
        ptx::mbarrier_wait(Shared::at(s.meta->empty[ring.index]), ring.lap - 1);
        // no lane may still wait here when the stage is handed on
        ptx::warp_barrier();
        if (lane == 0) {
            s.meta->tiles[ring.index] = tile;
            ptx::mbarrier_arrive(Shared::at(s.meta->full[ring.index]));
        }
        ring.advance();
    };
    if (lane == 0) {
        ptx::prefetch_map(&maps.queries);
        ptx::prefetch_map(&maps.documents);
        ptx::prefetch_map(&maps.tails);
    }
    Walk walk(f, ptx::block_index(), ptx::grid_size());
    int base = 0, its_start = 0, its_length = 0, owner = 0;  // lane i has start and length of document base + i
    while (walk.next()) {
        if (walk.moved) {
            int rows = 0;
            for (int i = 0; i < p.segments && segment_of(f, walk.block, i).exists; ++i) rows += p.slot;
            // before the wait: consumers give the last queries back when they see this
            post({QUERIES, 0, 0, 0, 0, NONE, rows, walk.block, 0, -1});
            ptx::mbarrier_wait(Shared::at(s.meta->query_empty[buffers.index]), buffers.lap - 1);
            ptx::warp_barrier();
            if (lane == 0) load_queries(f, s, maps, walk.block, buffers.index);
            buffers.advance();
        }
        if (walk.moved || walk.document == base + 32) {
            base = walk.document;
            owner = static_cast<int>(owner_of(f, walk.block));
            if (base + lane < walk.last) {
                const Document mine = document_of(f, owner, base + lane);
                its_start = static_cast<int>(mine.start), its_length = mine.length;
            }
        }
        const int at = walk.document - base;
        const Document document{owner, walk.document, ptx::shuffle(its_start, at), ptx::shuffle(its_length, at)};
        // with offsets, documents are rows of one matrix
        const int number = a.d.offsets || a.d.stride_n == 0 ? 0 : walk.document;
        const int along = a.own && !a.d.offsets && a.d.stride_q != 0 ? owner : 0;
        const int piece = walk.piece(), length = document.length;
        const int end = walk.until < ceil_div(length, TOKENS) ? walk.until * TOKENS : length;
        if (length == 0) post({DOCUMENT, 0, 0, 1, 0, NONE, 0, walk.block, walk.document, -1});
        int first = a.d.mask ? NONE : 0;
        // a tile ahead: the copy of a tile would wait for its scales to come from memory
        float next[TOKENS / 32];
        if (with_scales)
#pragma unroll
            for (int i = 0; i < TOKENS / 32; ++i)
                next[i] = row_scale(f, document, walk.from * TOKENS + 32 * i + lane);
        for (int start = walk.from * TOKENS; start < end; start += TOKENS) {
            const int tokens = end - start < TOKENS ? end - start : TOKENS;
            float scales[TOKENS / 32];
            if (with_scales) {
#pragma unroll
                for (int i = 0; i < TOKENS / 32; ++i) {
                    const int token = start + 32 * i + lane;
                    scales[i] = next[i];
                    next[i] = row_scale(f, document, token + TOKENS);
                    if (!(scales[i] < 0) && token < first) first = token;
                }
                if (a.d.mask)
                    for (int mask = 16; mask > 0; mask /= 2) {
                        const int other = ptx::shuffle_xor(first, mask);
                        first = other < first ? other : first;
                    }
            }
            for (int part = 0; part < parts; ++part) {
                const uint32_t full = Shared::at(s.meta->full[ring.index]);
                ptx::mbarrier_wait(Shared::at(s.meta->empty[ring.index]), ring.lap - 1);
                // with the last part, which consumers keep until they have taken the maximum
                if (with_scales && part == parts - 1)
#pragma unroll
                    for (int i = 0; i < TOKENS / 32; ++i) s.meta->scales[ring.index][32 * i + lane] = scales[i];
                if ((part == 0 || part == parts - 1) && lane == 0)
                    s.meta->tiles[ring.index] = {TILE,  tokens, start,      start + TOKENS >= end, scaled,
                                                 first, 0,      walk.block, walk.document,         piece};
                ptx::warp_barrier();
                if (lane == 0) {
                    const int rows = (tokens + TAIL_BOX - 1) / TAIL_BOX * TAIL_BOX;
                    ptx::mbarrier_arrive_expect(full, slabs * rows * 128);
                    for (int slab = 0; slab < slabs; ++slab) {
                        const uint32_t to = s.ring + (ring.index * slabs + slab) * SLAB_BYTES;
                        const int column = p.columns * (part + slab), from = static_cast<int>(document.start) + start;
                        if (rows == TOKENS) ptx::tensor_load(to, &maps.documents, full, column, from, number, along);
                        else
                            for (int row = 0; row < rows; row += TAIL_BOX)
                            ptx::tensor_load(to + row * 128, &maps.tails, full, column, from + row, number, along);
                    }
                }
                ring.advance();
            }
        }
    }
    post({STOP, 0, 0, 0, 0, NONE, 0, 0, 0, -1});
}

/* sum and the squares of 16 bytes of elements. */
template <class T>
__device__ __forceinline__ float add_squares(T, const char *from, float sum) {
    const auto x = ptx::load_packet<typename T::Stored>(from);
#pragma unroll
    for (const auto stored : x.values) {
        const float value = ptx::to_float(T{}, stored);
        sum += value * value;
    }
    return sum;
}
__device__ __forceinline__ int32_t add_squares(I8, const char *from, int32_t sum) {
    const auto x = ptx::load_packet<int32_t>(from);
#pragma unroll
    for (const int32_t four : x.values) sum = ptx::add_squares(four, sum);
    return sum;
}

/* What makes the tokens of a tile in shared memory unit vectors; a lane has one of its 64 tokens. */
template <class T>
__device__ inline void scale(const Forward &f, const Shared &s, int warp, int lane) {
    const Plan &p = f.plan;
    const int parts = parts_of(p), slabs = stage_slabs(p);
    Ring ring(p.stages);
    for (;;) {
        ptx::mbarrier_wait(Shared::at(s.meta->full[ring.index]), ring.lap);
        const int kind = s.meta->tiles[ring.index].kind, tokens = s.meta->tiles[ring.index].tokens;
        typename T::Sum sum = 0;
        for (int part = 0; part < (kind == TILE ? parts : 1); ++part) {
            if (part) ptx::mbarrier_wait(Shared::at(s.meta->full[ring.index]), ring.lap);
            const int row = 32 * warp + lane;
            if (kind == TILE && row < tokens) {
                const char *line = s.memory + ring.index * slabs * SLAB_BYTES + row * 128;
                for (int slab = 0; slab < slabs; ++slab)
#pragma unroll
                    for (int chunk = 0; chunk < 8; ++chunk)
                        sum = add_squares(T{}, line + slab * SLAB_BYTES + ((chunk ^ (row & 7)) << 4), sum);
                float &out = s.meta->scales[ring.index][row];
                // 1 or the scale of a code; negative: left out
                if (part == parts - 1 && !(out < 0))
                    out = CODES<T> ? unit_factor(sqrtf(static_cast<float>(sum)), out) : unit_factor(sqrtf(sum));
            }
            Shared::arrive(s.meta->scaled[ring.index], lane);
            Shared::arrive(s.meta->empty[ring.index], lane);
            ring.advance();
        }
        if (kind == STOP) return;
    }
}

/* Maxima and weights of a block's rows in shared memory. */
struct Maxima {
    const Table &table;
    const float *weights;
    const Part *parts;

    __device__ Part part(int i) const { return parts[i]; }
    __device__ float value(int row, int &where) const {
        where = table.wheres[row];
        return table.values[row];
    }
    __device__ float weight(int row, const Segment &, const Query &, int) const { return weights[row]; }
};

template <bool ARGMAX>
__device__ inline void finish_documents(const Forward &f, const Shared &s, int worker, int workers, int lane) {
    const Plan &p = f.plan;
    Ring results(TABLES);
    int64_t block = -1;
    for (;;) {
        ptx::mbarrier_wait(Shared::at(s.meta->done[results.index]), results.lap);
        const Table &table = s.meta->tables[results.index];
        if (table.stop) return;
        if (table.block != block) {
            block = table.block;
            for (int i = worker; i < p.segments; i += workers) {
                const Part part = part_of(f, block, i);
                if (lane == 0) s.meta->parts[i] = part;
                if (!part.segment.exists) break;
                for (int row = lane; row < p.slot; row += 32)
                    s.meta->weights[i * p.slot + row] =
                        query_weight(f, part.segment, part.tokens, part.segment.chunk * p.slot + row);
            }
            ptx::warp_barrier();
        }
        if (table.piece < 0) {
            finish<ARGMAX>(f, table.document, table.first, worker, workers, lane,
                           Maxima{table, s.meta->weights, s.meta->parts});
        } else {
            for (int row = 32 * worker + lane; row < p.rows; row += 32 * workers) {
                f.work.piece_values[table.piece * p.rows + row] = table.values[row];
                if constexpr (ARGMAX) f.work.piece_wheres[table.piece * p.rows + row] = table.wheres[row];
            }
        }
        Shared::arrive(s.meta->free[results.index], lane);
        results.advance();
    }
}

}  // namespace sm90
}  // namespace latemax
