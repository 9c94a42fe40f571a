/* Codes with AVX-512 without VNNI: the instructions of AVX2, twice as wide. */
#if defined(__x86_64__)
#define LATEMAX_LANES 16
#include "code_kernel.h"
#include "code_rows.h"

namespace latemax {
const CodeLevel codes_avx512 = {
    codes_any<SixteenBits, 24, 4, 2>, codes_any<EightBits, 24, 4, 2>, 63, codes_any<Bits, 24, 4, 2>,
    bounds_any<SixteenBits, 24, 4, 2>, bounds_any<EightBits, 24, 4, 2>, rewrite};
}
#endif
