#include "format/quantise.h"

#include <algorithm>

namespace fourmoe::format {
namespace {

// Magnitudes are ordered like their bits, and a NaN's are the largest.
f32 block_amax(const f32* x) {
  i32 largest = 0;
  for (i32 i = 0; i < kNvfp4Block; ++i) largest = std::max(largest, std::bit_cast<i32>(x[i]) & 0x7fffffff);
  return std::bit_cast<f32>(largest);
}

}  // namespace

void quantise_row(const f32* x, i64 n, f32 global, u8* codes, u8* scales) {
  for (i64 block = 0; block < n / kNvfp4Block; ++block) {
    const f32* values = x + block * kNvfp4Block;
    scales[block] = block_scale(block_amax(values), global);
    const f32 step = from_e4m3(scales[block]) * global;
    i32 block_codes[kNvfp4Block];  // plain loops over a block, which compilers turn into vectors
    for (i32 i = 0; i < kNvfp4Block; ++i) block_codes[i] = to_e2m1(values[i] / step);
    for (i32 pair = 0; pair < kNvfp4Block / 2; ++pair) {
      codes[block * 8 + pair] = static_cast<u8>(block_codes[2 * pair] | block_codes[2 * pair + 1] << 4);
    }
  }
}

void dequantise_row(const u8* codes, const u8* scales, i64 n, f32* out) {
  for (i64 i = 0; i < n; ++i) out[i] = from_e2m1(code_at(codes, i)) * from_e4m3(scales[i / kNvfp4Block]);
}

}  // namespace fourmoe::format
