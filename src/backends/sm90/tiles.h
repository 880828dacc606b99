// Tiles of the Hopper room: how packed weights and tokens lie in memory, and the shapes in which kernels take them.
//
// Weights: [row tiles of 64][K steps of 64] tiles of 2304 bytes: 128 threads x 16 bytes of codes, then 32 x 8 bytes of
// scales (backends/sm90/atom.h). A thread of warp w holds rows 16 w + g and 16 w + g + 8: a feature's gate and up, or,
// without a gate, neighbouring features (feature_of). K is padded to 128 with zeros, rows to 64.
//
// Dense weights: tiles of 8192 bytes, for each K step of 16 the 128 threads' 16 bytes of bf16, as wgmma takes them.
//
// Tokens: rows [slots, columns] bf16, sorted by expert; a tile of slots and 64 columns is one box of a tensor map. f16
// tokens are the sum of two planes of such rows.
#pragma once

#include <algorithm>
#include <iterator>
#include <string>
#include <utility>
#include <vector>

#include "flow.h"
#include "weights/device_packed.h"

namespace fourmoe::sm90 {

inline constexpr int kTileRows = 64;
inline constexpr int kTileColumns = 64;
inline constexpr int kCodeBytes = 2048;
inline constexpr int kTileBytes = 2304;  // 64 * 64 * 0.5625
inline constexpr int kDenseTileBytes = kTileRows * kTileColumns * 2;

constexpr int row_tiles(int rows) { return (rows + kTileRows - 1) / kTileRows; }
// Even: a stage holds two or four, the last one perhaps two.
constexpr int k_steps(int columns) { return (columns + 127) / 128 * 2; }
constexpr int tile_bytes(format::Encoding encoding) { return format::is_fp4(encoding) ? kTileBytes : kDenseTileBytes; }
constexpr i64 blob_bytes(int rows, int columns, format::Encoding encoding = format::Encoding::nvfp4) {
  return i64{row_tiles(rows)} * k_steps(columns) * tile_bytes(encoding);
}

// The feature whose weights are row `row` of a blob; with a gate, the gate's where row % 16 < 8, else the up's.
FOURMOE_HD constexpr int feature_of(bool gated, int row) {
  return gated ? row / 16 * 8 + row % 8 : row / 16 * 16 + row % 8 * 2 + row % 16 / 8;
}

// Packs one projection pair (gate and up, both [rows, columns]) or one matrix (gate null) into blob_bytes of the rows
// that result: 2 * rows, or rows. NVFP4, MXFP4 whose scales fit a window (weights/window.h), or bf16. Blocks whose
// NVFP4 scale is 0 get zero codes: the packed scale has no zero.
void pack(const format::Matrix* gate, const format::Matrix& up, u8* blob);

// The same on a GPU, for the layer's packing on the device; enqueues. The piece's bands are row tiles.
Status pack(const weights::Piece& piece, gpu::Stream stream);

extern const weights::Packing kPacking;

// What all steps ask of problem and machine.
Verdict can(const Problem& problem, const Machine& machine);
std::string describe(const Problem& problem, const Machine& machine);

// What a kernel multiplies.
struct Form {
  bool dense = false;  // weights are bf16, not packed codes
  i32 planes = 1;      // of the tokens: bf16 one, f16 two, whose products with the same weights join the same sums

