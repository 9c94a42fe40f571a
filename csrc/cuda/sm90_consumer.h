/* The warpgroups of the sm_90 kernel that multiply. */
#pragma once

#include "rows.h"
#include "sm90_shared.h"
#include "wgmma.h"

namespace latemax {
namespace sm90 {

/* K-major, rows of 128 bytes, groups of 8 rows 1,024 bytes apart, swizzled by 128 bytes. */
__device__ inline uint64_t descriptor(uint32_t address) {
    return (address & 0x3ffff) >> 4 | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

/* One warp of a warpgroup that holds BLOCKS x 64 query tokens: STEPS x 32 bytes of each in registers, or with STEPS = 0 all
 * in shared memory. */
template <class T, int BLOCKS, int STEPS, bool ARGMAX>
struct Consumer {
    static constexpr bool REGISTERS = STEPS > 0;
    const Forward &f;
    const Shared &s;
    const int warpgroup, warp, lane;
    Ring ring, buffers, results;
    Rows<ARGMAX> maxima[BLOCKS];
    uint32_t queries[REGISTERS ? BLOCKS : 1][REGISTERS ? STEPS : 1][4];
    uint32_t query_rows = 0;  // without REGISTERS: the address of this warpgroup's first row
    int blocks = 0, held = -1;

    __device__ __forceinline__ Consumer(const Forward &f, const Shared &s, int warpgroup, int warp, int lane)
        : f(f), s(s), warpgroup(warpgroup), warp(warp), lane(lane), ring(f.plan.stages),
          buffers(f.plan.query_buffers), results(TABLES) {
#pragma unroll
        for (int b = 0; b < BLOCKS; ++b) maxima[b].clear();
    }

    __device__ __forceinline__ int look() {
        ptx::mbarrier_wait(Shared::at(s.meta->full[ring.index]), ring.lap);
        return ptx::uniform(s.meta->tiles[ring.index].kind);
    }
    __device__ __forceinline__ void wait_scaled(const Ring &at) {
        if (f.a.normalize) ptx::mbarrier_wait(Shared::at(s.meta->scaled[at.index]), at.lap);
    }
    __device__ __forceinline__ void release(const Ring &at) {
        wait_scaled(at);
        Shared::arrive(s.meta->empty[at.index], lane);
    }

    __device__ __forceinline__ void switch_queries(int rows) {
        if (!REGISTERS && held >= 0) Shared::arrive(s.meta->query_empty[held], lane);
        held = buffers.index;
        ptx::mbarrier_wait(Shared::at(s.meta->query_full[held]), buffers.lap);
        buffers.advance();
        const int left = rows - 64 * BLOCKS * warpgroup;
        blocks = left <= 0 ? 0 : left <= 64 ? 1 : BLOCKS;
        const Plan &p = f.plan;
        query_rows = s.queries + held * query_bytes(p) + 64 * BLOCKS * warpgroup * 128;
        if constexpr (REGISTERS) {
#pragma unroll
            for (int b = 0; b < BLOCKS; ++b)
#pragma unroll
                for (int k = 0; k < STEPS; ++k) {
                    const int row = 64 * b + 16 * warp + lane % 16, chunk = 2 * (k % 4) + lane / 16;
                    ptx::ldmatrix_x4(queries[b][k], query_rows + (k / 4 * p.rows + row) * 128 + ((chunk ^ (row & 7)) << 4));
                }
            Shared::arrive(s.meta->query_empty[held], lane);
        }
    }

    /* Issues one part of 64 query tokens against a tile, as a group of its own; without REGISTERS its first COUNT_K steps. */
    template <int COUNT_K>
    __device__ __forceinline__ void issue(Accumulator<T> &acc, int b, int part) {
        const uint64_t documents = descriptor(s.ring + ring.index * stage_slabs(f.plan) * SLAB_BYTES);
        ptx::wgmma_fence();
        // a step is 32 bytes of a row; descriptors count in 16 bytes
        if constexpr (REGISTERS) {
#pragma unroll
            for (int k = 0; k < STEPS; ++k)
                ptx::wgmma(T{}, acc, queries[b][k], documents + k / 4 * (SLAB_BYTES >> 4) + 2 * (k % 4), k > 0);
        } else {
            const uint64_t rows = descriptor(query_rows + (part * f.plan.rows + 64 * b) * 128);
#pragma unroll
            for (int k = 0; k < COUNT_K; ++k)
                ptx::wgmma(T{}, acc, rows + 2 * k, documents + 2 * k, part + k > 0);
        }
        ptx::wgmma_commit();
    }

    /* A tile against the first COUNT blocks; LAST: the steps in its last slab. While the maximum of block 0 is taken the tensor
     * cores work on block 1, and while that of block 1 is, for the other warpgroup. */
    template <int COUNT, int LAST>
    __device__ __forceinline__ void tile() {
        Accumulator<T> acc[COUNT ? COUNT : 1];
        Ring at = ring;
        const int parts = REGISTERS ? 1 : f.plan.slabs;
        // the steps of a slab are known here: a branch between wgmma would serialise them
        for (int part = 0; part < parts - 1; ++part) {
#pragma unroll
            for (int b = 0; b < COUNT; ++b) issue<4>(acc[b], b, part);
            // the part before is read no more when only this one's groups are unfinished
            if (part) ptx::wgmma_wait<COUNT>(), release(at);
            at = ring;
            ring.advance();
            ptx::mbarrier_wait(Shared::at(s.meta->full[ring.index]), ring.lap);
        }
#pragma unroll
        for (int b = 0; b < COUNT; ++b) issue<LAST>(acc[b], b, parts - 1);
        // dims beyond the registers are of two parts at least
        if constexpr (!REGISTERS) ptx::wgmma_wait<COUNT>(), release(at);
        at = ring;
        ring.advance();
        const Tile &tile = s.meta->tiles[at.index];
        const bool scaled = ptx::uniform(tile.scaled), last = ptx::uniform(tile.last);
        const int tokens = ptx::uniform(tile.tokens);
        const float *scales = s.meta->scales[at.index];
        if (scaled || CODES<T>) wait_scaled(at);
#pragma unroll
        for (int b = 0; b < COUNT; ++b) {
            if (b < COUNT - 1) ptx::wgmma_wait<1>(acc[b]);
            else ptx::wgmma_wait<0>(acc[b]);
            if (scaled) maxima[b].take_scaled(acc[b], tile.start, scales, lane);
            else if (tokens == TOKENS) maxima[b].take(acc[b], tile.start, scales, lane);
            else maxima[b].take_tail(acc[b], tile.start, tokens, scales, lane);
        }
        if (last) store<COUNT>(tile);
        release(at);
    }
    /* The maxima of a document, to the warps that finish it. */
    template <int COUNT>
    __device__ __forceinline__ void store(const Tile &tile) {
        Table &table = s.meta->tables[results.index];
        ptx::mbarrier_wait(Shared::at(s.meta->free[results.index]), results.lap - 1);
        const int row = 64 * BLOCKS * warpgroup + 16 * warp;
#pragma unroll
        for (int b = 0; b < COUNT; ++b) maxima[b].store(lane, table.values + row + 64 * b, table.wheres + row + 64 * b);
        if (warpgroup == 0 && warp == 0 && lane == 0)
            table.block = tile.block, table.document = tile.document, table.first = tile.first, table.piece = tile.piece,
            table.stop = tile.kind == STOP;
        Shared::arrive(s.meta->done[results.index], lane);
        results.advance();
    }

    __device__ __forceinline__ void run() {
        const int left = static_cast<int>(f.a.dim) * BYTES<T> - SLAB_ROW * (f.plan.slabs - 1);
        const int last = ptx::uniform((left + STEP - 1) / STEP);
        if (REGISTERS || last == 4) loop<4>();
        else if (last == 3) loop<3>();
        else if (last == 2) loop<2>();
        else loop<1>();
    }

    template <int LAST>
    __device__ __forceinline__ void loop() {
        for (;;) {
            const int kind = look();
            if (kind == TILE) {
                if (BLOCKS == 2 && blocks == 2) tile<BLOCKS, LAST>();
                else if (blocks) tile<1, LAST>();
                else tile<0, LAST>();
                continue;
            }
            if (kind == QUERIES) switch_queries(s.meta->tiles[ring.index].rows);
            else store<0>(s.meta->tiles[ring.index]);
            release(ring);
            ring.advance();
            if (kind == STOP) return;
        }
    }
};

}  // namespace sm90
}  // namespace latemax
