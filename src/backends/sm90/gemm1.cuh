// gemm1 on Hopper: the epilogue that activates. Contract in gemm1/gemm1.h.
#pragma once

#include <cuda_bf16.h>

#include "backends/sm90/tiles.cuh"
#include "gemm1/activation.h"
#include "gpu/isa/power.cuh"
#include "gpu/values.cuh"

namespace fourmoe::sm90 {

// Sums to gemm2's tokens. A thread holds rows g and g + 8 of its warp's sixteen: a gate and its up, or two ups.
template <int kPlanes>
struct Activate {
  const f32* globals;    // [experts, 2] of gate and of up
  const f32* gate_bias;  // [experts, inter]; null for none
  const f32* up_bias;    // [experts, inter]; null for none
  Activation activation;
  u16* y;       // [kPlanes, slots, inter] bf16; null: y_wide
  f32* y_wide;  // [slots, inter]
  i32 inter;
  i64 plane = 0;  // elements between two planes of y

  static constexpr bool takes(const Form& form) { return form.planes == kPlanes; }
  static constexpr bool kFeedsNext = true;  // gemm2 may begin before all is stored
  // Of y, in the row tiles before this one.
  __device__ int columns_before(int row_tile) const {
    return min(inter, row_tile * (activation.gated() ? kTileRows / 2 : kTileRows));
  }

  // What a thread reads beside its sums: before them, and with them. Rows g and g + 8 are sum * scale + shift.
  struct Scales {
    f32 of[2];
  };
  struct Lines {
    f32 scale[2];
    f32 shift[2];
  };

  __device__ Scales scales(int expert) const {
    const f32 up = globals[2 * expert + 1];
    return {{activation.gated() ? globals[2 * expert] : up, up}};
  }

  template <class Place>
  __device__ Lines lines(const Place& place, const Scales& scales) const {
    const int feature = first_of(place);
    if (feature >= inter) return {};
    const i64 index = i64{place.expert} * inter + feature + threadIdx.x % 32 / 4 * (activation.gated() ? 1 : 2);
    const f32* first = activation.gated() ? gate_bias : up_bias;
    return {{ldexpf(scales.of[0], -kProductExponent), ldexpf(scales.of[1], -kProductExponent)},
            {bias_of(first, index), bias_of(up_bias, activation.gated() ? index : index + 1)}};
  }

  // Sums become features where they stand: each way of writing them is code once, not once for every activation.
  template <int kSlots, class Place>
  __device__ void store(const Place& place, const Lines& lines, f32 (&d)[kSlots / 2]) const {
    const int feature = first_of(place);
    if (feature >= inter) return;
    if (activation.gated()) gate<kSlots>(lines, d);
    else square<kSlots>(lines, d);
    place.settle(activation.gated(), d);
    if (activation.gated()) write<kSlots>(place, feature, d);
    else if (y != nullptr) write_pairs<kSlots>(place, y, feature, d);
    else write_pairs<kSlots>(place, y_wide, feature, d);
  }

 private:
  static __device__ f32 bias_of(const f32* bias, i64 index) { return bias == nullptr ? 0.0f : bias[index]; }

  template <class Place>
  __device__ int first_of(const Place& place) const {
    const int features = activation.gated() ? 8 : 16;  // of a warp's sixteen rows
    return (place.row_tile * 4 + gpu::isa::uniform(threadIdx.x % 128 / 32)) * features;
  }

  // Rows g. Kinds stand outside the loop over slots: inside it, unrolled, they would be a hundred kilobytes of code.
  template <int kSlots>
  __device__ void gate(const Lines& lines, f32 (&d)[kSlots / 2]) const {
    const auto each = [&](auto kind) {
      Activation fixed = activation;
      fixed.kind = decltype(kind)::value;
#pragma unroll
      for (int j = 0; j < kSlots / 4; ++j) {
        f32* at = d + j / 2 * 4 + j % 2;
        const f32 gate = at[0] * lines.scale[0] + lines.shift[0], up = at[2] * lines.scale[1] + lines.shift[1];
        at[0] = gemm1::activate(fixed, gate, up, gpu::isa::Exponential{});
      }
    };
    using enum ActivationKind;
    switch (activation.kind) {
      case swiglu: return each(std::integral_constant<ActivationKind, swiglu>{});
      case swiglu_clamped: return each(std::integral_constant<ActivationKind, swiglu_clamped>{});
      case geglu_erf: return each(std::integral_constant<ActivationKind, geglu_erf>{});
      case geglu_tanh: return each(std::integral_constant<ActivationKind, geglu_tanh>{});
      case relu2: return;
    }
  }

