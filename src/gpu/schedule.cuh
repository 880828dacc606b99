// schedule: the one order of tiles (gpu/tile_order.h), for every role of a persistent kernel.
//
// Each block's first tile is the one of its number; then a block takes the next that nobody has, so that who began late
// or had long tiles takes fewer, or, without a counter to take by, every gridDim.x-th. One warp of a block walks their
// order and feeds the others. The order comes from counts on the device alone, so a captured launch serves any routing.
#pragma once

#include "gpu/isa/launch.cuh"
#include "gpu/ring.cuh"
#include "gpu/tile_order.h"

namespace fourmoe::gpu {

// Tiles on their way from the scheduling warp to the reading warps: the one at work, the one being loaded, and more to
// load ahead where tiles are short.
template <int kTiles>
struct Feed {
  Ring<kTiles> ring;
  Tile tiles[kTiles];
};

// The scheduling warp's end of the feed.
template <int kTiles>
class Writer {
 public:
  __device__ explicit Writer(Feed<kTiles>& feed) : feed_(feed) {}

  // Until put() would not wait.
  __device__ void wait_for_room() { wait(&feed_.ring.empty[cursor_.stage], cursor_.lap ^ 1); }

  // The whole warp: the tile that make() gives in lane `owner`.
  template <class Make>
  __device__ __forceinline__ void put(int owner, const Make& make) {
    if (static_cast<int>(threadIdx.x % 32) == owner) {
      wait_for_room();
      feed_.tiles[cursor_.stage] = make();
      isa::barrier_arrive(&feed_.ring.full[cursor_.stage]);
    }
    __syncwarp();
    cursor_.advance();
  }

 private:
  Feed<kTiles>& feed_;
  Cursor<kTiles> cursor_;
};

// A warp's end of the feed.
template <int kTiles>
class Reader {
 public:
  __device__ explicit Reader(Feed<kTiles>& feed) : feed_(feed) {}

  // Of the next tile, in the feed, and the parity of the times that it has been filled.
  __device__ int place() const { return cursor_.stage; }
  __device__ u32 lap() const { return cursor_.lap; }
  // The next tile, in shared memory until pop().
  __device__ __forceinline__ const Tile& peek() {
    wait(&feed_.ring.full[cursor_.stage], cursor_.lap);
    return feed_.tiles[cursor_.stage];
  }
  __device__ __forceinline__ void pop() {
    __syncwarp();
    arrive(&feed_.ring.empty[cursor_.stage]);
    cursor_.advance();
  }
  __device__ __forceinline__ Tile next() {
    const Tile tile = peek();
    pop();
    return tile;
  }

 private:
  Feed<kTiles>& feed_;
  Cursor<kTiles> cursor_;
};

// The scheduling warp. T: kFeed, kWidths and their N, size(0) > size(1) > ...
template <class T>
class Schedule {
 public:
  // expert_begin: [experts + 1] first slot of each expert, shared memory. taken: tiles that all blocks have taken
  // beyond their first, global memory, 0 before the launch; null: none takes.
  __device__ Schedule(Feed<T::kFeed>& feed, const i32* expert_begin, int experts, int row_blocks, u64* taken)
      : writer_(feed), expert_begin_(expert_begin), experts_(experts), row_blocks_(row_blocks), taken_(taken) {}

  __device__ void run() {
    for (int width = 0; width < T::kWidths; ++width) {
      for (int first = 0; first < experts_; first += 32) deal(width, first);
    }
    writer_.put(0, [] { return Tile{T::kWidths, 0, 0, 0, 0}; });
  }

 private:
  // This block's tiles among those of 32 experts, an expert a lane.
  __device__ void deal(int width, int first) {
    const int lane = threadIdx.x % 32;
    const int expert = first + lane;
    const int count = expert < experts_ ? expert_begin_[expert + 1] - expert_begin_[expert] : 0;
    const int tiles = TileOrder<T>::tiles(count, width);
    if (!__any_sync(~0u, tiles > 0)) return;  // most widths of a long list are those of no expert
    int end = tiles * row_blocks_;            // inclusive sum over lanes
    for (int distance = 1; distance < 32; distance *= 2) {
      const int left = __shfl_up_sync(~0u, end, distance);
      if (lane >= distance) end += left;
    }
    const int all = __shfl_sync(~0u, end, 31);
    for (; index_ < all; advance()) {
      const int owner = __ffs(__ballot_sync(~0u, index_ < end)) - 1;
      writer_.put(owner, [&] {
        const int within = index_ - (end - tiles * row_blocks_);
        return TileOrder<T>::tile(width, expert, expert_begin_[expert], expert_begin_[expert + 1], tiles, within);
      });
    }
    index_ -= all;
  }

  // To the block's next tile, not before there is room for it: what is taken early is not left for others.
  __device__ __forceinline__ void advance() {
    int next = number_ + gridDim.x;
    if (taken_ != nullptr) {
      writer_.wait_for_room();
      int others = 0;
      if (threadIdx.x % 32 == 0) others = static_cast<int>(atomicAdd(reinterpret_cast<unsigned long long*>(taken_), 1));
      next = gridDim.x + isa::uniform(others);
    }
    index_ += next - number_;
    number_ = next;
  }

  Writer<T::kFeed> writer_;
  const i32* expert_begin_;
  int experts_;
  int row_blocks_;
  u64* taken_;
  int number_ = blockIdx.x;  // of the block's next tile
  int index_ = blockIdx.x;   // the same, counted from the experts at hand
};

}  // namespace fourmoe::gpu
