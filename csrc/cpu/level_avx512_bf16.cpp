/* AVX-512 with bfloat16 products: two of them a lane and instruction, summed in float32. */
#if defined(__x86_64__)
#define LATEMAX_LANES 16
#include "kernel.h"

namespace latemax {
const Level level_avx512_bf16 = {
    "avx512_bf16", LATEMAX_LANES, run_any<Float32, 12, 4>, run_any<BFloat16, 12, 4>, widen, sum_of_squares, add_scaled};
}
#endif
