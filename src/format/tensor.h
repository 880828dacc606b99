// Tensor: non-owning views of what a caller hands in, and of one projection's weights as a checkpoint stores them.
#pragma once

#include <string_view>

#include "format/nvfp4.h"

namespace fourmoe::format {

enum class Dtype : u8 { f32, f16, bf16, i32, i64, u8 };

constexpr std::string_view dtype_name(Dtype dtype) {
  switch (dtype) {
    case Dtype::f32: return "f32";
    case Dtype::f16: return "f16";
    case Dtype::bf16: return "bf16";
    case Dtype::i32: return "i32";
    case Dtype::i64: return "i64";
    case Dtype::u8: return "u8";
  }
  return "unknown";
}

constexpr i64 dtype_bytes(Dtype dtype) {
  switch (dtype) {
    case Dtype::f32:
    case Dtype::i32: return 4;
    case Dtype::f16:
    case Dtype::bf16: return 2;
    case Dtype::i64: return 8;
    case Dtype::u8: return 1;
  }
  return 0;
}

// A matrix of activations, logits, ids or routing weights.
struct Tensor {
  void* data = nullptr;  // [rows, cols] dtype, rows `stride` elements apart; caller's
  Dtype dtype = Dtype::f32;
  i64 rows = 0;
  i64 cols = 0;
  i64 stride = 0;  // elements between the starts of two rows, >= cols

  bool empty() const { return data == nullptr; }
  FOURMOE_HD u8* row(i64 index) const { return static_cast<u8*>(data) + index * stride * dtype_bytes(dtype); }
};

// Element `col` of a row of floats of the given type.
inline f32 read(const void* row, Dtype dtype, i64 col) {
  const u8* bytes = static_cast<const u8*>(row);
  switch (dtype) {
    case Dtype::f32: return load<f32>(bytes + 4 * col);
    case Dtype::f16: return from_f16(load<u16>(bytes + 2 * col));
    case Dtype::bf16: return from_bf16(load<u16>(bytes + 2 * col));
    default: return 0.0f;
  }
}

inline void write(void* row, Dtype dtype, i64 col, f32 value) {
  u8* bytes = static_cast<u8*>(row);
  const u16 half = dtype == Dtype::f16 ? to_f16_saturated(value) : to_bf16(value);
  if (dtype == Dtype::f32) std::memcpy(bytes + 4 * col, &value, 4);
  else std::memcpy(bytes + 2 * col, &half, 2);
}

// How the weights of a matrix are stored.
enum class Encoding : u8 {
  nvfp4,  // E2M1 pairs, an E4M3 scale a block of 16, a global scale
  mxfp4,  // E2M1 pairs, an E8M0 scale a block of 32
  bf16,
  f16,
  f32,
  fp8,  // E4M3 with one scale a matrix
};

constexpr std::string_view encoding_name(Encoding encoding) {
  switch (encoding) {
    case Encoding::nvfp4: return "nvfp4";
    case Encoding::mxfp4: return "mxfp4";
    case Encoding::bf16: return "bf16";
    case Encoding::f16: return "f16";
    case Encoding::f32: return "f32";
    case Encoding::fp8: return "fp8";
  }
  return "unknown";
}

constexpr bool is_fp4(Encoding encoding) { return encoding == Encoding::nvfp4 || encoding == Encoding::mxfp4; }
constexpr i32 block_of(Encoding encoding) { return encoding == Encoding::mxfp4 ? 32 : kNvfp4Block; }

// Bytes of one row's values, without scales.
constexpr i64 row_bytes(Encoding encoding, i64 cols) {
  switch (encoding) {
    case Encoding::nvfp4:
    case Encoding::mxfp4: return cols / 2;
    case Encoding::fp8: return cols;
    case Encoding::bf16:
    case Encoding::f16: return 2 * cols;
    case Encoding::f32: return 4 * cols;
  }
  return 0;
}

// One weight matrix [rows = outputs, cols = inputs], whatever the dialect it came from: the loader has already
// put nibbles in even/odd order, undone transposition and inverted divisors.
struct Matrix {
  const u8* data = nullptr;    // [rows, row_bytes(cols)], E2M1 pairs low nibble first, or dense values; any alignment
  const u8* scales = nullptr;  // [rows, cols / block_of] E4M3 or E8M0; null unless 4-bit
  i64 data_stride = 0;         // bytes between two rows of data (more than row_bytes when rows interleave)
  i64 scales_stride = 0;       // bytes between two rows of scales
  i32 rows = 0;
  i32 cols = 0;
  Encoding encoding = Encoding::nvfp4;
  f32 global = 1.0f;  // multiplier of every value, applied to the accumulator; 1 for mxfp4 and dense matrices

  bool empty() const { return data == nullptr; }
  const u8* row(i64 index) const { return data + index * data_stride; }
  const u8* scale_row(i64 index) const { return scales + index * scales_stride; }
  i64 bytes() const { return rows * (row_bytes(encoding, cols) + (is_fp4(encoding) ? cols / block_of(encoding) : 0)); }
};

// Weight (row, col) without its global scale, exact for every encoding.
inline f64 weight_at(const Matrix& matrix, i64 row, i64 col) {
  const u8* data = matrix.row(row);
  switch (matrix.encoding) {
    case Encoding::nvfp4: return f64{from_e2m1(code_at(data, col))} * from_e4m3(matrix.scale_row(row)[col / 16]);
    case Encoding::mxfp4: return f64{from_e2m1(code_at(data, col))} * from_e8m0(matrix.scale_row(row)[col / 32]);
    case Encoding::fp8: return from_e4m3(data[col]);
    case Encoding::bf16: return read(data, Dtype::bf16, col);
    case Encoding::f16: return read(data, Dtype::f16, col);
    case Encoding::f32: return read(data, Dtype::f32, col);
  }
  return 0.0;
}

}  // namespace fourmoe::format
