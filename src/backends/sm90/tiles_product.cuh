// One GEMM over all slots: the job of gemm1 and gemm2, which differ in their epilogues, and its launch. Roles in
// tiles.cuh. Where the two meet (tiles.h: Progress), gemm1 says of each tile of y that it is stored, and blocks of
// gemm2 begin where those of gemm1 have ended.
#pragma once

#include "backends/sm90/tiles.cuh"
#include "gpu/isa/order.cuh"

namespace fourmoe::sm90 {

// A row tile by slots as an epilogue sees it.
struct Place {
  int expert;
  int row_tile;
  int slot;   // the first
  int slots;  // in use

  __device__ bool uses(int column) const { return column < slots; }
  __device__ int row(int column) const { return slot + column; }
  template <class Bits>
  __device__ static void put(Bits* at, Bits bits) {
    *at = bits;
  }
  // What else becomes of features, with a gate or without.
  template <class Sums>
  __device__ static void settle(bool, const Sums&) {}
};

// What a job of one GEMM keeps.
template <int kFeed>
struct Counts {
  i32 expert_begin[gpu::kMaxExperts + 1];
  u64 stored[kFeed];  // barriers of the tiles in the feed: all their warps have stored them; of gemm1
  i32 asked;          // gemm2: an expert, and which of it and the 31 after it have all their y
  u32 known;
};

template <class T, class Epilogue>
struct Product {
  using Memory = Counts<T::kFeed>;
  using S = Block<T, Memory>;
  static constexpr bool kReports = Epilogue::kFeedsNext;
  CUtensorMap maps[T::kWidths];
  Operands weights;
  const i32* expert_begin;  // [experts + 1] first slot of each expert; route's
  Epilogue epilogue;
  bool tokens_late;   // the launch before this one makes the tokens only: weights may be fetched while it runs
  Progress progress;  // of both GEMMs

