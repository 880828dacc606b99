#include "combine/sum.cuh"
#include "gpu/launch.cuh"
#include "gpu/rows.h"

namespace fourmoe::combine {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocks = 6;  // of a multiprocessor: enough rows on their way to keep the memory busy
// A block has kThreads quads of columns of one token.
__global__ void __launch_bounds__(kThreads, kBlocks) sum_picks(const DeviceSum sum) {
  gpu::begin();
  const i32 quads = sum.hidden / 4;
  const i32 parts = (quads + kThreads - 1) / kThreads;
  const i64 token = blockIdx.x / parts;
  const i32 at = static_cast<i32>(blockIdx.x % parts * kThreads + threadIdx.x);
  const i32 quad = min(at, quads - 1);  // all lanes keep step
  const float4 acc = sum_quad(sum, token, quad);
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
