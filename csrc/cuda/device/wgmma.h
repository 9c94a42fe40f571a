/* wgmma of 64 query tokens (A, in registers or in shared memory) with 64 document tokens (B, in shared memory); what is in
 * shared memory is K-major, swizzled by 128 bytes.
 *
 * d[4 j + e] of a thread: row 16 warp + lane / 4 (+ 8 for e = 2, 3), column 8 j + 2 (lane % 4) + e % 2. Registers of A are
 * those of mma.sync: bytes 4 (lane % 4) to + 3 of rows lane / 4 and + 8, then the same 16 bytes further. A product takes 32
 * bytes of each token.
 */
#pragma once

#include "ptx.h"

namespace latemax {
namespace ptx {

#define LATEMAX_D4(C, i) C(d[i]), C(d[i + 1]), C(d[i + 2]), C(d[i + 3])
#define LATEMAX_D16(C, i) LATEMAX_D4(C, i), LATEMAX_D4(C, i + 4), LATEMAX_D4(C, i + 8), LATEMAX_D4(C, i + 12)
#define LATEMAX_D  \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "  \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "

/* d += a b; accumulate = 0 overwrites d. C: the constraint of a register of d. REGISTERS and SHARED: what follows the
 * operands where A is in registers and where it is in shared memory: signs, and of half precision also transpositions. */
#define LATEMAX_WGMMA(T, C, SHAPE, REGISTERS, SHARED)  \
    __device__ __forceinline__ void wgmma(T, T::Sum (&d)[32], const uint32_t (&a)[4], uint64_t b, int accumulate) {  \
        asm volatile(  \
            "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"  \
            "wgmma.mma_async.sync.aligned." SHAPE " " LATEMAX_D "{%32, %33, %34, %35}, %36, p" REGISTERS ";\n}"  \
            : LATEMAX_D16(C, 0), LATEMAX_D16(C, 16)  \
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));  \
    }  \
    __device__ __forceinline__ void wgmma(T, T::Sum (&d)[32], uint64_t a, uint64_t b, int accumulate) {  \
        asm volatile(  \
            "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"  \
            "wgmma.mma_async.sync.aligned." SHAPE " " LATEMAX_D "%32, %33, p" SHARED ";\n}"  \
            : LATEMAX_D16(C, 0), LATEMAX_D16(C, 16)  \
            : "l"(a), "l"(b), "r"(accumulate));  \
    }

LATEMAX_WGMMA(BF16, "+f", "m64n64k16.f32.bf16.bf16", ", 1, 1, 0", ", 1, 1, 0, 0")
LATEMAX_WGMMA(F16, "+f", "m64n64k16.f32.f16.f16", ", 1, 1, 0", ", 1, 1, 0, 0")
LATEMAX_WGMMA(I8, "+r", "m64n64k32.s32.s8.s8", "", "")

#undef LATEMAX_WGMMA
#undef LATEMAX_D
#undef LATEMAX_D16
#undef LATEMAX_D4

}  // namespace ptx
}  // namespace latemax
