/* csrc/cuda/device/ptx.h for the host: a thread block's threads are fibers, and every instruction does what the PTX
 * manual says. What may happen late on a GPU happens late here: copies land when they are waited for or at a random
 * moment, and until then their targets hold NaN.
 */
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "cuda/elements.h"

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

namespace latemax {

/* The arguments of cuTensorMapEncodeTiled; bytes of an element. */
struct TensorMap {
    const char *base;
    uint64_t sizes[4], strides[3];
    int rows, bytes;
};

namespace emulator {

int thread();
int block();
int grid();
char *shared();
[[noreturn]] void fail(const char *what);
uint16_t &shared_u16(uint32_t address);

/* Waits until `size` threads of the group have come; the last one runs `all` on what every thread brought. */
void meet(const char *what, int first, int size, void *mine, void (*all)(void **));
void named_barrier(int id, int threads);
void cp_async(uint32_t to, const void *from, int bytes);
void cp_async_commit();
void cp_async_wait(int pending);
void mbarrier_init(uint32_t barrier, int arrivals);
void mbarrier_arrive(uint32_t barrier, uint32_t bytes);
void mbarrier_wait(uint32_t barrier, uint32_t lap);
void tensor_load(uint32_t to, const TensorMap &map, uint32_t barrier, const int (&at)[4]);
enum Type { TYPE_F16, TYPE_BF16, TYPE_I8 };
inline Type type_of(F16) { return TYPE_F16; }
inline Type type_of(BF16) { return TYPE_BF16; }
inline Type type_of(I8) { return TYPE_I8; }
/* One of `registers` and `a` holds the left operand. d: 32-bit floats, or integers for codes. */
void wgmma(void *d, const uint32_t *registers, uint64_t a, uint64_t b, int accumulate, int n, Type type);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int pending);
float widen(uint16_t x, bool bf16);
uint16_t narrow(float x, bool bf16);
/* Two bytes of an operand as elements from k on: one of half precision or two codes. */
void unpack(uint16_t pair, Type type, float *to);
uint16_t pair(uint64_t descriptor, int row, int at);
void mma(void *c, const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Type type);
void ldmatrix(uint32_t (&r)[4], uint32_t from);
void may_yield();

}  // namespace emulator

