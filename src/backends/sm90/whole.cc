// whole on Hopper as a step: binds a call's views to the launches of whole.h.
#include "backends/sm90/whole.h"

#include <fmt/format.h>

#include <algorithm>

#include "args.h"
#include "backends/sm90/tiles.h"

namespace fourmoe::sm90 {
namespace {

Verdict can_whole(const Problem& problem, const Machine& machine) {
  if (Verdict verdict = can(problem, machine); !verdict.accepted()) return verdict;
  if (problem.max_tokens > kFewTokens) {
    return reject(Reason::shape_unsupported,
                  fmt::format("max_tokens is {}; up to {} would pass", problem.max_tokens, kFewTokens));
  }
  if (problem.encoding != format::Encoding::nvfp4) {
    return reject(Reason::encoding_unsupported,
                  fmt::format("weights are {}; nvfp4 would pass", format::encoding_name(problem.encoding)));
  }
  if (problem.activations != format::Dtype::bf16) {
    return reject(Reason::dtype_unsupported,
                  fmt::format("activations are {}; bf16 would pass", format::dtype_name(problem.activations)));
  }
  if (problem.precision != Precision::w4a16) {
    return reject(Reason::precision_unsupported, "w4a4 quantises between the GEMMs; w4a16 would pass");
  }
  if (problem.routing.weight_on_input) {
    return reject(Reason::routing_unsupported, "weights on the input differ by pick; weights on the output would pass");
  }
  return accept();
}

i64 carve(const Problem& problem, std::byte* memory, Work* work) {
  const i64 most = most_hits(problem);
  Carver carver(memory);
  work->hits = carver.take<i32>(1);
  work->tickets = carver.take<i32>(1);
  work->list = carver.take<Hit>(most);
  work->ready = carver.take<i32>(most);
  work->done = carver.take<i32>(row_tiles(problem.hidden));
  work->rows = carver.take<u16>(i64{kFewTokens} * problem.hidden);
  work->y = carver.take<u16>(most * kFewTokens * problem.inter);
  work->z = carver.take<f32>(most * kFewTokens * problem.hidden);
  return carver.used();
}

i64 bytes(const Problem& problem, const Machine&) {
  Work unused;
  return carve(problem, nullptr, &unused);
}

std::vector<Variant> variants_of(const Problem& problem, const Machine& machine, i64 tokens) {
  return whole_variants(load_of(problem, tokens), device_of(machine)->sms);
}

[[maybe_unused]] Whole bind(const Args& args, std::byte* scratch, i32 variant) {
  Whole call;
  call.tile = variant;
  carve(*args.problem, scratch, &call.work);
  call.slots.problem = *args.problem;
  call.slots.tokens = args.tokens;
  call.slots.in = args.picks;
  call.slots.out = args.slots;
  call.slots.fault = args.fault;
  call.hidden = args.hidden;
  call.table = args.weights.device;
  call.sum.tokens = args.tokens;
  call.sum.hidden = args.problem->hidden;
  call.sum.top_k = args.problem->top_k;
  call.sum.pick_slot = args.slots.pick_slot;
  call.sum.weights = args.slots.weights;
  call.sum.rows = call.work.z;
  call.sum.addend = args.addend;
  call.sum.out = args.output;
  return call;
}

Status run(const Bound& bound) {
  if constexpr (!gpu::kBuilt) return gpu::check_launch("sm90 whole");
  else
    return launch(bind(*bound.args, bound.scratch, bound.variant), device_of(*bound.args->machine)->sms,
                  bound.args->stream);
}

}  // namespace

Load load_of(const Problem& problem, i64 tokens) {
  return {row_tiles(problem.hidden), problem.local_experts, tokens * problem.top_k, !problem.batch_invariant, false};
}

i32 most_hits(const Problem& problem) { return std::min(problem.local_experts, kFewTokens * problem.top_k); }

extern const Step kWhole;
const Step kWhole = {"sm90",    "whole",     {Stage::route, Stage::combine},
                     can_whole, bytes,       run,
                     describe,  nullptr,     Place::device,
                     &kPacking, variants_of, kRevision};

}  // namespace fourmoe::sm90
