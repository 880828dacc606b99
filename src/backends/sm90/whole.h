// whole on Hopper: a layer for few tokens, as the host sees it: one launch that finds the experts hit, and one for both
// GEMMs and the sum.
//
// The tokens themselves are the eight columns of every product, so nothing is gathered or sorted: a hit (an expert that
// some token picked) has a row for every token, and those that picked it are stored. Tiles of both GEMMs stand in one
// queue; a tile of gemm2 waits for its own hit's tiles of gemm1 while its weights are on the way, and whoever finishes
// the last hit of 64 output columns adds them up, in the order of picks.
#pragma once

#include "backends/sm90/tiles.h"
#include "combine/device.h"
#include "route/device.h"
#include "weights/expert_table.h"

namespace fourmoe::sm90 {

inline constexpr i32 kFewTokens = 8;
inline constexpr i32 kMostHits = kFewTokens * 32;  // top_k <= 32

// An expert that some token picked.
struct alignas(16) Hit {
  const std::byte* blobs[2];  // its packed weights of gemm1 and gemm2
  i32 expert;
  u32 tokens;  // bit t: token t picked it
};

// Device memory of the step; the first launch of a call writes all but y and z. `most` = most_hits of the problem.
struct Work {
  i32* hits = nullptr;     // [1] experts hit
  i32* tickets = nullptr;  // [1] tiles taken
  Hit* list = nullptr;     // [most] the experts hit, ascending; zeros after them
  i32* ready = nullptr;    // [most] row tiles of gemm1 that are done
  i32* done = nullptr;     // [row tiles of gemm2] hits that are done
  u16* rows = nullptr;     // [kFewTokens, hidden] tokens rounded to bf16, where they are not
  u16* y = nullptr;        // [most * kFewTokens, inter] bf16
  f32* z = nullptr;        // [most * kFewTokens, hidden]
};

i32 most_hits(const Problem& problem);
Load load_of(const Problem& problem, i64 tokens);  // of gemm2: chooses the tile

struct Whole {
  route::DeviceSlots slots;  // out.pick_slot: rows of z
  format::Tensor hidden;     // [tokens, hidden]
  const weights::DeviceTable* table = nullptr;
  Work work;
  combine::DeviceSum sum;  // rows and pick_slot as above
  i32 tile = -1;           // of kTileShapes; -1: chosen
};

// Enqueues; does not wait. multiprocessors: of the device.
Status launch(const Whole& call, i32 multiprocessors, void* stream);

}  // namespace fourmoe::sm90
