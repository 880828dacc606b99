#include "format/validate.h"

#include <algorithm>

namespace fourmoe::format {

std::optional<BadScale> find_bad_scale(const Matrix& matrix) {
  if (!is_fp4(matrix.encoding)) return std::nullopt;
  // E4M3 without a sign ends at 0x7e, E8M0 at 0xfe: one comparison finds NaN and, in E4M3, every sign.
  const u8 largest = matrix.encoding == Encoding::nvfp4 ? kLargestScale : 0xfe;
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
