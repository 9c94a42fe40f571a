/* AVX-512 with bfloat16 products: an instruction sums two of them per lane in float32. */
#if defined(__x86_64__)
#define LATEMAX_LANES 16
#include "kernel.h"

namespace latemax {
const Level level_avx512_bf16 = {
    "avx512_bf16", LATEMAX_LANES,  2,         scores<Floats<Float32>, 24, 4, 2>, scores<Floats<BFloat16>, 24, 4, 2>,
    widen,         sum_of_squares, add_scaled, &codes_avx512_vnni};
}
#endif
