/* Which documents a thread block scores against which query blocks.
 *
 * Full rounds: every thread block has a query block of its own and walks all documents, so that all read the same document
 * at about the same time, from L2. The query blocks left over are shared out by cost, so that all thread blocks end at
 * about the same time: each takes a range of the documents, of one query block where few thread blocks stay idle then
 * (neighbours have different query blocks and the same documents), else of all of them in a row. A range may begin and end
 * inside a document; the maxima of such pieces are merged by launch_pieces. Shares need no counter: the offsets of ragged
 * documents are the sums that a share is found in.
 */
#pragma once

#include "items.h"

namespace latemax {

/* In ragged documents the cost of one, in tokens, besides its tokens: half a tile, the mean of rounding up. */
constexpr int COST = 32;

/* A place between tiles: before tile `tile` of a document. */
struct Cut {
    int document, tile;

    __host__ __device__ bool inside() const { return tile > 0; }
    __host__ __device__ bool operator==(const Cut &other) const { return document == other.document && tile == other.tile; }
};

/* The work of one query block: in tiles, in tokens where documents are ragged, or in documents where nothing is known. */
struct Costs {
    const maxsim_args &a;
    const Plan &p;
    bool ragged;
    int64_t uniform;  // of a document that is not ragged

    __host__ __device__ Costs(const maxsim_args &a, const Plan &p)
        : a(a), p(p), ragged(a.d.offsets && !a.candidates), uniform(p.split ? ceil_div(a.d.l, p.tile) : 1) {}
    __device__ int64_t offset(int64_t document) const {
        const int64_t at = a.d.offsets[document];
        return at < 0 ? 0 : at > a.d.total ? a.d.total : at;
    }
    /* Of all documents before this one. */
    __device__ int64_t before(int64_t document) const {
        return ragged ? offset(document) - offset(0) + document * COST : document * uniform;
    }
    /* Ranges of at least so much never begin and end at the same place. */
    __host__ __device__ int64_t least() const { return ragged ? p.tile + COST : 1; }
    // inlined, or what is returned by reference would be on the stack
    __device__ __forceinline__ Cut at(int64_t cost) const {
        if (!ragged) return {static_cast<int>(cost / uniform), static_cast<int>(cost % uniform)};
        int64_t low = 0, high = a.n_c;  // before(low) <= cost < before(high + 1)
        while (low < high) {
            const int64_t middle = (low + high + 1) / 2;
            if (before(middle) <= cost) low = middle;
            else high = middle - 1;
        }
        const int64_t within = cost - before(low);
        const int document = static_cast<int>(low);
        if (within == 0 || low == a.n_c) return {document, 0};
        const int64_t length = offset(low + 1) - offset(low), tiles = ceil_div(length, p.tile);
        const int64_t tile = p.split ? within / p.tile : 2 * within < length + COST ? 0 : tiles;
        return tile >= tiles ? Cut{document + 1, 0} : Cut{document, static_cast<int>(tile)};
    }
};

/* How `rest` query blocks of `total` cost each are shared by a grid. A share costs `least` or more. */
struct Sharing {
    int64_t sharers, active;  // thread blocks of one query block; all that have a share
    bool aligned;             // every share is of one query block

    __host__ __device__ Sharing(int64_t rest, int64_t total, int64_t least, int64_t grid)
        : sharers(0), active(0), aligned(true) {
        if (!rest || !total) return;
        const int64_t most = total < least ? 1 : total / least;
        sharers = grid / rest < most ? grid / rest : most;
        // neighbours on one document share it in L2; worth up to a twentieth of the thread blocks
        aligned = sharers == most || 20 * (grid - rest * sharers) <= grid;
        const int64_t all = rest * total < least ? 1 : rest * total / least;
        active = aligned ? rest * sharers : all < grid ? all : grid;
    }
    __host__ __device__ int64_t longest(int64_t rest, int64_t total) const {
        return active ? aligned ? ceil_div(total, sharers) : ceil_div(rest * total, active) : 0;
    }
};

/* The shares of the query blocks that no full round takes. */
struct Shares {
    Costs costs;
    int grid;
    int64_t full, rest, total;  // rounds, query blocks after them, and the cost of one
    Sharing sharing;

    __device__ Shares(const Forward &f, int grid)
        : costs(f.a, f.plan), grid(grid), full(blocks_of(f) / grid), rest(blocks_of(f) % grid), total(costs.before(f.a.n_c)),
          sharing(rest, total, costs.least(), grid) {}
    /* The next thread block along a document. */
    __device__ int64_t step() const { return sharing.aligned ? rest : 1; }
    /* Where the share of a thread block begins; its end is where that of `step` blocks further begins. `turn` is the query
     * block, of the rest. */
    __device__ __forceinline__ Cut begin(int64_t index, int64_t &turn) const {
        if (sharing.aligned) {
            turn = index % rest;
            const int64_t share = index / rest;
            return share < sharing.sharers ? costs.at(total * share / sharing.sharers) : Cut{static_cast<int>(costs.a.n_c), 0};
        }
        const int64_t cost = rest * total * index / sharing.active;
        turn = cost / total;
        return costs.at(cost % total);
    }
};

/* The documents of one thread block, in order. */
struct Walk {
    static constexpr int ALL = NONE;
    int block = -1, document = 0;
    int from = 0, until = ALL;  // tiles of the document; ALL: to its end
    int last = 0;               // documents of this query block end before this one
    bool moved = false;         // the query block is another than before

    __device__ Walk(const Forward &f, int index, int grid)
        : n_c_(static_cast<int>(f.a.n_c)), index_(index), grid_(grid), next_(index) {
        const Shares shares(f, grid);
        first_rest_ = static_cast<int>(shares.full) * grid;
        if (index >= shares.sharing.active) return;
        int64_t turn = 0, end = 0;
        cut_ = shares.begin(index, turn);
        end_ = shares.begin(index + shares.step(), end);
        // an end at the beginning of a query block is the end of the one before
        const bool before = !shares.sharing.aligned && end_.document == 0 && !end_.inside();
        rest_ = first_rest_ + static_cast<int>(turn), rest_end_ = first_rest_ + static_cast<int>(end) + !before;
        if (before) end_ = {n_c_, 0};
    }
    __device__ bool next() {
        moved = false;
        ++document, from = 0;
        while (document > to_.document || (document == to_.document && to_.tile <= from)) {
            if (!query_block()) return false;
            moved = true;
        }
        until = document == to_.document ? to_.tile : ALL;
        last = to_.document + to_.inside();
        return true;
    }
    /* Where the maxima of a piece go: the first and the last document of a thread block may be pieces. -1: not a piece. */
    __device__ int piece() const { return from > 0 ? 2 * index_ : until != ALL ? 2 * index_ + 1 : -1; }

  private:
    __device__ bool query_block() {
        if (next_ < first_rest_) {
            block = next_, next_ += grid_;
            document = 0, to_ = {n_c_, 0};
            return true;
        }
        if (rest_ >= rest_end_) return false;
        block = rest_++;
        document = cut_.document, from = cut_.tile;
        to_ = rest_ < rest_end_ ? Cut{n_c_, 0} : end_;
        cut_ = {0, 0};
        return true;
    }

    int n_c_, index_, grid_;
    int next_, first_rest_;          // query blocks of full rounds
    int rest_ = 0, rest_end_ = 0;    // and of the share
    Cut cut_{0, 0}, end_{0, 0}, to_{0, 0};
};

}  // namespace latemax
