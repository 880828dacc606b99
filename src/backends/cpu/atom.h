// Atom: the cpu room's innermost products, one table of functions for each instruction level.
//
// A strip of panels (16 weight rows each) is multiplied by a tile of m tokens held as f32. Weights are decoded in
// registers, a lane a row, and shared by the tile's tokens. Every level sums in the same order, whatever m and count:
//   total = 0;  for each block of 16 columns:  sum = w_0 x_0;  sum += w_k x_k, k = 1..15;  total += scale * sum
// (dense: total += sum). Products of the sum are exact for 16-bit and NVFP4 tokens times E2M1 codes.
//
// The files that define tables are compiled for their level: this header and atom_kernel.h must therefore hold nothing
// that a linker could pick for other levels too. Data and declarations only.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fourmoe::cpu {

inline constexpr std::int32_t kPanelRows = 16;
inline constexpr std::int32_t kMaxTile = 12;  // most tokens of a tile, of all levels
inline constexpr std::int32_t kPanelFormats = 4;

struct Strip {
  const std::byte* panels;  // [count] panels, `stride` bytes apart, 64-byte aligned; order in weights/packed.h
  std::int64_t stride;
  std::int32_t count;
  std::int32_t blocks;  // columns / 16
  const float* x;       // [blocks, m, 16]: the tile's tokens block by block, 64-byte aligned
  float* out;           // [count, m, 16]: sums of each panel's rows, overwritten, 64-byte aligned
};

struct Atom {
  using Multiply = void (*)(const Strip&);
  using Widen = void (*)(const std::uint8_t* row, std::int32_t blocks, float* out, std::int64_t stride);

  std::int32_t tile;                           // most tokens of a tile, <= kMaxTile
  Multiply multiply[kPanelFormats][kMaxTile];  // [weights::PanelFormat][m - 1], m = 1..tile

  // Rows of [blocks * 16] bf16 or f16 values of any alignment to f32, exact; block b goes to out + b * stride.
  Widen widen_bf16;
  Widen widen_f16;
};

// Null where the build's target lacks the level.
const Atom* atom_portable();
const Atom* atom_avx2();
const Atom* atom_avx512();

}  // namespace fourmoe::cpu
