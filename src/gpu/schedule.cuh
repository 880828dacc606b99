// schedule: the one order of tiles, for every role of a persistent kernel.
//
// A tile is a block of weight rows of one expert by up to N of its slots. A kernel multiplies by several N, widest
// first: an expert's slots are cut into full tiles of the widest and one rest, which goes to the narrowest N that holds
// it. Tiles are counted N by N, expert by expert, row block by row block, slot tile by slot tile (neighbours share
// weights) and dealt to the blocks in turn. One warp of a block walks this order and feeds the others. The order comes
// from counts on the device alone, so a captured launch serves any routing.
#pragma once

#include "gpu/ring.cuh"

namespace fourmoe::gpu {

inline constexpr int kMaxExperts = 1024;

struct Tile {
  i32 width;  // index of its N in the kernel's list; the list's length: no tile is left
  i32 expert;
  i32 row_block;
  i32 slot;   // the first
  i32 slots;  // in use, 1..N
};

inline constexpr int kFeedTiles = 4;  // tiles that the schedule is ahead of its slowest reader

// Tiles on their way from the scheduling warp to the reading warps.
struct Feed {
  Ring<kFeedTiles> ring;
  Tile tiles[kFeedTiles];
};

// A warp's end of the feed.
class Reader {
 public:
  __device__ explicit Reader(Feed& feed) : feed_(feed) {}

  // The next tile, in shared memory until pop().
  __device__ __forceinline__ const Tile& peek() {
    wait(&feed_.ring.full[cursor_.stage], cursor_.lap);
    return feed_.tiles[cursor_.stage];
  }
  __device__ __forceinline__ void pop() {
    __syncwarp();
    if (threadIdx.x % 32 == 0) isa::barrier_arrive(&feed_.ring.empty[cursor_.stage]);
    cursor_.advance();
  }
  __device__ __forceinline__ Tile next() {
    const Tile tile = peek();
    pop();
    return tile;
  }

 private:
  Feed& feed_;
  Cursor<kFeedTiles> cursor_;
};

// The scheduling warp. T: kWidths and their N, size(0) > size(1) > ...
template <class T>
class Schedule {
 public:
  // expert_begin: [experts + 1] first slot of each expert, shared memory.
  __device__ Schedule(Feed& feed, const i32* expert_begin, int experts, int row_blocks)
      : feed_(feed), expert_begin_(expert_begin), experts_(experts), row_blocks_(row_blocks) {}

  __device__ void run() {
    for (int width = 0; width < T::kWidths; ++width) {
      for (int first = 0; first < experts_; first += 32) deal(width, first);
    }
    publish({T::kWidths, 0, 0, 0, 0});
  }

 private:
  // Tiles of this width among the slots of an expert.
  static __device__ int tiles_of(int count, int width) {
    const int rest = count % T::size(0);
    int narrowest = 0;
    for (int w = 1; w < T::kWidths; ++w) narrowest = T::size(w) >= rest ? w : narrowest;
    return (width == 0 ? count / T::size(0) : 0) + (rest > 0 && narrowest == width ? 1 : 0);
  }

  // This block's tiles among those of 32 experts, an expert a lane.
  __device__ void deal(int width, int first) {
    const int lane = threadIdx.x % 32;
    const int expert = first + lane;
    const int count = expert < experts_ ? expert_begin_[expert + 1] - expert_begin_[expert] : 0;
    const int tiles = tiles_of(count, width);
    int end = tiles * row_blocks_;  // inclusive sum over lanes
    for (int distance = 1; distance < 32; distance *= 2) {
      const int left = __shfl_up_sync(~0u, end, distance);
      if (lane >= distance) end += left;
    }
    const int all = __shfl_sync(~0u, end, 31);
    for (; index_ < all; index_ += gridDim.x) {
      const int owner = __ffs(__ballot_sync(~0u, index_ < end)) - 1;
      if (lane == owner) emit(width, expert, tiles, index_ - (end - tiles * row_blocks_));
      __syncwarp();
      cursor_.advance();
    }
    index_ -= all;
  }

  __device__ void emit(int width, int expert, int tiles, int within) {
    const int begin = expert_begin_[expert], end = expert_begin_[expert + 1];
    const int slot_tile = width == 0 ? within % tiles : (end - begin) / T::size(0);
    const int slot = begin + slot_tile * T::size(0);
    put({width, expert, within / tiles, slot, min(T::size(width), end - slot)});
  }

  // One lane.
  __device__ void put(const Tile& tile) {
    wait(&feed_.ring.empty[cursor_.stage], cursor_.lap ^ 1);
    feed_.tiles[cursor_.stage] = tile;
    isa::barrier_arrive(&feed_.ring.full[cursor_.stage]);
  }

  __device__ void publish(const Tile& tile) {
    if (threadIdx.x % 32 == 0) put(tile);
    __syncwarp();
    cursor_.advance();
  }

  Feed& feed_;
  const i32* expert_begin_;
  int experts_;
  int row_blocks_;
  int index_ = blockIdx.x;  // of the block's next tile, counted from the experts at hand
  Cursor<kFeedTiles> cursor_;
};

}  // namespace fourmoe::gpu
