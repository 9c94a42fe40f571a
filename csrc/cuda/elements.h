/* Element types, by name: how a token's elements are stored, and in what the tensor cores add their products. Tokens are
 * moved as bytes: slabs, swizzles and the steps of a product are the same for all.
 */
#pragma once

#include <stdint.h>

namespace latemax {

struct F16 {
    using Stored = uint16_t;
    using Sum = float;
};
struct BF16 {
    using Stored = uint16_t;
    using Sum = float;
};
/* 8-bit codes, of which every token has a scale. Sums are exact: 128 * 128 * 131,071 dims fit in 32 bits. */
struct I8 {
    using Stored = int8_t;
    using Sum = int32_t;
};

template <class T>
constexpr int BYTES = sizeof(typename T::Stored);
template <class T>
constexpr bool CODES = BYTES<T> == 1;
constexpr int SLAB_ROW = 128, STEP = 32;  // bytes of a token in a slab, and in one matrix instruction

}  // namespace latemax
