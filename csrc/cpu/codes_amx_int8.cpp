/* AMX-INT8: products of signed bytes in tiles, which take rows of int8 codes as they are. */
#if defined(__x86_64__) && defined(__linux__)
#define LATEMAX_LANES 16
#include "code_kernel.h"
#include "tile_kernel.h"

namespace latemax {
#if defined(LATEMAX_TILES)
namespace {

struct ByteTiles {
    static constexpr int BYTES = 1;
    using Vector = vi;
    static LATEMAX_INLINE vf total(vi sum) { return to_float(sum); }
};

/* A Bounds. */
void tile_bounds(const void *panel, int vectors, const Rows &rows, int64_t dim, float *lower, float *upper,
                 const float *factor) {
    tiles_any<ByteTiles, Limits>(panel, vectors, rows, dim, lower, upper, factor);
}

const Bytes bytes = {tile_scores<ByteTiles>, tile_bounds, 127, 0};
}  // namespace
const Bytes *const bytes_amx_int8 = &bytes;
#else
/* the compiler lacks these intrinsics */
const Bytes *const bytes_amx_int8 = nullptr;
#endif
}  // namespace latemax
#endif
