// tile_order: how a GEMM's work is cut into tiles, and their order.
//
// A tile is a block of weight rows of one expert by up to N of its slots. A kernel multiplies by several N (widths).
// An expert's slots are cut into no more tiles than the widest N asks for: full tiles of the narrowest N of which so
// many hold the slots, then the rest, which takes the narrowest N that holds it. So 260 slots are not 256 and 4 but two
// halves: unpacking makes a tile of few slots nearly as dear as one of a hundred (docs/hopper-lab.md).
// Tiles are counted width by width, widest first, expert by expert, row block by row block, slot tile by slot tile
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

// T: kWidths and their N, size(0) > size(1) > ..., multiples of 8
template <class T>
struct TileOrder {
  // Tiles of this width among `count` slots of an expert, a row block.
  static FOURMOE_HD int tiles(int count, int width) {
    const Cut cut(count);
    return (cut.width == width ? cut.full : 0) + (cut.rest > 0 && narrowest(cut.rest, 1) == width ? 1 : 0);
  }

  // Number `within` of the tiles of this width of an expert with slots [begin, end); `tiles` as above, not 0.
  static FOURMOE_HD Tile tile(int width, int expert, int begin, int end, int tiles, int within) {
    const Cut cut(end - begin);
    const int slot_tile = width == cut.width ? within % tiles : cut.full;
    const int slots = slot_tile < cut.full ? T::size(width) : cut.rest;
    return {width, expert, within / tiles, begin + slot_tile * T::size(cut.width), slots};
  }

 private:
  // The narrowest width of which `tiles` hold the slots.
  static FOURMOE_HD int narrowest(int slots, int tiles) {
    int found = 0;
    for (int w = 1; w < T::kWidths; ++w) found = T::size(w) * tiles >= slots ? w : found;
    return found;
  }

  struct Cut {
    FOURMOE_HD explicit Cut(int count) {
      const int all = (count + T::size(0) - 1) / T::size(0);
      width = narrowest(count, all);
      full = all > 0 ? all - 1 : 0;
      rest = count - full * T::size(width);
    }
    int width;  // of the full tiles
    int full;
    int rest;  // slots of the last tile; 0 where there are no slots
  };
};

}  // namespace fourmoe::gpu
