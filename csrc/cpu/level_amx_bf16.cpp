/* AMX-BF16: products of bfloat16 in tiles. Everything else is the AVX-512 code.
 *
 * The processor flushes inputs and sums below 2^-126 to 0, as vdpbf16ps does.
 */
#if defined(__x86_64__) && defined(__linux__)
#define LATEMAX_LANES 16
#include "kernel.h"
#include "tile_kernel.h"

namespace latemax {
#if defined(LATEMAX_TILES)
namespace {

struct BFloat16Tiles {
    static constexpr int BYTES = 2;
    using Vector = vf;
    static LATEMAX_INLINE vf total(vf sum) { return sum; }
};

const Level level = {
    "amx_bf16",  LATEMAX_LANES, 2, scores<Floats<Float32>, 24, 4, 2>, tile_scores<BFloat16Tiles>, widen, sum_of_squares,
    add_scaled, &codes_avx512_vnni};
}  // namespace
const Level *const level_amx_bf16 = &level;
#else
/* the compiler lacks these intrinsics */
const Level *const level_amx_bf16 = nullptr;
#endif
}  // namespace latemax
#endif
