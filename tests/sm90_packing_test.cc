// Packed tiles of the Hopper room, on the host: what the kernel would multiply is what the checkpoint says, for every
// code and every scale.
#include <gtest/gtest.h>

#include <random>
#include <set>

#include "backends/sm90/atom.h"
#include "backends/sm90/tiles.h"
#include "weights/window.h"

namespace fourmoe::sm90 {
namespace {

using format::Encoding;
using format::Matrix;

// A matrix with its own memory.
struct Weights {
  Weights(Encoding encoding, i32 rows, i32 cols)
      : values(rows * format::row_bytes(encoding, cols)),
        scales(format::is_fp4(encoding) ? i64{rows} * cols / format::block_of(encoding) : 0) {
    matrix.data = values.data();
    matrix.data_stride = format::row_bytes(encoding, cols);
    matrix.scales = scales.data();
    matrix.scales_stride = format::is_fp4(encoding) ? cols / format::block_of(encoding) : 0;
    matrix.rows = rows;
    matrix.cols = cols;
    matrix.encoding = encoding;
  }
  Weights(const Weights&) = delete;

  std::vector<u8> values, scales;
  Matrix matrix;
};

// The operand at (row, column) of a blob as the tensor core sees it, in double.
f64 operand(const std::vector<u8>& blob, Encoding encoding, int columns, int row, int column) {
  const u8* tile = blob.data() + (i64{row / 64} * k_steps(columns) + column / 64) * tile_bytes(encoding);
  const int pair = row % 64 / 16 * 8 + row % 8;  // warp and g
  const int k = column % 64 / 16;
  const int t = column % 8 / 2;
  const int reg = column % 16 / 8 * 2 + row % 16 / 8;
  if (encoding == Encoding::bf16) {
    const u32 word = format::load<u32>(tile + 16 * (128 * k + 4 * pair + t) + 4 * reg);
    return format::from_bf16(static_cast<u16>(word >> (16 * (column % 2))));
  }
  const u8* codes = tile + 16 * (4 * pair + t) + 8 * (k / 2);
  u32 out[8];
  split_codes(format::load<u32>(codes), format::load<u32>(codes + 4), out);
  const u32 word = format::load<u32>(tile + kCodeBytes + 8 * pair + 4 * (k / 2));
  const u32 scales = encoding == Encoding::mxfp4 ? power_pair(word, k % 2) : scale_pair(word, k % 2);
  const f32 code = format::from_bf16(static_cast<u16>(out[4 * (k % 2) + reg] >> (16 * (column % 2))));
  const f32 scale = format::from_bf16(static_cast<u16>(scales >> (16 * (row % 16 / 8))));
  const f32 product = code * scale;
  EXPECT_EQ(format::from_bf16(format::to_bf16(product)), product);
  return product;
}

// Every element, with what epilogues do to the sums.
void expect_equal(const Matrix& m) {
  std::vector<u8> blob(blob_bytes(m.rows, m.cols, m.encoding), 0xee);
  pack(nullptr, m, blob.data());
  const i32 window = m.encoding == Encoding::mxfp4 ? weights::find_exponents(m).first() : 0;
  const f32 global = std::ldexp(1.0f, kPacking.exponent(m.encoding, window));
  for (int row = 0; row < row_tiles(m.rows) * 64; ++row) {
    for (int column = 0; column < k_steps(m.cols) * 64; ++column) {
      const f64 found = operand(blob, m.encoding, m.cols, row, column) * std::ldexp(global, -kProductExponent);
      const int feature = feature_of(false, row);
      const f64 wanted = feature < m.rows && column < m.cols ? format::weight_at(m, feature, column) : 0.0;
      ASSERT_EQ(found, wanted) << row << ", " << column;
    }
  }
}

// A thread's rows g and g + 8 are what epilogues take them for, and each feature is there once.
TEST(Sm90Packing, RowsOfAThreadBelongTogether) {
  for (int row = 0; row < 64; row += row % 16 == 7 ? 9 : 1) {
    EXPECT_EQ(feature_of(true, row), feature_of(true, row + 8));
    EXPECT_EQ(feature_of(false, row) + 1, feature_of(false, row + 8));
    EXPECT_EQ(feature_of(false, row) % 2, 0);
  }
  std::set<int> gated, alone;
  for (int row = 0; row < 64; ++row) gated.insert(feature_of(true, row)), alone.insert(feature_of(false, row));
  EXPECT_EQ(gated.size(), 32u);
  EXPECT_EQ(alone.size(), 64u);
  EXPECT_EQ(*alone.rbegin(), 63);
}

// Windows that begin at every exponent; each of their 127 scales with all codes.
TEST(Sm90Packing, Mxfp4ProductsAreExactForAllCodesAndAllExponents) {
  Weights w(Encoding::mxfp4, 48, 96);  // 144 blocks
  for (i32 first = 0; first + weights::kWindow - 1 <= 254; ++first) {
    SCOPED_TRACE(first);
    for (std::size_t i = 0; i < w.values.size(); ++i) w.values[i] = static_cast<u8>(i % 16 | (i + first) % 16 << 4);
    for (std::size_t i = 0; i < w.scales.size(); ++i) w.scales[i] = static_cast<u8>(first + i % weights::kWindow);
    expect_equal(w.matrix);
  }
}

TEST(Sm90Packing, BlocksOfZerosHaveAnyMxfp4Scale) {
  Weights w(Encoding::mxfp4, 32, 64);
  std::fill(w.values.begin(), w.values.end(), u8{0x91});
  std::fill(w.scales.begin(), w.scales.end(), u8{120});
  for (const int block : {0, 5, 63}) {
    std::fill_n(w.values.begin() + 16 * block, 16, u8{0x80});
    w.scales[block] = block == 5 ? 254 : 1;
  }
  expect_equal(w.matrix);
  std::fill(w.values.begin(), w.values.end(), u8{0});
  expect_equal(w.matrix);
}

TEST(Sm90Packing, Nvfp4AndBf16AreExact) {
  std::mt19937 random(3);
  for (const Encoding encoding : {Encoding::nvfp4, Encoding::bf16}) {
    Weights w(encoding, 80, 176);
    for (u8& value : w.values) value = static_cast<u8>(random() % 0x7f);  // as bf16 finite
    for (std::size_t i = 0; i < w.scales.size(); ++i) w.scales[i] = static_cast<u8>(i % 0x7f);
    expect_equal(w.matrix);
  }
}

TEST(Sm90Packing, ExponentsThatFitNoWindowAreNamed) {
  Weights w(Encoding::mxfp4, 16, 64);
  const auto refusal = [&](u8 a, u8 b) {
    std::fill(w.values.begin(), w.values.end(), u8{0x21});
    std::fill(w.scales.begin(), w.scales.end(), a);
    w.scales[9] = b;
    const weights::Exponents found = weights::find_exponents(w.matrix);
    return found.fit() ? "" : weights::refusal(found);
  };
  EXPECT_EQ(refusal(100, 226), "");
  EXPECT_EQ(refusal(100, 227), "has E8M0 scales from 100 to 227, 128 powers of two; up to 127 in a row would pass");
  EXPECT_EQ(refusal(0, 126), "");
  EXPECT_EQ(refusal(254, 128), "");
  EXPECT_EQ(refusal(120, 255), "has an E8M0 scale of 255, not a number; 0 to 254 would pass");
}

}  // namespace
}  // namespace fourmoe::sm90
