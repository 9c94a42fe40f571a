/* Codes with VNNI, which adds 4 products of 8 bits or 2 of 16 a lane, and VPOPCNTDQ. */
#if defined(__x86_64__)
#define LATEMAX_LANES 16
#include "code_kernel.h"
#include "code_rows.h"

namespace latemax {
const CodeLevel codes_avx512_vnni = {
    codes_any<SixteenBits, 24, 4, 2>, codes_any<EightBits, 24, 4, 2>, 127, codes_any<Bits, 24, 4, 2>,
    bounds_any<SixteenBits, 24, 4, 2>, bounds_any<EightBits, 24, 4, 2>, rewrite};
}
#endif
