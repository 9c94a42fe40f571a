/* wgmma of 64 query tokens (A, in registers or in shared memory) with 64 document tokens (B, in shared memory); what is in
 * shared memory is K-major, swizzled by 128 bytes.
 *
 * d[4 j + e] of a thread: row 16 warp + lane / 4 (+ 8 for e = 2, 3), column 8 j + 2 (lane % 4) + e % 2. Registers of A are
 * those of mma.m16n8k16: elements 2 (lane % 4) + (0, 1) of rows lane / 4 and + 8, then the same 8 elements further.
 */
#pragma once

#include "ptx.h"

namespace latemax {
namespace ptx {

#define LATEMAX_F4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define LATEMAX_F16(i) LATEMAX_F4(i), LATEMAX_F4(i + 4), LATEMAX_F4(i + 8), LATEMAX_F4(i + 12)
#define LATEMAX_D  \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "  \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "

/* d += a b; accumulate = 0 overwrites d. */
#define LATEMAX_WGMMA(T, TYPE)  \
    __device__ __forceinline__ void wgmma(T, float (&d)[32], const uint32_t (&a)[4], uint64_t b, int accumulate) {  \
        asm volatile(  \
            "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"  \
            "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " " LATEMAX_D  \
            "{%32, %33, %34, %35}, %36, p, 1, 1, 0;\n}"  \
            : LATEMAX_F16(0), LATEMAX_F16(16)  \
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));  \
    }  \
    __device__ __forceinline__ void wgmma(T, float (&d)[32], uint64_t a, uint64_t b, int accumulate) {  \
        asm volatile(  \
            "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"  \
            "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " " LATEMAX_D "%32, %33, p, 1, 1, 0, 0;\n}"  \
            : LATEMAX_F16(0), LATEMAX_F16(16)  \
            : "l"(a), "l"(b), "r"(accumulate));  \
    }

LATEMAX_WGMMA(BF16, "bf16")
LATEMAX_WGMMA(F16, "f16")

#undef LATEMAX_WGMMA
#undef LATEMAX_D
#undef LATEMAX_F16
#undef LATEMAX_F4

}  // namespace ptx
}  // namespace latemax
