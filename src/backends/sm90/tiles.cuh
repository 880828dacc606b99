// Tiles of the Hopper room, the device part: slots times packed experts, the body of gemm1 and gemm2. A persistent
// block has a loader warp, warpgroups that unpack and multiply, and an epilogue in their registers.
#pragma once

#include "backends/sm90/atom.cuh"
#include "backends/sm90/tiles.h"
#include "gpu/isa/bits.cuh"
#include "gpu/isa/registers.cuh"
#include "gpu/isa/wgmma.cuh"
#include "gpu/ring.cuh"
#include "gpu/schedule.cuh"

namespace fourmoe::sm90 {

struct Operands {
  const std::byte* const* blobs;  // [experts] packed weights of each expert
  const u8* tokens;               // tiled rows, see tiles.h; readable up to a tile beyond the last slot
  i64 step_bytes;                 // between two K steps of tokens
  const i32* expert_begin;        // [experts] first slot of each expert, multiples of 8
  const i32* expert_rows;         // [experts] slots in use
  const i32* tile_begin;          // [experts + 1] slot tiles before each expert, for this kernel's kSlots
  i32 experts;
  i32 row_tiles;  // of one expert, 64 rows each
  i32 steps;      // K steps, even
};

template <class T>
struct Shared {
  typename T::Stage stages[T::kStages];
  gpu::Ring<T::kStages> ring;
  i32 tile_begin[gpu::kMaxExperts + 1];
};

template <class T>
__device__ int row_blocks(const Operands& operands) {
  return (operands.row_tiles + T::kRowTiles - 1) / T::kRowTiles;
}

// One warp: keeps the ring full, tile after tile. Each lane brings one part of a stage: a row tile's two K steps of
// weights, or one K step of tokens.
template <class T>
__device__ void load(Shared<T>& shared, const Operands& operands) {
  static_assert(T::kRowTiles + 2 <= 32);
  const int lane = threadIdx.x % 32;
  const int half = lane - T::kRowTiles;  // of tokens; negative: this lane brings weights
  const u32 bytes = half < 0 ? 2 * kTileBytes : T::kSlots * 128;
  const i64 stride = half < 0 ? 2 * kTileBytes : 2 * operands.step_bytes;
  gpu::Schedule schedule(shared.tile_begin, operands.experts, row_blocks<T>(operands));
  gpu::Cursor<T::kStages> cursor;
  gpu::Tile tile{-1, 0, 0};
  while (schedule.next(&tile)) {
    const int row = tile.row_tile * T::kRowTiles + lane;
    const int group = operands.expert_begin[tile.expert] / kGroupSlots + tile.slot_tile * (T::kSlots / kGroupSlots);
    const int rows = min(T::kRowTiles, operands.row_tiles - tile.row_tile * T::kRowTiles);
    const bool brings = half < 0 ? lane < rows : half < 2;
    const u8* from =
        half < 0 ? reinterpret_cast<const u8*>(operands.blobs[tile.expert]) + i64{row} * operands.steps * kTileBytes
                 : operands.tokens + half * operands.step_bytes + i64{group} * kGroupBytes;
    for (int step = 0; step < operands.steps; step += 2, cursor.advance(), from += stride) {
      typename T::Stage& stage = shared.stages[cursor.stage];
      u64* full = &shared.ring.full[cursor.stage];
      gpu::wait(&shared.ring.empty[cursor.stage], cursor.lap ^ 1);
      if (lane == 0) gpu::isa::barrier_expect(full, sizeof(stage.tokens) + rows * 2 * kTileBytes);
      __syncwarp();
      u8* to = half < 0 ? stage.weights[lane][0] : stage.tokens[half & 1];
      if (brings) gpu::isa::bulk_load(to, from, bytes, full);
    }
  }
}

// One step of one row tile: four wgmma over 64 columns.
template <class T>
__device__ __forceinline__ void multiply_step(f32 (&d)[T::kSlots / 2], const u32 (&a)[4][4], const u8* tokens) {
  const u64 rows = gpu::isa::swizzled_rows(gpu::isa::shared_address(tokens));
  gpu::isa::wgmma_fence();
#pragma unroll
  for (int k = 0; k < 4; ++k) gpu::isa::Wgmma<T::kSlots>::multiply(d, a[k], rows + 2 * k);
  gpu::isa::wgmma_commit();
}

__device__ __forceinline__ void unpack_tile(const u8* tile, u32 (&a)[4][4]) {
  const int thread = threadIdx.x % 128;
  const u32 base = gpu::isa::shared_address(tile);
  const uint4 codes = gpu::isa::load_shared_16(base + 16 * thread);
  const uint2 scales = gpu::isa::load_shared_8(base + kCodeBytes + 8 * (thread / 4));
  unpack(codes.x, codes.y, scales.x, *reinterpret_cast<u32(*)[2][4]>(&a[0]));
  unpack(codes.z, codes.w, scales.y, *reinterpret_cast<u32(*)[2][4]>(&a[2]));
}

// A warpgroup: sums of its row tiles over all K steps. While one step's products are at work the next one's weights are
// unpacked into the other set of operands.
template <class T>
__device__ void multiply(Shared<T>& shared, gpu::Cursor<T::kStages>* cursor, int steps,
                         f32 (&d)[T::kRows][T::kSlots / 2]) {
  const int group = threadIdx.x / 128;
  u32 a[2][4][4];
  gpu::wait(&shared.ring.full[cursor->stage], cursor->lap);
  unpack_tile(shared.stages[cursor->stage].weights[group * T::kRows][0], a[0]);
  int before = -1;  // the stage that the last products still read
#pragma unroll 1
  for (int step = 0; step < steps; step += 2) {
    const typename T::Stage& stage = shared.stages[cursor->stage];
    const int here = cursor->stage;
    cursor->advance();
#pragma unroll
    for (int unit = 0; unit < 2 * T::kRows; ++unit) {
      multiply_step<T>(d[unit % T::kRows], a[unit % 2], stage.tokens[unit / T::kRows]);
      gpu::isa::wgmma_wait<1>();
      if (unit == 0 && before >= 0 && threadIdx.x % 32 == 0) gpu::isa::barrier_arrive(&shared.ring.empty[before]);
      const int next = unit + 1;
      if (next < 2 * T::kRows) {
        unpack_tile(stage.weights[group * T::kRows + next % T::kRows][next / T::kRows], a[next % 2]);
      } else if (step + 2 < steps) {
        gpu::wait(&shared.ring.full[cursor->stage], cursor->lap);
        unpack_tile(shared.stages[cursor->stage].weights[group * T::kRows][0], a[next % 2]);
      }
    }
    before = here;
  }
  gpu::isa::wgmma_wait<0>();
  if (threadIdx.x % 32 == 0) gpu::isa::barrier_arrive(&shared.ring.empty[before]);
}

// A warpgroup: tile after tile, handing each row tile's sums to the epilogue.
template <class T, class Epilogue>
__device__ void consume(Shared<T>& shared, const Operands& operands, const Epilogue& epilogue) {
  gpu::Schedule schedule(shared.tile_begin, operands.experts, row_blocks<T>(operands));
  gpu::Cursor<T::kStages> cursor;
  gpu::Tile tile{-1, 0, 0};
  while (schedule.next(&tile)) {
    f32 d[T::kRows][T::kSlots / 2] = {};
    multiply<T>(shared, &cursor, operands.steps, d);
    const int begin = tile.slot_tile * T::kSlots;
    const int slot = operands.expert_begin[tile.expert] + begin;
    const int slots = min(T::kSlots, operands.expert_rows[tile.expert] - begin);
#pragma unroll
    for (int r = 0; r < T::kRows; ++r) {
      const int row_tile = tile.row_tile * T::kRowTiles + threadIdx.x / 128 * T::kRows + r;
      if (row_tile < operands.row_tiles) epilogue.template store<T::kSlots>(tile.expert, row_tile, slot, slots, d[r]);
    }
  }
}

template <class T, class Epilogue>
__global__ void __launch_bounds__(T::kThreads, 1)
    gemm(const __grid_constant__ Operands operands, const __grid_constant__ Epilogue epilogue) {
  extern __shared__ u8 raw[];
  Shared<T>& shared = *reinterpret_cast<Shared<T>*>(raw + (1024 - gpu::isa::shared_address(raw) % 1024) % 1024);
  if (threadIdx.x == 0) shared.ring.init(T::kGroups * 4);
  for (int e = threadIdx.x; e <= operands.experts; e += T::kThreads) shared.tile_begin[e] = operands.tile_begin[e];
  __syncthreads();
  if (threadIdx.x < T::kGroups * 128) {
    gpu::isa::registers_take<T::kConsumerRegisters>();
    consume<T>(shared, operands, epilogue);
  } else {
    gpu::isa::registers_give<T::kLoaderRegisters>();
    if (threadIdx.x < T::kGroups * 128 + 32) load<T>(shared, operands);
  }
}

template <class T>
constexpr int shared_bytes() {
  return sizeof(Shared<T>) + 1024;  // the block's memory begins at a multiple of 16 only
}

}  // namespace fourmoe::sm90
