#include <utility>

#include "maxsim_cpu.h"
#if defined(__x86_64__) && defined(__linux__)
#include "tiles.h"
#endif

namespace latemax {

int levels(const Level **out) {
    int n = 0;
    out[n++] = &level_portable;
#if defined(__x86_64__)
    /* these also check that the operating system saves the registers */
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (avx2) out[n++] = &level_avx2;
    if (avx512) out[n++] = &level_avx512;
    const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vpopcntdq");
    if (vnni) out[n++] = &level_avx512_vnni;
    if (vnni && __builtin_cpu_supports("avx512bf16")) {
        out[n++] = &level_avx512_bf16;
        /* the last level is used: Intel's vdpbf16ps runs at half the rate of two FMA pipes (16 x 20 queries, 200 x 1030
         * tokens: 99 ms, widened 55 ms), AMD's at twice that of its FMA */
        if (__builtin_cpu_is("intel")) std::swap(out[n - 1], out[n - 2]);
    }
#endif
#if defined(__x86_64__) && defined(__linux__)
    if (level_amx_bf16 && tiles::has_bf16(vnni) && tiles::permitted()) {
        static const CodeLevel codes = [] {
            CodeLevel all = codes_avx512_vnni;
            if (bytes_amx_int8 && tiles::has_int8()) all.i8 = *bytes_amx_int8;
            return all;
        }();
        static const Level amx = [] {
            Level all = *level_amx_bf16;
            all.codes = &codes;
            return all;
        }();
        out[n++] = &amx;
    }
#endif
    return n;
}

}  // namespace latemax
