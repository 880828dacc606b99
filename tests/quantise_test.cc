// The weight quantiser against the bytes that nvidia-modelopt wrote (tests/fixtures/quantizer).
#include "weights/quantise.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>

#include "checkpoint/safetensors.h"
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

}  // namespace
}  // namespace fourmoe
