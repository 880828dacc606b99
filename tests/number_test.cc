// The ruler: conversions between f32 and the small floats, each over every value that it can meet or by brute force.
#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

#include "format/quantise.h"
#include "format/tensor.h"

namespace fourmoe::format {
namespace {

TEST(Number, Bf16RoundTripsEveryFiniteValue) {
  for (u32 bits = 0; bits < 0x10000; ++bits) {
    const f32 value = from_bf16(static_cast<u16>(bits));
    if (std::isnan(value)) {
      EXPECT_TRUE(std::isnan(from_bf16(to_bf16(value))));
    } else {
      EXPECT_EQ(to_bf16(value), bits);
    }
  }
}

TEST(Number, Bf16RoundsToNearestTiesToEven) {
  EXPECT_EQ(to_bf16(1.0f + 0x1p-8f), 0x3f80);            // halfway: even neighbour is 1
  EXPECT_EQ(to_bf16(1.0f + 0x1p-7f + 0x1p-8f), 0x3f82);  // halfway: even neighbour is above
  EXPECT_EQ(to_bf16(1.0f + 0x1p-8f + 0x1p-20f), 0x3f81);
}

#ifdef __FLT16_MAX__  // clang 14 has the type on few machines
#ifdef __aarch64__    // where gcc 12 knows it in C++ by ARM's name only
using CompilersHalf = __fp16;
#else
using CompilersHalf = _Float16;
#endif

TEST(Number, F16MatchesTheCompilersType) {
  for (u32 bits = 0; bits < 0x10000; ++bits) {
    const u16 half = static_cast<u16>(bits);
    const f32 expected = static_cast<f32>(std::bit_cast<CompilersHalf>(half));
    const f32 value = from_f16(half);
    if (std::isnan(expected)) {
      EXPECT_TRUE(std::isnan(value));
      continue;
    }
    EXPECT_EQ(value, expected);
    EXPECT_EQ(std::signbit(value), std::signbit(expected));
    EXPECT_EQ(to_f16(value), half);
  }
  std::mt19937 random(1);
  for (int i = 0; i < 2000000; ++i) {
    const f32 value = std::bit_cast<f32>(static_cast<u32>(random()));
    if (std::isnan(value)) continue;
    ASSERT_EQ(to_f16(value), std::bit_cast<u16>(static_cast<CompilersHalf>(value))) << value;
  }
  EXPECT_EQ(to_f16_saturated(1e9f), 0x7bff);
  EXPECT_EQ(to_f16_saturated(-1e9f), 0xfbff);
}
#endif

TEST(Number, E4m3DecodesByItsDefinition) {
  for (int byte = 0; byte < 256; ++byte) {
    const int exponent = (byte >> 3) & 15;
    const int mantissa = byte & 7;
    const f64 magnitude = exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
    const f32 value = from_e4m3(static_cast<u8>(byte));
    if ((byte & 0x7f) == 0x7f) {
      EXPECT_TRUE(std::isnan(value));
    } else {
      EXPECT_EQ(value, (byte & 0x80) != 0 ? -magnitude : magnitude);
    }
  }
}

// Nearest by trying every code; ties go to the even one.
u8 nearest_e4m3(f32 value) {
  u8 best = 0;
  for (u8 code = 0; code < 0x7f; ++code) {
    const f64 here = std::fabs(f64{from_e4m3(code)} - std::fabs(f64{value}));
    const f64 there = std::fabs(f64{from_e4m3(best)} - std::fabs(f64{value}));
    if (here < there || (here == there && code % 2 == 0)) best = code;
  }
  return static_cast<u8>(best | (std::signbit(value) ? 0x80 : 0));
}

TEST(Number, E4m3EncodesTheNearestValue) {
  for (u8 code = 0; code < 0x7e; ++code) {
    const f32 low = from_e4m3(code);
    const f32 high = from_e4m3(static_cast<u8>(code + 1));
    for (const f32 value : {low, (low + high) / 2, std::nextafter((low + high) / 2, 0.0f),
                            std::nextafter((low + high) / 2, 1000.0f), -low, -(low + high) / 2}) {
      EXPECT_EQ(to_e4m3(value), nearest_e4m3(value)) << value;
    }
  }
  std::mt19937 random(2);
  std::uniform_real_distribution<f32> exponent(-40.0f, 12.0f);
  for (int i = 0; i < 20000; ++i) {
    const f32 value = std::exp2(exponent(random));
    ASSERT_EQ(to_e4m3(value), nearest_e4m3(value)) << value;
  }
  EXPECT_EQ(to_e4m3(1e30f), 0x7e);
  EXPECT_EQ(to_e4m3(std::nanf("")), 0x7f);
}

TEST(Number, E2m1EncodesTheNearestValueTiesToEven) {
  for (int step = 0; step <= 7000; ++step) {
    const f32 value = static_cast<f32>(step) / 1000.0f;
    u8 best = 0;
    for (u8 code = 0; code < 8; ++code) {
      const f32 here = std::fabs(kE2m1[code] - value);
      const f32 there = std::fabs(kE2m1[best] - value);
      if (here < there || (here == there && code % 2 == 0)) best = code;
    }
    EXPECT_EQ(to_e2m1(value), best) << value;
    EXPECT_EQ(to_e2m1(-value) & 7, best) << value;
  }
}

TEST(Number, E8m0IsAPowerOfTwo) {
  for (int byte = 0; byte < 255; ++byte) EXPECT_EQ(from_e8m0(static_cast<u8>(byte)), std::ldexp(1.0, byte - 127));
  EXPECT_TRUE(std::isnan(from_e8m0(255)));
}

// DESIGN section 4: the claim on which every room rests.
TEST(Number, EveryProductOfCodeAndScaleIsExactInBf16AndF16) {
  for (int scale = 0; scale < 0x7f; ++scale) {
    for (const f32 code : kE2m1) {
      const f32 product = code * from_e4m3(static_cast<u8>(scale));
      EXPECT_EQ(from_bf16(to_bf16(product)), product);
      EXPECT_EQ(from_f16(to_f16(product)), product);
    }
  }
}

TEST(Quantise, RecoversValuesThatAreRepresentable) {
  const f32 global = 0.37f;
  std::vector<f32> x(64);
  for (int i = 0; i < 64; ++i) x[i] = kE2m1[(i * 5 + i / 16) % 16] * from_e4m3(static_cast<u8>(0x30 + i / 16)) * global;
  for (int block = 0; block < 4; ++block) x[block * 16] = 6.0f * from_e4m3(static_cast<u8>(0x30 + block)) * global;
  std::vector<u8> codes(32);
  std::vector<u8> scales(4);
  std::vector<f32> back(64);
  quantise_row(x.data(), 64, global, codes.data(), scales.data());
  dequantise_row(codes.data(), scales.data(), 64, back.data());
  for (int i = 0; i < 64; ++i) EXPECT_NEAR(back[i] * global, x[i], 1e-6f * std::fabs(x[i]));
}

TEST(Quantise, SaturatesZeroesAndShowsNan) {
  std::vector<f32> x(48, 0.0f);
  x[0] = 1e6f;
  x[1] = -1e6f;
  x[16 + 3] = std::nanf("");
  std::vector<u8> codes(24);
  std::vector<u8> scales(3);
  quantise_row(x.data(), 48, 1.0f, codes.data(), scales.data());
  EXPECT_EQ(scales[0], 0x7e);
  EXPECT_EQ(codes[0], 0xf7);
  EXPECT_EQ(scales[1] & 0x7f, 0x7f);
  EXPECT_EQ(scales[2], 0x38);
  EXPECT_EQ(codes[16], 0);
}

TEST(Tensor, WeightsDecodeExhaustively) {
  std::vector<u8> data(256);
  for (int i = 0; i < 256; ++i) data[i] = static_cast<u8>(i);
  for (int scale = 0; scale < 256; ++scale) {
    const std::vector<u8> scales(32, static_cast<u8>(scale));
    const Matrix nvfp4{data.data(), scales.data(), 256, 32, 1, 512, Encoding::nvfp4, 1.0f};
    const Matrix mxfp4{data.data(), scales.data(), 256, 16, 1, 512, Encoding::mxfp4, 1.0f};
    for (int col = 0; col < 512; ++col) {
      const int code = col % 2 == 0 ? (col / 2) & 15 : (col / 2) >> 4;
      if ((scale & 0x7f) != 0x7f) {
        ASSERT_EQ(weight_at(nvfp4, 0, col), f64{kE2m1[code]} * from_e4m3(static_cast<u8>(scale)));
      }
      if (scale != 255) {
        ASSERT_EQ(weight_at(mxfp4, 0, col), std::ldexp(f64{kE2m1[code]}, scale - 127));
      }
    }
  }
}

}  // namespace
}  // namespace fourmoe::format
