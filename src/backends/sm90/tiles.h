// Tiles of the Hopper room: how packed weights and tokens lie in memory, and the shapes in which kernels take them.
//
// Weights: [row tiles of 64][K steps of 64] tiles of 2304 bytes: 128 threads x 16 bytes of codes, then 32 x 8 bytes of
// scales (backends/sm90/atom.h). A thread of warp w holds rows 16 w + g and 16 w + g + 8; with a gate, rows come in
// sixteens of 8 gate and 8 up rows, so that a pair meets in one thread. K is padded to 128 with zeros, rows to 64.
// Tokens: [K steps of 64][groups of 8 slots][1024 bytes]: rows of 128 bytes, 16-byte chunks exchanged by the 128-byte
// swizzle (chunk ^ row), so that the rows of a tile are one bulk copy a K step. Each expert's slots begin at a group.
#pragma once

#include "flow.h"
#include "weights/device_packed.h"

namespace fourmoe::sm90 {

inline constexpr int kTileRows = 64;
inline constexpr int kTileColumns = 64;
inline constexpr int kCodeBytes = 2048;
inline constexpr int kTileBytes = 2304;  // 64 * 64 * 0.5625
inline constexpr int kGroupSlots = 8;
inline constexpr int kGroupBytes = 1024;

constexpr int row_tiles(int rows) { return (rows + kTileRows - 1) / kTileRows; }
constexpr int k_steps(int columns) { return (columns + 127) / 128 * 2; }  // even: a stage holds two
constexpr i64 blob_bytes(int rows, int columns) { return i64{row_tiles(rows)} * k_steps(columns) * kTileBytes; }

// Address of 16-byte chunk `chunk` (columns 8 chunk ..) of a slot's row in tiled tokens.
FOURMOE_HD u8* chunk_address(u8* tokens, i64 step_bytes, int slot, int chunk) {
  return tokens + (chunk / 8) * step_bytes + i64{slot / 8} * kGroupBytes + slot % 8 * 128 +
         ((chunk % 8) ^ (slot % 8)) * 16;
}

// Packs one projection pair (gate and up, both [rows, columns]) or one matrix (gate null) into blob_bytes of the rows
// that result: 2 * rows, or rows. NVFP4 only. Blocks whose scale is 0 get zero codes: the packed scale has no zero.
void pack(const format::Matrix* gate, const format::Matrix& up, u8* blob);

// The same on a GPU, for the layer's packing on the device; enqueues. The piece's bands are row tiles.
Status pack(const weights::Piece& piece, gpu::Stream stream);

extern const weights::Packing kPacking;

// What both steps ask of problem and machine.
Verdict can(const Problem& problem, const Machine& machine);
std::string describe(const Problem& problem, const Machine& machine);

// A kernel's shape: kSlots tokens (wgmma's N) by kGroups * kRows * 64 weight rows.
template <int kSlots_, int kGroups_, int kRows_, int kStages_>
struct Tiles {
  static constexpr int kSlots = kSlots_;    // 8, 16, 32, 64, 128 or 256
  static constexpr int kGroups = kGroups_;  // consuming warpgroups
  static constexpr int kRows = kRows_;      // row tiles of each warpgroup
  static constexpr int kStages = kStages_;
  static constexpr int kRowTiles = kGroups * kRows;
  static constexpr int kThreads = (kGroups + 1) * 128;
  // An even share of the 65536 registers would be too few for the consumers and too many for the loader. What one gives
  // up is all that the others can take: setmaxnreg waits for ever for registers that the launch did not allot.
  static constexpr int kLaunchRegisters = 65536 / kThreads / 8 * 8;
  static constexpr int kLoaderRegisters = kGroups == 4 ? 32 : 40;
  static constexpr int kConsumerRegisters = (kLaunchRegisters * kThreads / 128 - kLoaderRegisters) / kGroups / 8 * 8;
  static_assert(kConsumerRegisters <= 232);

  struct Stage {  // two K steps
    u8 tokens[2][kSlots * 128];
    u8 weights[kRowTiles][2][kTileBytes];
  };
  static_assert(sizeof(Stage) % 1024 == 0, "every stage's tokens begin at a swizzle's period");
};

}  // namespace fourmoe::sm90
