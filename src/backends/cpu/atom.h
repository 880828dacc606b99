// Atom: the cpu room's innermost products, one table of functions for each instruction level and form of tokens.
//
// A strip of panels (16 weight rows each) is multiplied by a tile of m tokens. Weights are decoded once for the tile.
// An atom sums in one order whatever m and count, so its results do not depend on the batch. Atoms of f32 tokens:
//   total = 0;  for each block of 16 columns:  sum = w_0 x_0;  sum += w_k x_k, k = 1..15;  total += scale * sum
// (dense: total += sum). Products of the sum are exact for 16-bit and NVFP4 tokens times E2M1 codes. Atoms of int8
// tokens, whose columns share a scale in groups of 32, sum whole numbers, exactly in f32 as in 32-bit integers:
//   total = 0;  for each block of 16 columns:  sum = sum_k 2 w_k x_k;  total += weight_scale * (sum * half_scale)
// so that they agree bit for bit where total's line is a multiply-add that rounds once. Atoms of other forms say theirs
// in their files.
//
// The files that define tables are compiled for their level: this header and atom_kernel.h must therefore hold nothing
// that a linker could pick for other levels too. Data and declarations only.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fourmoe::cpu {

inline constexpr std::int32_t kPanelRows = 16;
inline constexpr std::int32_t kMaxTile = 128;  // most tokens of a tile, of all atoms
inline constexpr std::int32_t kSlack = 8 * 64;
inline constexpr std::int32_t kSpareRows = 7;  // of sums: tiles of one height reach beyond the last token
inline constexpr std::int32_t kPanelFormats = 4;
inline constexpr std::int32_t kTokenFormats = 3;

enum class TokenFormat : std::uint8_t { bf16, f16, nvfp4 };

// A token as the layer holds it.
struct Row {
  const std::uint8_t* values;  // [cols] bf16 or f16, or [cols/2] E2M1 pairs, low nibble first; any alignment
  const std::uint8_t* scales;  // [cols/16] E4M3; null unless nvfp4
};

struct Strip {
  const std::byte* panels;  // [count] panels, `stride` bytes apart, 64-byte aligned; order in weights/packed.h
  std::int64_t stride;
  std::int32_t count;
  std::int32_t blocks;  // columns / 16
  const std::byte* x;   // [steps, m, step_bytes]: the tile's tokens in the atom's form, 64-byte aligned; kSlack
                        // more bytes can be read
  std::int32_t tokens;  // m
  float* out;           // [count, m, 16]: sums of each panel's rows, overwritten, 64-byte aligned
  std::int64_t pitch;   // floats from panel to panel of out, >= (m + kSpareRows) * 16; rows beyond m are scratch
};

struct Atom {
  using Multiply = void (*)(const Strip&);
  // Writes a token's step s to out + s * stride; returns the power of two that its sums are to be multiplied by.
  using Load = float (*)(const Row& row, std::int32_t blocks, std::byte* out, std::int64_t stride);

  const char* name;                            // its instructions and the form of tokens, as describe() says it
  std::int32_t tile;                           // most tokens of a tile, <= kMaxTile
  std::int32_t step_blocks;                    // blocks of columns in a step of x
  std::int32_t step_bytes;                     // of one token
  Multiply multiply[kPanelFormats][kMaxTile];  // [weights::PanelFormat][m - 1], m = 1..tile; null: not for this format
  Load load[kTokenFormats];                    // [TokenFormat]; null: not for this format
  void (*enter)(std::int32_t tokens);  // called by a thread before it multiplies tiles of so many tokens; may be null
  void (*leave)();                     // and when it has done with them
};

// A tile's sums of gate and up, and what they become.
struct Gates {
  const float* gate;     // [rows, 16]
  const float* up;       // [rows, 16]; the same as gate where there is no gate
  const float* factors;  // [rows]: what load returned for each token; sums are multiplied by it, then by the global
  std::int32_t rows;
  float gate_global;
  float up_global;
  const float* gate_bias;    // [16] or null
  const float* up_bias;      // [16] or null
  float alpha, beta, limit;  // of Activation
  float* y;                  // [rows, 16], overwritten, 64-byte aligned
};

// A tile's sums of down.
struct Sums {
  const float* sums;     // [rows, 16]
  const float* factors;  // [rows], as in Gates
  std::int32_t rows;
  float global;
  const float* bias;  // [16] or null
  float* out;         // [rows, 16], rows `stride` apart, overwritten
  std::int64_t stride;
  bool past_caches;  // written to memory rather than kept in caches, where out is aligned and the level can
};

// What becomes of sums, by vectors: a value depends on its own sums alone.
struct Finish {
  using Activate = void (*)(const Gates&);
  using Round = void (*)(const float* y, std::int32_t rows, std::uint16_t* out, std::int64_t stride);
  using Scale = void (*)(const Sums&);

  Activate activate[5];  // [ActivationKind]; null: the level has no vectors for it, the portable one serves
  Round round_bf16;      // [rows, 16] to rows `stride` apart
  Round round_f16;       // saturates
  Scale scale;
  void (*settle)();  // by the thread that wrote past the caches, before others read; may be null
};

// 16-bit tokens to int8 by format::quantise_int8. A step holds twice the codes of a block, as f32, and the half scale
// of their group. For atoms of f32 that sum whole numbers.
inline constexpr std::int32_t kWholeStepFloats = 20;  // 16 codes, the half scale, 3 unused
float whole_bf16(const Row& row, std::int32_t blocks, std::byte* out, std::int64_t stride);
float whole_f16(const Row& row, std::int32_t blocks, std::byte* out, std::int64_t stride);

// NVFP4 tokens to f32, without the global scale: exact. For atoms of f32 tokens.
float widen_nvfp4(const Row& row, std::int32_t blocks, std::byte* out, std::int64_t stride);

float e4m3_to_f32(std::uint8_t byte);

// Null where the build's target lacks the level.
const Atom* atom_portable();
const Atom* atom_avx2();
const Atom* atom_avx512();
const Finish* finish_portable();
const Finish* finish_avx2();
const Finish* finish_avx512();
const Atom* atom_vnni();  // nvfp4 tokens, nvfp4 and mxfp4 panels

// The same levels for int8 tokens, made of bf16 or f16 ones as they are loaded; nvfp4 and mxfp4 panels.
const Atom* atom_portable_int8();
const Atom* atom_avx2_int8();
const Atom* atom_avx512_int8();
const Atom* atom_vnni_int8();
const Atom* atom_amx();  // bf16 tokens, nvfp4 panels
const Atom* atom_amx_mxfp4();

}  // namespace fourmoe::cpu
