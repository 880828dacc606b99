// gemm2 on Hopper: the epilogue that writes each slot's output. Contract in gemm2/gemm2.h.
#pragma once

#include "backends/sm90/tiles.cuh"

namespace fourmoe::sm90 {

struct Project {
  const f32* globals;  // [experts] of down
  const f32* bias;     // [experts, hidden]; null for none
  f32* z;              // [slots, hidden]; overwritten where slots are in use
  i32 hidden;

  static constexpr bool takes(const Form&) { return true; }

  template <int kSlots, class Place>
  __device__ void store(const Place& place, f32 (&d)[kSlots / 2]) const {
    const int lane = threadIdx.x % 32;
    const int row = place.row_tile * kTileRows + threadIdx.x % 128 / 32 * 16;  // hidden ends at a multiple of 16
    if (row >= hidden) return;
    const f32 scale = ldexpf(globals[place.expert], -kProductExponent);
    const i64 index = i64{place.expert} * hidden + row + lane / 4;
    const f32 shifts[2] = {bias == nullptr ? 0.0f : bias[index], bias == nullptr ? 0.0f : bias[index + 8]};
    const int first = lane % 4 * 2;
    f32* out = z + i64{place.slot + first} * hidden + row + lane / 4;
#pragma unroll
    for (int j = 0; j < kSlots / 8; ++j) {
      for (int c = 0; c < 2; ++c) {
        if (!place.uses(first + 8 * j + c)) continue;
        out[c * hidden] = d[4 * j + c] * scale + shifts[0];
        out[c * hidden + 8] = d[4 * j + 2 + c] * scale + shifts[1];
      }
      out = gpu::isa::advance(out, i64{8} * hidden * sizeof(f32));
    }
  }
};

}  // namespace fourmoe::sm90
