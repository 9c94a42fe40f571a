/* Every instruction of the kernels that C++ has no word for, one inline function each.
 *
 * tests/cuda_emulator/ptx.h implements the same functions for the host, so that the kernels' own sources run without a
 * GPU; whatever is added here is added there.
 */
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#include "../elements.h"
#ifdef LATEMAX_WATCHDOG
#include <stdio.h>
#endif

namespace latemax {

using TensorMap = CUtensorMap;

namespace ptx {

__device__ inline int thread_index() { return threadIdx.x; }
__device__ inline int block_index() { return blockIdx.x; }
__device__ inline int grid_size() { return gridDim.x; }

/* Swizzled tiles start at multiples of 1024 bytes. */
__device__ inline char *dynamic_shared() {
    extern __shared__ __align__(1024) char shared[];
    return shared;
}
__device__ inline uint32_t shared_address(const void *p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

__device__ inline void block_barrier() { __syncthreads(); }
__device__ inline void named_barrier(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ inline void warp_barrier() { __syncwarp(); }
template <class T>
__device__ inline T shuffle_xor(T x, int mask) {
    return __shfl_xor_sync(0xffffffffu, x, mask);
}
/* Another lane's value. */
template <class T>
__device__ inline T shuffle(T x, int lane) {
    return __shfl_sync(0xffffffffu, x, lane);
}
/* The first lane's value, which tells the compiler that the warp agrees. */
__device__ inline int uniform(int x) { return __shfl_sync(0xffffffffu, x, 0); }
__device__ inline bool warp_any(bool x) { return __any_sync(0xffffffffu, x); }
/* The lanes that say yes, and those that hold the same value, one bit each. */
__device__ inline uint32_t ballot(bool x) { return __ballot_sync(0xffffffffu, x); }
__device__ inline uint32_t match(int x) { return __match_any_sync(0xffffffffu, x); }
__device__ inline int count_bits(uint32_t x) { return __popc(x); }

/* NaN if either is. */
__device__ inline float max_nan(float x, float y) {
    float z;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
    return z;
}

__device__ inline float to_float(F16, uint16_t x) { return __half2float(__ushort_as_half(x)); }
__device__ inline float to_float(BF16, uint16_t x) { return __uint_as_float(static_cast<uint32_t>(x) << 16); }
__device__ inline float to_float(I8, int8_t x) { return x; }

__device__ inline uint16_t from_float(F16, float x) { return __half_as_ushort(__float2half_rn(x)); }
__device__ inline uint16_t from_float(BF16, float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }

/* 2 or 4 words of global memory that no kernel writes, by one access aligned to their size. */
__device__ inline void load_words(uint32_t (&to)[2], const void *from) {
    const uint2 x = __ldg(static_cast<const uint2 *>(from));
    to[0] = x.x, to[1] = x.y;
}
__device__ inline void load_words(uint32_t (&to)[4], const void *from) {
    const uint4 x = __ldg(static_cast<const uint4 *>(from));
    to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
}
__device__ inline void store_words(void *to, const uint32_t (&x)[2]) {
    *static_cast<uint2 *>(to) = make_uint2(x[0], x[1]);
}
__device__ inline void store_words(void *to, const uint32_t (&x)[4]) {
    *static_cast<uint4 *>(to) = make_uint4(x[0], x[1], x[2], x[3]);
}

/* 16 bytes of a row in shared memory, by one access. */
template <class T>
struct __align__(16) Packet {
    T values[16 / sizeof(T)];
};
template <class T>
__device__ inline Packet<T> load_packet(const char *from) {
    return *reinterpret_cast<const Packet<T> *>(from);
}
/* sum and the squares of the four signed bytes of x. */
__device__ inline int add_squares(int x, int sum) { return __dp4a(x, x, sum); }

/* 16 bytes from global to shared memory; with bytes = 0 nothing is read and zeros are written. */
__device__ inline void cp_async_16(uint32_t to, const void *from, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
__device__ inline void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

__device__ inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(from)
                 : "memory");
}

/* c[16, 8] += a[16, 32 bytes] b[32 bytes, 8], fragments of one warp. */
__device__ inline void mma(BF16, float *c, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ inline void mma(F16, float *c, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline void mma(I8, int32_t *c, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* From here on sm_90. Barriers in shared memory are 8 bytes; a phase ends when its arrivals and bytes have all come. */
__device__ inline void mbarrier_init(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
/* Makes initialised barriers visible to the copy engine; a block barrier follows. */
__device__ inline void mbarrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ inline void mbarrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ inline void mbarrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
/* Waits until phase `lap` of the barrier (0, 1, ...) has ended; lap -1 of a new barrier has. The instruction sees only
 * the parity, so a thread must wait for every phase in turn, or phase lap - 2 answers for lap. */
__device__ inline void mbarrier_wait(uint32_t barrier, uint32_t lap) {
#ifdef LATEMAX_WATCHDOG
    // a protocol error traps and names its barrier instead of spinning until the process is killed
    for (uint32_t tries = 0, ended = 0; !ended; ++tries) {
        asm volatile(
            "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
            : "=r"(ended)
            : "r"(barrier), "r"(lap & 1)
            : "memory");
        if (tries == 1u << 24) {
            printf("barrier %u never ended phase %d (parity %u): block %d, thread %d\n", barrier, lap, lap & 1, blockIdx.x,
                   threadIdx.x);
            __trap();
        }
    }
#else
    // the loop is in the assembly: as a loop of C++ it looks divergent, and ptxas would serialise the wgmma after it
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
        "@p bra done;\n"
        "bra again;\n"
        "done:\n"
        "}" ::"r"(barrier),
        "r"(lap & 1)
        : "memory");
#endif
}

/* Fetches a tensor map before its first use. */
__device__ inline void prefetch_map(const TensorMap *map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
/* A box of the tensor from (column, row, n, m) to shared memory; its bytes count towards the barrier's phase. Elements
 * outside of the tensor arrive as 0 and are counted too. */
__device__ inline void tensor_load(uint32_t to, const TensorMap *map, uint32_t barrier, int column, int row, int n, int m) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];"
        ::"r"(to), "l"(map), "r"(barrier), "r"(column), "r"(row), "r"(n), "r"(m)
        : "memory");
}

/* Registers a thread of this warpgroup may use from here on. */
template <int REGISTERS>
__device__ inline void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
__device__ inline void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

/* Accumulators may be written by wgmma from here on. */
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
/* Until at most PENDING groups are unfinished. */
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
__device__ __forceinline__ void read_next(float &x) { asm volatile("" : "+f"(x)::"memory"); }
__device__ __forceinline__ void read_next(int32_t &x) { asm volatile("" : "+r"(x)::"memory"); }
/* Names the accumulators that are read next, so that the compiler moves no reading of them before the wait. */
template <int PENDING, class Sum, int COUNT>
__device__ __forceinline__ void wgmma_wait(Sum (&d)[COUNT]) {
    wgmma_wait<PENDING>();
#pragma unroll
    for (int i = 0; i < COUNT; ++i) read_next(d[i]);
}

}  // namespace ptx
}  // namespace latemax
