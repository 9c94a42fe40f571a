/* csrc/cuda/device/wgmma.h for the host. */
#pragma once

#include "ptx.h"

namespace latemax {
namespace ptx {

inline bool is_bf16(BF16) { return true; }
inline bool is_bf16(F16) { return false; }

template <class T, int N>
struct Wgmma {
    static void run(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate) {
        emulator::wgmma(d, a, b, accumulate, N, is_bf16(T{}));
    }
};

}  // namespace ptx
}  // namespace latemax
