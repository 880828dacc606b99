// quantise: rows of activations to NVFP4, and back.
#pragma once

#include "format/nvfp4.h"

namespace fourmoe::format {

// The scale of a block whose largest magnitude is amax, E4M3 (recipe below).
FOURMOE_HD u8 block_scale(f32 amax, f32 global) {
  const f32 scale = amax / (kE2m1Max * global);
  if (scale == 0.0f) return to_e4m3(1.0f);
  return to_e4m3(scale < 0x1p-9f ? 0x1p-9f : scale);  // to_e4m3 saturates; NaN passes
}

// One row of n values (a multiple of 16) to E2M1 pairs [n/2], low nibble first, and E4M3 scales [n/16], such that
// value ~ E2M1 * E4M3 * global. ModelOpt's recipe, for weights and activations alike (tests/fixtures/README.md); in
// f32, each operation rounded, subnormals kept:
//   s     = amax / (6 * global), 1 where that is 0, within [2^-9, 448];  scale = E4M3(s)
//   code  = E2M1(x / (scale * global)): nearest, ties to even, saturating at 6
// A NaN in a block makes its scale NaN, so that it shows in the result. global is finite and > 0.
void quantise_row(const f32* x, i64 n, f32 global, u8* codes, u8* scales);

// E2M1 * E4M3 of every value, without the global: exact in f32.
void dequantise_row(const u8* codes, const u8* scales, i64 n, f32* out);

}  // namespace fourmoe::format
