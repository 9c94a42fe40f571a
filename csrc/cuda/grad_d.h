/* Gradient of the document tokens: each is the sum of g · q over the query tokens whose argmax it is.
 *
 * A thread block owns tokens of one document. The query tokens that met it (its entries: n_q · l_q of them, or those of the
 * queries that name it) are sorted by their argmax in shared memory, a counting sort that keeps their order; then each warp
 * adds up the rows of an equal share of them in registers. No float is added by an atomic, and every order is fixed, so
 * gradients repeat bit for bit. A token's own share is always whole: where a run of entries with one argmax goes on in the
 * next warps, the first adds up what they found.
 *
 * A row that is no argmax is not read, so no NaN or infinity in it reaches a gradient.
 */
#pragma once

#include "backward.h"
#include "items.h"
#include "row.h"

namespace latemax {

/* The document tokens of a thread block, and the queries that met the document. */
struct Owned {
    int64_t row;  // of the first in the gradient
    int start;    // the first, in the document
    int count;
    int query, candidate;  // own: of its only pair; all pairs: candidate
    int64_t pair, pairs;   // candidates: where the document's pairs start; how many there are
};

__device__ inline Owned owned_of(const Backward &b, int64_t block) {
    const maxsim_args &a = b.a;
    const int most = b.owners.tokens;
    if (!a.d.offsets) {
        const int64_t item = block / b.owners.parts, start = block % b.owners.parts * most;
        const int64_t owner = item / a.n_c, number = item % a.n_c, left = a.d.l - start;
        return {item * a.d.l + start, static_cast<int>(start), static_cast<int>(left < most ? left : most),
                static_cast<int>(owner), static_cast<int>(number), 0, a.own ? 1 : a.n_q};
    }
    // Document j has the blocks from offsets[j] / most + j on: one for each `most` tokens and at most one more, which is
    // empty. Rows after the last document, which belong to none, are document n.
    const auto begin = [&](int64_t j) {
        const int64_t at = a.d.offsets[j];
        return at < 0 ? 0 : at > a.d.total ? a.d.total : at;
    };
    int64_t low = 0, high = a.d.n;
    while (low < high) {
        const int64_t middle = (low + high + 1) / 2;
        if (begin(middle) / most + middle <= block) low = middle;
        else high = middle - 1;
    }
    const int64_t first = begin(low), end = low < a.d.n ? begin(low + 1) : a.d.total;
    const int64_t start = (block - first / most - low) * most, left = end - first - start;
    Owned o{first + start, static_cast<int>(start),
            static_cast<int>(left < 0 ? 0 : left < most ? left : most), 0, static_cast<int>(low), 0, low < a.d.n ? a.n_q : 0};
    if (a.candidates && low < a.d.n) o.pair = b.g.pair_starts[low], o.pairs = b.g.pair_starts[low + 1] - o.pair;
    return o;
}

__device__ inline const uint16_t *token_of(const maxsim_args &a, const Owned &o, int token) {
    const auto *tokens = static_cast<const uint16_t *>(a.d.tokens);
    if (a.d.offsets) return tokens + (o.row + token) * a.d.stride_l;
    return tokens + o.query * a.d.stride_q + o.candidate * a.d.stride_n + (o.start + token) * a.d.stride_l;
}

struct Tables {
    float *heads;      // [warps, dim]: what a warp found of the run that an earlier one started
    float *sums;       // [tokens, dim], where documents have several batches
    int *starts;       // [tokens + 1]: of the runs of sorted entries
    int *totals;       // [warps]
    uint16_t *counts;  // [warps, tokens]: entries of a warp with this argmax, then where its next one goes
    uint16_t *sorted;  // [batch]

    __device__ Tables(const Owners &o, int dim) {
        heads = reinterpret_cast<float *>(ptx::dynamic_shared());
        sums = heads + OWNER_WARPS * dim;
        starts = reinterpret_cast<int *>(sums + (o.sums ? o.tokens * dim : 0));
        totals = starts + o.tokens + 1;
        counts = reinterpret_cast<uint16_t *>(totals + OWNER_WARPS);
        sorted = counts + OWNER_WARPS * o.tokens;
    }
};

struct Entry {
    int query, candidate, token;
};

/* The entries of a batch: `count` of the document's, from a number on. */
struct Batch {
    const Backward &b;
    const Owned &owned;
    int64_t pair;  // of entry 0
    uint32_t token;
    int count;