namespace ptx {

inline int thread_index() { return emulator::thread(); }
inline int block_index() { return emulator::block(); }
inline int grid_size() { return emulator::grid(); }
inline char *dynamic_shared() { return emulator::shared(); }
inline uint32_t shared_address(const void *p) {
    return static_cast<uint32_t>(static_cast<const char *>(p) - emulator::shared());
}

inline void block_barrier() { emulator::named_barrier(0, 0); }
inline void named_barrier(int id, int threads) { emulator::named_barrier(id, threads); }

inline void warp_barrier() {
    emulator::meet("warp barrier", emulator::thread() / 32 * 32, 32, nullptr, [](void **) {});
}
template <class T>
struct Shuffle {
    T value, result;
    int lane;  // the one that is read, or for shuffle_xor its difference
};
template <class T>
inline T shuffle_xor(T x, int mask) {
    Shuffle<T> mine{x, x, mask};
    emulator::meet("shuffle", emulator::thread() / 32 * 32, 32, &mine, [](void **all) {
        for (int i = 0; i < 32; ++i) {
            auto &lane = *static_cast<Shuffle<T> *>(all[i]);
            lane.result = static_cast<Shuffle<T> *>(all[i ^ lane.lane])->value;
        }
    });
    return mine.result;
}
template <class T>
inline T shuffle(T x, int from) {
    Shuffle<T> mine{x, x, from};
    emulator::meet("shuffle", emulator::thread() / 32 * 32, 32, &mine, [](void **all) {
        for (int i = 0; i < 32; ++i) {
            auto &lane = *static_cast<Shuffle<T> *>(all[i]);
            lane.result = static_cast<Shuffle<T> *>(all[lane.lane & 31])->value;
        }
    });
    return mine.result;
}
inline int uniform(int x) {
    emulator::meet("uniform", emulator::thread() / 32 * 32, 32, &x, [](void **all) {
        for (int i = 1; i < 32; ++i) {
            if (*static_cast<int *>(all[i]) != *static_cast<int *>(all[0])) emulator::fail("uniform: the warp disagrees");
        }
    });
    return x;
}
inline bool warp_any(bool x) {
    emulator::meet("vote", emulator::thread() / 32 * 32, 32, &x, [](void **all) {
        bool any = false;
        for (int i = 0; i < 32; ++i) any |= *static_cast<bool *>(all[i]);
        for (int i = 0; i < 32; ++i) *static_cast<bool *>(all[i]) = any;
    });
    return x;
}

inline uint32_t ballot(bool x) {
    uint32_t mine = x;
    emulator::meet("ballot", emulator::thread() / 32 * 32, 32, &mine, [](void **all) {
        uint32_t yes = 0;
        for (int i = 0; i < 32; ++i) yes |= *static_cast<uint32_t *>(all[i]) << i;
        for (int i = 0; i < 32; ++i) *static_cast<uint32_t *>(all[i]) = yes;
    });
    return mine;
}
inline uint32_t match(int x) {
    struct {
        int value;
        uint32_t same;
    } mine{x, 0};
    using Mine = decltype(mine);
    emulator::meet("match", emulator::thread() / 32 * 32, 32, &mine, [](void **all) {
        for (int i = 0; i < 32; ++i)
            for (int j = 0; j < 32; ++j)
                if (static_cast<Mine *>(all[i])->value == static_cast<Mine *>(all[j])->value)
                    static_cast<Mine *>(all[i])->same |= 1u << j;
    });
    return mine.same;
}
inline int count_bits(uint32_t x) { return __builtin_popcount(x); }

inline float max_nan(float x, float y) { return x != x || y != y ? NAN : x > y ? x : y; }
inline float to_float(F16, uint16_t x) { return emulator::widen(x, false); }
inline float to_float(BF16, uint16_t x) { return emulator::widen(x, true); }
inline float to_float(I8, int8_t x) { return x; }

inline uint16_t from_float(F16, float x) { return emulator::narrow(x, false); }
inline uint16_t from_float(BF16, float x) { return emulator::narrow(x, true); }

template <int COUNT>
inline void load_words(uint32_t (&to)[COUNT], const void *from) {
    if (reinterpret_cast<uintptr_t>(from) % sizeof to) emulator::fail("an access that is not aligned");
    memcpy(to, from, sizeof to);
}
template <int COUNT>
inline void store_words(void *to, const uint32_t (&x)[COUNT]) {
    if (reinterpret_cast<uintptr_t>(to) % sizeof x) emulator::fail("an access that is not aligned");
    memcpy(to, x, sizeof x);
}

template <class T>
struct Packet {
    T values[16 / sizeof(T)];
};
template <class T>
inline Packet<T> load_packet(const char *from) {
    if (reinterpret_cast<uintptr_t>(from) % 16) emulator::fail("a 16-byte access that is not aligned");
    Packet<T> x;
    memcpy(&x, from, 16);
    return x;
}
inline int add_squares(int x, int sum) {
    for (int i = 0; i < 32; i += 8) sum += static_cast<int8_t>(x >> i) * static_cast<int8_t>(x >> i);
    return sum;
}

inline void cp_async_16(uint32_t to, const void *from, int bytes) { emulator::cp_async(to, from, bytes); }
inline void cp_async_commit() { emulator::cp_async_commit(); }
template <int PENDING>
inline void cp_async_wait() {
    emulator::cp_async_wait(PENDING);
}
inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t from) { emulator::ldmatrix(r, from); }
template <class T>
inline void mma(T type, typename T::Sum *c, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    emulator::mma(c, a, b0, b1, emulator::type_of(type));
}

inline void mbarrier_init(uint32_t barrier, int arrivals) { emulator::mbarrier_init(barrier, arrivals); }
inline void mbarrier_init_fence() {}
inline void mbarrier_arrive(uint32_t barrier) { emulator::mbarrier_arrive(barrier, 0); }
inline void mbarrier_arrive_expect(uint32_t barrier, uint32_t bytes) { emulator::mbarrier_arrive(barrier, bytes); }
inline void mbarrier_wait(uint32_t barrier, uint32_t lap) { emulator::mbarrier_wait(barrier, lap); }
inline void prefetch_map(const TensorMap *) {}
inline void tensor_load(uint32_t to, const TensorMap *map, uint32_t barrier, int column, int row, int n, int m) {
    emulator::tensor_load(to, *map, barrier, {column, row, n, m});
}
template <int REGISTERS>
inline void give_registers() {}
template <int REGISTERS>
inline void take_registers() {}
inline void wgmma_fence() { emulator::wgmma_fence(); }
inline void wgmma_commit() { emulator::wgmma_commit(); }
template <int PENDING>
inline void wgmma_wait() {
    emulator::wgmma_wait(PENDING);
}
template <int PENDING, class Sum, int COUNT>
inline void wgmma_wait(Sum (&)[COUNT]) {
    emulator::wgmma_wait(PENDING);
}

}  // namespace ptx
}  // namespace latemax
