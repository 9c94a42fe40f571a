/* What the sm_90 kernel decides before it runs, without running it: its plan and the documents of each thread block. */
#include "cuda/sm90_shared.h"

namespace {

/* in: n_q, n_c, l_q, l_d, dim, own, shared memory of a block, multiprocessors, clocks of a launch. d_offsets: of ragged
 * documents on the host, or NULL. */
latemax::Forward planned(const int64_t *in, const int64_t *d_offsets) {
    maxsim_args a{};
    a.n_q = in[0], a.n_c = in[1], a.q.l = in[2], a.d.l = in[3], a.dim = in[4], a.own = static_cast<int32_t>(in[5]);
    a.d.offsets = d_offsets, a.d.n = a.n_c, a.d.total = d_offsets ? d_offsets[a.n_c] : (a.own ? a.n_q : 1) * a.n_c * a.d.l;
    const int shared = static_cast<int>(in[6]);
    const latemax::Device device{90, static_cast<int>(in[7]), shared, shared + 1024, static_cast<int>(in[8])};
    return {a, {}, latemax::sm90::plan(a, device)};
}

}  // namespace

/* rows, stages, parts of a tile, query buffers, warpgroups, segments, chunks, query blocks, thread blocks, document tokens of
 * a tile, split; all 0 where the call does not fit. */
extern "C" __attribute__((visibility("default"))) void latemax_plan(const int64_t *in, const int64_t *d_offsets, int64_t *out) {
    for (int i = 0; i < 11; ++i) out[i] = 0;
    try {
        const latemax::Plan p = planned(in, d_offsets).plan;
        const int64_t values[] = {p.rows, p.stages, latemax::sm90::parts_of(p), p.query_buffers, latemax::sm90::warpgroups_of(p),
                                  p.segments, p.chunks, p.blocks, p.grid, p.tile, p.split};
        for (int i = 0; i < 11; ++i) out[i] = values[i];
    } catch (const std::exception &) {
    }
}

/* The documents of one thread block, in order: query block, document, its first tile and the one it ends before, where its
 * maxima go. Returns their number. */
extern "C" __attribute__((visibility("default"))) int64_t latemax_walk(const int64_t *in, const int64_t *d_offsets, int index,
                                                                       int64_t *out, int64_t most) {
    const latemax::Forward f = planned(in, d_offsets);
    latemax::Walk walk(f, index, f.plan.grid);
    int64_t count = 0;
    while (walk.next() && count < most) {
        const int64_t values[] = {walk.block, walk.document, walk.from, walk.until, walk.piece()};
        for (int i = 0; i < 5; ++i) out[5 * count + i] = values[i];
        ++count;
    }
    return count;
}
