// Args: the views that one call binds, stage by stage. plan.cc places the views between stages in the workspace.
#pragma once

#include "combine/combine.h"
#include "executor.h"
#include "gemm1/gemm1.h"
#include "gemm2/gemm2.h"
#include "machine.h"
#include "route/route.h"
#include "weights/expert_table.h"

namespace fourmoe {

namespace gpu {
struct Fault;  // gpu/fault.h: what kernels found wrong
}

// The layer's shared expert, for a step that computes it with the routed ones (Step::takes_shared).
struct Shared {
  bool asked = false;            // it is entry [local_experts] of the table on the device
  const f32* weights = nullptr;  // [tokens] of its output; null: 1
};

struct Args {
  const Problem* problem = nullptr;
  const Machine* machine = nullptr;
  Executor* executor = nullptr;
  weights::ExpertTable weights;
  i32 tokens = 0;         // rows in use, <= problem->max_tokens
  format::Tensor hidden;  // [tokens, hidden] bf16|f16|f32; caller's

  // w4a4: tokens that the caller quantised. hidden is then [tokens, hidden/2] u8, E2M1 pairs, low nibble
  // first, and these are their scales [tokens, hidden/16] u8, E4M3; a value is code * scale * the expert's input_scale.
  // Empty: the plan quantises.
  format::Tensor hidden_scales;

  // Plans for a GPU, where all views above and below lie in its memory:
  void* stream = nullptr;       // cudaStream_t; null: the default stream
  gpu::Fault* fault = nullptr;  // in host memory that the device sees; the layer's
  std::byte* kept = nullptr;    // [Plan::kept_bytes] of the workspace's calls; the layer's; null: nothing is kept

  route::In picks;
  route::Picked picked;
  route::Out slots;
  gemm1::Out inter;
  gemm2::Out partial;
  combine::In addend;
  Shared shared;
  combine::Out output;
};

}  // namespace fourmoe
