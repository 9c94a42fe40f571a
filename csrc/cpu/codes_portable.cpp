/* Codes with what every 64-bit processor has. */
#define LATEMAX_LANES 4
#include "code_kernel.h"
#include "code_rows.h"

namespace latemax {
const CodeLevel codes_portable = {
    codes_any<SixteenBits, 12, 3, 2>, nullptr, 0, codes_any<Bits, 12, 3, 2>,
    bounds_any<SixteenBits, 12, 3, 2>, nullptr, rewrite};
}
