// Scale layout: block scales as engines store them, and as this library reads them.
//
// Tensor cores of Blackwell read scales in atoms of 128 rows by 4 blocks, 512 bytes each. The scale of row r and block
// b of a matrix of R rows and B blocks lies at
//   ((r / 128) * (B / 4) + b / 4) * 512 + (r % 32) * 16 + (r % 128) / 32 * 4 + b % 4
// R rounded up to 128 and B to 4. Engines hand the atoms round as views of six dimensions,
// [32, 4, R / 128, 4, B / 4, matrices]: row within 32, which 32 of 128, atom of rows, block within 4, atom of blocks.
// Source: the CUTLASS documentation of block-scaled layouts.
#pragma once

#include <array>

#include "format/number.h"

namespace fourmoe::format {

inline constexpr i64 kAtomRows = 128;
inline constexpr i64 kAtomBlocks = 4;

// A view of six dimensions, as above.
struct AtomView {
  const u8* data = nullptr;
  std::array<i64, 6> shape{};
  std::array<i64, 6> strides{};  // bytes

  i64 rows() const { return shape[2] * kAtomRows; }
  i64 blocks() const { return shape[4] * kAtomBlocks; }
  i64 matrices() const { return shape[5]; }

  u8 at(i64 matrix, i64 row, i64 block) const {
    return data[row % 32 * strides[0] + row % kAtomRows / 32 * strides[1] + row / kAtomRows * strides[2] +
                block % kAtomBlocks * strides[3] + block / kAtomBlocks * strides[4] + matrix * strides[5]];
  }
};

// The scales of one matrix, rows one after the other: out [rows(), blocks()] bytes, caller's.
inline void read_linear(const AtomView& atoms, i64 matrix, u8* out) {
  for (i64 row = 0; row < atoms.rows(); ++row) {
    for (i64 block = 0; block < atoms.blocks(); ++block) *out++ = atoms.at(matrix, row, block);
  }
}

}  // namespace fourmoe::format
