/* csrc/cuda/device/wgmma.h for the host. */
#pragma once

#include "ptx.h"

namespace latemax {
namespace ptx {

inline bool is_bf16(BF16) { return true; }
inline bool is_bf16(F16) { return false; }

template <class T>
inline void wgmma(T type, float (&d)[32], const uint32_t (&a)[4], uint64_t b, int accumulate) {
    emulator::wgmma(d, a, 0, b, accumulate, 64, is_bf16(type));
}
template <class T>
inline void wgmma(T type, float (&d)[32], uint64_t a, uint64_t b, int accumulate) {
    emulator::wgmma(d, nullptr, a, b, accumulate, 64, is_bf16(type));
}

}  // namespace ptx
}  // namespace latemax
