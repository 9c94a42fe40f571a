/* The planner of the sm_90 kernel, for the model of its rings. */
#include "cuda/sm90_shared.h"

/* rows, stages, parts of a tile, query buffers, warpgroups; all 0 where the call does not fit. */
extern "C" __attribute__((visibility("default"))) void latemax_plan(int64_t n_q, int64_t l_q, int64_t dim, int own, int shared,
                                                                    int multiprocessors, int *out) {
    maxsim_args a{};
    a.n_q = n_q, a.n_c = 1000, a.q.l = l_q, a.dim = dim, a.own = own;
    try {
        const latemax::Plan p = latemax::sm90::plan(a, {90, multiprocessors, shared, shared + 1024, 4000});
        out[0] = p.rows, out[1] = p.stages, out[2] = latemax::sm90::parts_of(p), out[3] = p.query_buffers;
        out[4] = latemax::sm90::warpgroups_of(p);
    } catch (const std::exception &) {
        for (int i = 0; i < 5; ++i) out[i] = 0;
    }
}
