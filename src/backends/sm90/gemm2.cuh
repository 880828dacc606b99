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

  // What a thread reads beside its sums: rows g and g + 8 are sum * scale + shift.
  struct Lines {
    f32 scale;
    f32 shift[2];
  };

  template <class Place>
  __device__ Lines lines(const Place& place) const {
    const int row = row_of(place);
    if (row >= hidden) return {};
    const f32 scale = ldexpf(globals[place.expert], -kProductExponent);
    const i64 index = i64{place.expert} * hidden + row + threadIdx.x % 32 / 4;
    return {scale, {bias == nullptr ? 0.0f : bias[index], bias == nullptr ? 0.0f : bias[index + 8]}};
  }

  template <int kSlots, class Place>
  __device__ void store(const Place& place, const Lines& lines, f32 (&d)[kSlots / 2]) const {
    const int lane = threadIdx.x % 32;
    const int row = row_of(place);
    if (row >= hidden) return;
    const int first = lane % 4 * 2;
    f32* out[2];
    for (int c = 0; c < 2; ++c) out[c] = z + i64{place.row(first + c)} * hidden + row + lane / 4;
#pragma unroll
    for (int j = 0; j < kSlots / 8; ++j) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        u32* at = reinterpret_cast<u32*>(out[c]);
        out[c] = gpu::isa::advance(out[c], i64{8} * hidden * sizeof(f32));
        if (!place.uses(first + 8 * j + c)) continue;
        place.put(at, __float_as_uint(d[4 * j + c] * lines.scale + lines.shift[0]));
        place.put(at + 8, __float_as_uint(d[4 * j + 2 + c] * lines.scale + lines.shift[1]));
      }
    }
  }

 private:
  template <class Place>
  static __device__ int row_of(const Place& place) {  // hidden ends at a multiple of 16
    return place.row_tile * kTileRows + threadIdx.x % 128 / 32 * 16;
  }
};

}  // namespace fourmoe::sm90
