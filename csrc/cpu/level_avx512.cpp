/* AVX-512: 12 x 2 sums of 16 lanes in 32 registers; with and without instructions for codes. */
#if defined(__x86_64__)
#define LATEMAX_LANES 16
#include "kernel.h"

namespace latemax {
const Level level_avx512 = {"avx512", LATEMAX_LANES, 2, scores<Floats<Float32>, 24, 4, 2>, nullptr,
                            widen,    sum_of_squares, add_scaled, &codes_avx512};
const Level level_avx512_vnni = {"avx512_vnni", LATEMAX_LANES, 2, scores<Floats<Float32>, 24, 4, 2>, nullptr,
                                 widen,         sum_of_squares, add_scaled, &codes_avx512_vnni};
}
#endif
