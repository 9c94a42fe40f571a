/* csrc/cuda/device/wgmma.h for the host. */
#pragma once

#include "ptx.h"

namespace latemax {
namespace ptx {

template <class T>
inline void wgmma(T type, typename T::Sum (&d)[32], const uint32_t (&a)[4], uint64_t b, int accumulate) {
    emulator::wgmma(d, a, 0, b, accumulate, 64, emulator::type_of(type));
}
template <class T>
inline void wgmma(T type, typename T::Sum (&d)[32], uint64_t a, uint64_t b, int accumulate) {
    emulator::wgmma(d, nullptr, a, b, accumulate, 64, emulator::type_of(type));
}

}  // namespace ptx
}  // namespace latemax
