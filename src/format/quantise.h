// quantise: rows of activations to NVFP4 and to int8, and back.
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

// Blocks of 16 values, each anywhere: block b at x + b * x_stride, its codes and its scale alike.
struct Blocks {
  const f32* x;
  i64 x_stride;
  u8* codes;  // 8 bytes each
  i64 codes_stride;
  u8* scales;
  i64 scales_stride;
};

// The same for `count` such blocks; by vectors where the machine has them, with the same bits.
void quantise_blocks(const Blocks& blocks, i64 count, f32 global);

// w4a8_int8: columns of a row that share a scale; the last group of a row has 16 where the columns are no multiple
// of 32.
inline constexpr i32 kInt8Group = 32;

// One row of n values (a multiple of 16), each a bf16 or an f16, to int8 codes [n] and half scales
// [ceil(n / kInt8Group)], such that value ~ code * 2 * half; in f32, each operation rounded, subnormals kept:
//   half = amax / 254;  code = x / (2 * half), to the nearest, ties to even
// It is the half that is rounded, as kernels multiply it by sums of doubled weights. A group of zeros has half 0, and
// one with a value that is not finite half NaN, so that it shows in the result; the codes of both are 0. A half that is
// not 0 is at least 2^-133 / 254, which has 8 bits, so no code is beyond 127.
void quantise_int8(const f32* x, i64 n, i8* codes, f32* halves);

// E2M1 * E4M3 of every value, without the global: exact in f32.
void dequantise_row(const u8* codes, const u8* scales, i64 n, f32* out);

}  // namespace fourmoe::format
