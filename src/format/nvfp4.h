// NVFP4: value = E2M1(code) * E4M3(scale of its block of 16) * global.
//
// Two codes share a byte, the even column in the low nibble. Every product of a code and a finite scale has at
// most 6 significant bits, hence is exact in f32, bf16 and f16 (not in FP8); the global scale stays f32 and is
// applied to the accumulator. Source: docs/design.md section 4.
#pragma once

#include <algorithm>
#include <array>

#include "format/number.h"

namespace fourmoe::format {

inline constexpr i32 kNvfp4Block = 16;           // values that share a scale
inline constexpr u8 kLargestScale = 0x7e;        // E4M3 bytes beyond it are NaN or have a sign: no scale is
inline constexpr f32 kE2m1Max = 6.0f;            // largest E2M1 magnitude
inline constexpr f32 kE4m3Max = 448.0f;          // largest E4M3 magnitude
inline constexpr f32 kNvfp4Max = 6.0f * 448.0f;  // amax / 2688 is the global scale (ModelOpt's recipe)

// E2M1 by code: bit 3 is the sign.
inline constexpr std::array<f32, 16> kE2m1 = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                                              -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};

inline f32 from_e2m1(u8 code) { return kE2m1[code & 15u]; }

// Nearest E2M1 code, ties to the even code; magnitudes above 6 saturate. -0 gives code 0, as ModelOpt writes it; small
// negative values give code 8.
FOURMOE_HD u8 to_e2m1(f32 value) {
  const f32 magnitude = std::fabs(value);
  const u8 code = static_cast<u8>((magnitude > 0.25f) + (magnitude >= 0.75f) + (magnitude > 1.25f) +
                                  (magnitude >= 1.75f) + (magnitude > 2.5f) + (magnitude >= 3.5f) + (magnitude > 5.0f));
  return static_cast<u8>(code | (value < 0.0f ? 8u : 0u));
}

// The code of column `col` in a row of packed pairs.
inline u8 code_at(const u8* row, i64 col) { return static_cast<u8>((row[col / 2] >> (col % 2 == 0 ? 0 : 4)) & 15u); }

}  // namespace fourmoe::format
