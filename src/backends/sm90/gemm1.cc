// gemm1 on Hopper as a step: binds a call's views to the kernel of gemm1.h.
#include "backends/sm90/gemm1.h"

#include "args.h"
#include "backends/sm90/tiles.h"
#include "route/device.h"

namespace fourmoe::sm90 {
namespace {

// w4a4: activations before they are quantised, [slots, inter] f32.
i64 bytes(const Problem& problem, const Machine&) {
  const i64 values = i64{problem.max_tokens} * problem.top_k * problem.inter;
  return problem.precision == Precision::w4a4 ? values * static_cast<i64>(sizeof(f32)) : 0;
}

Load load_of(const Problem& problem, i64 tokens) {
  const i32 rows = problem.activation.gated() ? 2 * problem.inter : problem.inter;
  return {row_tiles(rows), problem.local_experts, tokens * problem.top_k, !problem.batch_invariant, true};
}

std::vector<Variant> variants_of(const Problem& problem, const Machine& machine, i64 tokens) {
  return variants(load_of(problem, tokens), form_of(problem), device_of(machine)->sms);
}

// Functions that only a build with CUDA uses are marked; all builds compile them.

[[maybe_unused]] Gemm1 bind(const Args& args, f32* wide, i32 variant) {
  const Problem& problem = *args.problem;
  const weights::DeviceTable& table = *args.weights.device;
  Gemm1 call;
  call.blobs = table.gemm1;
  call.globals = table.gemm1_globals;
  call.gate_bias = table.gate_bias;
  call.up_bias = table.up_bias;
  call.expert_begin = args.slots.expert_begin;
  call.rows = args.slots.rows;
  call.y = wide == nullptr ? args.inter.rows : nullptr;
  call.y_wide = wide;
  call.form = form_of(problem);
  call.powers = problem.encoding == format::Encoding::mxfp4;
  call.experts = problem.local_experts;
  call.hidden = problem.hidden;
  call.inter = problem.inter;
  call.max_slots = i64{problem.max_tokens} * problem.top_k;
  call.expected_slots = i64{args.tokens} * problem.top_k;
  call.split = !problem.batch_invariant;
  call.activation = problem.activation;
  call.tile = variant;
  call.follows_rows = true;  // no step runs without tokens
  call.progress = progress_of(problem, args.slots.progress);
  return call;
}

[[maybe_unused]] Status quantise(const Args& args, const f32* wide) {
  route::DeviceRows rows;
  rows.problem = *args.problem;
  rows.tokens = args.tokens;
  rows.columns = args.problem->inter;
  rows.values = wide;
  rows.slots = args.slots;
  rows.globals = args.weights.device->inter_scale;
  rows.rows = args.inter.rows;
  return route::launch_quantise_rows(rows, args.stream);
}

Status run(const Bound& bound) {
  if constexpr (!gpu::kBuilt) return gpu::not_built();
  else {
    const Args& args = *bound.args;
    const bool quantises = args.problem->precision == Precision::w4a4;
    f32* wide = quantises ? reinterpret_cast<f32*>(bound.scratch) : nullptr;
    Status status = launch(bind(args, wide, bound.variant), device_of(*args.machine)->sms, args.stream);
    return status.ok() && quantises ? quantise(args, wide) : status;
  }
}

}  // namespace

extern const Step kGemm1;
const Step kGemm1 = {
    "sm90",      "gemm1",  {Stage::gemm1, Stage::gemm1}, can, bytes, run, describe, nullptr, Place::device, &kPacking,
    variants_of, kRevision};

}  // namespace fourmoe::sm90
