/* What the warps of the sm_90 kernel share: the ring, its barriers and tables. */
#pragma once

#include <stdexcept>
#include <string>

#include "finish.h"
#include "runtime.h"
#include "walk.h"

namespace latemax {
namespace sm90 {

constexpr int THREADS = 384, TOKENS = 64, LEAST_ROWS = 64, MOST_ROWS = 256;
constexpr int SLAB_BYTES = TOKENS * SLAB_ROW;  // of 64 tokens, 8 KB
constexpr int REGISTER_SLABS = 2;         // up to which the query tokens stay in registers
constexpr int TAIL_BOX = 16;              // the last tokens of a document are copied in boxes of so many
constexpr int MOST_STAGES = 12, MOST_QUERY_BUFFERS = 2, TABLES = 2, NORM_WARPS = 2;
// 168 registers a thread are there at the start (65,536 / 384); what warpgroup 0 gives, the others take
constexpr int HELPER_REGISTERS = 88, CONSUMER_REGISTERS = 208;
static_assert(HELPER_REGISTERS + 2 * CONSUMER_REGISTERS <= 3 * 168);

/* What a stage of the ring holds. TILE: document tokens. DOCUMENT: an empty document. QUERIES: from here on another query
 * block. STOP: nothing more. */
enum Kind { TILE, DOCUMENT, QUERIES, STOP };
struct Tile {
    int kind;
    int tokens, start;  // of the tile, and where it is in its document
    int last, scaled;   // last of its document; some similarities are multiplied or left out
    int first;          // the lowest valid token of the document up to here
    int rows;           // QUERIES: rows of the block that hold a query
    int64_t block, document;
    int piece;          // where the maxima of a part of a document go, -1: a whole document, see walk.h
};

/* Maxima of a document on their way from the consumers to the warps that finish it. */
struct Table {
    float values[MOST_ROWS];
    int wheres[MOST_ROWS];
    int64_t block, document;
    int first, piece, stop;
};

struct Meta {
    uint64_t full[MOST_STAGES], scaled[MOST_STAGES], empty[MOST_STAGES];
    uint64_t query_full[MOST_QUERY_BUFFERS], query_empty[MOST_QUERY_BUFFERS], done[TABLES], free[TABLES];
    Tile tiles[MOST_STAGES];
    float scales[MOST_STAGES][TOKENS];  // of document tokens, see Rows
    Table tables[TABLES];
    float weights[MOST_ROWS];  // of query tokens, see query_weight
    Part parts[MOST_ROWS / 8];
};
static_assert(sizeof(Meta) <= 12288, "most_dims of latemax/ops/backends/cuda.py leaves room for this");

__host__ __device__ inline int stage_slabs(const Plan &p) { return p.slabs <= REGISTER_SLABS ? p.slabs : 1; }
__host__ __device__ inline int parts_of(const Plan &p) { return p.slabs <= REGISTER_SLABS ? 1 : p.slabs; }
__host__ __device__ inline int query_bytes(const Plan &p) { return p.slabs * p.rows * 128; }
__host__ __device__ inline int warpgroups_of(const Plan &p) { return p.rows > 64 ? 2 : 1; }
inline int shared_bytes(const Plan &p) {
    return p.stages * stage_slabs(p) * SLAB_BYTES + p.query_buffers * query_bytes(p) + static_cast<int>(sizeof(Meta));
}

/* The clocks of a tile on one multiprocessor: of the tensor cores, or of reading it while all others read too, at 13 bytes a
 * clock (3 TB/s). */
inline int64_t tile_clocks(const Plan &p) {
    // codes take half the bytes of half precision, and are multiplied twice as fast
    const int64_t bytes = SLAB_ROW * p.slabs, multiply = p.rows * p.tile * bytes / 4096, read = p.tile * bytes / 13;
    return multiply > read ? multiply : read;
}

/* Whether documents are cut between thread blocks: where the time of the longest share shrinks by more than the launch that
 * merges the pieces takes. Masked documents and candidates have lengths that only the device knows. */
inline bool worth_a_split(const Plan &p, const maxsim_args &a, const Device &device) {
    if (a.d.mask || a.candidates || !a.n_c) return false;
    const int64_t grid = device.multiprocessors, rest = p.blocks % grid, tokens = a.d.offsets ? a.d.total / a.n_c : a.d.l;
    if (!tokens) return false;
    const int64_t tiles = ceil_div(tokens, p.tile), all = a.n_c * tiles;
    // ragged documents: a share of whole ones ends within half a document of its even part
    const int64_t whole = Sharing(rest, a.n_c, 1, grid).longest(rest, a.n_c) * tiles + (a.d.offsets ? tiles / 2 : 0);
    return (whole - Sharing(rest, all, 1, grid).longest(rest, all)) * tile_clocks(p) > device.launch_clocks;
}

/* Rows of a query block, query buffers, stages and grid, so that a block fits in shared memory. */
inline Plan plan(const maxsim_args &a, const Device &device) {
    Plan p = plan_queries(a, LEAST_ROWS, MOST_ROWS, LONGEST_SM90);
    p.tile = TOKENS;
    const auto fits = [&] { return shared_bytes(p) <= device.shared_block; };
    // 256 rows halve what is read of documents, which is worth more than a ring of over three stages
    const auto least_stages = [&] { return p.rows == MOST_ROWS ? 3 : 2; };
    p.query_buffers = 1, p.stages = least_stages();
    while (!fits() && p.rows > LEAST_ROWS && p.rows / 2 >= p.slot) {
        plan_rows(p, a, p.rows / 2);
        p.stages = least_stages();
    }
    if (!fits()) throw std::runtime_error("dim " + std::to_string(a.dim) + " needs more shared memory than this GPU has");
    // queries in registers free their buffer at once; else a second buffer comes before a fifth stage
    if (p.slabs > REGISTER_SLABS && p.blocks > device.multiprocessors) {
        const int stages = p.stages;
        p.stages = 4, p.query_buffers = MOST_QUERY_BUFFERS;
        if (!fits()) p.stages = stages, p.query_buffers = 1;
    }
    while (p.stages < MOST_STAGES) {
        ++p.stages;
        if (fits()) continue;
        --p.stages;
        break;
    }
    p.split = worth_a_split(p, a, device);
    plan_grid(p, a, device.multiprocessors);
    return p;
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

struct Shared {
    char *memory;
    uint32_t ring, queries;
    Meta *meta;

    __device__ Shared(const Plan &p, char *memory) : memory(memory) {
        const int stages = p.stages * stage_slabs(p) * SLAB_BYTES;
        ring = ptx::shared_address(memory);
        queries = ring + stages;
        meta = reinterpret_cast<Meta *>(memory + stages + p.query_buffers * query_bytes(p));
    }
    __device__ static uint32_t at(const uint64_t &barrier) { return ptx::shared_address(&barrier); }
    /* By one lane, after the whole warp is done with what the barrier guards. */
    __device__ static void arrive(const uint64_t &barrier, int lane) {
        ptx::warp_barrier();
        if (lane == 0) ptx::mbarrier_arrive(at(barrier));
    }
};

}  // namespace sm90
}  // namespace latemax
