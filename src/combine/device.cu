#include "combine/device.h"
#include "gpu/launch.cuh"
#include "gpu/rows.h"
#include "gpu/values.cuh"
#include "route/device.h"

namespace fourmoe::combine {
namespace {

constexpr int kThreads = 256;
constexpr int kBatch = 8;  // rows in flight a thread

// Adds picks [0, count) in order; each product and each sum rounded, as the host does.
__device__ __forceinline__ void add_picks(const DeviceSum& sum, i64 pick, int count, i64 quad, float4* acc) {
  const i64 quads = sum.hidden / 4;
  i32 slot[kBatch];
  f32 weight[kBatch];
  float4 z[kBatch];
#pragma unroll
  for (int i = 0; i < kBatch; ++i) {
    slot[i] = i < count ? sum.pick_slot[pick + i] : -1;
    weight[i] = i < count && !sum.weight_on_input ? sum.weights[pick + i] : 1.0f;
  }
#pragma unroll
  for (int i = 0; i < kBatch; ++i) {
    if (slot[i] >= 0) z[i] = __ldcs(reinterpret_cast<const float4*>(sum.rows) + slot[i] * quads + quad);
  }
#pragma unroll
  for (int i = 0; i < kBatch; ++i) {
    if (slot[i] < 0) continue;  // not even a zero: -0 + 0 is 0
    acc->x = __fadd_rn(acc->x, __fmul_rn(weight[i], z[i].x));
    acc->y = __fadd_rn(acc->y, __fmul_rn(weight[i], z[i].y));
    acc->z = __fadd_rn(acc->z, __fmul_rn(weight[i], z[i].z));
    acc->w = __fadd_rn(acc->w, __fmul_rn(weight[i], z[i].w));
  }
}

// A block has kThreads quads of columns of one token.
__global__ void __launch_bounds__(kThreads) sum_picks(const DeviceSum sum) {
  gpu::begin();
  const i32 quads = sum.hidden / 4;
  const i32 parts = (quads + kThreads - 1) / kThreads;
  const i64 token = blockIdx.x / parts;
  const i32 quad = blockIdx.x % parts * kThreads + threadIdx.x;
  if (quad >= quads) return;
  const i64 first = token * sum.top_k;
  float4 acc = {0.0f, 0.0f, 0.0f, 0.0f};
  if (sum.addend.addend != nullptr) acc = reinterpret_cast<const float4*>(sum.addend.addend)[token * quads + quad];
  for (i32 p = 0; p < sum.top_k; p += kBatch) add_picks(sum, first + p, min(kBatch, sum.top_k - p), quad, &acc);
  if (sum.pick_slot[first] == route::kRefused) acc.x = acc.y = acc.z = acc.w = __uint_as_float(0x7fc00000u);
  gpu::store_quad(sum.out.output.row(token), sum.out.output.dtype, quad, acc);
}

}  // namespace

Status launch_combine(const DeviceSum& sum, void* stream) {
  if (sum.tokens == 0) return {};
  if (Status status = gpu::check_rows("output", sum.out.output); !status.ok()) return status;
  const i64 parts = (sum.hidden / 4 + kThreads - 1) / kThreads;
  return gpu::launch("combine", sum_picks, {sum.tokens * parts, kThreads}, sum, stream);
}

}  // namespace fourmoe::combine
