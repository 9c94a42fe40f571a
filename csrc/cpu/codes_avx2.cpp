/* Codes with AVX2: 16-bit products, bits counted by a table of 16. */
#if defined(__x86_64__)
#define LATEMAX_LANES 8
#include "code_kernel.h"
#include "code_rows.h"

namespace latemax {
const CodeLevel codes_avx2 = {
    scores<Integers<SixteenBits>, 8, 2, 4>, scores<Integers<Bits>, 8, 2, 4>, bounds<Integers<SixteenBits>, 8, 2, 4>,
    {scores<Integers<EightBits>, 8, 2, 4>, bounds<Integers<EightBits>, 8, 2, 4>, 63, 128}, rewrite};
}
#endif
