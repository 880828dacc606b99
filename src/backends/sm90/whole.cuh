// whole on Hopper: the job of the one launch. Roles in tiles.cuh.
#pragma once

#include "backends/sm90/gemm1.cuh"
#include "backends/sm90/gemm2.cuh"
#include "backends/sm90/whole.h"
#include "combine/sum.cuh"
#include "gpu/isa/order.cuh"

namespace fourmoe::sm90 {

// Columns are tokens: those that picked the expert are in use.
struct HitPlace {
  int expert;
  int row_tile;
  int slot;    // row of y and z of the hit's token 0
  u32 tokens;  // bit t: token t is in use

  __device__ bool uses(int column) const { return (tokens >> column & 1) != 0; }
};

inline constexpr int kMostRowTiles = 8;  // of a tile

// What the job keeps of the call.
struct Hits {
  u64 arrived;  // barrier: the list is here
  i32 count;
  i32 last[kMostRowTiles];  // what row tiles' counters were before this block's report
  Hit list[kMostHits];
};

template <class T>
struct Layer {
  static_assert(T::kRowTiles <= kMostRowTiles);
  using Memory = Hits;
  using S = Block<T, Hits>;
  CUtensorMap maps[2];  // the tokens; y
  Operands gemms[2];
  Activate<1> activate;
  Project project;
  Work work;
  i32 most;  // hits in the list
  combine::DeviceSum sum;

  __device__ const Operands& operands(int width) const { return gemms[width]; }
  __device__ const CUtensorMap& tokens(int width) const { return maps[width]; }
  __device__ int first_row(const gpu::Tile& tile) const { return tile.width == 0 ? 0 : tile.slot; }
  __device__ bool early() const { return true; }  // only roles that read what the call's first launch wrote wait for it
  __device__ const std::byte* blob(const S& shared, const gpu::Tile& tile) const {
    return shared.job.list[tile.slot / kFewTokens].blobs[tile.width];
  }
  __device__ void prepare(S& shared) const {
    if (threadIdx.x == 0) gpu::isa::barrier_init(&shared.job.arrived, 1), gpu::isa::barrier_fence_init();
  }

  // Tiles are taken one at a time, so that a block that comes late takes fewer and none waits for one that has not
  // come.
  __device__ void schedule(S& shared) const {
    gpu::Writer<T::kFeed> writer(shared.feed);
    gpu::isa::wait_for_earlier();
    int i = first_ticket(shared);
    const int hits = shared.job.count, blocks[2] = {row_blocks<T>(gemms[0]), row_blocks<T>(gemms[1])};
    for (; i < hits * (blocks[0] + blocks[1]); i = ticket(writer)) {
      const int width = i < hits * blocks[0] ? 0 : 1;
      const int within = width == 0 ? i : i - hits * blocks[0];
      const int hit = within / blocks[width];
      const Hit& of = shared.job.list[hit];
      writer.put(0, [&] {
        return gpu::Tile{width, of.expert, within % blocks[width], hit * kFewTokens, static_cast<i32>(of.tokens)};
      });
    }
    writer.put(0, [] { return gpu::Tile{T::kWidths, 0, 0, 0, 0}; });
  }

  // One warp: a tile of gemm2 needs all of its hit's tiles of gemm1.
  __device__ void wait(const gpu::Tile& tile) const {
    if (tile.width == 1) {
      gpu::wait_for_count(&work.ready[tile.slot / kFewTokens], gemms[0].row_tiles);
      gpu::isa::fence_copy_engine();
    }
    __syncwarp();
  }

