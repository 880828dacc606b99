// gemm2 on Hopper: the epilogue that writes each slot's output. Contract in gemm2/gemm2.h.
#pragma once

#include "backends/sm90/tiles.cuh"

namespace fourmoe::sm90 {

struct Project {
  const f32* scales;  // [experts] global scale of down, times 2^-kProductExponent
  const f32* bias;    // [experts, hidden]; null for none
  f32* z;             // [slots, hidden]; overwritten where slots are in use
  i32 hidden;

  template <int kSlots>
  __device__ void store(int expert, int row_tile, int slot, int slots, const f32 (&d)[kSlots / 2]) const {
    const int lane = threadIdx.x % 32;
    const int first = row_tile * kTileRows + threadIdx.x % 128 / 32 * 16 + lane / 4;
#pragma unroll
    for (int i = 0; i < kSlots / 2; ++i) {
      const int column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      const int row = first + i % 4 / 2 * 8;
      if (column >= slots || row >= hidden) continue;
      const f32 shift = bias != nullptr ? bias[i64{expert} * hidden + row] : 0.0f;
      z[i64{slot + column} * hidden + row] = d[i] * scales[expert] + shift;
    }
  }
};

}  // namespace fourmoe::sm90
