// The Hopper atom's layout, on the host: every code and scale byte arrives where the tensor core expects it.
#include <gtest/gtest.h>

#include <random>

#include "backends/sm90/atom.h"
#include "format/nvfp4.h"

namespace fourmoe::sm90 {
namespace {

TEST(Sm90Atom, SixteenCodesComeBackFromTwoWords) {
  std::mt19937 random(1);
  for (int trial = 0; trial < 2000; ++trial) {
    std::array<std::array<u8, 2>, 8> codes{};
    for (auto& pair : codes) pair = {static_cast<u8>(random() % 16), static_cast<u8>(random() % 16)};
    const auto words = join_codes(codes);
    u32 out[8];
    split_codes(words[0], words[1], out);
    for (int r = 0; r < 8; ++r) {
      for (int half = 0; half < 2; ++half) {
        const u16 bits = static_cast<u16>(out[r] >> (16 * half));
        EXPECT_EQ(format::from_bf16(bits) * 0x1p126f, format::kE2m1[codes[r][half]]);
        EXPECT_EQ(bits & ~0x81c0, 0);
      }
    }
  }
}

// The packer of the device computes what the packer of the host looks up.
TEST(Sm90Atom, MergedCodesAreJoinedCodes) {
  std::mt19937 random(2);
  for (int trial = 0; trial < 2000; ++trial) {
    std::array<std::array<u8, 2>, 8> codes{};
    u32 placed[8];
    for (int r = 0; r < 8; ++r) {
      codes[r] = {static_cast<u8>(random() % 16), static_cast<u8>(random() % 16)};
      placed[r] = place_codes(codes[r][0] | codes[r][1] << 4);
    }
    u32 w0, w1;
    merge_codes(placed, &w0, &w1);
    EXPECT_EQ((std::array<u32, 2>{w0, w1}), join_codes(codes));
  }
}

// 64 bits in, 64 out: nothing is stored twice and nothing is lost.
TEST(Sm90Atom, EveryBitOfTheWordsIsOneBitOfOneCode) {
  for (int bit = 0; bit < 64; ++bit) {
    u32 out[8];
    split_codes(bit < 32 ? 1u << bit : 0u, bit < 32 ? 0u : 1u << (bit - 32), out);
    int set = 0;
    for (const u32 word : out) set += __builtin_popcount(word);
    EXPECT_EQ(set, 1) << bit;
  }
}

TEST(Sm90Atom, ScalesOfBothRowsAndStepsComeBack) {
  for (int e4m3 = 0; e4m3 < 0x7f; ++e4m3) {
    const u8 byte = format::to_ue5m3(static_cast<u8>(e4m3));
    const u8 other = static_cast<u8>(255 - byte);
    const u32 words[4] = {join_scales(byte, other, 0x5a, 0xa5), join_scales(other, byte, 0x5a, 0xa5),
                          join_scales(0x5a, 0xa5, byte, other), join_scales(0x5a, 0xa5, other, byte)};
    for (int place = 0; place < 4; ++place) {
      const u32 pair = scale_pair(words[place], place / 2);
      const f32 scale = format::from_bf16(static_cast<u16>(pair >> (16 * (place % 2))));
      EXPECT_EQ(scale * 0x1p-80f, e4m3 == 0 ? 0x1p-15f : format::from_e4m3(static_cast<u8>(e4m3))) << place;
    }
  }
}

TEST(Sm90Atom, ProductsAreExactInBf16) {
  for (int e4m3 = 1; e4m3 < 0x7f; ++e4m3) {
    const u32 pair = scale_pair(join_scales(format::to_ue5m3(static_cast<u8>(e4m3)), 0, 0, 0), 0);
    for (int code = 0; code < 16; ++code) {
      u32 out[8];
      const auto words = join_codes({{{static_cast<u8>(code), 0}}});
      split_codes(words[0], words[1], out);
      const f32 product = format::from_bf16(static_cast<u16>(out[0])) * format::from_bf16(static_cast<u16>(pair));
      EXPECT_EQ(format::from_bf16(format::to_bf16(product)), product);
      EXPECT_EQ(std::ldexp(product, -kProductExponent), format::kE2m1[code] * format::from_e4m3(static_cast<u8>(e4m3)));
    }
  }
}

}  // namespace
}  // namespace fourmoe::sm90
