// One GEMM over all slots: the job of gemm1 and gemm2, which differ in their epilogues, and its launch. Roles in
// tiles.cuh.
#pragma once

#include "backends/sm90/tiles.cuh"

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
struct Counts {
  i32 expert_begin[gpu::kMaxExperts + 1];
};

template <class T, class Epilogue>
struct Product {
  using Memory = Counts;
  CUtensorMap maps[T::kWidths];
  Operands weights;
  const i32* expert_begin;  // [experts + 1] first slot of each expert; route's
  Epilogue epilogue;
  bool tokens_late;  // the launch before this one makes the tokens only: weights may be fetched while it runs

  __device__ const Operands& operands(int) const { return weights; }
  __device__ const CUtensorMap& tokens(const gpu::Tile& tile) const { return maps[tile.width]; }
  __device__ static constexpr int boxes(const Block<T, Counts>&, const gpu::Tile&) { return 1; }
  __device__ static constexpr int box_rows(const gpu::Tile& tile) { return T::size(tile.width); }
  __device__ static int first_row(const Block<T, Counts>&, const gpu::Tile& tile, int) { return tile.slot; }
  __device__ bool early() const { return tokens_late; }
  __device__ void wait(Block<T, Counts>&, const gpu::Tile&) const {}
  __device__ static constexpr bool brings(const gpu::Tile&) { return false; }
  __device__ void bring(Block<T, Counts>&, const gpu::Tile&, gpu::Cursor<T::kStages>*) const {}
  __device__ const std::byte* blob(const Block<T, Counts>&, const gpu::Tile& tile) const {
    return weights.blobs[tile.expert];
  }
  __device__ void prepare(Block<T, Counts>& shared) const {
    for (int e = threadIdx.x; e <= weights.experts; e += T::kThreads) shared.job.expert_begin[e] = expert_begin[e];
  }
  __device__ void schedule(Block<T, Counts>& shared) const {
    gpu::Schedule<T>(shared.feed, shared.job.expert_begin, weights.experts, row_blocks<T>(weights)).run();
  }
  using Scales = typename Epilogue::Scales;
  __device__ Scales scales(const gpu::Tile& tile) const { return epilogue.scales(tile.expert); }
  template <int kWidth>
  __device__ __forceinline__ void store(const gpu::Tile& tile, int row_tile, const Scales& scales,
                                        f32 (&d)[T::size(kWidth) / 2]) const {
    const Place place{tile.expert, row_tile, tile.slot, tile.slots};
    epilogue.template store<T::size(kWidth)>(place, epilogue.lines(place, scales), d);
  }
};

// One GEMM of a call.
template <class Epilogue>
struct Gemm {
  gpu::MappedRows rows;  // of all planes
  Operands weights;
  const i32* expert_begin;
  Epilogue epilogue;
  bool early_weights;
  bool powers;  // scales are MXFP4's
};

template <class T, class Epilogue>
Status launch_kernel(const Gemm<Epilogue>& gemm, i32 multiprocessors, void* stream) {
  Product<T, Epilogue> job{{}, gemm.weights, gemm.expert_begin, gemm.epilogue, gemm.early_weights};
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
