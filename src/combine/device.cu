#include "combine/device.h"
#include "gpu/launch.cuh"
#include "gpu/rows.h"
#include "gpu/values.cuh"
#include "route/device.h"

namespace fourmoe::combine {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocks = 6;  // of a multiprocessor: enough rows on their way to keep the memory busy
constexpr int kBatch = 4;   // rows in flight a thread; divides 32
constexpr u32 kAll = 0xffffffffu;

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

// Adds picks p .. p + kBatch - 1 in order; each product and each sum rounded, as the host does.
__device__ __forceinline__ void add_picks(const float4* column, i64 quads, const Pick& lane_pick, i32 p, float4* acc) {
  i32 slot[kBatch];
  float4 z[kBatch];
#pragma unroll
  for (int i = 0; i < kBatch; ++i) {
    slot[i] = __shfl_sync(kAll, lane_pick.slot, p + i);
    if (slot[i] >= 0) z[i] = column[slot[i] * quads];
  }
#pragma unroll
  for (int i = 0; i < kBatch; ++i) {
    const f32 weight = __shfl_sync(kAll, lane_pick.weight, p + i);
    if (slot[i] < 0) continue;  // not even a zero: -0 + 0 is 0
    acc->x = __fadd_rn(acc->x, __fmul_rn(weight, z[i].x));
    acc->y = __fadd_rn(acc->y, __fmul_rn(weight, z[i].y));
    acc->z = __fadd_rn(acc->z, __fmul_rn(weight, z[i].z));
    acc->w = __fadd_rn(acc->w, __fmul_rn(weight, z[i].w));
  }
}

// A block has kThreads quads of columns of one token.
__global__ void __launch_bounds__(kThreads, kBlocks) sum_picks(const DeviceSum sum) {
  gpu::begin();
  const i32 quads = sum.hidden / 4;
  const i32 parts = (quads + kThreads - 1) / kThreads;
  const i64 token = blockIdx.x / parts;
  const i32 at = static_cast<i32>(blockIdx.x % parts * kThreads + threadIdx.x);
  const i32 quad = min(at, quads - 1);  // all lanes keep step
  const Pick pick = pick_of_lane(sum, token);
  const float4* column = reinterpret_cast<const float4*>(sum.rows) + quad;
  float4 acc = {0.0f, 0.0f, 0.0f, 0.0f};
  if (sum.addend.addend != nullptr) acc = reinterpret_cast<const float4*>(sum.addend.addend)[token * quads + quad];
  for (i32 p = 0; p < sum.top_k; p += kBatch) add_picks(column, quads, pick, p, &acc);
  if (__shfl_sync(kAll, pick.slot, 0) == route::kRefused) acc.x = acc.y = acc.z = acc.w = __uint_as_float(0x7fc00000u);
  if (at < quads) gpu::store_quad(sum.out.output.row(token), sum.out.output.dtype, quad, acc);
}

}  // namespace

Status launch_combine(const DeviceSum& sum, void* stream) {
  if (sum.tokens == 0) return {};
  if (Status status = gpu::check_rows("output", sum.out.output); !status.ok()) return status;
  const i64 parts = (sum.hidden / 4 + kThreads - 1) / kThreads;
  return gpu::launch("combine", sum_picks, {sum.tokens * parts, kThreads}, sum, stream);
}

}  // namespace fourmoe::combine
