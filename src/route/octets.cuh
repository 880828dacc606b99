// octets: eight columns of a token as gemm1 takes them: rounded, times the routing weight, in two planes, quantised.
#pragma once

#include "gpu/fault.h"
#include "gpu/values.cuh"
#include "route/quantise.cuh"

namespace fourmoe::route {

// An octet of bf16 times the weight, rounded again.
__device__ __forceinline__ uint4 weighted(const uint4& x, f32 weight) {
  const u32 words[4] = {x.x, x.y, x.z, x.w};
  f32 product[8];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    product[2 * i] = gpu::low_bf16(words[i]) * weight;
    product[2 * i + 1] = gpu::high_bf16(words[i]) * weight;
  }
  return gpu::octet_bf16(product);
}

__device__ __forceinline__ void round_f16(f32 (&x)[8]) {
#pragma unroll
  for (f32& value : x) value = format::from_f16(format::to_f16_saturated(value));
}

// An octet as two planes of bf16, rounded to f16 before.
__device__ __forceinline__ void split(const f32 (&x)[8], uint4* high, uint4* low) {
  gpu::Planes pair[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) pair[i] = gpu::planes_of_f16(x[2 * i], x[2 * i + 1]);
  *high = {pair[0].high, pair[1].high, pair[2].high, pair[3].high};
  *low = {pair[0].low, pair[1].low, pair[2].low, pair[3].low};
}

// Whether a token has a scale that is NaN or negative, which is then its fault. All threads of a block call it.
__device__ __forceinline__ bool has_bad_scale(const format::Tensor& scales, i64 token, gpu::Fault* fault) {
  const u8* row = scales.row(token);
  i32 bad = threadIdx.x;
  while (bad < scales.cols && row[bad] <= format::kLargestScale) bad += blockDim.x;
  if (__syncthreads_or(bad < scales.cols) == 0) return false;
  if (bad < scales.cols) {
    const u64 key = gpu::fault_key(gpu::FaultKind::scale, static_cast<i32>(token), bad, row[bad]);
    atomicMin(reinterpret_cast<unsigned long long*>(&fault->first), key);
  }
  return true;
}

// Tokens of which every pick wants a row of its own: quantised by its expert's input scale, or times its weight.
struct PickRows {
  format::Tensor hidden;              // [tokens, hidden] f32|f16|bf16; rows begin at multiples of 16 bytes; caller's
  const f32* input_scales = nullptr;  // [experts] w4a4, weights::Expert::input_scale; null: w4a16
  u16* rows = nullptr;  // [planes, rows, hidden] bf16, f16 in two planes; null: picks of a token share a row
  i64 plane = 0;        // elements between two planes

  // Of a row: a warp's, a lane an octet.
  __device__ i32 pieces() const { return static_cast<i32>((hidden.cols / 8 + 31) / 32); }

  // A warp: a piece of the token, times the weight.
  template <int kPlanes>
  __device__ void make(i64 token, i32 piece, f32 weight, i32 expert, i64 row) const {
    const i64 octets = hidden.cols / 8, octet = 32 * piece + threadIdx.x % 32;
    const bool real = octet < octets;
    f32 x[8];
    gpu::load_octet(hidden.row(token), hidden.dtype, real ? octet : 0, x);
    uint4* to = reinterpret_cast<uint4*>(rows) + row * octets + octet;
    if (kPlanes == 1 && input_scales == nullptr) {
      if (real) *to = weighted(gpu::octet_bf16(x), weight);
      return;
    }
    if (kPlanes == 2) round_f16(x);
#pragma unroll
    for (f32& value : x) value *= weight;
    if constexpr (kPlanes == 2) {
      if (real) split(x, to, to + plane / 8);
    } else {
      const u32 largest = largest_of(x);
      const f32 global = input_scales[expert];
      const uint4 quantised = quantise_octet(x, largest, step_of(block_scale(largest, global), global));
      if (real) *to = quantised;
    }
  }
};

}  // namespace fourmoe::route
