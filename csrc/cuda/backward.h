/* What the gradient's kernels are given, and how a call is cut: decided on the host. */
#pragma once

#include <stdint.h>

#include "maxsim_cuda.h"
#include "plan.h"

namespace latemax {

constexpr int MOST_GRADIENT_DIMS = 1024;
constexpr int OWNER_THREADS = 320, OWNER_WARPS = OWNER_THREADS / 32;  // of grad_d
constexpr int GATHER_THREADS = 256, GATHER_WARPS = GATHER_THREADS / 32;  // of grad_q

/* An entry is a query token that met the document. Their numbers in a batch are 16-bit. */
constexpr int MOST_ENTRIES = 32768;  // in the only batch of a document
constexpr int BATCH_ENTRIES = 16384;  // where there are more, next to sums that last from batch to batch

/* How grad_d is cut. */
struct Owners {
    int tokens;     // of a document that a block owns, at most; a thread each in the scan
    int batch;      // entries that are sorted at a time
    int sums;       // float32 sums of the tokens in shared memory: a document may have more entries than a batch
    int64_t parts;  // of a dense document, a block each
    int64_t blocks;
    int shared;     // bytes
};

struct Backward {
    maxsim_args a;
    Gradient g;
    Owners owners;
    int splits;  // of grad_q's documents
};

inline int owner_bytes(int tokens, int batch, int dim, bool sums) {
    // heads of the warps, sums, starts, totals of the warps, counts, sorted entries; see Tables of grad_d.h
    return 4 * OWNER_WARPS * dim + (sums ? 4 * tokens * dim : 0) + 4 * (tokens + 1) + 4 * OWNER_WARPS +
           2 * OWNER_WARPS * tokens + 2 * batch;
}

/* The most tokens that fit, in parts of one length; shorter where the GPU would have less than a block for every
 * multiprocessor, although each block of a document reads all its argmax. */
inline Owners plan_owners(const maxsim_args &a, int multiprocessors, int shared_block) {
    const int dim = static_cast<int>(a.dim);
    const int64_t met = a.candidates ? a.n_q * a.n_c : a.own ? 1 : a.n_q, entries = met * a.q.l;
    Owners o{};
    o.sums = entries > MOST_ENTRIES;
    o.batch = o.sums ? BATCH_ENTRIES : static_cast<int>(entries);
    const int64_t rows = a.d.offsets ? a.d.total : a.d.l;
    int64_t most = rows < OWNER_THREADS ? rows : OWNER_THREADS;
    while (most > 1 && owner_bytes(static_cast<int>(most), o.batch, dim, o.sums) > shared_block) --most;
    const int64_t documents = a.d.offsets ? 1 : (a.own ? a.n_q : 1) * a.n_c;
    for (o.parts = ceil_div(rows, most); o.parts * documents < multiprocessors && ceil_div(rows, o.parts) > 32;) ++o.parts;
    o.tokens = static_cast<int>(ceil_div(rows, o.parts));
    // ragged: a slot for every `tokens` rows, one more for every document and one for rows after the last, see owned_of
    o.blocks = a.d.offsets ? a.d.total / o.tokens + a.d.n + 1 : o.parts * documents;
    o.shared = owner_bytes(o.tokens, o.batch, dim, o.sums);
    return o;
}

/* Into how many parts the documents of grad_q are cut, 32 at a time: four blocks fit on a multiprocessor. */
inline int splits_of(int64_t rows, int64_t n_c, int multiprocessors) {
    const int64_t blocks = ceil_div(rows, GATHER_WARPS), wanted = 4 * static_cast<int64_t>(multiprocessors) / blocks;
    const int64_t most = ceil_div(n_c, 32);
    return static_cast<int>(wanted < 1 ? 1 : wanted < most ? wanted : most);
}

}  // namespace latemax
