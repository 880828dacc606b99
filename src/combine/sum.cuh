// sum: some columns of one token's output, in the order that combine.h fixes.
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

// How rows are read: as they lie.
struct Stored {
  template <int kRows, int kCount>
  __device__ __forceinline__ void read(const gpu::Columns<kCount>* column, i64 stride, const i32 (&slot)[kRows],
                                       gpu::Columns<kCount> (&z)[kRows]) const {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (slot[i] >= 0) z[i] = column[slot[i] * stride];
    }
  }
  template <int kCount>
  __device__ __forceinline__ gpu::Columns<kCount> addend(const gpu::Columns<kCount>* at) const {
    return *at;
  }
};

// Adds picks p .. p + kRows - 1 in order; each product and each sum rounded, as the host does.
template <int kRows, int kCount, class Rows>
__device__ __forceinline__ void add_picks(const gpu::Columns<kCount>* column, i64 stride, const Pick& lane_pick, i32 p,
                                          const Rows& rows, gpu::Columns<kCount>* acc) {
  i32 slot[kRows];
  gpu::Columns<kCount> z[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) slot[i] = __shfl_sync(kAll, lane_pick.slot, p + i);
  rows.read(column, stride, slot, z);
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const f32 weight = __shfl_sync(kAll, lane_pick.weight, p + i);
    if (slot[i] < 0) continue;  // not even a zero: -0 + 0 is 0
#pragma unroll
    for (int c = 0; c < kCount; ++c) acc->at[c] = __fadd_rn(acc->at[c], __fmul_rn(weight, z[i].at[c]));
  }
}

// kCount columns of a token from kCount * index on. All lanes of a warp call it with the same token; kRows, the picks
// whose rows are in flight at once, divides 32.
template <int kRows, int kCount, class Rows = Stored>
__device__ __forceinline__ gpu::Columns<kCount> sum_columns(const DeviceSum& sum, i64 token, i32 index,
                                                            const Rows& rows = {}) {
  using Columns = gpu::Columns<kCount>;
  const i64 stride = sum.hidden / kCount;
  const Pick pick = pick_of_lane(sum, token);
  const Columns* column = reinterpret_cast<const Columns*>(sum.rows) + index;
  Columns acc = {};
  if (sum.addend.addend != nullptr) {
    acc = rows.addend(reinterpret_cast<const Columns*>(sum.addend.addend) + token * stride + index);
    const f32 weight = sum.addend_weights == nullptr ? 1.0f : sum.addend_weights[token];
#pragma unroll
    for (int c = 0; c < kCount; ++c) acc.at[c] = __fmul_rn(weight, acc.at[c]);
  }
  for (i32 p = 0; p < sum.top_k; p += kRows) add_picks<kRows>(column, stride, pick, p, rows, &acc);
  if (__shfl_sync(kAll, pick.slot, 0) == route::kRefused) {
#pragma unroll
    for (int c = 0; c < kCount; ++c) acc.at[c] = __uint_as_float(0x7fc00000u);
  }
  return acc;
}

}  // namespace fourmoe::combine
