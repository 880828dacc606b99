#include "gpu/launch.cuh"
#include "route/shared.h"

namespace fourmoe::route {
namespace {

constexpr i32 kThreads = 256;

struct Weights {
  f32* values;  // [tokens] logits, overwritten
  i64 tokens;
  bool gated;
};

__global__ void weigh(const __grid_constant__ Weights args) {
  gpu::begin();
  const i64 token = i64{blockIdx.x} * kThreads + threadIdx.x;
  if (token >= args.tokens) return;
  args.values[token] = args.gated ? 1.0f / (1.0f + expf(-args.values[token])) : 1.0f;
}

}  // namespace

Status launch_shared_weights(const DeviceLogits& args, void* stream) {
  const bool gated = !args.router.empty();
  if (gated) {
    if (Status status = launch_logits(args, stream); !status.ok()) return status;
  }
  const Weights weights = {args.logits, args.hidden.rows, gated};
  const gpu::Grid grid = {(args.hidden.rows + kThreads - 1) / kThreads, kThreads};
  return gpu::launch("shared weights", weigh, grid, weights, stream);
}

}  // namespace fourmoe::route
