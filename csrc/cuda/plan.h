/* How a call is cut: decided on the host, passed to the kernel with the arguments.
 *
 * A thread block keeps the query tokens of one query block, `rows` of them, and streams documents. The rows are
 * cut in segments of `slot` rows: a whole query each, one of the `chunks` of 64 tokens of a long query, or up to 32 tokens
 * of a ragged query.
 */
#pragma once

#include <stdint.h>

#include "../maxsim.h"
#include "ptx.h"

namespace latemax {

constexpr int CHUNK = 64;        // query tokens in a segment of a long query, and in each piece of a score's sum
constexpr int RAGGED_SLOT = 32;  // in a segment of a ragged query, whose length the host does not know
// the longest query that stays in one segment
constexpr int LONGEST_SM90 = 128, LONGEST_SM80 = 64;

struct Plan {
    int rows;           // query tokens in a query block: 32 or 64 (sm_80), 64, 128 or 256 (sm_90)
    int slot;           // rows of a segment: a multiple of 8, CHUNK where queries are cut, RAGGED_SLOT where they are ragged
    int segments;       // in a query block
    int chunks;         // segments of one query; unused where queries are ragged
    int64_t units;      // segments of all queries; of ragged ones the most there can be
    int64_t blocks;     // query blocks
    int columns;        // dims in a slab, SLAB_ROW bytes: 64, of codes 128
    int slabs;          // of a token
    int stages;         // of the ring of document tiles
    int query_buffers;  // 2: the next query block is fetched while this one is used
    int grid;           // thread blocks
    int tile;           // document tokens in a tile
    int split;          // documents may be cut between thread blocks, see walk.h
};

__host__ __device__ inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* Whether scores are sums of several segments' sums. */
__host__ __device__ inline bool in_parts(const maxsim_args &a, const Plan &p) { return a.q.offsets || p.chunks > 1; }

inline int element_bytes(const maxsim_args &a) { return a.q.dtype == MAXSIM_I8 ? BYTES<I8> : BYTES<F16>; }

inline void plan_rows(Plan &p, const maxsim_args &a, int rows) {
    p.rows = rows;
    p.segments = rows / p.slot;
    if (a.q.offsets) {
        // a query has a segment at least, and own documents in a block of its own
        p.units = a.q.total / p.slot + a.n_q * (a.own ? p.segments : 1);
        p.blocks = ceil_div(p.units, p.segments);
    } else {
        p.units = a.n_q * p.chunks;
        p.blocks = a.own ? a.n_q * ceil_div(p.chunks, p.segments) : ceil_div(p.units, p.segments);
    }
}

/* Segments and query blocks for kernels of `least` to `most` rows. */
inline Plan plan_queries(const maxsim_args &a, int least, int most, int longest) {
    Plan p{};
    const int64_t length = a.q.offsets ? ceil_div(a.q.total, a.n_q) : a.q.l;
    p.chunks = !a.q.offsets && length > longest ? static_cast<int>(ceil_div(length, CHUNK)) : 1;
    p.slot = a.q.offsets ? RAGGED_SLOT : p.chunks > 1 ? CHUNK : length > 8 ? static_cast<int>(ceil_div(length, 8) * 8) : 8;
    p.columns = SLAB_ROW / element_bytes(a);
    p.slabs = static_cast<int>(ceil_div(a.dim, p.columns));
    const int64_t wanted = ceil_div(length, p.slot) * p.slot * (a.own ? 1 : a.n_q);
    int rows = least;
    while (rows < most && rows < wanted) rows *= 2;
    plan_rows(p, a, rows);
    return p;
}

/* The thread blocks. `most` run at once. */
inline void plan_grid(Plan &p, const maxsim_args &a, int64_t most) {
    const int64_t work = p.blocks * (!p.split ? a.n_c : a.d.offsets ? ceil_div(a.d.total, p.tile) + a.n_c
                                                                    : a.n_c * ceil_div(a.d.l, p.tile));
    p.grid = static_cast<int>(work < most ? work : most);
}

}  // namespace latemax
