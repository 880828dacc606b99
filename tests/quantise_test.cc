// The weight quantiser against the bytes that nvidia-modelopt wrote (tests/fixtures/quantizer).
#include "weights/quantise.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>

#include "checkpoint/safetensors.h"
#include "format/quantise.h"
#include "status.h"

namespace fourmoe {
namespace {

using checkpoint::StoredTensor;
using checkpoint::TensorMap;
using format::Encoding;
using format::Matrix;

TensorMap read_fixture(const std::string& name) {
  TensorMap tensors;
  const std::string path = std::string(FOURMOE_SOURCE_DIR) + "/tests/fixtures/quantizer/" + name;
  checkpoint::parse_safetensors(checkpoint::MappedFile::open(path), &tensors, nullptr);
  return tensors;
}

Matrix dense(const u8* data, Encoding encoding, i32 rows, i32 cols) {
  Matrix matrix;
  matrix.data = data;
  matrix.encoding = encoding;
  matrix.rows = rows;
  matrix.cols = cols;
  matrix.data_stride = format::row_bytes(encoding, cols);
  return matrix;
}

Matrix view(const StoredTensor& tensor) {
  const Encoding encoding = tensor.dtype == "F32"   ? Encoding::f32
                            : tensor.dtype == "F16" ? Encoding::f16
                                                    : Encoding::bf16;
  return dense(tensor.data(), encoding, static_cast<i32>(tensor.shape[0]), static_cast<i32>(tensor.shape[1]));
}

struct Quantised {
  std::vector<u8> codes;
  std::vector<u8> scales;
  f32 global;
};

Quantised quantise(const Matrix& matrix, i32 threads = 2) {
  Executor& executor = tbb_executor(threads);
  Quantised out;
  out.codes.assign(i64{matrix.rows} * matrix.cols / 2, 0xcc);
  out.scales.assign(i64{matrix.rows} * matrix.cols / 16, 0xcc);
  out.global = weights::global_of(weights::find_amax(matrix, "w", executor));
  weights::quantise(matrix, out.global, executor, out.codes.data(), out.scales.data());
  return out;
}

std::vector<u8> bytes_of(const StoredTensor& tensor) { return {tensor.data(), tensor.data() + tensor.bytes}; }

TEST(Quantise, GivesModeloptsBytes) {
  const TensorMap inputs = read_fixture("input.safetensors");
  const TensorMap expected = read_fixture("expected.safetensors");
  int compared = 0;
  for (const auto& [name, tensor] : inputs) {
    if (name.starts_with("undefined.")) continue;
    const Quantised found = quantise(view(tensor));
    EXPECT_EQ(found.codes, bytes_of(expected.at(name + ".weight"))) << name;
    EXPECT_EQ(found.scales, bytes_of(expected.at(name + ".weight_scale"))) << name;
    EXPECT_EQ(found.global, format::load<f32>(expected.at(name + ".weight_scale_2").data())) << name;
    ++compared;
  }
  EXPECT_GE(compared, 20);
}

TEST(Quantise, AMatrixOfZerosIsZerosWithValidScales) {
  const TensorMap inputs = read_fixture("input.safetensors");
  const Quantised found = quantise(view(inputs.at("undefined.zero_matrix")));
  EXPECT_EQ(found.codes, std::vector<u8>(found.codes.size(), 0));
  EXPECT_EQ(found.scales, std::vector<u8>(found.scales.size(), 0x38));  // E4M3 of 1
  EXPECT_EQ(found.global, 1.0f);
}

TEST(Quantise, TheGlobalScaleNeverVanishes) {
  EXPECT_EQ(weights::global_of(2688.0f), 1.0f);
  EXPECT_GT(weights::global_of(std::numeric_limits<f32>::denorm_min()), 0.0f);
  EXPECT_TRUE(std::isfinite(weights::global_of(std::numeric_limits<f32>::max())));
}

TEST(Quantise, DoesNotDependOnThreads) {
  std::mt19937 random(1);
  std::normal_distribution<f32> normal;
  std::vector<f32> values(300 * 1040);
  for (f32& value : values) value = normal(random);
  const Matrix matrix = dense(reinterpret_cast<const u8*>(values.data()), Encoding::f32, 300, 1040);
  const Quantised one = quantise(matrix, 1);
  const Quantised five = quantise(matrix, 5);
  EXPECT_EQ(one.codes, five.codes);
  EXPECT_EQ(one.scales, five.scales);
  EXPECT_EQ(one.global, five.global);
}

TEST(Quantise, ReadsRowsOfAnyAlignmentAndStride) {
  const TensorMap inputs = read_fixture("input.safetensors");
  const Matrix tight = view(inputs.at("bf16.normal"));
  std::vector<u8> memory(tight.rows * (tight.data_stride + 3) + 1);
  for (i64 row = 0; row < tight.rows; ++row) {
    std::memcpy(memory.data() + 1 + row * (tight.data_stride + 3), tight.row(row), tight.data_stride);
  }
  Matrix loose = tight;
  loose.data = memory.data() + 1;
  loose.data_stride += 3;
  EXPECT_EQ(quantise(loose).codes, quantise(tight).codes);
}

void expect_refusal(const Matrix& matrix, Reason reason, const std::string& words) {
  try {
    weights::find_amax(matrix, "layers.3.w", tbb_executor(2));
    ADD_FAILURE() << "expected: " << words;
  } catch (const Error& error) {
    EXPECT_EQ(error.reason(), reason);
    EXPECT_NE(std::string(error.what()).find(words), std::string::npos) << error.what();
  }
}

TEST(Quantise, NamesTheFirstValueThatIsNotFinite) {
  std::vector<f32> values(40 * 8192, 1.0f);
  const Matrix matrix = dense(reinterpret_cast<const u8*>(values.data()), Encoding::f32, 40, 8192);
  values[31 * 8192 + 2] = -std::numeric_limits<f32>::infinity();
  expect_refusal(matrix, Reason::value_not_finite, "tensor 'layers.3.w' has -inf at [31, 2]");
  values[17 * 8192 + 8191] = std::numeric_limits<f32>::quiet_NaN();
  expect_refusal(matrix, Reason::value_not_finite, "tensor 'layers.3.w' has nan at [17, 8191]");
}

TEST(Quantise, RefusesWeightsThatAreQuantisedAlready) {
  const std::vector<u8> bytes(32 * 16);
  expect_refusal(dense(bytes.data(), Encoding::fp8, 16, 32), Reason::dtype_unsupported, "is fp8");
}

// The recipe of format/quantise.h, value by value.
void expect_recipe(const f32* x, f32 global, const u8* codes, u8 scale) {
  f32 amax = 0.0f;
  bool nan = false;
  for (i32 i = 0; i < 16; ++i) {
    nan = nan || x[i] != x[i];
    amax = std::max(amax, std::fabs(x[i]));
  }
  const f32 s = amax / (6.0f * global);
  const u8 expected = nan ? 0x7f : s == 0.0f ? format::to_e4m3(1.0f) : format::to_e4m3(std::max(s, 0x1p-9f));
  ASSERT_EQ(scale, expected) << amax << " / " << global;
  const f32 step = format::from_e4m3(scale) * global;
  for (i32 i = 0; i < 16; ++i) {
    ASSERT_EQ(format::code_at(codes, i), format::to_e2m1(x[i] / step)) << x[i] << " / " << step;
  }
}

// Ties, zeros of both signs, subnormals, infinities and NaNs among values of every size; blocks apart from one another.
TEST(QuantiseBlocks, FollowsTheRecipeToTheLastBit) {
  std::mt19937_64 random(11);
  constexpr i64 kBlocks = 37;
  constexpr i64 kGap = 3;
  for (i32 round = 0; round < 400; ++round) {
    std::vector<f32> x(kBlocks * (16 + kGap));
    const f32 global =
        std::ldexp(1.0f + static_cast<f32>(random() % 1024) / 1024.0f, static_cast<i32>(random() % 40) - 30);
    for (f32& value : x) {
      const u64 bits = random();
      value = std::bit_cast<f32>(static_cast<u32>(bits));                                    // anything
      if (round % 4 < 3) value = static_cast<f32>(static_cast<i32>(bits % 97) - 48) / 8.0f;  // ties of many steps
      if (round % 4 < 2) value *= global * std::ldexp(1.0f, static_cast<i32>(bits >> 32) % 9);
      if (round % 4 == 1 && bits % 5 == 0) value = bits % 2 == 0 ? 0.0f : -0.0f;
    }
    if (round % 8 == 0) std::fill_n(x.data(), 16 + kGap, 0.0f);
    std::vector<u8> codes(kBlocks * 11, 0xcc), scales(kBlocks * 2, 0xcc);
    format::quantise_blocks({x.data(), 16 + kGap, codes.data(), 11, scales.data(), 2}, kBlocks, global);
    for (i64 b = 0; b < kBlocks; ++b) {
      expect_recipe(&x[b * (16 + kGap)], global, &codes[b * 11], scales[b * 2]);
      ASSERT_EQ(codes[b * 11 + 8], 0xcc);
      ASSERT_EQ(scales[b * 2 + 1], 0xcc);
    }
  }
}

struct Int8Row {
  std::vector<i8> codes;
  std::vector<f32> halves;
};

Int8Row quantise_int8(const std::vector<f32>& x) {
  const i64 n = static_cast<i64>(x.size());
  Int8Row row = {std::vector<i8>(n, 99), std::vector<f32>((n + 31) / 32, -1.0f)};
  format::quantise_int8(x.data(), n, row.codes.data(), row.halves.data());
  return row;
}

TEST(QuantiseInt8, FollowsTheRecipeToTheLastBit) {
  std::mt19937_64 random(11);
  for (const i64 n : {16, 32, 48, 80, 1856}) {
    std::vector<f32> x(n);
    for (i64 i = 0; i < n; ++i) {
      x[i] = std::ldexp(static_cast<f32>(random() % 511) - 255.0f, static_cast<int>(i / 32 * 29 % 240) - 130);
    }
    const Int8Row row = quantise_int8(x);
    for (i64 i = 0; i < n; ++i) {
      f64 amax = 0.0;
      for (i64 k = i / 32 * 32; k < std::min(n, i / 32 * 32 + 32); ++k) amax = std::max(amax, std::abs(f64{x[k]}));
      const f32 half = row.halves[i / 32];
      ASSERT_EQ(half, static_cast<f32>(amax / 254.0)) << i;
      ASSERT_EQ(row.codes[i], std::nearbyint(static_cast<f32>(x[i] / (2.0 * half)))) << i;
      ASSERT_LE(std::abs(x[i] - row.codes[i] * 2.0 * half), half * 1.01) << i;
    }
  }
}

TEST(QuantiseInt8, TiesGoToEven) {
  std::vector<f32> x(32, 0.0f);
  x[0] = -254.0f;  // scale 2
  for (i64 i = 1; i < 16; ++i) x[i] = static_cast<f32>(i % 2 == 0 ? -i : i);
  const Int8Row row = quantise_int8(x);
  EXPECT_EQ(row.halves[0], 1.0f);
  EXPECT_EQ(row.codes[0], -127);
  const i8 expected[16] = {-127, 0, -1, 2, -2, 2, -3, 4, -4, 4, -5, 6, -6, 6, -7, 8};
  EXPECT_TRUE(std::equal(expected, expected + 16, row.codes.begin()));
}

TEST(QuantiseInt8, ScalesOfZerosOfNoNumbersAndOfTheLeastValues) {
  const f32 nan = std::numeric_limits<f32>::quiet_NaN(), infinity = std::numeric_limits<f32>::infinity();
  std::vector<f32> x(32 * 5 + 16, 0.0f);
  std::fill_n(x.begin() + 32, 96, 3.0f);
  x[32 + 31] = nan;
  x[64 + 15] = infinity;
  x[96 + 16] = -infinity;
  x[128] = -0x1p-133f;  // the least bf16
  x[160 + 15] = 0x1.fep127f;
  const Int8Row row = quantise_int8(x);
  EXPECT_EQ(row.halves[0], 0.0f);
  for (i64 group = 1; group < 4; ++group) EXPECT_TRUE(std::isnan(row.halves[group])) << group;
  EXPECT_TRUE(std::all_of(row.codes.begin(), row.codes.begin() + 128, [](i8 code) { return code == 0; }));
  EXPECT_EQ(row.codes[128], -127);
  EXPECT_EQ(row.halves[4], 0x1p-133f / 254.0f);
  EXPECT_GT(row.halves[4], 0.0f);
  EXPECT_EQ(row.codes[160 + 15], 127);
  EXPECT_TRUE(std::isfinite(row.halves[5]));
}

}  // namespace
}  // namespace fourmoe
