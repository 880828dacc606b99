// gemm1 on Hopper, as the host sees it. Contract in gemm1/gemm1.h.
#pragma once

#include <cstddef>

#include "backends/sm90/tiles.h"
#include "flow.h"

namespace fourmoe::sm90 {

// All pointers: device memory.
struct Gemm1 {
  const std::byte* const* blobs = nullptr;  // [experts] gate and up of each expert, packed (tiles.h)
  const f32* globals = nullptr;             // [experts, 2] global scale of gate and of up; up's alone counts ungated
  const f32* gate_bias = nullptr;           // [experts, inter]; null for none
  const f32* up_bias = nullptr;             // [experts, inter]; null for none
  const i32* expert_begin = nullptr;        // [experts + 1] first slot of each expert; last = slots in use
  const u16* rows = nullptr;  // [form.planes, max_slots, hidden] bf16, sorted by expert; aligned to 16 bytes
  u16* y = nullptr;           // [form.planes, max_slots, inter] bf16, two planes: the f16 values that they
                              // sum to; overwritten in rows in use; null for y_wide
  f32* y_wide = nullptr;      // [max_slots, inter] the same before rounding; null for y
  Form form;
  bool powers = false;  // blobs are packed from MXFP4
  i32 experts = 0;
  i32 hidden = 0;
  i32 inter = 0;
  i64 max_slots = 0;
  i64 expected_slots = 0;  // of this call: chooses the tile, whatever it is the result is right
  Activation activation;
  // The launch before this one in the stream makes `rows` and nothing else of this call's, and lets this one begin once
  // its own wait is over (gpu::begin): weights are fetched while it runs.
  bool follows_rows = false;
  bool split = true;  // K may be split where that is faster; sums then have an order of their own
  i32 tile = -1;      // of kTileShapes; -1: chosen
  Progress progress;  // of `y`, null with y_wide; zeros before the launch that makes `rows`
};

// Enqueues; does not wait. multiprocessors: of the device.
Status launch(const Gemm1& call, i32 multiprocessors, void* stream);

}  // namespace fourmoe::sm90
