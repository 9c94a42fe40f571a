/* Forward for Hopper: the copy engine fills a ring of document tiles, two warpgroups multiply them by wgmma.
 *
 *     warpgroup 0   warp 0: query blocks and document tiles to shared memory, as far ahead as there is room
 *                   warps 1, 2 with normalize: inverse norms of the tiles that have come
 *                   warp 3, without normalize 1 to 3: scores and argmax of the documents that are done
 *     warpgroup 1   wgmma of a tile or of half the rows, while the maximum of the one before is taken
 *     warpgroup 2   the same for other query tokens
 *
 * Query tokens are the M operand: up to 256 bytes each in registers, longer ones from shared memory. 128 document tokens are N, so
 * that a maximum runs along a thread's own registers. Every warp sees every phase of the ring, in order.
 */
#pragma once

#include "sm90_consumer.h"
#include "sm90_helpers.h"

namespace latemax {
namespace sm90 {

template <class T, int BLOCKS, int STEPS, bool ARGMAX>
__global__ void __launch_bounds__(THREADS, 1) forward(const __grid_constant__ Forward f, const __grid_constant__ Maps maps) {
    const Plan &p = f.plan;
    const int thread = ptx::thread_index(), warpgroup = ptx::uniform(thread / 128), lane = thread % 32;
    const int warp = ptx::uniform(thread / 32 % 4);
    const Shared s(p, ptx::dynamic_shared());
    const int consumers = 4 * warpgroups_of(p), norms = f.a.normalize ? NORM_WARPS : 0;
    if (thread == 0) {
        // an arrival of the producer and its bytes fill; a lane of each warp that reads empties
        for (int i = 0; i < p.stages; ++i) {
            ptx::mbarrier_init(Shared::at(s.meta->full[i]), 1);
            ptx::mbarrier_init(Shared::at(s.meta->scaled[i]), NORM_WARPS);
            ptx::mbarrier_init(Shared::at(s.meta->empty[i]), consumers + norms);
        }
        for (int i = 0; i < p.query_buffers; ++i) {
            ptx::mbarrier_init(Shared::at(s.meta->query_full[i]), 1);
            ptx::mbarrier_init(Shared::at(s.meta->query_empty[i]), consumers);
        }
        for (int i = 0; i < TABLES; ++i) {
            ptx::mbarrier_init(Shared::at(s.meta->done[i]), consumers);
            ptx::mbarrier_init(Shared::at(s.meta->free[i]), 3 - norms);
        }
        ptx::mbarrier_init_fence();
    }
    ptx::block_barrier();
    if (warpgroup == 0) {
        ptx::give_registers<HELPER_REGISTERS>();
        if (warp == 0) produce(f, s, maps, lane);
        else if (warp <= norms) scale<T>(f, s, warp - 1, lane);
        else finish_documents<ARGMAX>(f, s, warp - 1 - norms, 3 - norms, lane);
    } else {
        ptx::take_registers<CONSUMER_REGISTERS>();
        if (warpgroup <= warpgroups_of(p)) Consumer<T, BLOCKS, STEPS, ARGMAX>(f, s, warpgroup - 1, warp, lane).run();
    }
}

}  // namespace sm90
}  // namespace latemax
