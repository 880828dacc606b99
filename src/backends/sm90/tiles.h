// Tiles of the Hopper room: how packed weights and tokens lie in memory, and the shapes in which kernels take them.
//
// Weights: [row tiles of 64][K steps of 64] tiles of 2304 bytes: 128 threads x 16 bytes of codes, then 32 x 8 bytes of
// scales (backends/sm90/atom.h). A thread of warp w holds rows 16 w + g and 16 w + g + 8; with a gate, rows come in
// sixteens of 8 gate and 8 up rows, so that a pair meets in one thread. K is padded to 128 with zeros, rows to 64.
// Tokens: rows [slots, columns] bf16, sorted by expert; a tile of slots and 64 columns is one box of a tensor map.
#pragma once

#include <algorithm>
#include <iterator>

#include "flow.h"
#include "weights/device_packed.h"

namespace fourmoe::sm90 {

inline constexpr int kTileRows = 64;
inline constexpr int kTileColumns = 64;
inline constexpr int kCodeBytes = 2048;
inline constexpr int kTileBytes = 2304;  // 64 * 64 * 0.5625

constexpr int row_tiles(int rows) { return (rows + kTileRows - 1) / kTileRows; }
constexpr int k_steps(int columns) { return (columns + 127) / 128 * 2; }  // even: a stage holds two
constexpr i64 blob_bytes(int rows, int columns) { return i64{row_tiles(rows)} * k_steps(columns) * kTileBytes; }

// Packs one projection pair (gate and up, both [rows, columns]) or one matrix (gate null) into blob_bytes of the rows
// that result: 2 * rows, or rows. NVFP4 only. Blocks whose scale is 0 get zero codes: the packed scale has no zero.
void pack(const format::Matrix* gate, const format::Matrix& up, u8* blob);

// The same on a GPU, for the layer's packing on the device; enqueues. The piece's bands are row tiles.
Status pack(const weights::Piece& piece, gpu::Stream stream);

extern const weights::Packing kPacking;

// What both steps ask of problem and machine.
Verdict can(const Problem& problem, const Machine& machine);
std::string describe(const Problem& problem, const Machine& machine);

// A kernel's shape: blocks of weight rows by tiles of up to `sizes` tokens (wgmma's N), see gpu/schedule.cuh.
struct TileShape {
  i32 groups;    // consuming warpgroups
  i32 rows;      // row tiles of each warpgroup
  i32 stages;    // of the ring
  bool split;    // warpgroups share their row tiles and take turns at the K steps; sums are added in a fixed order
  i32 sizes[6];  // descending; 0 ends the list
};

// The shapes that are built; choose() and the benchmark name them by index.
inline constexpr TileShape kTileShapes[] = {
    {4, 1, 7, true, {8}},
    {4, 1, 8, false, {24, 16, 8}},
    {4, 2, 5, false, {24, 16, 8}},
    {4, 2, 4, false, {40, 32, 24, 16, 8}},
    {4, 1, 6, false, {64, 48, 40, 32, 24, 16}},
    {2, 2, 4, false, {128, 96, 64, 48, 32, 16}},
    {2, 1, 3, false, {256, 192, 128, 96, 64, 32}},
};
inline constexpr int kSplitTile = 0;
inline constexpr int kNarrowTile = 1;
inline constexpr int kTileShapeCount = static_cast<int>(std::size(kTileShapes));

// The shape for a launch of `row_tiles` tiles of 64 rows over `slots` slots that fall on `experts` experts at random.
int choose(i32 row_tiles, i32 experts, i64 slots, i32 multiprocessors);

template <int kTile>
struct Tiles {
  static constexpr TileShape kShape = kTileShapes[kTile];
  static constexpr int kGroups = kShape.groups;
  static constexpr int kRows = kShape.rows;
  static constexpr int kStages = kShape.stages;
  static constexpr bool kSplit = kShape.split;
  static constexpr int kMost = kShape.sizes[0];
  static constexpr int kWidths =
      static_cast<int>(std::find(std::begin(kShape.sizes), std::end(kShape.sizes), 0) - std::begin(kShape.sizes));
  static constexpr int kRowTiles = kSplit ? kRows : kGroups * kRows;  // of a block
  static constexpr int kDepth = kSplit ? 2 * kGroups : 2;             // K steps of a stage
  static constexpr int kThreads = (kGroups + 1) * 128;
  // An even share of the 65536 registers would be too few for the consumers and too many for the loader. What one gives
  // up is all that the others can take: setmaxnreg waits for ever for registers that the launch did not allot.
  static constexpr int kLaunchRegisters = 65536 / kThreads / 8 * 8;
  static constexpr int kLoaderRegisters = kGroups == 4 ? 32 : 40;
  static constexpr int kConsumerRegisters = (kLaunchRegisters * kThreads / 128 - kLoaderRegisters) / kGroups / 8 * 8;
  static_assert(kConsumerRegisters <= 232);

  // The N of number `width`.
  FOURMOE_HD static constexpr int size(int width) {
    return width == 0   ? kSize<0>
           : width == 1 ? kSize<1>
           : width == 2 ? kSize<2>
           : width == 3 ? kSize<3>
           : width == 4 ? kSize<4>
                        : kSize<5>;
  }
  template <int kWidth>
  static constexpr int kSize = kShape.sizes[kWidth];

  struct alignas(1024) Stage {       // a swizzle's period
    u8 tokens[kDepth][kMost * 128];  // rows of 64 columns, 128-byte swizzle
    u8 weights[kRowTiles][kDepth][kTileBytes];
  };
};

}  // namespace fourmoe::sm90
