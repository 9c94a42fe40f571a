/* AVX2 with FMA and F16C: 3 x 4 sums of 8 lanes in 16 registers, so that one pass over the documents serves 32 query
 * tokens. */
#if defined(__x86_64__)
#define LATEMAX_LANES 8
#include "kernel.h"

namespace latemax {
const Level level_avx2 = {"avx2", LATEMAX_LANES, 4,          scores<Floats<Float32>, 12, 3, 4>,
                          nullptr, widen,         sum_of_squares, add_scaled, &codes_avx2};
}
#endif
