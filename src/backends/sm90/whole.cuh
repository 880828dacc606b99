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

template <class T>
struct Layer {
  CUtensorMap maps[2];  // the tokens; y
  Operands gemms[2];
  Activate<1> activate;
  Project project;
  Work work;
  combine::DeviceSum sum;

  __device__ const Operands& operands(int width) const { return gemms[width]; }
  __device__ const CUtensorMap& tokens(int width) const { return maps[width]; }
  __device__ int first_row(const gpu::Tile& tile) const { return tile.width == 0 ? 0 : tile.slot; }
  __device__ bool early_weights() const { return false; }
  __device__ void prepare(Shared<T>&) const {}

  // Tiles are taken one at a time, so that a block that comes late takes fewer and none waits for one that has not
  // come.
  __device__ void schedule(Shared<T>& shared) const {
    gpu::Writer<T::kFeed> writer(shared.feed);
    const int hits = *work.hits;
    const int blocks[2] = {row_blocks<T>(gemms[0]), row_blocks<T>(gemms[1])};
    for (int i = ticket(writer); i < hits * (blocks[0] + blocks[1]); i = ticket(writer)) {
      const int width = i < hits * blocks[0] ? 0 : 1;
      const int within = width == 0 ? i : i - hits * blocks[0];
      const int hit = within / blocks[width];
      writer.put(0, [&] {
        return gpu::Tile{width, work.experts[hit], within % blocks[width], hit * kFewTokens, work.tokens_of[hit]};
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

  template <int kWidth>
  __device__ __forceinline__ void store(Shared<T>& shared, const gpu::Tile& tile, int row_tile, f32 (&d)[4]) const {
    const HitPlace place{tile.expert, row_tile, tile.slot, static_cast<u32>(tile.slots)};
    if constexpr (kWidth == 0) {
      activate.template store<kFewTokens>(place, d);
      gpu::isa::fence_copy_engine();
      report(shared, &work.ready[tile.slot / kFewTokens]);
    } else {
      project.template store<kFewTokens>(place, d);
      if (report(shared, &work.done[row_tile]) == *work.hits - 1) add_up(row_tile);
    }
  }

  // Consumers, after the last tile: without a hit nobody has written the output.
  __device__ void rest(Shared<T>&) const {
    if (*work.hits > 0 || threadIdx.x >= 128) return;
    for (int row_tile = blockIdx.x; row_tile < gemms[1].row_tiles; row_tile += gridDim.x) add_up(row_tile);
  }

 private:
  __device__ int ticket(gpu::Writer<T::kFeed>& writer) const {
    writer.wait_for_room();
    int taken = 0;
    if (threadIdx.x % 32 == 0) taken = atomicAdd(work.tickets, 1);
    return __shfl_sync(~0u, taken, 0);
  }

  // A warpgroup has stored a row tile; what the counter was before.
  __device__ __forceinline__ int report(Shared<T>& shared, i32* counter) const {
    const int group = threadIdx.x / 128;
    gpu::isa::sync_some(2 + group, 128);  // 1 is join's
    if (threadIdx.x % 128 == 0) shared.last[group] = gpu::isa::add_release(counter, 1);
    gpu::isa::sync_some(2 + group, 128);
    return shared.last[group];
  }

  // A warpgroup: 64 columns of the output, a warp a token.
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
