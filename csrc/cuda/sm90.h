/* Forward for Hopper: the copy engine fills a ring of document tiles, two warpgroups multiply them by wgmma.
 *
 *     warpgroup 0   one thread: query blocks and document tiles to shared memory, as far ahead as there is room
 *     warpgroup 1   wgmma | maximum | wgmma | ...      while one takes its maximum, the tensor cores work for the other
 *     warpgroup 2      wgmma | maximum | wgmma | ...
 *
 * Document tokens are the M operand, so that the maximum over them stays elementwise in registers. With one team both
 * warpgroups hold the same query columns and take turns with the tiles; with two each has its own columns and every
 * tile serves both, which halves what is read of documents.
 */
#pragma once

#include "wgmma.h"
#include "running.h"

namespace latemax {
namespace sm90 {

constexpr int CONSUMERS = 2, THREADS = 128 * (1 + CONSUMERS), WARPS = 4 * CONSUMERS, ROWS = 64, MOST_COLUMNS = 128;
constexpr int SLAB_BYTES = ROWS * 128, PART_SLABS = 2;  // a stage of the ring: 64 tokens x 128 dims, 16 KB
constexpr int MOST_STAGES = 12, MOST_QUERY_BUFFERS = 2;
// 168 registers a thread are there at the start (65,536 / 384); what the producer gives, the consumers take
constexpr int PRODUCER_REGISTERS = 72, CONSUMER_REGISTERS = 216;

struct Barriers {
    uint64_t full[MOST_STAGES], empty[MOST_STAGES], query_full[MOST_QUERY_BUFFERS], query_empty[MOST_QUERY_BUFFERS];
};

__host__ __device__ inline int stage_bytes(const Plan &p) {
    return (p.slabs < PART_SLABS ? p.slabs : PART_SLABS) * SLAB_BYTES;
}
__host__ __device__ inline int query_bytes(const Plan &p) { return p.teams * p.slabs * p.columns * 128; }
template <int N, bool ARGMAX>
constexpr int table_bytes() {
    return sizeof(Tables<N, ARGMAX, WARPS>) + sizeof(Barriers);
}
inline int shared_bytes(const Plan &p, int tables) {
    return p.stages * stage_bytes(p) + p.query_buffers * query_bytes(p) + tables;
}

/* A position in a ring of barriers; lap counts the turns and names the phase that is waited for. */
struct Ring {
    int size, index = 0;
    uint32_t lap = 0;

