// Tiles of the Hopper room, the device part: slots times packed experts, the roles of gemm1, gemm2 and whole. A
// persistent block has a scheduling warp, two loading warps, warpgroups that unpack and multiply, and an epilogue: in
// their registers, or (whole) in those of a warpgroup to which they hand their sums. A warp says of tiles of y that
// they are stored.
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

// One GEMM's weights.
struct Operands {
  const std::byte* const* blobs;  // [experts] packed weights of each expert; DeviceTable's
  i32 experts;
  i32 row_tiles;  // of one expert, 64 rows each
  i32 steps;      // K steps, even
  i32 plane = 0;  // rows between the tokens' planes
  Products products = {};
};

// Sums on their way from the consumers to a warpgroup that has the epilogue alone.
template <int kTiles, int kGroupRows>
struct Handed {
  gpu::Ring<kTiles> ring;
  float4 sums[kTiles][kGroupRows][128];  // of eight tokens: wgmma's four of each thread, by group and its row tile
};
template <int kGroupRows>
struct Handed<0, kGroupRows> {};

template <class T>
struct Shared {
  static constexpr bool kJoins = T::kSplit && T::kHanded == 0;

  typename T::Stage stages[T::kStages];
  gpu::Ring<T::kStages> ring;
  gpu::Feed<T::kFeed> feed;
  Handed<T::kHanded, T::kGroups * T::kRows> handed;
  // Where groups that split K join: each one's sums, of this tile and of the one before.
  f32 partial[2][kJoins ? T::kGroups : 1][kJoins ? T::kRows * T::kMost / 2 : 1][kJoins ? 128 : 1];
};

// And what the job keeps.
template <class T, class Memory>
struct Block : Shared<T> {
  Memory job;
};

template <class T>
__device__ int row_blocks(const Operands& operands) {
  return (operands.row_tiles + T::kRowTiles - 1) / T::kRowTiles;
}

// The roles of a block. A Job says what they work on; S is its Block<T, Memory>:
//   const Operands& operands(int width)    the GEMM that tiles of this width belong to
//   const std::byte* blob(S&, tile)        its expert's weights
//   const CUtensorMap& tokens(tile)        its tokens
//   int boxes(S&, tile)                    in which they come, of each K step; a lane each of a stage's
//   int box_rows(tile)                     of each box
//   int first_row(S&, tile, box)           likewise
//   void wait_for_first()                  until any tile's tokens may be there; one warp, before what follows
//   void wait(S&, tile)                    until the tile's tokens are there; likewise
//   bool brings(tile)                      bring() puts the tile's tokens into the ring instead; one warp
//   void bring(S&, tile, cursor)
//   bool early()                           roles start before this launch's input is there, and wait for it themselves
//   void prepare(S&)                       all threads, before the roles
//   void schedule(S&)                      the scheduling warp
//   Scales scales(tile)                    what a warpgroup reads before it has sums; of shapes that do not hand over
//   void store<kWidth>(tile, row_tile, scales, d)  its sums of one row tile; likewise
//   void begin(S&)                         the consumers, first; of shapes that hand over
//   void finish(S&)                        the warpgroup that takes them
//   kReports                               whether there is a report(); always of shapes that hand over
//   void report(S&)                        one warp, a reader of the feed, too
//   void stored(S&, place)                 a warp that has stored a tile, of that place in the feed; of other shapes

// One warp: weights into the ring, a lane a row tile.
template <class T, class Job>
__device__ void load_weights(Block<T, typename Job::Memory>& shared, const Job& job) {
  static_assert(T::kRowTiles <= 32);
  const int lane = threadIdx.x % 32;
  const u64 policy = gpu::isa::evict_first();  // of the one launch, whose numbers are to stay in the L2
  gpu::Reader<T::kFeed> reader(shared.feed);
  gpu::Cursor<T::kStages> cursor;
  for (gpu::Tile tile = reader.next(); tile.width < T::kWidths; tile = reader.next()) {
    const Operands& operands = job.operands(tile.width);
    const int rows = min(T::kRowTiles, operands.row_tiles - tile.row_block * T::kRowTiles);
    const i64 row = tile.row_block * T::kRowTiles + lane;
    const std::byte* from = job.blob(shared, tile) + row * operands.steps * T::kWeightBytes;
    for (int step = 0; step < operands.steps;
         step += T::kDepth, cursor.advance(), from += T::kDepth * T::kWeightBytes) {
      const u32 bytes = min(T::kDepth, operands.steps - step) * T::kWeightBytes;
      u64* full = &shared.ring.full[cursor.stage];
      gpu::wait(&shared.ring.empty[cursor.stage], cursor.lap ^ 1);
      if (lane == 0) gpu::isa::barrier_expect(full, rows * bytes);
      __syncwarp();
      if (lane >= rows) continue;
      auto* to = shared.stages[cursor.stage].weights[lane];
      if constexpr (T::kHanded > 0) gpu::isa::bulk_load(to, from, bytes, full, policy);
      else gpu::isa::bulk_load(to, from, bytes, full);
    }
  }
}

