// packed: panels hold exactly what the checkpoint holds, in the order that weights/packed.h states.
#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <vector>

#include "case.h"
#include "weights/packed.h"

namespace fourmoe::weights {
namespace {

using format::Encoding;
using format::Matrix;

constexpr Order kOrder{16};

// A matrix in memory of its own: rows `gap` bytes apart beyond their length, starting at an odd address.
struct Source {
  Source(Encoding encoding, i32 rows, i32 cols, i64 gap, u64 seed) {
    std::mt19937_64 random(seed);
    matrix.encoding = encoding;
    matrix.rows = rows;
    matrix.cols = cols;
    matrix.data_stride = format::row_bytes(encoding, cols) + gap;
    data.resize(rows * matrix.data_stride + 1);
    std::generate(data.begin(), data.end(), [&] { return static_cast<u8>(random()); });
    if (encoding == Encoding::fp8) {
      for (u8& byte : data) byte = (byte & 0x7f) == 0x7f ? 0x7e : byte;  // no NaN
    }
    matrix.data = data.data() + 1;
    if (!format::is_fp4(encoding)) return;
    matrix.scales_stride = cols / format::block_of(encoding) + gap;
    scales.resize(rows * matrix.scales_stride + 1);
    std::generate(scales.begin(), scales.end(), [&] { return static_cast<u8>(random() % 127); });
    matrix.scales = scales.data() + 1;
  }
  std::vector<u8> data;
  std::vector<u8> scales;
  Matrix matrix;
};

struct Panels {
  Panels(const Matrix& matrix, i64 spare) : format(panel_format(matrix.encoding)) {
    stride = panel_bytes(format, kOrder, matrix.cols) + spare;
    count = panel_count(kOrder, matrix.rows);
    bytes.assign(count * stride, std::byte{0xa5});
  }
  PanelFormat format;
  i64 stride;
  i32 count;
  std::vector<std::byte> bytes;
};

void expect_same(const Matrix& matrix, const Panels& panels) {
  const bool fp4 = format::is_fp4(matrix.encoding);
  const bool widened = panels.format == PanelFormat::f32;
  const i64 row_bytes = widened ? 4 * i64{matrix.cols} : format::row_bytes(matrix.encoding, matrix.cols);
  const i64 row_scales = fp4 ? matrix.cols / format::block_of(matrix.encoding) : 0;
  std::vector<u8> codes(matrix.rows * row_bytes), scales(matrix.rows * row_scales);
  unpack(panels.format, kOrder, matrix.rows, matrix.cols, panels.bytes.data(), panels.stride, codes.data(),
         fp4 ? scales.data() : nullptr);
  for (i64 row = 0; row < matrix.rows; ++row) {
    ASSERT_TRUE(
        std::equal(scales.data() + row * row_scales, scales.data() + (row + 1) * row_scales, matrix.scale_row(row)))
        << "scales of row " << row;
    if (!widened) {
      ASSERT_EQ(0, std::memcmp(codes.data() + row * row_bytes, matrix.row(row), row_bytes)) << "row " << row;
      continue;
    }
    for (i64 col = 0; col < matrix.cols; ++col) {
      const f32 expected = static_cast<f32>(format::weight_at(matrix, row, col));
      const f32 found = format::load<f32>(codes.data() + row * row_bytes + 4 * col);
      if (expected != expected) ASSERT_NE(found, found);
      else ASSERT_EQ(std::bit_cast<u32>(found), std::bit_cast<u32>(expected)) << row << ", " << col;
    }
  }
}

TEST(Packed, ComesBackBitForBit) {
  for (const Encoding encoding :
       {Encoding::nvfp4, Encoding::mxfp4, Encoding::bf16, Encoding::f16, Encoding::f32, Encoding::fp8}) {
    for (const i32 rows : {1, 15, 16, 17, 48}) {
      for (const i32 cols : {32, 64, 96, 352}) {
        for (const i64 gap : {0, 5}) {
          const Source source(encoding, rows, cols, gap, rows * 1000 + cols);
          Panels panels(source.matrix, 64 * gap);
          pack_panels(source.matrix, kOrder, 0, panels.count, panels.bytes.data(), panels.stride);
          SCOPED_TRACE(format::encoding_name(encoding));
          expect_same(source.matrix, panels);
        }
      }
    }
  }
}

// Tails of 16 and 48 columns, which only a block of 16 can have.
TEST(Packed, Nvfp4GroupsOfAnyLengthComeBack) {
  for (const i32 cols : {16, 48, 80, 112, 2704}) {
    const Source source(Encoding::nvfp4, 20, cols, 3, cols);
    Panels panels(source.matrix, 0);
    pack_panels(source.matrix, kOrder, 0, panels.count, panels.bytes.data(), panels.stride);
    expect_same(source.matrix, panels);
  }
}

// gpt-oss stores gate and up as alternate rows of one tensor.
TEST(Packed, InterleavedRowsComeApart) {
  const Source both(Encoding::mxfp4, 64, 96, 0, 5);
  for (const i32 half : {0, 1}) {
    Matrix matrix = both.matrix;
    matrix.rows = 32;
    matrix.data += half * matrix.data_stride;
    matrix.scales += half * matrix.scales_stride;
    matrix.data_stride *= 2;
    matrix.scales_stride *= 2;
    Panels panels(matrix, 0);
    pack_panels(matrix, kOrder, 0, panels.count, panels.bytes.data(), panels.stride);
    expect_same(matrix, panels);
  }
}

TEST(Packed, PanelsArePackedApartOrTogether) {
  const Source source(Encoding::nvfp4, 80, 80, 0, 9);
  Panels together(source.matrix, 0), apart(source.matrix, 0);
  pack_panels(source.matrix, kOrder, 0, 5, together.bytes.data(), together.stride);
  for (const i32 first : {3, 0, 2, 4, 1}) {
    pack_panels(source.matrix, kOrder, first, 1, apart.bytes.data() + first * apart.stride, apart.stride);
  }
  EXPECT_EQ(together.bytes, apart.bytes);
}

TEST(Packed, RowsBeyondTheMatrixAreZero) {
  for (const Encoding encoding : {Encoding::nvfp4, Encoding::mxfp4, Encoding::bf16, Encoding::f32}) {
    const Source source(encoding, 3, 96, 0, 11);
    Panels panels(source.matrix, 0);
    pack_panels(source.matrix, kOrder, 0, 1, panels.bytes.data(), panels.stride);
    const bool fp4 = format::is_fp4(encoding);
    std::vector<u8> codes(16 * 96 * 4), scales(16 * 6);
    unpack(panels.format, kOrder, 16, 96, panels.bytes.data(), panels.stride, codes.data(),
           fp4 ? scales.data() : nullptr);
    const i64 row = panels.format == PanelFormat::f32 ? 4 * 96 : format::row_bytes(encoding, 96);
    EXPECT_TRUE(std::all_of(codes.begin() + 3 * row, codes.begin() + 16 * row, [](u8 byte) { return byte == 0; }));
  }
}

TEST(Packed, Ue5m3HoldsEveryE4m3Magnitude) {
  for (i32 byte = 0; byte < 127; ++byte) {
    const u8 e4m3 = static_cast<u8>(byte);
    const u8 ue5m3 = format::to_ue5m3(e4m3);
    EXPECT_EQ(std::bit_cast<f32>(u32{ue5m3} << 20) * 0x1p112f, format::from_e4m3(e4m3)) << byte;
    EXPECT_EQ(format::from_ue5m3(ue5m3), e4m3);
    EXPECT_TRUE(ue5m3 == 0 || ue5m3 >= 8) << "a subnormal: " << byte;
  }
}

TEST(Packed, ExpertsOfALayerLieInOneBuffer) {
  const Problem problem = cases::problem(80, 48, 5, 2);
  checkpoint::Layer layer = cases::random_layer(problem, 3, false);
  const Packed packed(layer.experts, kOrder, tbb_executor(2));
  const i64 gate_panel = panel_bytes(PanelFormat::nvfp4, kOrder, 80);
  const i64 down_panel = panel_bytes(PanelFormat::nvfp4, kOrder, 48);
  EXPECT_EQ(packed.bytes(), 5 * (2 * 3 * gate_panel + 5 * down_panel));
  for (const Expert& expert : layer.experts) {
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(expert.gemm1) % 64, 0u);
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(expert.gemm2) % 64, 0u);
    for (const auto& [matrix, blob, stride] : {std::tuple(&expert.gate, expert.gemm1, 2 * gate_panel),
                                               std::tuple(&expert.up, expert.gemm1 + gate_panel, 2 * gate_panel),
                                               std::tuple(&expert.down, expert.gemm2, down_panel)}) {
      std::vector<u8> codes(matrix->rows * matrix->cols / 2), scales(matrix->rows * matrix->cols / 16);
      unpack(PanelFormat::nvfp4, kOrder, matrix->rows, matrix->cols, blob, stride, codes.data(), scales.data());
      EXPECT_EQ(0, std::memcmp(codes.data(), matrix->data, codes.size()));
      EXPECT_EQ(0, std::memcmp(scales.data(), matrix->scales, scales.size()));
    }
  }
}

TEST(Packed, ExpertsThatDifferAreRefused) {
  const Problem problem = cases::problem(32, 32, 2, 1);
  checkpoint::Layer layer = cases::random_layer(problem, 3, false);
  layer.experts[1].up.rows = 16;
  EXPECT_THROW(Packed(layer.experts, kOrder, tbb_executor(1)), Error);
}

}  // namespace
}  // namespace fourmoe::weights
