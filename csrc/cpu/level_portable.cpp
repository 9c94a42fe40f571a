/* Vectors of 4 floats, which every 64-bit processor has (SSE2, NEON); the compiler picks the instructions. */
#define LATEMAX_LANES 4
#include "kernel.h"

namespace latemax {
const Level level_portable = {"portable", LATEMAX_LANES, 2, scores<Floats<Float32>, 12, 3, 2>, nullptr,
                              widen,      sum_of_squares, add_scaled, &codes_portable};
}
