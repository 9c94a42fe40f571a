/* csrc/cuda/device/runtime.h for the host: a launch runs the grid's blocks one after the other, with a seed in random order. */
#pragma once

#include <functional>
#include <stdexcept>
#include <string>

#include "maxsim.h"
#include "ptx.h"

namespace latemax {

using Stream = void *;

struct Device {
    int capability, multiprocessors, shared_block, shared_multiprocessor;
    int launch_clocks;  // what one kernel more on a stream takes
};
const Device &device_of(int index);
inline void use(int) {}

namespace emulator {
void run(const std::function<void()> &kernel, int blocks, int threads, int shared);
int configured();  // how often the device was set: each time is a new device
void prepare(void *kernel, int shared);
void may_launch(void *kernel, int shared);
}  // namespace emulator

template <class Work>
void once_per_device(int, const Work &work) {
    static int done = 0;
    if (done == emulator::configured()) return;
    work();
    done = emulator::configured();
}

inline int driver_version() { return 13000; }
inline int runtime_version() { return 13000; }

template <class... Parameters>
void prepare(void (*kernel)(Parameters...), int shared) {
    emulator::prepare(reinterpret_cast<void *>(kernel), shared);
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int blocks, int threads, int shared, Stream, Arguments &&...arguments) {
    emulator::may_launch(reinterpret_cast<void *>(kernel), shared);
    emulator::run([&] { kernel(arguments...); }, blocks, threads, shared);
}

inline TensorMap tensor_map(maxsim_dtype dtype, const void *base, const uint64_t (&sizes)[4], const uint64_t (&strides)[3],
                            int rows) {
    // the rules of cuTensorMapEncodeTiled that a caller can break
    if (!base) throw std::runtime_error("tensor map: null base");
    if (reinterpret_cast<uintptr_t>(base) % 16) throw std::runtime_error("tensor map: base not aligned to 16 bytes");
    TensorMap map{static_cast<const char *>(base), {}, {}, rows, dtype == MAXSIM_I8 ? BYTES<I8> : BYTES<F16>};
    for (int i = 0; i < 4; ++i) {
        if (sizes[i] == 0 || sizes[i] > uint64_t{1} << 32) throw std::runtime_error("tensor map: size out of range");
        map.sizes[i] = sizes[i];
    }
    if (strides[0] < map.bytes * sizes[0]) throw std::runtime_error("tensor map: tokens overlap");
    for (int i = 0; i < 3; ++i) {
        if (strides[i] == 0 || strides[i] % 16 || strides[i] >= uint64_t{1} << 40)
            throw std::runtime_error("tensor map: stride out of range");
        map.strides[i] = strides[i];
    }
    if (rows < 1 || rows > 256) throw std::runtime_error("tensor map: box out of range");
    return map;
}

}  // namespace latemax
