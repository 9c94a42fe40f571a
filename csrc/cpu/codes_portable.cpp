/* Codes with what every 64-bit processor has. */
#define LATEMAX_LANES 4
#include "code_kernel.h"
#include "code_rows.h"

namespace latemax {
const CodeLevel codes_portable = {
    scores<Integers<SixteenBits>, 12, 3, 2>, scores<Integers<Bits>, 12, 3, 2>, bounds<Integers<SixteenBits>, 12, 3, 2>,
    {nullptr, nullptr, 0, 0}, rewrite};
}