    __device__ Batch(const Backward &b_, const Owned &owned_, int64_t first, int count_)
        : b(b_), owned(owned_), pair(first / b_.a.q.l), token(static_cast<uint32_t>(first % b_.a.q.l)), count(count_) {}

    __device__ Entry entry(int i) const {
        const uint32_t l = static_cast<uint32_t>(b.a.q.l), at = token + i;
        const int64_t p = pair + at / l;
        const int within = static_cast<int>(at % l);
        if (b.a.own && !b.a.candidates) return {owned.query, owned.candidate, within};
        if (!b.a.candidates) return {static_cast<int>(p), owned.candidate, within};
        const int64_t number = b.g.pairs[owned.pair + p];
        return {static_cast<int>(number / b.a.n_c), static_cast<int>(number % b.a.n_c), within};
    }
    /* The argmax among the tokens owned, -1 if it is none of them. */
    __device__ int argmax(const Entry &e) const {
        const int at = b.a.argmax[(e.query * b.a.n_c + e.candidate) * b.a.q.l + e.token] - owned.start;
        return at >= 0 && at < owned.count ? at : -1;
    }
};

/* Calls work(entry, argmax) for the entries of this warp, an equal share of the batch, in order; all lanes call it. Four
 * argmax of a lane are read at a time: one at a time, 8192 entries wait 32 × 600 clocks for L2. */
template <class Work>
__device__ inline void each_entry(const Batch &batch, const Work &work) {
    constexpr int AT_ONCE = 4;
    const int warp = ptx::thread_index() / 32, lane = ptx::thread_index() % 32;
    const int each = (batch.count + OWNER_THREADS - 1) / OWNER_THREADS * 32;
    const int end = batch.count < (warp + 1) * each ? batch.count : (warp + 1) * each;
    for (int first = warp * each; first < end; first += 32 * AT_ONCE) {
        int argmax[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
            const int at = first + 32 * i + lane;
            argmax[i] = at < end ? batch.argmax(batch.entry(at)) : -1;
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i)
            if (first + 32 * i < end) work(first + 32 * i + lane, argmax[i]);
    }
}

/* Fills `starts` and `sorted`: the entries of each owned token in their order. */
__device__ inline void sort(const Batch &batch, const Tables &t) {
    const int thread = ptx::thread_index(), lane = thread % 32, warp = thread / 32, tokens = batch.owned.count;
    const uint32_t before = (1u << lane) - 1;
    for (int i = thread; i < OWNER_WARPS * tokens; i += OWNER_THREADS) t.counts[i] = 0;
    ptx::block_barrier();
    // only this warp changes its counts, and only one lane the count of a token
    uint16_t *counts = t.counts + warp * tokens;
    each_entry(batch, [&](int, int argmax) {
        const uint32_t same = ptx::match(argmax);
        if (argmax >= 0 && !(same & before)) counts[argmax] += ptx::count_bits(same);
        ptx::warp_barrier();
    });
    ptx::block_barrier();

    int total = 0;
    if (thread < tokens)
        for (int w = 0; w < OWNER_WARPS; ++w) total += t.counts[w * tokens + thread];
    int end = total;
    for (int step = 1; step < 32; step *= 2) {
        const int other = ptx::shuffle(end, (lane - step) & 31);
        if (lane >= step) end += other;
    }
    if (lane == 31) t.totals[warp] = end;
    ptx::block_barrier();
    for (int w = 0; w < warp; ++w) end += t.totals[w];
    if (thread < tokens) {
        int at = end - total;
        t.starts[thread] = at;
        for (int w = 0; w < OWNER_WARPS; ++w) {
            const int count = t.counts[w * tokens + thread];
            t.counts[w * tokens + thread] = static_cast<uint16_t>(at);
            at += count;
        }
    }
    if (thread == tokens - 1) t.starts[tokens] = end;
    ptx::block_barrier();

    each_entry(batch, [&](int entry, int argmax) {
        const uint32_t same = ptx::match(argmax);
        const int first = argmax >= 0 ? counts[argmax] : 0;
        ptx::warp_barrier();
        if (argmax >= 0) {
            t.sorted[first + ptx::count_bits(same & before)] = static_cast<uint16_t>(entry);
            if (!(same & before)) counts[argmax] = static_cast<uint16_t>(first + ptx::count_bits(same));
        }
        ptx::warp_barrier();
    });
    ptx::block_barrier();
}

/* Adds up the sorted entries of a batch; finish(token, sums) is called once for each token that has some. */
template <class T, int C, class Finish>
__device__ inline void add_up(const Batch &batch, const Tables &t, const Finish &finish) {
    const maxsim_args &a = batch.b.a;
    const int lane = ptx::thread_index() % 32, warp = ptx::uniform(ptx::thread_index() / 32), dim = static_cast<int>(a.dim);
    const int kept = t.starts[batch.owned.count];
    const auto share = [&](int w) { return kept * w / OWNER_WARPS; };
    const int from = share(warp), to = share(warp + 1);
    Sums<C> sums;
    int token = -1;
    for (int at = from; at < to; at += 32) {
        const bool counts = at + lane < to;
        uint32_t offset = 0;
        float weight = 0;
        int argmax = -1;
        if (counts) {
            const Entry e = batch.entry(t.sorted[at + lane]);
            argmax = batch.argmax(e);
            offset = static_cast<uint32_t>((e.query * a.q.stride_n + e.token * a.q.stride_l) / 8);
            weight = batch.b.g.scores[e.query * batch.b.g.stride_q + e.candidate * batch.b.g.stride_c];
        }
        const int before = ptx::shuffle(argmax, (lane - 1) & 31);
        const uint32_t starts = ptx::ballot(counts && argmax != (lane ? before : token));
        const auto *first_row = static_cast<const uint16_t *>(a.q.tokens);
        gather<T>(sums, first_row, counts, offset, weight, starts, dim, a.normalize, [&](int i) {
            if (token >= 0) {
                // a run that an earlier warp started is left to it
                if (t.starts[token] < from) sums.put(t.heads + warp * dim, dim);
                else finish(token, sums);
            }
            token = ptx::shuffle(argmax, i);
            sums.clear();
        });
    }
    // the last run is finished after the barrier, with what the next warps found of it
    const bool others = token >= 0 && t.starts[token] < from;
    if (others) sums.put(t.heads + warp * dim, dim);
    ptx::block_barrier();
    if (token < 0 || others) return;
    for (int w = warp + 1; share(w) < t.starts[token + 1]; ++w)
        if (share(w) < share(w + 1)) sums.add_floats(t.heads + w * dim, dim);
    finish(token, sums);
}

/* 96 registers let two blocks share a multiprocessor: one sorts while the other waits for rows. Up to 256 dims. */
template <class T, int C>
__global__ void __launch_bounds__(OWNER_THREADS, C <= 8 ? 2 : 1) grad_d(const __grid_constant__ Backward b) {
    const maxsim_args &a = b.a;
    const int dim = static_cast<int>(a.dim), warp = ptx::thread_index() / 32;
    const Owned owned = owned_of(b, ptx::block_index());
    if (owned.count <= 0) return;
    const Tables t(b.owners, dim);
    const int64_t entries = owned.pairs * a.q.l;
    const bool once = entries <= b.owners.batch;
    const auto write = [&](int token, Sums<C> &sums) {
        if (a.normalize) {
            Row<C> x;
            x.load({token_of(a, owned, token), dim}, 0);
            sums.template through_norm<T>(x, dim);
        }
        sums.template store<T>(static_cast<uint16_t *>(b.g.d) + (owned.row + token) * dim, dim);
    };
    if (!once)
        for (int i = ptx::thread_index(); i < owned.count * dim; i += OWNER_THREADS) t.sums[i] = 0;
    int64_t first = 0;
    do {
        const int64_t left = entries - first;
        const Batch batch(b, owned, first, static_cast<int>(left < b.owners.batch ? left : b.owners.batch));
        sort(batch, t);
        add_up<T, C>(batch, t, [&](int token, Sums<C> &sums) {
            if (once) write(token, sums);
            else sums.add_to(t.sums + token * dim, dim);
        });
        first += b.owners.batch;
    } while (first < entries);
    if (!once) ptx::block_barrier();
    for (int token = warp; token < owned.count; token += OWNER_WARPS) {
        if (once && t.starts[token] < t.starts[token + 1]) continue;
        Sums<C> sums;
        sums.clear();
        if (!once) sums.add_floats(t.sums + token * dim, dim);
        write(token, sums);
    }
}

}  // namespace latemax
