/* Compares what csrc/cuda assumes of the tensor cores with CuTe's layouts, on the host. Prints the first difference. */
#include <cute/arch/mma_sm90_desc.hpp>
#include <cute/atom/mma_traits_sm80.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>

#include <cstdio>
#include <cstdlib>

#include "sm90_consumer.h"

using namespace cute;

template <class... Values>
void same(const char *what, long ours, long theirs, Values... at) {
    if (ours == theirs) return;
    std::printf("%s: %ld here, %ld in CuTe, at", what, ours, theirs);
    (std::printf(" %d", static_cast<int>(at)), ...);
    std::printf("\n");
    std::exit(1);
}

int main() {
    /* The 128-byte swizzle: 16-byte column c of row r is at c ^ (r % 8); slabs and 16-dim steps inside an atom. */
    const auto tile = as_position_independent_swizzle_layout(
        tile_to_shape(SM90::GMMA::Layout_K_SW128_Atom<bfloat16_t>{}, Shape<_64, _128>{}));
    for (int row = 0; row < 64; ++row)
        for (int k = 0; k < 128; ++k) {
            const int plain = k / 64 * latemax::sm90::SLAB_BYTES + row * 128 + k % 64 * 2;
            same("swizzle", plain ^ (plain >> 7 & 7) << 4, 2 * tile(row, k), row, k);
        }

    for (uint32_t address = 0; address < 1 << 18; address += 16) {
        GmmaDescriptor theirs{};
        theirs.bitfield.start_address_ = address >> 4;
        theirs.bitfield.leading_byte_offset_ = 1;
        theirs.bitfield.stride_byte_offset_ = 1024 >> 4;
        theirs.bitfield.base_offset_ = 0;
        theirs.bitfield.layout_type_ = static_cast<uint8_t>(SM90::GMMA::LayoutType::B128);
        same("descriptor", static_cast<long>(latemax::sm90::descriptor(address)), static_cast<long>(theirs.desc_), address);
    }

    static_assert(latemax::SLAB_ROW == 128 && latemax::STEP == 32);
    const auto codes = as_position_independent_swizzle_layout(
        tile_to_shape(SM90::GMMA::Layout_K_SW128_Atom<int8_t>{}, Shape<_64, _256>{}));
    for (int row = 0; row < 64; ++row)
        for (int k = 0; k < 256; ++k) {
            const int plain = k / 128 * latemax::sm90::SLAB_BYTES + row * 128 + k % 128;
            same("swizzle of codes", plain ^ (plain >> 7 & 7) << 4, codes(row, k), row, k);
        }

    using Products = MMA_Traits<SM90::GMMA::MMA_64x64x16_F32BF16BF16_RS<SM90::GMMA::Major::K, SM90::GMMA::Major::K>>;
    using Small = MMA_Traits<SM80_16x8x16_F32BF16BF16F32_TN>;
    using CodeProducts = MMA_Traits<SM90::GMMA::MMA_64x64x32_S32S8S8_RS_TN>;
    using SmallCodes = MMA_Traits<SM80_16x8x32_S32S8S8S32_TN>;
    for (int thread = 0; thread < 128; ++thread) {
        const int warp = thread / 32, g = thread % 32 / 4, t = thread % 4;
        for (int v = 0; v < 32; ++v) {
            const int row = 16 * warp + g + v % 4 / 2 * 8, column = v / 4 * 8 + 2 * t + v % 2;
            same("wgmma accumulator", row + 64 * column, typename Products::CLayout{}(thread, v), thread, v);
            same("wgmma accumulator of codes", row + 64 * column, typename CodeProducts::CLayout{}(thread, v), thread, v);
        }
        for (int v = 0; v < 16; ++v) {
            // the same bytes as of 16-bit elements: four to a register
            const int row = 16 * warp + g + v / 4 % 2 * 8, k = 4 * t + v % 4 + v / 8 * 16;
            same("wgmma A registers of codes", row + 64 * k, typename CodeProducts::ALayout{}(thread, v), thread, v);
            if (thread < 32) same("mma A registers of codes", row + 16 * k, typename SmallCodes::ALayout{}(thread, v), thread, v);
        }
        for (int v = 0; v < 8; ++v) {
            const int row = 16 * warp + g + v / 2 % 2 * 8, k = 2 * t + v % 2 + v / 4 * 8;
            same("wgmma A registers", row + 64 * k, typename Products::ALayout{}(thread, v), thread, v);
            if (thread < 32) same("mma A registers", row + 16 * k, typename Small::ALayout{}(thread, v), thread, v);
        }
        if (thread >= 32) continue;
        for (int v = 0; v < 8; ++v)
            same("mma B registers of codes", g + 8 * (4 * t + v % 4 + v / 4 * 16), typename SmallCodes::BLayout{}(thread, v),
                 thread, v);
        for (int v = 0; v < 4; ++v) {
            same("mma B registers", g + 8 * (2 * t + v % 2 + v / 2 * 8), typename Small::BLayout{}(thread, v), thread, v);
            same("mma accumulator of codes", g + v / 2 * 8 + 16 * (2 * t + v % 2), typename SmallCodes::CLayout{}(thread, v),
                 thread, v);
            same("mma accumulator", g + v / 2 * 8 + 16 * (2 * t + v % 2), typename Small::CLayout{}(thread, v), thread, v);
        }
    }
    std::printf("same\n");
}
