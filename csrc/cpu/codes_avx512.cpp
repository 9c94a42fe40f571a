/* Codes with AVX-512 without VNNI: the instructions of AVX2, twice as wide. */
#if defined(__x86_64__)
#define LATEMAX_LANES 16
#include "code_kernel.h"
#include "code_rows.h"

namespace latemax {
const CodeLevel codes_avx512 = {
    scores<Integers<SixteenBits>, 24, 4, 2>, scores<Integers<Bits>, 24, 4, 2>, bounds<Integers<SixteenBits>, 24, 4, 2>,
    {scores<Integers<EightBits>, 24, 4, 2>, bounds<Integers<EightBits>, 24, 4, 2>, 63, 128}, rewrite};
}
#endif
