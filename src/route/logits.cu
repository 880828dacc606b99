// Router logits: a block sums the products of a few experts with a few tokens.
//
// Each thread takes every 256th octet of columns, whatever the number of tokens; then lanes, then warps are added in a
// fixed order. Products of two f32 are exact in f64, so every step of a sum rounds once, as on the host.
#include "gpu/launch.cuh"
#include "gpu/rows.h"
#include "gpu/values.cuh"
#include "route/device.h"

namespace fourmoe::route {
namespace {

constexpr i32 kThreads = 256;
constexpr i32 kWarps = kThreads / 32;

struct Block {
  i32 token;   // first
  i32 expert;  // first
};

template <i32 kRows, i32 kExperts>
__device__ __forceinline__ Block block_of(const DeviceLogits& a) {
  const i32 columns = static_cast<i32>((a.router.rows + kExperts - 1) / kExperts);
  return {static_cast<i32>(blockIdx.x / columns) * kRows, static_cast<i32>(blockIdx.x % columns) * kExperts};
}

template <i32 kRows>
__device__ __forceinline__ void load_octets(const format::Tensor& from, i32 first, i32 octet, f64 (&out)[kRows][8]) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    f32 x[8];
    gpu::load_octet(from.row(min(first + r, static_cast<i32>(from.rows) - 1)), from.dtype, octet, x);
#pragma unroll
    for (int i = 0; i < 8; ++i) out[r][i] = x[i];
  }
}

template <i32 kRows, i32 kExperts>
__device__ __forceinline__ void add_octet(const DeviceLogits& a, const Block& at, i32 octet,
                                          f64 (&sums)[kRows][kExperts]) {
  f64 w[kExperts][8];
  load_octets(a.router, at.expert, octet, w);
#pragma unroll
  for (int t = 0; t < kRows; ++t) {
    f64 x[1][8];
    load_octets(a.hidden, at.token + t, octet, x);
#pragma unroll
    for (int e = 0; e < kExperts; ++e) {
#pragma unroll
      for (int i = 0; i < 8; ++i) sums[t][e] = fma(x[0][i], w[e][i], sums[t][e]);
    }
  }
}

// Threads 0 .. kRows * kExperts - 1 write a logit each.
template <i32 kRows, i32 kExperts>
__device__ __forceinline__ void reduce(const DeviceLogits& a, const Block& at, f64 (&sums)[kRows][kExperts]) {
  __shared__ f64 shared[kWarps][kRows * kExperts];
  const u32 warp = threadIdx.x / 32;
#pragma unroll
  for (int i = 0; i < kRows * kExperts; ++i) {
    f64 sum = sums[i / kExperts][i % kExperts];
    for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, d);
    if (threadIdx.x % 32 == 0) shared[warp][i] = sum;
  }
  __syncthreads();
  const i32 token = at.token + static_cast<i32>(threadIdx.x) / kExperts;
  const i32 expert = at.expert + static_cast<i32>(threadIdx.x) % kExperts;
  if (threadIdx.x >= kRows * kExperts || token >= a.hidden.rows || expert >= a.router.rows) return;
  f64 sum = 0.0;
  for (int w = 0; w < kWarps; ++w) sum += shared[w][threadIdx.x];
  a.logits[token * a.router.rows + expert] = static_cast<f32>(sum + (a.bias != nullptr ? f64{a.bias[expert]} : 0.0));
}

template <i32 kRows, i32 kExperts>
__global__ void __launch_bounds__(kThreads) multiply(const DeviceLogits a) {
  gpu::begin();
  const Block at = block_of<kRows, kExperts>(a);
  f64 sums[kRows][kExperts] = {};
  for (i32 octet = threadIdx.x; octet < a.hidden.cols / 8; octet += kThreads) add_octet(a, at, octet, sums);
  reduce(a, at, sums);
}

template <i32 kRows, i32 kExperts>
Status launch_tile(const DeviceLogits& args, void* stream) {
  const i64 blocks = (args.hidden.rows + kRows - 1) / kRows * ((args.router.rows + kExperts - 1) / kExperts);
  return gpu::launch("logits", multiply<kRows, kExperts>, {blocks, kThreads}, args, stream);
}

}  // namespace

Status launch_logits(const DeviceLogits& args, void* stream) {
  const i64 tokens = args.hidden.rows;
  if (tokens == 0) return {};
  Status status = gpu::check_rows("hidden_states", args.hidden);
  if (status.ok()) status = gpu::check_rows("router", args.router);
  if (!status.ok()) return status;
  if (tokens == 1) return launch_tile<1, 2>(args, stream);
  if (tokens == 2) return launch_tile<2, 2>(args, stream);
  if (tokens <= 32) return launch_tile<4, 2>(args, stream);
  return launch_tile<8, 4>(args, stream);
}

}  // namespace fourmoe::route
