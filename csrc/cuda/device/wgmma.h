/* wgmma of 64 document tokens (A) with N query tokens (B), both in shared memory, K-major, swizzled by 128 bytes.
 *
 * acc[4 j + e] of a thread: row 16 warp + lane / 4 (+ 8 for e = 2, 3), column 8 j + 2 (lane % 4) + e % 2.
 */
#pragma once

#include "ptx.h"

namespace latemax {
namespace ptx {

template <class T, int N>
struct Wgmma;

#define LATEMAX_F4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define LATEMAX_F16(i) LATEMAX_F4(i), LATEMAX_F4(i + 4), LATEMAX_F4(i + 8), LATEMAX_F4(i + 12)

/* accumulate = 0 overwrites d. */
#define LATEMAX_WGMMA_32(TYPE)  \
    asm volatile(  \
        "{\n.reg .pred p;\nsetp.ne.b32 p, %18, 0;\n"  \
        "wgmma.mma_async.sync.aligned.m64n32k16.f32." TYPE "." TYPE " {"  \
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, " \
        "%16, %17, p, 1, 1, 0, 0;\n}"  \
        : LATEMAX_F16(0)  \
        : "l"(a), "l"(b), "r"(accumulate))

#define LATEMAX_WGMMA_64(TYPE)  \
    asm volatile(  \
        "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"  \
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " {"  \
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, " \
        "%32, %33, p, 1, 1, 0, 0;\n}"  \
        : LATEMAX_F16(0), LATEMAX_F16(16)  \
        : "l"(a), "l"(b), "r"(accumulate))

#define LATEMAX_WGMMA_128(TYPE)  \
    asm volatile(  \
        "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"  \
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " {"  \
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, " \
        "%64, %65, p, 1, 1, 0, 0;\n}"  \
        : LATEMAX_F16(0), LATEMAX_F16(16), LATEMAX_F16(32), LATEMAX_F16(48)  \
        : "l"(a), "l"(b), "r"(accumulate))

#define LATEMAX_WGMMA(T, TYPE, N)  \
    template <>  \
    struct Wgmma<T, N> {  \
        static __device__ __forceinline__ void run(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate) {  \
            LATEMAX_WGMMA_##N(TYPE);  \
        }  \
    }

LATEMAX_WGMMA(BF16, "bf16", 32);
LATEMAX_WGMMA(BF16, "bf16", 64);
LATEMAX_WGMMA(BF16, "bf16", 128);
LATEMAX_WGMMA(F16, "f16", 32);
LATEMAX_WGMMA(F16, "f16", 64);
LATEMAX_WGMMA(F16, "f16", 128);

#undef LATEMAX_WGMMA
#undef LATEMAX_WGMMA_32
#undef LATEMAX_WGMMA_64
#undef LATEMAX_WGMMA_128
#undef LATEMAX_F16
#undef LATEMAX_F4

}  // namespace ptx
}  // namespace latemax