  // The epilogue's warpgroup: every tile's sums, and of the columns that this block was the last to bring, the output.
  __device__ void finish(S& shared) const {
    gpu::Reader<T::kFeed> reader(shared.feed);
    gpu::isa::wait_for_earlier();
    int turn = 0;
    for (gpu::Tile tile = reader.next(); tile.width < T::kWidths; tile = reader.next(), ++turn) {
      if (tile.width == 0) finish_tile<0>(shared, turn, tile);
      else finish_tile<1>(shared, turn, tile);
    }
    if (shared.job.count > 0) return;  // without a hit nobody has written the output
    for (int row_tile = blockIdx.x; row_tile < gemms[1].row_tiles; row_tile += gridDim.x) add_up(row_tile);
  }

 private:
  // And the list, which comes meanwhile.
  __device__ int first_ticket(S& shared) const {
    int taken = 0;
    if (threadIdx.x % 32 == 0) {
      const u32 bytes = most * sizeof(Hit);
      gpu::isa::barrier_expect(&shared.job.arrived, bytes);
      gpu::isa::bulk_load(shared.job.list, work.list, bytes, &shared.job.arrived);
      taken = atomicAdd(work.tickets, 1);
      shared.job.count = *work.hits;
    }
    __syncwarp();
    gpu::wait(&shared.job.arrived, 0);
    return gpu::isa::uniform(taken);
  }

  __device__ int ticket(gpu::Writer<T::kFeed>& writer) const {
    writer.wait_for_room();
    int taken = 0;
    if (threadIdx.x % 32 == 0) taken = atomicAdd(work.tickets, 1);
    return gpu::isa::uniform(taken);
  }

  template <int kWidth>
  __device__ __forceinline__ void finish_tile(S& shared, int turn, const gpu::Tile& tile) const {
    const int first = tile.row_block * T::kRowTiles;
    const int rows = min(T::kRowTiles, gemms[kWidth].row_tiles - first);
    gpu::wait(&shared.handed.ring.full[turn % T::kHanded], turn / T::kHanded & 1);
    for (int r = 0; r < rows; ++r) {
      f32 d[4];
      take_over(shared, turn, r, d);
      const HitPlace place{tile.expert, first + r, tile.slot, static_cast<u32>(tile.slots)};
      if constexpr (kWidth == 0) activate.template store<kFewTokens>(place, d);
      else project.template store<kFewTokens>(place, d);
    }
    __syncwarp();
    if (threadIdx.x % 32 == 0) gpu::isa::barrier_arrive(&shared.handed.ring.empty[turn % T::kHanded]);
    if constexpr (kWidth == 0) report(tile.slot / kFewTokens, rows);
    else report_columns(shared, first, rows);
  }

  // The warpgroup has stored `rows` row tiles of a hit's y.
  __device__ void report(int hit, int rows) const {
    gpu::isa::fence_copy_engine();
    gpu::isa::sync_some(1, 128);
    if (threadIdx.x % 128 == 0) gpu::isa::add_release(&work.ready[hit], rows);
  }

  // The warpgroup has stored a hit's row tiles of z: those that no other hit is missing are added up.
  __device__ void report_columns(S& shared, int first, int rows) const {
    const int thread = threadIdx.x % 128;
    gpu::isa::sync_some(1, 128);
    if (thread < rows) shared.job.last[thread] = gpu::isa::add_release(&work.done[first + thread], 1);
    gpu::isa::sync_some(1, 128);
    for (int r = 0; r < rows; ++r) {
      if (shared.job.last[r] == shared.job.count - 1) add_up(first + r);
    }
  }

  // The warpgroup: 64 columns of the output, a warp a token.
  __device__ void add_up(int row_tile) const {
    const int quad = row_tile * 16 + threadIdx.x % 16;
    const int last = sum.hidden / 4 - 1;
    for (int token = threadIdx.x % 128 / 32; token < sum.tokens; token += 4) {
      const float4 columns = combine::sum_quad(sum, token, min(quad, last));
      if (quad <= last && threadIdx.x % 32 < 16) {
        gpu::store_quad(sum.out.output.row(token), sum.out.output.dtype, quad, columns);
      }
    }
  }
};

}  // namespace fourmoe::sm90