  // Rows g and g + 8.
  template <int kSlots>
  __device__ void square(const Lines& lines, f32 (&d)[kSlots / 2]) const {
#pragma unroll
    for (int i = 0; i < kSlots / 2; ++i) {
      const int half = i % 4 / 2;
      d[i] = gemm1::activate(Activation{ActivationKind::relu2}, 0.0f, d[i] * lines.scale[half] + lines.shift[half]);
    }
  }

  static __device__ __forceinline__ gpu::Planes planes_of(f32 first, f32 second) {
    if constexpr (kPlanes == 2) return gpu::planes_of_f16(first, second);
    const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
    return {*reinterpret_cast<const u32*>(&pair), 0};
  }

  // With a gate, a warp's 8 features of all slots: d[4j + c] is feature g of slot 8j + 2t + c.
  template <int kSlots, class Place>
  __device__ void write(const Place& place, int feature, const f32 (&d)[kSlots / 2]) const {
    if (y == nullptr) return write_wide<kSlots>(place, feature, d);
    const int lane = threadIdx.x % 32;
    u16* row = y + i64{place.row(lane / 4)} * inter + feature + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < kSlots / 8; ++j) {
      const gpu::Planes pair = planes_of(d[4 * j], d[4 * j + 1]);
      const u32 high = gpu::isa::transpose(pair.high);  // slot 8j + g, features 2t, 2t + 1
      const u32 low = kPlanes == 2 ? gpu::isa::transpose(pair.low) : 0;
      if (place.uses(8 * j + lane / 4)) put(place, row, {high, low});
      row = gpu::isa::advance(row, i64{8} * inter * sizeof(u16));
    }
  }

  template <int kSlots, class Place>
  __device__ void write_wide(const Place& place, int feature, const f32 (&d)[kSlots / 2]) const {
    const int lane = threadIdx.x % 32, column = lane % 4 * 2;
    f32* row = y_wide + i64{place.row(column)} * inter + feature + lane / 4;
#pragma unroll
    for (int j = 0; j < kSlots / 8; ++j) {
      if (place.uses(column + 8 * j)) row[0] = d[4 * j];
      if (place.uses(column + 8 * j + 1)) row[inter] = d[4 * j + 1];
      row = gpu::isa::advance(row, i64{8} * inter * sizeof(f32));
    }
  }

  // Without one, 16: d[4j + c] and d[4j + 2 + c] are features 2g and 2g + 1 of slot 8j + 2t + c.
  template <int kSlots, class Place, class T>
  __device__ void write_pairs(const Place& place, T* first, int feature, const f32 (&d)[kSlots / 2]) const {
    const int lane = threadIdx.x % 32, column = lane % 4 * 2;
    T* row[2];
    for (int c = 0; c < 2; ++c) row[c] = first + i64{place.row(column + c)} * inter + feature + lane / 4 * 2;
#pragma unroll
    for (int j = 0; j < kSlots / 8; ++j) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        T* at = row[c];
        row[c] = gpu::isa::advance(row[c], i64{8} * inter * sizeof(T));
        if (place.uses(column + 8 * j + c)) put(place, at, d[4 * j + c], d[4 * j + 2 + c]);
      }
    }
  }

  template <class Place>
  static __device__ void put(const Place&, f32* at, f32 first, f32 second) {
    *reinterpret_cast<float2*>(at) = {first, second};
  }
  template <class Place>
  __device__ void put(const Place& place, u16* at, f32 first, f32 second) const {
    put(place, at, planes_of(first, second));
  }
  template <class Place>
  __device__ void put(const Place& place, u16* at, const gpu::Planes& pair) const {
    place.put(reinterpret_cast<u32*>(at), pair.high);
    if constexpr (kPlanes == 2) place.put(reinterpret_cast<u32*>(at + plane), pair.low);
  }
};

}  // namespace fourmoe::sm90
