#include "format/validate.h"

#include <algorithm>

namespace fourmoe::format {

std::optional<BadScale> find_bad_scale(const Matrix& matrix) {
  if (!is_fp4(matrix.encoding)) return std::nullopt;
  const u8 largest = largest_scale(matrix.encoding);
  const i64 blocks = matrix.cols / block_of(matrix.encoding);
  for (i64 row = 0; row < matrix.rows; ++row) {
    const u8* scales = matrix.scale_row(row);
    if (*std::max_element(scales, scales + blocks) <= largest) continue;
    const u8* bad = std::find_if(scales, scales + blocks, [&](u8 byte) { return byte > largest; });
    return BadScale{row, bad - scales, *bad};
  }
  return std::nullopt;
}

}  // namespace fourmoe::format