// One warp: tokens into the ring, a lane a box.
template <class T, class Job>
__device__ void load_tokens(Block<T, typename Job::Memory>& shared, const Job& job) {
  const int lane = threadIdx.x % 32, box = lane / T::kDepth, within = lane % T::kDepth;  // K step of the stage
  gpu::Reader<T::kFeed> reader(shared.feed);
  gpu::Cursor<T::kStages> cursor;
  job.wait_for_first();
  for (gpu::Tile tile = reader.next(); tile.width < T::kWidths; tile = reader.next()) {
    const Operands& operands = job.operands(tile.width);
    if (job.brings(tile)) {
      job.bring(shared, tile, &cursor);
      continue;
    }
    job.wait(shared, tile);
    const int boxes = job.boxes(shared, tile);
    const u32 bytes = job.box_rows(tile) * 128;
    const CUtensorMap* map = &job.tokens(tile);
    const int row = box < boxes ? job.first_row(shared, tile, box) : 0;
    for (int step = 0; step < operands.steps; step += T::kDepth, cursor.advance()) {
      const int depth = min(T::kDepth, operands.steps - step);
      u64* full = &shared.ring.full[cursor.stage];
      gpu::wait(&shared.ring.empty[cursor.stage], cursor.lap ^ 1);
      if (lane == 0) gpu::isa::barrier_expect(full, depth * T::kPlanes * boxes * bytes);
      __syncwarp();
      if (box >= boxes || within >= depth) continue;
      u8* to = shared.stages[cursor.stage].tokens[within] + box * bytes;
#pragma unroll
      for (int plane = 0; plane < T::kPlanes; ++plane, to += T::kPlaneBytes) {
        gpu::isa::box_load(to, map, (step + within) * kTileColumns, row + plane * operands.plane, full);
      }
    }
  }
}

// Where a thread reads its part of stage 0. A stage's own part is `stage * sizeof(Stage)` further: the loop below has
// as few instructions beside unpacking as can be, for it is the issue slots that run out (docs/hopper.md).
template <class T>
struct View {
  u32 codes;   // of the group's first tile, shared address; dense weights too
  u32 scales;  // the same
  u64 tokens;  // descriptor of the group's first K step

  __device__ explicit View(const Shared<T>& shared) {
    const int group = gpu::isa::uniform(threadIdx.x / 128), thread = threadIdx.x % 128;
    const int first_row = T::kSplit ? 0 : group * T::kRows, first_step = T::kSplit ? 2 * group : 0;
    const u32 tile = gpu::isa::shared_address(shared.stages[0].weights[first_row][first_step]);
    codes = tile + 16 * thread;
    scales = tile + kCodeBytes + 8 * (thread / 4);
    tokens = gpu::isa::swizzled_rows(gpu::isa::shared_address(shared.stages[0].tokens[first_step]));
  }
  // The view of another stage.
  __device__ View(const View& first, int stage) {
    const u32 bytes = stage * static_cast<u32>(sizeof(typename T::Stage));
    codes = first.codes + bytes;
    scales = first.scales + bytes;
    tokens = first.tokens + bytes / 16;
  }
};

// Unit u of a stage is row tile u % kRows of K step u / kRows.
template <class T>
__device__ __forceinline__ void unpack_unit(const View<T>& view, const Operands& operands, int unit, u32 (&a)[4][4]) {
  const u32 tile = (unit % T::kRows * T::kDepth + unit / T::kRows) * T::kWeightBytes;
  if constexpr (T::kDense) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const uint4 pairs = gpu::isa::load_shared_16(view.codes + tile + 2048 * k);
      a[k][0] = pairs.x, a[k][1] = pairs.y, a[k][2] = pairs.z, a[k][3] = pairs.w;
    }
  } else {
    const uint4 codes = gpu::isa::load_shared_16(view.codes + tile);
    const uint2 scales = gpu::isa::load_shared_8(view.scales + tile);
    const auto with = [&](const auto& shift) {
      unpack<T::kPowers>(codes.x, codes.y, scales.x, *reinterpret_cast<u32(*)[2][4]>(&a[0]), shift);
      unpack<T::kPowers>(codes.z, codes.w, scales.y, *reinterpret_cast<u32(*)[2][4]>(&a[2]), shift);
    };
    if constexpr (T::kByProducts) with(operands.products);
    else with(Shifts{});
  }
}

