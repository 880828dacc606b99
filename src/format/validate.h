// validate: what a matrix from outside must satisfy before any room multiplies it.
#pragma once

#include <optional>

#include "format/tensor.h"

namespace fourmoe::format {

// The largest byte of a block scale: beyond it E8M0 is NaN, E4M3 is NaN or has a sign.
constexpr u8 largest_scale(Encoding encoding) { return encoding == Encoding::nvfp4 ? kLargestScale : 0xfe; }

struct BadScale {
  i64 row;
  i64 block;
  u8 byte;
};

// The first block scale that is NaN (E4M3 0x7f, 0xff; E8M0 0xff) or negative (E4M3 with its sign set, -0 included).
std::optional<BadScale> find_bad_scale(const Matrix& matrix);

}  // namespace fourmoe::format
