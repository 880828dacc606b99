// Tiles of the Hopper room, the device part: slots times packed experts, the body of gemm1 and gemm2. A persistent
// block has a scheduling warp, two loading warps, warpgroups that unpack and multiply, and an epilogue in their
// registers.
#pragma once

#include <cuda.h>

#include <utility>

#include "backends/sm90/atom.cuh"
#include "backends/sm90/tiles.h"
#include "gpu/isa/bits.cuh"
#include "gpu/isa/launch.cuh"
#include "gpu/isa/registers.cuh"
#include "gpu/isa/wgmma.cuh"
#include "gpu/launch.cuh"
#include "gpu/ring.cuh"
#include "gpu/schedule.cuh"

namespace fourmoe::sm90 {

struct Operands {
  const std::byte* const* blobs;  // [experts] packed weights of each expert
  const i32* expert_begin;        // [experts + 1] first slot of each expert
  i32 experts;
  i32 row_tiles;       // of one expert, 64 rows each
  i32 steps;           // K steps, even
  bool early_weights;  // the launch before this one makes the tokens only: weights may be fetched while it runs
};

// Tensor maps of the tokens, a map for each N of a kernel.
template <class T>
struct Maps {
  CUtensorMap of[T::kWidths];
};

// A row tile by slots as an epilogue sees it.
struct Place {
  int expert;
  int row_tile;
  int slot;   // the first
  int slots;  // in use
};

template <class T>
struct Shared {
  typename T::Stage stages[T::kStages];
  gpu::Ring<T::kStages> ring;
  gpu::Feed feed;
  i32 expert_begin[gpu::kMaxExperts + 1];
  f32 partial[2][T::kSplit ? T::kGroups : 1][T::kSplit ? T::kRows * T::kMost / 2 : 1][128];  // sums of each group
};

template <class T>
__device__ int row_blocks(const Operands& operands) {
  return (operands.row_tiles + T::kRowTiles - 1) / T::kRowTiles;
}

// One warp: weights into the ring, a lane a row tile.
template <class T>
__device__ void load_weights(Shared<T>& shared, const Operands& operands) {
  static_assert(T::kRowTiles <= 32);
  const int lane = threadIdx.x % 32;
  gpu::Reader reader(shared.feed);
  gpu::Cursor<T::kStages> cursor;
  for (gpu::Tile tile = reader.next(); tile.width < T::kWidths; tile = reader.next()) {
    const int rows = min(T::kRowTiles, operands.row_tiles - tile.row_block * T::kRowTiles);
    const i64 row = tile.row_block * T::kRowTiles + lane;
    const std::byte* from = operands.blobs[tile.expert] + row * operands.steps * kTileBytes;
    for (int step = 0; step < operands.steps; step += T::kDepth, cursor.advance(), from += T::kDepth * kTileBytes) {
      const u32 bytes = min(T::kDepth, operands.steps - step) * kTileBytes;
      u64* full = &shared.ring.full[cursor.stage];
      gpu::wait(&shared.ring.empty[cursor.stage], cursor.lap ^ 1);
      if (lane == 0) gpu::isa::barrier_expect(full, rows * bytes);
      __syncwarp();
      if (lane < rows) gpu::isa::bulk_load(shared.stages[cursor.stage].weights[lane], from, bytes, full);
    }
  }
}

// One warp: tokens into the ring, a lane a K step.
template <class T>
__device__ void load_tokens(Shared<T>& shared, const Maps<T>& maps, const Operands& operands) {
  const int lane = threadIdx.x % 32;
  gpu::Reader reader(shared.feed);
  gpu::Cursor<T::kStages> cursor;
  gpu::isa::wait_for_earlier();
  for (gpu::Tile tile = reader.next(); tile.width < T::kWidths; tile = reader.next()) {
    const u32 bytes = T::size(tile.width) * 128;
    for (int step = 0; step < operands.steps; step += T::kDepth, cursor.advance()) {
      const int depth = min(T::kDepth, operands.steps - step);
      u64* full = &shared.ring.full[cursor.stage];
      gpu::wait(&shared.ring.empty[cursor.stage], cursor.lap ^ 1);
      if (lane == 0) gpu::isa::barrier_expect(full, depth * bytes);
      __syncwarp();
      if (lane >= depth) continue;
      u8* to = shared.stages[cursor.stage].tokens[lane];
      gpu::isa::box_load(to, &maps.of[tile.width], (step + lane) * kTileColumns, tile.slot, full);
    }
  }
}

// One step of one row tile: four wgmma over 64 columns. The first step of a tile begins new sums.
template <int kSlots>
__device__ __forceinline__ void multiply_step(f32 (&d)[kSlots / 2], const u32 (&a)[4][4], const u8* tokens, bool add) {
  const u64 rows = gpu::isa::swizzled_rows(gpu::isa::shared_address(tokens));
  gpu::isa::wgmma_fence();
#pragma unroll
  for (int k = 0; k < 4; ++k) gpu::isa::Wgmma<kSlots>::multiply(d, a[k], rows + 2 * k, add || k > 0);
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

// A warp lets go of a stage.
template <class T>
__device__ __forceinline__ void release(Shared<T>& shared, int stage) {
  if (threadIdx.x % 32 == 0) gpu::isa::barrier_arrive(&shared.ring.empty[stage]);
}

// A warpgroup: sums of its row tiles over its K steps, two in each stage. While one step's products are at work the
// next one's weights are unpacked into the other set of operands.
template <class T, int kSlots>
__device__ __forceinline__ void multiply(Shared<T>& shared, gpu::Cursor<T::kStages>* cursor, int steps,
                                         f32 (&d)[T::kRows][kSlots / 2]) {
  const int group = threadIdx.x / 128;
  const int first_row = T::kSplit ? 0 : group * T::kRows;
  const int first_step = T::kSplit ? 2 * group : 0;
  u32 a[2][4][4];
  int before = -1;  // the stage that the last products still read
  if (first_step < steps) {
    gpu::wait(&shared.ring.full[cursor->stage], cursor->lap);
    unpack_tile(shared.stages[cursor->stage].weights[first_row][first_step], a[0]);
  }
#pragma unroll 1
  for (int step = first_step; step < steps; step += T::kDepth) {
    const typename T::Stage& stage = shared.stages[cursor->stage];
    const int here = cursor->stage;
    cursor->advance();
#pragma unroll
    for (int unit = 0; unit < 2 * T::kRows; ++unit) {
      multiply_step<kSlots>(d[unit % T::kRows], a[unit % 2], stage.tokens[first_step + unit / T::kRows],
                            step > first_step || unit >= T::kRows);
      gpu::isa::wgmma_wait<1>();
      if (unit == 0 && before >= 0) release(shared, before);
      const int next = unit + 1;
      if (next < 2 * T::kRows) {
        unpack_tile(stage.weights[first_row + next % T::kRows][first_step + next / T::kRows], a[next % 2]);
      } else if (step + T::kDepth < steps) {
        gpu::wait(&shared.ring.full[cursor->stage], cursor->lap);
        unpack_tile(shared.stages[cursor->stage].weights[first_row][first_step], a[next % 2]);
      }
    }
    before = here;
  }
  gpu::isa::wgmma_wait<0>();
  if (before >= 0) release(shared, before);
  if ((steps - 1) % T::kDepth < first_step) {  // the last stage holds no step for this group
    gpu::wait(&shared.ring.full[cursor->stage], cursor->lap);
    release(shared, cursor->stage);
    cursor->advance();
  }
}

// Adds the groups' sums, each over some of the K steps, in order of the groups. True in the group that has them all:
// groups take turns, so that an epilogue holds up one of them a tile.
template <class T, int kSlots>
__device__ __forceinline__ bool join(Shared<T>& shared, int turn, int steps, f32 (&d)[T::kRows][kSlots / 2]) {
  constexpr int kCount = T::kRows * kSlots / 2;
  const int group = threadIdx.x / 128;
  const int thread = threadIdx.x % 128;
  const bool empty = 2 * group >= steps;  // fewer steps than groups
  auto& partial = shared.partial[turn % 2];
#pragma unroll
  for (int i = 0; i < kCount; ++i) partial[group][i][thread] = empty ? 0.0f : d[i / (kSlots / 2)][i % (kSlots / 2)];
  gpu::isa::sync_some(1, T::kGroups * 128);  // also: who joined the tile before has read its sums
  if (group != turn % T::kGroups) return false;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    f32 sum = partial[0][i][thread];
    for (int other = 1; other < T::kGroups; ++other) sum += partial[other][i][thread];
    d[i / (kSlots / 2)][i % (kSlots / 2)] = sum;
  }
  return true;
}

// A warpgroup: the tiles of one N, each row tile's sums handed to the epilogue.
template <class T, int kSlots, class Epilogue>
__device__ __forceinline__ void consume(Shared<T>& shared, const Operands& operands, const Epilogue& epilogue,
                                        gpu::Reader* reader, gpu::Cursor<T::kStages>* cursor, int width) {
#pragma unroll 1
  for (int turn = 0; reader->peek().width == width; ++turn, reader->pop()) {
    f32 d[T::kRows][kSlots / 2];
    multiply<T, kSlots>(shared, cursor, operands.steps, d);
    if constexpr (T::kSplit) {
      if (!join<T, kSlots>(shared, turn, operands.steps, d)) continue;
    }
    const int group = T::kSplit ? 0 : threadIdx.x / 128;
    const gpu::Tile& tile = reader->peek();
    Place place{tile.expert, tile.row_block * T::kRowTiles + group * T::kRows, tile.slot, tile.slots};
#pragma unroll
    for (int r = 0; r < T::kRows; ++r, ++place.row_tile) {
      if (place.row_tile < operands.row_tiles) epilogue.template store<kSlots>(place, d[r]);
    }
  }
}

// A warpgroup: all tiles, a loop for each N, as the schedule orders them.
template <class T, class Epilogue, int... kWidths>
__device__ __forceinline__ void consume(Shared<T>& shared, const Operands& operands, const Epilogue& epilogue,
                                        std::integer_sequence<int, kWidths...>) {
  gpu::Reader reader(shared.feed);
  gpu::Cursor<T::kStages> cursor;
  (consume<T, T::size(kWidths)>(shared, operands, epilogue, &reader, &cursor, kWidths), ...);
}

// Barriers and the experts' slots, before the roles begin.
template <class T>
__device__ void prepare(Shared<T>& shared, const Operands& operands) {
  if (threadIdx.x == 0) {
    shared.ring.init(2, T::kGroups * 4);
    shared.feed.ring.init(1, T::kGroups * 4 + 2);
  }
  for (int e = threadIdx.x; e <= operands.experts; e += T::kThreads) shared.expert_begin[e] = operands.expert_begin[e];
  __syncthreads();
}

template <class T, class Epilogue>
__global__ void __launch_bounds__(T::kThreads, 1)
    gemm(const __grid_constant__ Maps<T> maps, const __grid_constant__ Operands operands,
         const __grid_constant__ Epilogue epilogue) {
  extern __shared__ u8 raw[];
  Shared<T>& shared = *reinterpret_cast<Shared<T>*>(raw + (1024 - gpu::isa::shared_address(raw) % 1024) % 1024);
  if (!operands.early_weights) gpu::isa::wait_for_earlier();
  gpu::isa::release_later();
  prepare(shared, operands);
  const int warp = threadIdx.x / 32;
  if (warp < T::kGroups * 4) {
    gpu::isa::registers_take<T::kConsumerRegisters>();
    consume(shared, operands, epilogue, std::make_integer_sequence<int, T::kWidths>());
  } else {
    gpu::isa::registers_give<T::kLoaderRegisters>();
    if (warp == T::kGroups * 4) load_weights<T>(shared, operands);
    if (warp == T::kGroups * 4 + 1) load_tokens<T>(shared, maps, operands);
    if (warp == T::kGroups * 4 + 2) {
      gpu::Schedule<T>(shared.feed, shared.expert_begin, operands.experts, row_blocks<T>(operands)).run();
    }
  }
}

template <class T>
constexpr int shared_bytes() {
  static_assert(sizeof(Shared<T>) + 1024 <= 232448, "a Hopper block has at most 227 KiB");
  return sizeof(Shared<T>) + 1024;  // the block's memory begins at a multiple of 16 only
}

// Rows [max_slots, columns] that a launch multiplies.
struct Rows {
  const u16* data;
  i64 max_slots;
  i32 columns;
};

// Enqueues the kernel of kTileShapes[tile].
template <class Epilogue, int kTile = 0>
Status launch_tile(int tile, const Rows& rows, const Operands& operands, const Epilogue& epilogue, i32 multiprocessors,
                   void* stream) {
  if constexpr (kTile < kTileShapeCount) {
    if (tile != kTile) {
      return launch_tile<Epilogue, kTile + 1>(tile, rows, operands, epilogue, multiprocessors, stream);
    }
    using T = Tiles<kTile>;
    Maps<T> maps;
    for (int width = 0; width < T::kWidths; ++width) {
      const Status status = gpu::map_rows(rows.data, rows.max_slots, rows.columns, T::size(width), &maps.of[width]);
      if (!status.ok()) return status;
    }
    const gpu::LaunchShape shape{multiprocessors, T::kThreads, shared_bytes<T>(), true};
    return gpu::launch(gemm<T, Epilogue>, shape, stream, maps, operands, epilogue);
  } else {
    return refuse(Reason::internal, "no tile " + std::to_string(tile));
  }
}

}  // namespace fourmoe::sm90
