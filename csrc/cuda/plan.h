/* How a call is cut: decided on the host, passed to the kernel beside the arguments.
 *
 * Query tokens are columns. A group is what one accumulator holds: `pack` short queries of `slot` columns each, or one of
 * the `chunks` of a long query. A thread block keeps the `teams` groups of one query block in shared memory and walks
 * documents past them.
 */
#pragma once

#include <stdint.h>

#include "../maxsim.h"

namespace latemax {

struct Plan {
    int columns;        // query columns in a group: 32, 64 or 128
    int slot;           // columns between the queries of a group: l_q, up to a multiple of 8; or all of them
    int pack;           // queries in a group
    int chunks;         // groups of one query
    int teams;          // groups that a thread block holds
    int64_t groups;     // of all queries; where they have their own documents, of one query
    int64_t blocks;     // query blocks
    int slabs;          // of 64 dims
    int stages;         // of the ring of document tiles
    int query_buffers;  // 2: the next query block is fetched while this one is used
    int grid;           // thread blocks
    int contiguous;     // see Walk
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* Columns, groups and query blocks for kernels whose groups have at most `most` columns. */
inline Plan plan_queries(const maxsim_args &a, int most, int most_teams) {
    Plan p{};
    const int64_t slot = ceil_div(a.q.l, 8) * 8;
    p.chunks = static_cast<int>(ceil_div(a.q.l, most));
    const int64_t wanted = a.own || slot >= most ? slot : slot * a.n_q;
    p.columns = 32;
    while (p.columns < most && p.columns < wanted) p.columns *= 2;
    p.slot = p.chunks > 1 || slot > p.columns ? p.columns : static_cast<int>(slot);
    p.pack = a.own || p.chunks > 1 ? 1 : p.columns / p.slot;
    p.groups = a.own ? p.chunks : p.chunks > 1 ? a.n_q * p.chunks : ceil_div(a.n_q, p.pack);
    p.teams = p.groups > 1 ? most_teams : 1;
    p.blocks = ceil_div(p.groups, p.teams) * (a.own ? a.n_q : 1);
    p.slabs = static_cast<int>(ceil_div(a.dim, 64));
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
