/* What the host side asks of CUDA: the device, launches, tensor maps. The emulator has its own, with the same names. */
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <atomic>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#include "../../maxsim.h"
#include "ptx.h"

namespace latemax {

using Stream = cudaStream_t;

inline void check(cudaError_t status, const char *what) {
    if (status == cudaSuccess) return;
    // sticky errors stay, others must not be blamed on the next call
    cudaGetLastError();
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

struct Device {
    int capability, multiprocessors, shared_block, shared_multiprocessor;
    int launch_clocks;  // what one kernel more on a stream takes
};

constexpr int MOST_DEVICES = 64;

/* Runs `work` once per device; threads that come meanwhile wait. The flag is one per type of `work`, that is, per caller. */
template <class Work>
void once_per_device(int index, const Work &work) {
    static std::atomic<bool> done[MOST_DEVICES];
    if (index < 0 || index >= MOST_DEVICES) throw std::runtime_error("no device " + std::to_string(index));
    if (done[index].load(std::memory_order_acquire)) return;
    static std::mutex one;
    const std::lock_guard<std::mutex> lock(one);
    if (done[index].load(std::memory_order_relaxed)) return;
    work();
    done[index].store(true, std::memory_order_release);
}

/* Asked once per device: the attributes take longer than a launch. */
inline const Device &device_of(int index) {
    static Device known[MOST_DEVICES];
    once_per_device(index, [&] {
        const auto get = [&](cudaDeviceAttr name) {
            int value = 0;
            check(cudaDeviceGetAttribute(&value, name, index), "asking the device");
            return value;
        };
        known[index] = {10 * get(cudaDevAttrComputeCapabilityMajor) + get(cudaDevAttrComputeCapabilityMinor),
                        get(cudaDevAttrMultiProcessorCount), get(cudaDevAttrMaxSharedMemoryPerBlockOptin),
                        get(cudaDevAttrMaxSharedMemoryPerMultiprocessor), 4000};
    });
    return known[index];
}

/* Torch switches devices lazily: the current device of this thread may still be another. */
inline void use(int device) {
    int current = -1;
    check(cudaGetDevice(&current), "cudaGetDevice");
    if (current != device) check(cudaSetDevice(device), "cudaSetDevice");
}

/* The driver's CUDA version, 0 without a driver, and that of the runtime in this library: 1000 * major + 10 * minor. */
inline int driver_version() {
    int version = 0;
    check(cudaDriverGetVersion(&version), "cudaDriverGetVersion");
    return version;
}
inline int runtime_version() { return CUDART_VERSION; }

/* Loads a kernel of the current device and opts in to `shared` bytes of a block; 48 KB is the limit without. Once per
 * device and never per call: another thread may be between its own attribute and its launch, and a first launch inside
 * a capture would load the kernel there. */
template <class... Parameters>
void prepare(void (*kernel)(Parameters...), int shared) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared), "loading a kernel");
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int blocks, int threads, int shared, Stream stream, Arguments &&...arguments) {
    kernel<<<blocks, threads, shared, stream>>>(std::forward<Arguments>(arguments)...);
    check(cudaGetLastError(), "launch");
}

/* A tensor of half precision or 8-bit codes, innermost axis first and dense; strides are in bytes. Boxes are `rows` of 128
 * bytes, swizzled by 128 bytes. */
inline TensorMap tensor_map(maxsim_dtype dtype, const void *base, const uint64_t (&sizes)[4], const uint64_t (&strides)[3],
                            int rows) {
    using Encode = CUresult (*)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *,
                                const cuuint64_t *, const cuuint32_t *, const cuuint32_t *, CUtensorMapInterleave,
                                CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
    // found at run time: linking libcuda would keep the library from loading where there is no driver
    static const Encode encode = [] {
        void *found = nullptr;
        cudaDriverEntryPointQueryResult result;
        check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result),
              "looking for cuTensorMapEncodeTiled");
        if (result != cudaDriverEntryPointSuccess) throw std::runtime_error("the driver has no cuTensorMapEncodeTiled");
        return reinterpret_cast<Encode>(found);
    }();
    TensorMap map;
    const cuuint64_t dims[4] = {sizes[0], sizes[1], sizes[2], sizes[3]};
    const cuuint64_t steps[3] = {strides[0], strides[1], strides[2]};
    const bool codes = dtype == MAXSIM_I8;
    const CUtensorMapDataType type = codes                  ? CU_TENSOR_MAP_DATA_TYPE_UINT8
                                     : dtype == MAXSIM_BF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                            : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    const cuuint32_t columns = SLAB_ROW / (codes ? BYTES<I8> : BYTES<F16>);
    const cuuint32_t box[4] = {columns, static_cast<cuuint32_t>(rows), 1, 1}, element[4] = {1, 1, 1, 1};
    const CUresult status =
        encode(&map, type, 4, const_cast<void *>(base), dims, steps, box, element, CU_TENSOR_MAP_INTERLEAVE_NONE,
               CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (status != CUDA_SUCCESS) throw std::runtime_error("cuTensorMapEncodeTiled refused: CUresult " + std::to_string(status));
    return map;
}

}  // namespace latemax