  __device__ const Operands& operands(int) const { return weights; }
  __device__ const CUtensorMap& tokens(const gpu::Tile& tile) const { return maps[tile.width]; }
  __device__ static constexpr int boxes(const S&, const gpu::Tile&) { return 1; }
  __device__ static constexpr int box_rows(const gpu::Tile& tile) { return T::size(tile.width); }
  __device__ static int first_row(const S&, const gpu::Tile& tile, int) { return tile.slot; }
  __device__ bool early() const { return tokens_late; }
  __device__ bool meets() const { return !kReports && progress.stored != nullptr; }
  __device__ void wait_for_first() const {
    if (!meets()) gpu::isa::wait_for_earlier();
  }
  // All of the expert's y; the next ones' are asked for with it. gemm1's blocks run when those of gemm2 begin, so a
  // wait is short; one that is not ends as those of a ring do.
  __device__ void wait(S& shared, const gpu::Tile& tile) const {
    if (!meets()) return;
    Memory& own = shared.job;
    const u32 behind = tile.expert - own.asked;
    if (behind >= 32 || (own.known >> behind & 1) == 0) {
      const int lane = threadIdx.x % 32, expert = min(tile.expert + lane, weights.experts - 1);
      const u64 all = static_cast<u64>(own.expert_begin[expert + 1] - own.expert_begin[expert]) * progress.columns;
      u32 known = 0;
      for (const i64 since = clock64(); (known & 1) == 0;) {
        known = __ballot_sync(~0u, gpu::isa::load_acquire(progress.stored + expert) == all);
        if (clock64() - since > gpu::kWaitCycles) __trap();
      }
      __syncwarp();  // all lanes have read what was known before
      if (lane == 0) own.asked = tile.expert, own.known = known;
    }
    gpu::isa::fence_copy_engine();
    __syncwarp();
  }
  __device__ static constexpr bool brings(const gpu::Tile&) { return false; }
  __device__ void bring(S&, const gpu::Tile&, gpu::Cursor<T::kStages>*) const {}
  __device__ const std::byte* blob(const S&, const gpu::Tile& tile) const { return weights.blobs[tile.expert]; }
  __device__ void prepare(S& shared) const {
    Memory& own = shared.job;
    // From the L2: the launch that wrote them may be one that this one did not wait for, if another in between did.
    for (int e = threadIdx.x; e <= weights.experts; e += T::kThreads) own.expert_begin[e] = __ldcg(&expert_begin[e]);
    if (threadIdx.x > 0) return;
    own.asked = 0, own.known = 0;
    if constexpr (kReports) {
      for (u64& barrier : own.stored)
        gpu::isa::barrier_init(&barrier, 4 * (T::kSplit ? 1 : T::kGroups) * gpu::kArrivals);
      gpu::isa::barrier_fence_init();
    }
  }
  __device__ void schedule(S& shared) const {
    u64* taken = progress.stored == nullptr ? nullptr : progress.stored + weights.experts + (kReports ? 0 : 1);
    gpu::Schedule<T>(shared.feed, shared.job.expert_begin, weights.experts, row_blocks<T>(weights), taken).run();
    // No launch ends before those that it follows: a block of gemm1 that takes its last number late would take one of
    // the next call's (tests/models/split.pml).
    gpu::isa::wait_for_earlier();
  }
  using Scales = typename Epilogue::Scales;
  __device__ Scales scales(const gpu::Tile& tile) const { return epilogue.scales(tile.expert); }
  template <int kWidth>
  __device__ __forceinline__ void store(const gpu::Tile& tile, int row_tile, const Scales& scales,
                                        f32 (&d)[T::size(kWidth) / 2]) const {
    const Place place{tile.expert, row_tile, tile.slot, tile.slots};
    epilogue.template store<T::size(kWidth)>(place, epilogue.lines(place, scales), d);
  }
  __device__ __forceinline__ void stored(S& shared, int place) const {
    if constexpr (kReports) {
      __syncwarp();
      gpu::arrive(&shared.job.stored[place]);
    }
  }
  // A warp of its own, for a release takes until the stores before it are done.
  __device__ void report(S& shared) const {
    gpu::Reader<T::kFeed> reader(shared.feed);
    for (gpu::Tile tile = reader.peek(); tile.width < T::kWidths; tile = reader.peek()) {
      gpu::wait(&shared.job.stored[reader.place()], reader.lap());
      reader.pop();
      if (progress.stored == nullptr || threadIdx.x % 32 > 0) continue;
      const int first = tile.row_block * T::kRowTiles;
      const u64 columns = epilogue.columns_before(first + T::kRowTiles) - epilogue.columns_before(first);
      gpu::isa::add_release(progress.stored + tile.expert, tile.slots * columns);
    }
  }
};

// One GEMM of a call.
template <class Epilogue>
struct Gemm {
  gpu::MappedRows rows;  // of all planes
  Operands weights;
  const i32* expert_begin;
  Epilogue epilogue;
  bool tokens_late;  // as Product's
  bool powers;       // scales are MXFP4's
  Progress progress;
};

template <class T, class Epilogue>
Status launch_kernel(const Gemm<Epilogue>& gemm, i32 multiprocessors, void* stream) {
  Product<T, Epilogue> job{{}, gemm.weights, gemm.expert_begin, gemm.epilogue, gemm.tokens_late, gemm.progress};
  for (int width = 0; width < T::kWidths; ++width) {
    const Status status = gpu::map_rows(gemm.rows, T::size(width), &job.maps[width]);
    if (!status.ok()) return status;
  }
  const gpu::LaunchShape shape{multiprocessors, T::kThreads, shared_bytes<T, Product<T, Epilogue>>(), true};
  return gpu::launch(multiply_tiles<T, Product<T, Epilogue>>, shape, stream, job);
}

// Enqueues the kernel of kTileShapes[tile].
template <int kTile = 0, class Epilogue>
Status launch_tile(int tile, const Gemm<Epilogue>& gemm, i32 multiprocessors, void* stream) {
  if constexpr (kTile < kTileShapeCount) {
    if (tile != kTile) return launch_tile<kTile + 1>(tile, gemm, multiprocessors, stream);
    constexpr Form kForm = kTileShapes[kTile].form;
    if constexpr (!Epilogue::takes(kForm)) {
      return refuse(Reason::internal, "tile " + std::to_string(tile) + " is of another form");
    } else if (kForm.dense || !gemm.powers) {
      return launch_kernel<Tiles<kTile, false>>(gemm, multiprocessors, stream);
    } else {
      return launch_kernel<Tiles<kTile, !kForm.dense>>(gemm, multiprocessors, stream);
    }
  } else {
    return refuse(Reason::internal, "no tile " + std::to_string(tile));
  }
}

}  // namespace fourmoe::sm90
