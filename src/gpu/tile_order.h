// tile_order: how a GEMM's work is cut into tiles, and their order.
//
// A tile is a block of weight rows of one expert by up to N of its slots. A kernel multiplies by several N (widths),
// widest first: an expert's slots are cut into full tiles of the widest and one rest, which goes to the narrowest N
// that holds it. Tiles are counted width by width, expert by expert, row block by row block, slot tile by slot tile
// (neighbours share weights).
#pragma once

#include "format/number.h"

namespace fourmoe::gpu {

inline constexpr int kMaxExperts = 1024;

struct Tile {
  i32 width;  // index of its N in the kernel's list; the list's length: no tile is left
  i32 expert;
  i32 row_block;
  i32 slot;   // the first
  i32 slots;  // in use, 1..N
};

// T: kWidths and their N, size(0) > size(1) > ...
template <class T>
struct TileOrder {
  // Tiles of this width among `count` slots of an expert, a row block.
  static FOURMOE_HD int tiles(int count, int width) {
    const int rest = count % T::size(0);
    int narrowest = 0;
    for (int w = 1; w < T::kWidths; ++w) narrowest = T::size(w) >= rest ? w : narrowest;
    return (width == 0 ? count / T::size(0) : 0) + (rest > 0 && narrowest == width ? 1 : 0);
  }

  // Number `within` of the tiles of this width of an expert with slots [begin, end); `tiles` as above, not 0.
  static FOURMOE_HD Tile tile(int width, int expert, int begin, int end, int tiles, int within) {
    const int slot_tile = width == 0 ? within % tiles : (end - begin) / T::size(0);
    const int slot = begin + slot_tile * T::size(0);
    const int left = end - slot;
    return {width, expert, within / tiles, slot, left < T::size(width) ? left : T::size(width)};
  }
};

}  // namespace fourmoe::gpu
