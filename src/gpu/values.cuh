// values: reading and writing runs of floats of the types that callers have, 16 bytes at a time where they lie so.
#pragma once

#include <cuda_bf16.h>

#include "format/nvfp4.h"
#include "format/tensor.h"

namespace fourmoe::gpu {

// Element `col` of a row of floats.
__device__ __forceinline__ f32 read(const void* row, format::Dtype dtype, i64 col) {
  if (dtype == format::Dtype::f32) return static_cast<const f32*>(row)[col];
  const u16 half = static_cast<const u16*>(row)[col];
  return dtype == format::Dtype::f16 ? format::from_f16(half) : format::from_bf16(half);
}

// The two halves of a word, the lower address first.
__device__ __forceinline__ f32 low_bf16(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ f32 high_bf16(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }
__device__ __forceinline__ u32 pair_bf16(f32 low, f32 high) {
  return format::to_bf16(low) | u32{format::to_bf16(high)} << 16;
}
__device__ __forceinline__ u32 pair_f16(f32 low, f32 high) {
  return format::to_f16_saturated(low) | u32{format::to_f16_saturated(high)} << 16;
}

// Two values rounded to f16, each as two bf16 that sum to it: 11 significant bits are 8 and at most 3 more. What is
// beyond f16 becomes its largest, as everywhere here; NaN stays NaN.
struct Planes {
  u32 high;
  u32 low;
};

__device__ __forceinline__ Planes planes_of_f16(f32 first, f32 second) {
  const f32 x = format::from_f16(format::to_f16_saturated(first));
  const f32 y = format::from_f16(format::to_f16_saturated(second));
  const u32 high = pair_bf16(x, y);
  return {high, pair_bf16(x - low_bf16(high), y - high_bf16(high))};
}

// The products of two pairs of bf16, rounded.
__device__ __forceinline__ u32 multiply_bf16(u32 a, u32 b) {
  const __nv_bfloat162 product =
      __hmul2_rn(*reinterpret_cast<const __nv_bfloat162*>(&a), *reinterpret_cast<const __nv_bfloat162*>(&b));
  return *reinterpret_cast<const u32*>(&product);
}

// Eight values from column 8 * octet on; the row begins at a multiple of 16 bytes.
__device__ __forceinline__ void load_octet(const void* row, format::Dtype dtype, i64 octet, f32 (&x)[8]) {
  if (dtype == format::Dtype::f32) {
    const float4 low = static_cast<const float4*>(row)[2 * octet];
    const float4 high = static_cast<const float4*>(row)[2 * octet + 1];
    x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
    x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
    return;
  }
  const uint4 halves = static_cast<const uint4*>(row)[octet];
  const u32 words[4] = {halves.x, halves.y, halves.z, halves.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const bool f16 = dtype == format::Dtype::f16;
    x[2 * i] = f16 ? format::from_f16(static_cast<u16>(words[i])) : low_bf16(words[i]);
    x[2 * i + 1] = f16 ? format::from_f16(static_cast<u16>(words[i] >> 16)) : high_bf16(words[i]);
  }
}

__device__ __forceinline__ uint4 octet_bf16(const f32 (&x)[8]) {
  return {pair_bf16(x[0], x[1]), pair_bf16(x[2], x[3]), pair_bf16(x[4], x[5]), pair_bf16(x[6], x[7])};
}

// Neighbouring columns of a row of f32, moved at once.
template <int kCount>
struct alignas(4 * kCount) Columns {
  f32 at[kCount];
};

// At column kCount * index.
template <int kCount>
__device__ __forceinline__ void store_columns(void* row, format::Dtype dtype, i64 index, const Columns<kCount>& x) {
  struct alignas(2 * kCount) Pairs {
    u32 at[kCount / 2];
  } pairs;
  if (dtype == format::Dtype::f32) {
    static_cast<Columns<kCount>*>(row)[index] = x;
    return;
  }
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) {
    pairs.at[i] =
        dtype == format::Dtype::f16 ? pair_f16(x.at[2 * i], x.at[2 * i + 1]) : pair_bf16(x.at[2 * i], x.at[2 * i + 1]);
  }
  static_cast<Pairs*>(row)[index] = pairs;
}

// E2M1 by code: with the exponent field of an f32 the magnitude's bits are short by 2^126, subnormal 0.5 included.
__device__ __forceinline__ f32 from_e2m1(u32 code) {
  const f32 magnitude = __uint_as_float((code & 7u) << 22) * 0x1p126f;
  return __uint_as_float(__float_as_uint(magnitude) | (code & 8u) << 28);
}

}  // namespace fourmoe::gpu
