// gemm2 on Hopper, as the host sees it. Contract in gemm2/gemm2.h.
#pragma once

#include <cstddef>

#include "backends/sm90/tiles.h"
#include "flow.h"

namespace fourmoe::sm90 {

// All pointers: device memory.
struct Gemm2 {
  const std::byte* const* blobs = nullptr;  // [experts] down of each expert, packed (tiles.h)
  const f32* globals = nullptr;             // [experts] global scale of down
  const f32* bias = nullptr;                // [experts, hidden]; null for none
  const i32* expert_begin = nullptr;        // [experts + 1] first slot of each expert; last = slots in use
  const u16* rows = nullptr;                // [form.planes, max_slots, inter] bf16; aligned to 16 bytes
  f32* z = nullptr;                         // [max_slots, hidden], overwritten in rows in use
  Form form;
  bool powers = false;  // blobs are packed from MXFP4
  i32 experts = 0;
  i32 hidden = 0;
  i32 inter = 0;
  i64 max_slots = 0;
  i64 expected_slots = 0;      // of this call: chooses the tile, whatever it is the result is right
  bool follows_gemm1 = false;  // the launch before this one in the stream is gemm1 or has the same inputs but `rows`
  bool split = true;           // K may be split where that is faster; sums then have an order of their own
  i32 tile = -1;               // of kTileShapes; -1: chosen
  // As gemm1's, which is then the launch before this one: blocks begin where gemm1's have ended, and wait for the y of
  // each expert by itself. rows and z must not overlap gemm1's rows.
  Progress progress;
};

// Enqueues; does not wait. multiprocessors: of the device.
Status launch(const Gemm2& call, i32 multiprocessors, void* stream);

}  // namespace fourmoe::sm90
