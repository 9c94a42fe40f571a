/* How a call is cut: decided on the host, passed to the kernel with the arguments.
 *
 * A thread block keeps the query tokens of one query block, `rows` of them, and streams documents. The rows are
 * cut in segments of `slot` rows: a whole query each, or one of the `chunks` of 64 tokens of a long query.
 */
#pragma once

#include <stdint.h>

#include "../maxsim.h"

namespace latemax {

constexpr int CHUNK = 64;  // query tokens in a segment of a long query, and in each piece of a score's sum
// the longest query that stays in one segment
constexpr int LONGEST_SM90 = 128, LONGEST_SM80 = 64;

struct Plan {
    int rows;           // query tokens in a query block: 32 or 64 (sm_80), 64, 128 or 256 (sm_90)
    int slot;           // rows of a segment: a multiple of 8, CHUNK where queries are cut
    int segments;       // in a query block
    int chunks;         // segments of one query
    int64_t blocks;     // query blocks
    int slabs;          // of 64 dims
    int stages;         // of the ring of document tiles
    int query_buffers;  // 2: the next query block is fetched while this one is used
    int grid;           // thread blocks
    int contiguous;     // see Walk
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* Cuts queries of more than `longest` tokens. Depends on l_q only, since the caller allocates by it. */
inline int chunks_of(int64_t l_q, int longest) { return l_q > longest ? static_cast<int>(ceil_div(l_q, CHUNK)) : 1; }

inline void plan_rows(Plan &p, const maxsim_args &a, int rows) {
    p.rows = rows;
    p.segments = rows / p.slot;
    p.blocks = a.own ? a.n_q * ceil_div(p.chunks, p.segments) : ceil_div(a.n_q * p.chunks, p.segments);
}

/* Segments and query blocks for kernels of `least` to `most` rows. */
inline Plan plan_queries(const maxsim_args &a, int least, int most, int longest) {
    Plan p{};
    p.chunks = chunks_of(a.q.l, longest);
    p.slot = p.chunks > 1 ? CHUNK : a.q.l > 8 ? static_cast<int>(ceil_div(a.q.l, 8) * 8) : 8;
    p.slabs = static_cast<int>(ceil_div(a.dim, 64));
    const int64_t wanted = static_cast<int64_t>(p.slot) * p.chunks * (a.own ? 1 : a.n_q);
    int rows = least;
    while (rows < most && rows < wanted) rows *= 2;
    plan_rows(p, a, rows);
    return p;
}

/* The grid, and how the query blocks of an unfilled round are shared out, see Walk. */
inline void plan_grid(Plan &p, const maxsim_args &a, int64_t most) {
    const int64_t items = p.blocks * a.n_c;
    p.grid = static_cast<int>(items < most ? items : most);
    const int64_t rest = p.blocks % p.grid;
    // neighbours on one document share it in L2; worth up to a twentieth of the round in idle blocks
    if (rest) p.contiguous = 20 * ceil_div(a.n_c, p.grid / rest) > 21 * ceil_div(rest * a.n_c, p.grid);
}

}  // namespace latemax
