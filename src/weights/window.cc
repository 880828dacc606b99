#include "weights/window.h"

#include <fmt/format.h>

namespace fourmoe::weights {
namespace {

void add(u8 byte, Exponents* range) {
  range->least = std::min<u32>(range->least, byte);
  range->most = std::max<u32>(range->most, byte);
}

bool is_zero(const u8* codes, i64 bytes) {
  return std::none_of(codes, codes + bytes, [](u8 pair) { return (pair & 0x77) != 0; });  // both signs
}

// Of scales whose blocks have a code that is not zero, or of all.
template <bool kAll>
Exponents scan(const format::Matrix& matrix) {
  constexpr i64 kCodes = format::block_of(format::Encoding::mxfp4) / 2;
  Exponents range;
  for (i64 row = 0; row < matrix.rows; ++row) {
    const u8* scales = matrix.scale_row(row);
    for (i64 block = 0; block < matrix.cols / (2 * kCodes); ++block) {
      const bool counts = kAll || scales[block] == kNotANumber || !is_zero(matrix.row(row) + block * kCodes, kCodes);
      if (counts) add(scales[block], &range);
    }
  }
  return range;
}

}  // namespace

Exponents find_exponents(const format::Matrix& matrix) {
  const Exponents all = scan<true>(matrix);
  return all.fit() ? all : scan<false>(matrix);
}

std::string refusal(const Exponents& range) {
  if (range.most == kNotANumber) return "has an E8M0 scale of 255, not a number; 0 to 254 would pass";
  return fmt::format("has E8M0 scales from {} to {}, {} powers of two; up to {} in a row would pass", range.least,
                     range.most, range.most - range.least + 1, kWindow);
}

}  // namespace fourmoe::weights
