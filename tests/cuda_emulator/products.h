/* wgmma on their way, and what they compute. */
#pragma once

#include "ptx.h"

namespace latemax {
namespace emulator {

struct Product {
    void *d[128];                    // of each thread of the warpgroup: 32-bit floats, or integers for codes
    const uint32_t *registers[128];  // of A, read when the product is made: they must not change before
    uint64_t a, b;
    int accumulate, n;
    Type type;
};
void multiply(const Product &product);

}  // namespace emulator
}  // namespace latemax
