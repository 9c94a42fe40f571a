/* Codes with VNNI, which adds 4 products of 8 bits or 2 of 16 a lane, and VPOPCNTDQ. */
#if defined(__x86_64__)
#define LATEMAX_LANES 16
#include "code_kernel.h"
#include "code_rows.h"

namespace latemax {
const CodeLevel codes_avx512_vnni = {
    scores<Integers<SixteenBits>, 24, 4, 2>, scores<Integers<Bits>, 24, 4, 2>, bounds<Integers<SixteenBits>, 24, 4, 2>,
    {scores<Integers<EightBits>, 24, 4, 2>, bounds<Integers<EightBits>, 24, 4, 2>, 127, 128}, rewrite};
}
#endif
