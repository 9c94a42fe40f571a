/* AVX2 with FMA and F16C: 6 x 2 sums of 8 lanes in 16 registers. */
#if defined(__x86_64__)
#define LATEMAX_LANES 8
#include "kernel.h"

namespace latemax {
const Level level_avx2 = {"avx2", LATEMAX_LANES, run_any<Float32, 6, 2>, nullptr, widen, sum_of_squares, add_scaled};
}
#endif
