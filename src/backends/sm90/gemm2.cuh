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
  static constexpr bool kFeedsNext = false;

  // What a thread reads beside its sums: before them, and with them. Rows g and g + 8 are sum * scale + shift.
  using Scales = f32;
  struct Lines {
    f32 scale;
    f32 shift[2];
  };

  __device__ Scales scales(int expert) const { return globals[expert]; }

  template <class Place>
  __device__ Lines lines(const Place& place, Scales global) const {
    const int first = first_of(place);
    if (first >= hidden) return {};
    const i64 index = i64{place.expert} * hidden + first;
    const f32 scale = ldexpf(global, -kProductExponent);
    return {scale, {bias == nullptr ? 0.0f : bias[index], bias == nullptr ? 0.0f : bias[index + 1]}};
  }

  template <int kSlots, class Place>
  __device__ void store(const Place& place, const Lines& lines, f32 (&d)[kSlots / 2]) const {
    const int column = threadIdx.x % 4 * 2;
    const int first = first_of(place);
    if (first >= hidden) return;
    f32* out[2];
    for (int c = 0; c < 2; ++c) out[c] = z + i64{place.row(column + c)} * hidden + first;
#pragma unroll
    for (int j = 0; j < kSlots / 8; ++j) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        uint2* at = reinterpret_cast<uint2*>(out[c]);
        out[c] = gpu::isa::advance(out[c], i64{8} * hidden * sizeof(f32));
        if (!place.uses(column + 8 * j + c)) continue;
        place.put(at, {__float_as_uint(d[4 * j + c] * lines.scale + lines.shift[0]),
                       __float_as_uint(d[4 * j + 2 + c] * lines.scale + lines.shift[1])});
      }
    }
  }

 private:
  // The feature of row g; that of row g + 8 is the next. hidden ends at a multiple of 16.
  template <class Place>
  static __device__ int first_of(const Place& place) {
    return place.row_tile * kTileRows + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4 * 2;
  }
};

}  // namespace fourmoe::sm90
