// gemm2 on Hopper as a step: binds a call's views to the kernel of gemm2.h.
#include "backends/sm90/gemm2.h"

#include "args.h"
#include "backends/sm90/tiles.h"

namespace fourmoe::sm90 {
namespace {

std::vector<Variant> variants_of(const Problem& problem, const Machine& machine, i64 tokens) {
  const Load load{row_tiles(problem.hidden), problem.local_experts, tokens * problem.top_k, !problem.batch_invariant,
                  false};
  return variants(load, form_of(problem), device_of(machine)->sms);
}

Status run(const Bound& bound) {
  if constexpr (!gpu::kBuilt) return gpu::not_built();
  else {
    const Args& args = *bound.args;
    const Problem& problem = *args.problem;
    const weights::DeviceTable& table = *args.weights.device;
    Gemm2 call;
    call.blobs = table.gemm2;
    call.globals = table.gemm2_globals;
    call.bias = table.down_bias;
    call.expert_begin = args.slots.expert_begin;
    call.rows = args.inter.rows;
    call.z = args.partial.rows;
    call.form = form_of(problem);
    call.powers = problem.encoding == format::Encoding::mxfp4;
    call.experts = problem.local_experts;
    call.hidden = problem.hidden;
    call.inter = problem.inter;
    call.max_slots = i64{problem.max_tokens} * problem.top_k;
    call.expected_slots = i64{args.tokens} * problem.top_k;
    call.split = !problem.batch_invariant;
    call.tile = bound.variant;
    call.progress = progress_of(problem, args.slots.progress);
    call.follows_gemm1 = true;  // or, in w4a4, what quantises its result and reads the same expert_begin
    return launch(call, device_of(*args.machine)->sms, args.stream);
  }
}

}  // namespace

extern const Step kGemm2;
const Step kGemm2 = {"sm90",
                     "gemm2",
                     {Stage::gemm2, Stage::gemm2},
                     can,
                     [](const Problem&, const Machine&) { return i64{0}; },
                     run,
                     describe,
                     nullptr,
                     Place::device,
                     &kPacking,
                     variants_of,
                     kRevision};

}  // namespace fourmoe::sm90