  bool operator==(const Form&) const = default;
};

// A kernel's shape: blocks of weight rows by tiles of up to `sizes` tokens (wgmma's N), see gpu/schedule.cuh.
struct TileShape {
  i32 groups;    // consuming warpgroups
  i32 rows;      // row tiles of each warpgroup
  i32 stages;    // of the ring
  bool split;    // warpgroups share their row tiles and take turns at the K steps; sums are added in a fixed order
  i32 sizes[8];  // descending; 0 ends the list
  i32 feed = 2;  // tiles that a block takes before it is done with the first; more where the ring holds several
  Form form = {};
  i32 handed = 0;  // tiles whose sums may wait for an epilogue in a warpgroup of its own; 0: it is the consumers' own
  i32 depth = 2;   // K steps that a consumer takes from a stage: 2, or 4, of which a last stage may hold two
};

// Of the kernels' speed, see Step::revision: raise it when tiles or roles change.
inline constexpr i32 kRevision = 10;

// The shapes that are built; choose() and the benchmark name them by index.
inline constexpr TileShape kTileShapes[] = {
    {4, 1, 7, true, {8}, 4},
    {4, 1, 4, false, {24, 16, 8}, 3, {}, 0, 4},
    {4, 2, 5, false, {24, 16, 8}},
    {4, 2, 2, false, {48, 40, 32, 24, 16, 8}, 2, {}, 0, 4},
    {4, 1, 3, false, {64, 56, 48, 40, 32, 16}, 3, {}, 0, 4},
    {3, 2, 4, false, {88, 80, 72, 64, 56, 48}},
    {2, 2, 4, false, {144, 128, 112, 96, 80, 64}},
    {2, 1, 3, false, {256, 224, 192, 176, 160, 144, 128, 64}},
    {4, 1, 4, false, {64, 48, 32, 24, 16, 8}, 4, {false, 2}},
    {2, 1, 4, false, {64, 48, 32, 24, 16, 8}, 2, {true, 1}},
    {2, 1, 3, false, {64, 48, 32, 24, 16, 8}, 4, {true, 2}},
    // Of one launch for the layer (whole.h); its two widths are the two GEMMs.
    {4, 1, 7, true, {8, 8}, 3, {}, 3},
    {4, 1, 4, false, {8, 8}, 2, {}, 3, 4},
    {4, 2, 4, false, {8, 8}, 2, {}, 2},
    {4, 1, 7, true, {8, 8}, 2, {}, 3},
    {4, 1, 7, false, {8, 8}, 2, {false, 2}, 3},
    {2, 1, 5, false, {8, 8}, 2, {true, 1}, 3},
    {2, 1, 4, false, {8, 8}, 2, {true, 2}, 3},
};
inline constexpr int kSplitTile = 0;
inline constexpr int kNarrowTile = 1;
inline constexpr int kTileShapeCount = 11;            // for one GEMM
inline constexpr int kWholeTile = kTileShapeCount;    // the first of those for a layer
inline constexpr int kWholeFewTile = kWholeTile + 3;  // of one token or so
inline constexpr int kAllTileShapes = static_cast<int>(std::size(kTileShapes));
// Of those for a layer: built for picks that want rows of their own, too.
constexpr bool takes_pick_rows(int tile) { return tile >= kWholeTile && tile != kWholeFewTile; }

// What a launch has to do.
struct Load {
  i32 row_tiles;  // of 64 rows, of each expert
  i32 experts;
  i64 slots;   // that fall on the experts at random
  bool split;  // K may be split: sums then have another order than those of wider tiles
  bool first;  // of gemm1
};

// What one launch for a layer has to do: the two GEMMs in one queue.
struct LayerLoad {
  i32 row_tiles[2];  // of 64 rows, of each expert
  i32 experts;
  i64 slots;
  bool split;
  Form form = {};
  bool by_pick = false;  // picks want rows of their own
};

// The shape for a GEMM.
int choose(const Load& load, i32 multiprocessors);

// The shape for a layer in one launch.
int choose_whole(const LayerLoad& load, i32 multiprocessors);

// The first of shapes [first, end) for a form that is not the usual one, by default of those for one GEMM; -1 for none.
int choose(const Form& form, int first = 0, int end = kTileShapeCount);

// groups x rows x stages, "s" where K is split, and the sizes: "4x2x5:24,16,8". Then what differs from the usual feed,
// tiles handed on, depth and form: "+f3", "+h3", "+d4", "+dense", "+p2".
std::string name_of(const TileShape& shape);

// Shapes for one GEMM, or for a layer in one launch, that fit the load: the one that the rule takes first.
std::vector<Variant> variants(const Load& load, const Form& form, i32 multiprocessors);
std::vector<Variant> whole_variants(const LayerLoad& load, i32 multiprocessors);

Form form_of(const Problem& problem);

// Where the two GEMMs of a call meet; null: they do not, each waits for all of the launch before it.
struct Progress {
  u64* stored = nullptr;  // [route::progress_words] device memory, zeros before gemm1: values of y of each expert that
                          // are stored, then tiles of gemm1 and of gemm2 that blocks have taken beyond their first
  i32 columns = 0;        // of y: inter
};

// In a call of the layer. In w4a4 a launch lies between the GEMMs; tokens in two planes lie where gemm2 puts its
// result.
Progress progress_of(const Problem& problem, u64* counters);

// kPowersOfTwo: scales are MXFP4's (atom.h).
template <int kTile, bool kPowersOfTwo = false>
struct Tiles {
  static constexpr TileShape kShape = kTileShapes[kTile];
  static constexpr int kGroups = kShape.groups;
  static constexpr int kRows = kShape.rows;
  static constexpr int kStages = kShape.stages;
  static constexpr bool kSplit = kShape.split;
  static constexpr bool kPowers = kPowersOfTwo;
  static constexpr int kHanded = kShape.handed;
  // Where unpacking is the limit; with few tokens memory is.
  static constexpr bool kByProducts = !kSplit && kHanded == 0;
  static constexpr bool kDense = kShape.form.dense;
  static constexpr int kPlanes = kShape.form.planes;
  static constexpr int kFeed = kShape.feed;
  static constexpr int kMost = kShape.sizes[0];
  static constexpr int kWidths =
      static_cast<int>(std::find(std::begin(kShape.sizes), std::end(kShape.sizes), 0) - std::begin(kShape.sizes));
  static constexpr int kRowTiles = kSplit ? kRows : kGroups * kRows;  // of a block
  static constexpr int kSteps = kShape.depth;                         // of K, that a consumer takes from a stage
  static constexpr int kDepth = kSplit ? kSteps * kGroups : kSteps;   // of a stage
  static_assert(kSteps == 2 || (kSteps == 4 && !kSplit));
  static constexpr int kThreads = (kGroups + 1 + (kHanded > 0)) * 128;
  // An even share of the 65536 registers would be too few for the consumers and too many for the loader. What one gives
  // up is all that the others can take: setmaxnreg waits for ever for registers that the launch did not allot.
  static constexpr int kLaunchRegisters = 65536 / kThreads / 8 * 8;
  static constexpr int kLoaderRegisters = kHanded > 0 ? 48 : kGroups == 4 ? 32 : 40;
  static constexpr int kConsumerRegisters = (kLaunchRegisters * kThreads / 128 - kLoaderRegisters) / kGroups / 8 * 8;
  static_assert(kConsumerRegisters <= 232);
  // With an epilogue's warpgroup, consumers keep their share and it takes what the loader gives up.
  static constexpr int kFinisherRegisters = 2 * kLaunchRegisters - kLoaderRegisters;

  // The N of number `width`.
  FOURMOE_HD static constexpr int size(int width) { return size(width, std::make_integer_sequence<int, kWidths>()); }
  template <int kWidth>
  static constexpr int kSize = kShape.sizes[kWidth];

  static constexpr int kPlaneBytes = kMost * 128;
  static constexpr int kWeightBytes = kDense ? kDenseTileBytes : kTileBytes;

  struct alignas(1024) Stage {                 // a swizzle's period
    u8 tokens[kDepth][kPlanes * kPlaneBytes];  // rows of 64 columns, 128-byte swizzle
    u8 weights[kRowTiles][kDepth][kWeightBytes];
  };

 private:
  template <int... kWidth>
  FOURMOE_HD static constexpr int size(int width, std::integer_sequence<int, kWidth...>) {
    int found = 0;
    ((found = width == kWidth ? kSize<kWidth> : found), ...);
    return found;
  }
};

}  // namespace fourmoe::sm90
