// sum: four columns of one token's output, in the order that combine.h fixes.
#pragma once

#include "combine/device.h"
#include "gpu/values.cuh"
#include "route/device.h"

namespace fourmoe::combine {

inline constexpr int kBatch = 4;  // rows in flight a thread where others hide their way; divides 32
inline constexpr u32 kAll = 0xffffffffu;

// Lane p of every warp has the token's pick p.
struct Pick {
  i32 slot;  // negative for none
  f32 weight;
};

__device__ __forceinline__ Pick pick_of_lane(const DeviceSum& sum, i64 token) {
  const i32 lane = static_cast<i32>(threadIdx.x % 32);
  if (lane >= sum.top_k) return {-1, 0.0f};
  const i64 pick = token * sum.top_k + lane;
  return {sum.pick_slot[pick], sum.weight_on_input ? 1.0f : sum.weights[pick]};
}

// Adds picks p .. p + kRows - 1 in order; each product and each sum rounded, as the host does.
template <int kRows>
__device__ __forceinline__ void add_picks(const float4* column, i64 quads, const Pick& lane_pick, i32 p, float4* acc) {
  i32 slot[kRows];
  float4 z[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    slot[i] = __shfl_sync(kAll, lane_pick.slot, p + i);
    if (slot[i] >= 0) z[i] = column[slot[i] * quads];
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const f32 weight = __shfl_sync(kAll, lane_pick.weight, p + i);
    if (slot[i] < 0) continue;  // not even a zero: -0 + 0 is 0
    acc->x = __fadd_rn(acc->x, __fmul_rn(weight, z[i].x));
    acc->y = __fadd_rn(acc->y, __fmul_rn(weight, z[i].y));
    acc->z = __fadd_rn(acc->z, __fmul_rn(weight, z[i].z));
    acc->w = __fadd_rn(acc->w, __fmul_rn(weight, z[i].w));
  }
}

// Columns 4 * quad .. of a token. All lanes of a warp call it with the same token; kRows divides 32.
template <int kRows = kBatch>
__device__ __forceinline__ float4 sum_quad(const DeviceSum& sum, i64 token, i32 quad) {
  const i64 quads = sum.hidden / 4;
  const Pick pick = pick_of_lane(sum, token);
  const float4* column = reinterpret_cast<const float4*>(sum.rows) + quad;
  float4 acc = {0.0f, 0.0f, 0.0f, 0.0f};
  if (sum.addend.addend != nullptr) acc = reinterpret_cast<const float4*>(sum.addend.addend)[token * quads + quad];
  for (i32 p = 0; p < sum.top_k; p += kRows) add_picks<kRows>(column, quads, pick, p, &acc);
  if (__shfl_sync(kAll, pick.slot, 0) == route::kRefused) acc.x = acc.y = acc.z = acc.w = __uint_as_float(0x7fc00000u);
  return acc;
}

}  // namespace fourmoe::combine
