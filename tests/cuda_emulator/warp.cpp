/* Elements, operands in shared memory, and the instructions that multiply and load. */
#include <math.h>
#include <string.h>

#include "products.h"
#include "runtime.h"

namespace latemax {
namespace emulator {

float widen(uint16_t x, bool bf16) {
    uint32_t bits = static_cast<uint32_t>(x) << 16;
    if (!bf16) {
        const uint32_t sign = static_cast<uint32_t>(x & 0x8000) << 16, exponent = x >> 10 & 31, digits = x & 1023;
        if (exponent == 0) {
            const float tiny = ldexpf(static_cast<float>(digits), -24);
            return sign ? -tiny : tiny;
        }
        bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | digits << 13;
    }
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* Rounds to nearest, ties to even. */
uint16_t narrow(float x, bool bf16) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (bf16) return x != x ? 0x7fff : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    const uint16_t sign = bits >> 16 & 0x8000;
    const float size = fabsf(x);
    if (x != x) return 0x7fff;
    if (size >= 65520) return sign | 0x7c00;
    if (size < 6.103515625e-5f) return sign | static_cast<uint16_t>(nearbyintf(ldexpf(size, 24)));
    bits = (bits & 0x7fffffff) - (112u << 23);
    return sign | static_cast<uint16_t>((bits + 0xfff + (bits >> 13 & 1)) >> 13);
}

void unpack(uint16_t pair, Type type, float *to) {
    if (type == TYPE_I8) to[0] = static_cast<int8_t>(pair), to[1] = static_cast<int8_t>(pair >> 8);
    else to[0] = widen(pair, type == TYPE_BF16);
}

/* The two bytes from `at` on of a row of a K-major operand, rows of 128 bytes swizzled by 128 bytes. */
uint16_t pair(uint64_t descriptor, int row, int at) {
    if (descriptor >> 62 != 1 || (descriptor >> 49 & 7)) fail("wgmma: not the 128-byte swizzle");
    const uint32_t start = (descriptor & 0x3fff) << 4, step = (descriptor >> 32 & 0x3fff) << 4;
    const uint32_t plain = start + row / 8 * step + row % 8 * 128 + at;
    return shared_u16(plain ^ (plain >> 7 & 7) << 4);
}

void multiply(const Product &p) {
    // 32 bytes of each row; sums of the products of 32 codes are exact in float
    static float a[64][32], b[32][256];
    const int each = p.type == TYPE_I8 ? 2 : 1;  // elements in two bytes
    for (int i = 0; i < 16; ++i) {
        for (int m = 0; m < 64; ++m) {
            const int thread = m / 16 * 32 + m % 8 * 4 + i % 8 / 2, index = m % 16 / 8 + i / 8 * 2;
            unpack(p.registers[0] ? p.registers[thread][index] >> i % 2 * 16 & 0xffff : pair(p.a, m, 2 * i),
                             p.type, &a[m][each * i]);
        }
        for (int n = 0; n < p.n; ++n) {
            float values[2];
            unpack(pair(p.b, n, 2 * i), p.type, values);
            for (int k = 0; k < each; ++k) b[each * i + k][n] = values[k];
        }
    }
    for (int m = 0; m < 64; ++m) {
        float line[256] = {};
        for (int k = 0; k < 16 * each; ++k)
            for (int n = 0; n < p.n; ++n) line[n] += a[m][k] * b[k][n];
        for (int n = 0; n < p.n; ++n) {
            const int thread = m / 16 * 32 + m % 8 * 4 + n % 8 / 2, at = n / 8 * 4 + m % 16 / 8 * 2 + n % 2;
            const auto add = [&](auto &d, auto sum) { d = p.accumulate ? d + sum : sum; };
            if (p.type == TYPE_I8) add(static_cast<int32_t *>(p.d[thread])[at], static_cast<int32_t>(line[n]));
            else add(static_cast<float *>(p.d[thread])[at], line[n]);
        }
    }
}

struct Fragments {
    void *c;
    const uint32_t *a;
    uint32_t b[2];
    Type type;
};
void mma(void *c, const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Type type) {
    Fragments mine{c, a, {b0, b1}, type};
    meet("mma", thread() / 32 * 32, 32, &mine, [](void **all) {
        const bool codes = static_cast<Fragments *>(all[0])->type == TYPE_I8;
        const int each = codes ? 2 : 1, steps = 16 * each;  // elements in two bytes, and of a row
        float a[16][32], b[8][32];
        for (int lane = 0; lane < 32; ++lane) {
            const Fragments &f = *static_cast<Fragments *>(all[lane]);
            const int g = lane / 4, t = lane % 4;
            for (int half = 0; half < 2; ++half) {
                for (int i = 0; i < 4; ++i)
                    unpack(f.a[i] >> 16 * half & 0xffff, f.type, &a[g + i % 2 * 8][each * (2 * t + half + i / 2 * 8)]);
                for (int i = 0; i < 2; ++i) unpack(f.b[i] >> 16 * half & 0xffff, f.type, &b[g][each * (2 * t + half + i * 8)]);
            }
        }
        for (int lane = 0; lane < 32; ++lane) {
            void *c = static_cast<Fragments *>(all[lane])->c;
            for (int i = 0; i < 4; ++i) {
                const int m = lane / 4 + i / 2 * 8, n = lane % 4 * 2 + i % 2;
                for (int k = 0; k < steps; ++k)
                    if (codes) static_cast<int32_t *>(c)[i] += static_cast<int32_t>(a[m][k] * b[n][k]);
                    else static_cast<float *>(c)[i] += a[m][k] * b[n][k];
            }
        }
    });
}

struct Matrices {
    uint32_t *r, from;
};
void ldmatrix(uint32_t (&r)[4], uint32_t from) {
    Matrices mine{r, from};
    meet("ldmatrix", thread() / 32 * 32, 32, &mine, [](void **all) {
        for (int lane = 0; lane < 32; ++lane)
            for (int i = 0; i < 4; ++i) {
                const uint32_t row = static_cast<Matrices *>(all[8 * i + lane / 4])->from;
                if (row % 16) fail("ldmatrix: a row not aligned to 16 bytes");
                const uint32_t low = shared_u16(row + lane % 4 * 4), high = shared_u16(row + lane % 4 * 4 + 2);
                static_cast<Matrices *>(all[lane])->r[i] = low | high << 16;
            }
    });
}

}  // namespace emulator
}  // namespace latemax
