// schedule: the one order of tiles, for every role of a persistent kernel.
//
// A tile is kRowTile weight rows of one expert by one tile of its slots. Tiles are counted expert by expert, row tile
// by row tile, slot tile by slot tile (neighbours share weights), and dealt to the blocks in turn. The order comes from
// counts on the device alone, so a captured launch serves any routing.
#pragma once

#include "format/number.h"

namespace fourmoe::gpu {

inline constexpr int kMaxExperts = 1024;

struct Tile {
  int expert;
  int row_tile;
  int slot_tile;
};

class Schedule {
 public:
  // tile_begin: [experts + 1] slot tiles before each expert, in shared memory.
  __device__ Schedule(const i32* tile_begin, int experts, int row_tiles)
      : tile_begin_(tile_begin), experts_(experts), row_tiles_(row_tiles), index_(blockIdx.x) {}

  // The block's next tile; false after the last.
  __device__ bool next(Tile* tile) {
    if (index_ >= tile_begin_[experts_] * row_tiles_) return false;
    const int slot_tile = index_ / row_tiles_;
    int low = tile->expert < 0 ? 0 : tile->expert;  // experts only go up
    int high = experts_ - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (tile_begin_[middle] <= slot_tile) low = middle;
      else high = middle - 1;
    }
    const int slot_tiles = tile_begin_[low + 1] - tile_begin_[low];
    const int within = index_ - tile_begin_[low] * row_tiles_;
    *tile = {low, within / slot_tiles, within % slot_tiles};
    index_ += gridDim.x;
    return true;
  }

 private:
  const i32* tile_begin_;
  int experts_;
  int row_tiles_;
  int index_;
};

}  // namespace fourmoe::gpu