    __device__ explicit Ring(int size) : size(size) {}
    __device__ void advance() {
        if (++index == size) index = 0, ++lap;
    }
};

/* K-major, rows of 128 bytes, groups of 8 rows 1,024 bytes apart, swizzled by 128 bytes. */
__device__ inline uint64_t descriptor(uint32_t address) {
    return (address & 0x3ffff) >> 4 | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

struct Shared {
    uint32_t ring, queries;
    Barriers *barriers;

    __device__ static uint32_t at(const uint64_t &barrier) { return ptx::shared_address(&barrier); }
};

__device__ inline void produce(const Forward &f, const Shared &s, const TensorMap *q_map, const TensorMap *d_map) {
    const maxsim_args &a = f.a;
    const Plan &p = f.plan;
    const int parts = (p.slabs + PART_SLABS - 1) / PART_SLABS, documents_of_query = a.own && a.d_stride_q != 0;
    Ring ring(p.stages), buffers(p.query_buffers);
    Walk walk(f, ptx::block_index(), ptx::grid_size());
    while (walk.next()) {
        if (walk.moved) {
            const uint32_t full = Shared::at(s.barriers->query_full[buffers.index]);
            ptx::mbarrier_wait(Shared::at(s.barriers->query_empty[buffers.index]), buffers.lap - 1);
            int queries = 0;
            for (int team = 0; team < p.teams; ++team) queries += group_of(f, walk.block, team).count;
            ptx::mbarrier_arrive_expect(full, queries * p.slabs * p.slot * 128);
            for (int team = 0; team < p.teams; ++team) {
                const Group group = group_of(f, walk.block, team);
                const uint32_t to = s.queries + buffers.index * query_bytes(p) + team * p.slabs * p.columns * 128;
                for (int i = 0; i < group.count; ++i) {
                    const int64_t query = group.query + i;
                    const int row = static_cast<int>(query_of(a, query).start) + group.chunk * p.columns;
                    for (int slab = 0; slab < p.slabs; ++slab)
                        ptx::tensor_load(to + (slab * p.columns + i * p.slot) * 128, q_map, full, 64 * slab, row,
                                         a.q_offsets || a.q_stride_n == 0 ? 0 : static_cast<int>(query), 0);
                }
            }
            buffers.advance();
        }
        const Document document = document_of(a, group_of(f, walk.block, 0).query, walk.document);
        const int number = a.d_stride_n == 0 ? 0 : static_cast<int>(document.number);
        const int owner = documents_of_query ? static_cast<int>(document.owner) : 0;
        for (int row = 0; row < document.length; row += ROWS)
            for (int part = 0; part < parts; ++part) {
                const uint32_t full = Shared::at(s.barriers->full[ring.index]);
                const int from = part * PART_SLABS, slabs = p.slabs - from < PART_SLABS ? p.slabs - from : PART_SLABS;
                ptx::mbarrier_wait(Shared::at(s.barriers->empty[ring.index]), ring.lap - 1);
                ptx::mbarrier_arrive_expect(full, slabs * SLAB_BYTES);
                for (int i = 0; i < slabs; ++i)
                    ptx::tensor_load(s.ring + ring.index * stage_bytes(p) + i * SLAB_BYTES, d_map, full, 64 * (from + i),
                                     static_cast<int>(document.start) + row, number, owner);
                ring.advance();
            }
    }
}

template <class T, int N, bool ARGMAX>
__device__ __forceinline__ void consume(const Forward &f, const Shared &s, Tables<N, ARGMAX, WARPS> &tables, int warpgroup,
                                        int warp, int lane) {
    const maxsim_args &a = f.a;
    const Plan &p = f.plan;
    const int parts = (p.slabs + PART_SLABS - 1) / PART_SLABS;
    const int team = p.teams > 1 ? warpgroup : 0;
    // the team's lines of the tables
    const int line = p.teams > 1 ? 4 * warpgroup : 0, warps = p.teams > 1 ? 4 : WARPS;
    const int my_line = 4 * warpgroup + warp;
    Ring ring(p.stages), buffers(p.query_buffers);
    Running<N, ARGMAX> running;
    Group group{};
    uint32_t queries = 0;
    int buffer = 0, turn = 0, held = -1;

    Walk walk(f, ptx::block_index(), ptx::grid_size());
    while (walk.next()) {
        if (walk.moved) {
            if (held >= 0 && lane == 0) ptx::mbarrier_arrive(Shared::at(s.barriers->query_empty[held]));
            group = group_of(f, walk.block, team);
            held = buffers.index;
            queries = s.queries + held * query_bytes(p) + team * p.slabs * (N * 128);
            ptx::mbarrier_wait(Shared::at(s.barriers->query_full[held]), buffers.lap);
            buffers.advance();
        }
        const Document document = document_of(a, group_of(f, walk.block, 0).query, walk.document);
        const int length = ptx::uniform(document.length);
        running.clear();
        for (int start = 0; start < length; start += ROWS) {
            if (p.teams == 1 && (turn++ & 1) != warpgroup) {
                // the other warpgroup's tile: a wait sees only whether the phase's parity moved, so every phase is waited
                // for, skipped or not
                for (int part = 0; part < parts; ++part) {
                    ptx::mbarrier_wait(Shared::at(s.barriers->full[ring.index]), ring.lap);
                    ptx::warp_barrier();
                    if (lane == 0) ptx::mbarrier_arrive(Shared::at(s.barriers->empty[ring.index]));
                    ring.advance();
                }
                continue;
            }
            const bool plain = start + ROWS <= document.length && !a.d_mask && !a.normalize;
            const int row = start + 16 * warp + lane / 4;
            // asked for before the tile is waited for
            const float scale = plain ? 1.0f : row_scale(a, document, row);
            const float scale8 = plain ? 1.0f : row_scale(a, document, row + 8);
            float acc[N / 2];
            for (int part = 0; part < parts; ++part) {
                ptx::mbarrier_wait(Shared::at(s.barriers->full[ring.index]), ring.lap);
                if (group.count) {
                    const int from = part * PART_SLABS, to = p.slabs < from + PART_SLABS ? p.slabs : from + PART_SLABS;
                    uint64_t d = descriptor(s.ring + ring.index * stage_bytes(p));
                    uint64_t q = descriptor(queries + from * (N * 128));
#pragma unroll 1
                    for (int slab = from; slab < to; ++slab) {
                        ptx::wgmma_fence();
                        // 16 dims are 32 bytes of a row; descriptors count in 16 bytes
#pragma unroll
                        for (int k = 0; k < 4; ++k) ptx::Wgmma<T, N>::run(acc, d + 2 * k, q + 2 * k, slab + k > 0);
                        ptx::wgmma_commit();
                        d += SLAB_BYTES >> 4, q += N * 128 >> 4;
                    }
                    ptx::wgmma_wait(acc);
                }
                // a lane that still waits here when the stage has been filled again would wait for the wrong phase
                ptx::warp_barrier();
                if (lane == 0) ptx::mbarrier_arrive(Shared::at(s.barriers->empty[ring.index]));
                ring.advance();
            }
            if (group.count) running.take(acc, row, scale, scale8, plain);
        }
        running.reduce(lane, tables.values[buffer][my_line], tables.wheres[buffer][ARGMAX ? my_line : 0],
                       &tables.firsts[buffer][my_line]);
        ptx::named_barrier(1 + team, 32 * warps);
        finish<N, ARGMAX>(f, group, walk.document, my_line - line, warps, lane, tables.values[buffer] + line,
                          tables.wheres[buffer] + (ARGMAX ? line : 0), tables.firsts[buffer] + line);
        buffer ^= 1;
    }
}

template <class T, int N, bool ARGMAX>
__global__ void __launch_bounds__(THREADS, 1)
    forward(const __grid_constant__ Forward f, const __grid_constant__ TensorMap q_map,
            const __grid_constant__ TensorMap d_map) {
    const Plan &p = f.plan;
    const int thread = ptx::thread_index(), warpgroup = ptx::uniform(thread / 128);
    char *shared = ptx::dynamic_shared();
    Shared s;
    s.ring = ptx::shared_address(shared);
    s.queries = s.ring + p.stages * stage_bytes(p);
    char *after = shared + p.stages * stage_bytes(p) + p.query_buffers * query_bytes(p);
    s.barriers = reinterpret_cast<Barriers *>(after);
    auto &tables = *reinterpret_cast<Tables<N, ARGMAX, WARPS> *>(after + sizeof(Barriers));
    if (thread == 0) {
        // the producer's arrival and its bytes fill; a lane of each consumer warp empties
        for (int i = 0; i < p.stages; ++i) {
            ptx::mbarrier_init(Shared::at(s.barriers->full[i]), 1);
            ptx::mbarrier_init(Shared::at(s.barriers->empty[i]), WARPS);
        }
        for (int i = 0; i < p.query_buffers; ++i) {
            ptx::mbarrier_init(Shared::at(s.barriers->query_full[i]), 1);
            ptx::mbarrier_init(Shared::at(s.barriers->query_empty[i]), WARPS);
        }
        ptx::mbarrier_init_fence();
    }
    ptx::block_barrier();
    if (warpgroup == 0) {
        ptx::give_registers<PRODUCER_REGISTERS>();
        if (thread == 0) produce(f, s, &q_map, &d_map);
    } else {
        ptx::take_registers<CONSUMER_REGISTERS>();
        consume<T, N, ARGMAX>(f, s, tables, warpgroup - 1, thread / 32 % 4, thread % 32);
    }
}

}  // namespace sm90
}  // namespace latemax