// Four wgmma over 64 columns of each plane. The first step of a tile begins new sums.
template <class T, int kSlots>
__device__ __forceinline__ void multiply_unit(const View<T>& view, int unit, const u32 (&a)[4][4], bool add,
                                              f32 (&d)[kSlots / 2]) {
  const u64 rows = view.tokens + unit / T::kRows * (T::kPlanes * T::kPlaneBytes / 16);
  gpu::isa::wgmma_fence();
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    gpu::isa::Wgmma<kSlots>::multiply(d, a[k], rows + 2 * k, add || k > 0);
    if constexpr (T::kPlanes == 2) {
      gpu::isa::Wgmma<kSlots>::multiply(d, a[k], rows + T::kPlaneBytes / 16 + 2 * k, true);
    }
  }
  gpu::isa::wgmma_commit();
}

// A warp lets go of a stage.
template <class T>
__device__ __forceinline__ void release(Shared<T>& shared, int stage) {
  gpu::arrive(&shared.ring.empty[stage]);
}

// A warpgroup: sums of its row tiles over its K steps, T::kSteps of each stage. While one unit's products are at work
// the next one's weights are unpacked into the other set of operands.
template <class T, int kSlots>
__device__ __forceinline__ void multiply(Shared<T>& shared, gpu::Cursor<T::kStages>* cursor, const Operands& operands,
                                         f32 (&d)[T::kRows][kSlots / 2]) {
  constexpr int kUnits = T::kSteps * T::kRows, kFewest = 2 * T::kRows;  // of a stage
  const int steps = operands.steps;
  const int first_step = T::kSplit ? 2 * gpu::isa::uniform(threadIdx.x / 128) : 0;
  const View<T> first(shared);
  u32 a[2][4][4];
  int before = -1;  // the stage that the last products still read
  if (first_step < steps) {
    gpu::wait(&shared.ring.full[cursor->stage], cursor->lap);
    unpack_unit(View<T>(first, cursor->stage), operands, 0, a[0]);
  }
#pragma unroll 1
  for (int step = first_step; step < steps; step += T::kDepth) {
    const View<T> view(first, cursor->stage);
    const int here = cursor->stage;
    cursor->advance();
#pragma unroll
    for (int unit = 0; unit < kUnits; ++unit) {
      multiply_unit<T, kSlots>(view, unit, a[unit % 2], step > first_step || unit >= T::kRows, d[unit % T::kRows]);
      gpu::isa::wgmma_wait<1>();
      if (unit == 0 && before >= 0) release(shared, before);
      if (unit + 1 == kFewest && kFewest < kUnits && step + 2 == steps) break;  // a last stage of two
      if (unit + 1 < kUnits) {
        unpack_unit(view, operands, unit + 1, a[(unit + 1) % 2]);
      } else if (step + T::kDepth < steps) {
        gpu::wait(&shared.ring.full[cursor->stage], cursor->lap);
        unpack_unit(View<T>(first, cursor->stage), operands, 0, a[0]);
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
  const int group = gpu::isa::uniform(threadIdx.x / 128);
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

// A warpgroup: its sums to the one that has the epilogue.
template <class T>
__device__ __forceinline__ void hand_over(Shared<T>& shared, int turn, int steps, f32 (&d)[T::kRows][4]) {
  const int group = gpu::isa::uniform(threadIdx.x / 128), thread = threadIdx.x % 128;
  const int place = turn % T::kHanded;
  const bool empty = T::kSplit && 2 * group >= steps;  // fewer steps than groups
  gpu::wait(&shared.handed.ring.empty[place], (turn / T::kHanded & 1) ^ 1);
#pragma unroll
  for (int r = 0; r < T::kRows; ++r) {
    const float4 sums = {d[r][0], d[r][1], d[r][2], d[r][3]};
    shared.handed.sums[place][group * T::kRows + r][thread] = empty ? float4{0.0f, 0.0f, 0.0f, 0.0f} : sums;
  }
  __syncwarp();
  gpu::arrive(&shared.handed.ring.full[place]);
}

// A warpgroup: its row tiles' sums to the job. Each takes the first one's place: an epilogue is long, and code that
// runs once a tile is not in the instruction cache.
template <class T, int kWidth, class Job, class Scales, int kCount>
__device__ __forceinline__ void store(const Job& job, const gpu::Tile& tile, const Scales& scales,
                                      f32 (&d)[T::kRows][kCount]) {
  static_assert(T::kRows <= 2);
  int row_tile = tile.row_block * T::kRowTiles + (T::kSplit ? 0 : gpu::isa::uniform(threadIdx.x / 128) * T::kRows);
#pragma unroll 1
  for (int r = 0; r < T::kRows; ++r, ++row_tile) {
    if (row_tile < job.operands(kWidth).row_tiles) job.template store<kWidth>(tile, row_tile, scales, d[0]);
#pragma unroll
    for (int i = 0; T::kRows > 1 && i < kCount; ++i) d[0][i] = d[T::kRows - 1][i];
  }
}

// A warpgroup: the tiles of one width.
template <class T, int kWidth, class Job>
__device__ __forceinline__ void consume(Block<T, typename Job::Memory>& shared, const Job& job,
                                        gpu::Reader<T::kFeed>* reader, gpu::Cursor<T::kStages>* cursor, int* turn) {
  constexpr int kSlots = T::size(kWidth);
#pragma unroll 1
  for (; reader->peek().width == kWidth; reader->pop()) {
    const auto scales = job.scales(reader->peek());
    const int steps = job.operands(kWidth).steps;
    f32 d[T::kRows][kSlots / 2];
    multiply<T, kSlots>(shared, cursor, job.operands(kWidth), d);
    if constexpr (T::kSplit) {
      if (!join<T, kSlots>(shared, (*turn)++, steps, d)) continue;
    }
    store<T, kWidth>(job, reader->peek(), scales, d);
    job.stored(shared, reader->place());
  }
}

// A warpgroup: all tiles, whose widths have one N, in one loop: another's code would have to be fetched where it waits.
template <class T, class Job>
__device__ __forceinline__ void consume_alike(Shared<T>& shared, const Job& job) {
  gpu::Reader<T::kFeed> reader(shared.feed);
  gpu::Cursor<T::kStages> cursor;
  int turn = 0;  // tiles so far
  for (int width = reader.peek().width; width < T::kWidths; width = reader.peek().width, ++turn) {
    const int steps = job.operands(width).steps;
    f32 d[T::kRows][T::kMost / 2];
    multiply<T, T::kMost>(shared, &cursor, job.operands(width), d);
    hand_over(shared, turn, steps, d);
    reader.pop();
  }
}

// A warpgroup: all tiles, a loop for each width, as the schedule orders them.
template <class T, class Job, int... kWidths>
__device__ __forceinline__ void consume(Block<T, typename Job::Memory>& shared, const Job& job,
                                        std::integer_sequence<int, kWidths...>) {
  gpu::Reader<T::kFeed> reader(shared.feed);
  gpu::Cursor<T::kStages> cursor;
  int turn = 0;  // tiles so far
  (consume<T, kWidths>(shared, job, &reader, &cursor, &turn), ...);
}

template <class T, class Job>
__global__ void __launch_bounds__(T::kThreads, 1) multiply_tiles(const __grid_constant__ Job job) {
  using Memory = Block<T, typename Job::Memory>;
  extern __shared__ u8 raw[];
  Memory& shared = *reinterpret_cast<Memory*>(raw + (1024 - gpu::isa::shared_address(raw) % 1024) % 1024);
  constexpr int kConsumers = T::kGroups * 4, kFinishers = T::kHanded > 0 ? 4 : 0;  // warps
  if (threadIdx.x == 0) {
    shared.ring.init(2, kConsumers);
    shared.feed.ring.init(1, kConsumers + 2 + kFinishers + (Job::kReports ? 1 : 0));
    if constexpr (T::kHanded > 0) shared.handed.ring.init(kConsumers * gpu::kArrivals, kFinishers);
  }
  if (!job.early()) gpu::isa::wait_for_earlier();
  gpu::isa::release_later();
  job.prepare(shared);
  __syncthreads();
  const int warp = gpu::isa::uniform(threadIdx.x / 32);
  if (warp < kConsumers) {
    if constexpr (T::kHanded == 0) {
      gpu::isa::registers_take<T::kConsumerRegisters>();
      consume<T>(shared, job, std::make_integer_sequence<int, T::kWidths>());
    } else {
      job.begin(shared);
      consume_alike<T>(shared, job);
    }
  } else if (warp < kConsumers + 4) {
    gpu::isa::registers_give<T::kLoaderRegisters>();
    if (warp == kConsumers) load_weights<T>(shared, job);
    else if (warp == kConsumers + 1) load_tokens<T>(shared, job);
    else if (warp == kConsumers + 2) job.schedule(shared);
    else if constexpr (Job::kReports) job.report(shared);
  } else {
    if constexpr (T::kHanded > 0) {
      gpu::isa::registers_take<T::kFinisherRegisters>();
      job.finish(shared);
    }
  }
}

template <class T, class Job>
constexpr int shared_bytes() {
  using Memory = Block<T, typename Job::Memory>;
  static_assert(sizeof(Memory) + 1024 <= 232448, "a Hopper block has at most 227 KiB");
  return sizeof(Memory) + 1024;  // the block's memory begins at a multiple of 16 only
}

}  // namespace fourmoe::sm90
