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
  if (problem.max_tokens * problem.top_k > kFewPicks) {
    return reject(Reason::shape_unsupported, fmt::format("max_tokens is {} of top-{}; up to {} would pass",
                                                         problem.max_tokens, problem.top_k, kFewPicks / problem.top_k));
  }
  return accept();
}

i64 kept(const Problem&, const Machine& machine) { return 4 * i64{queue_shape(device_of(machine)->sms).words()}; }

i64 carve(const Problem& problem, const Machine& machine, std::byte* memory, Work* work) {
  Carver carver(memory);
  work->queue = reinterpret_cast<i32*>(carver.take<std::byte>(kept(problem, machine)));
  const i64 planes = form_of(problem).planes;
  const i64 rows_of_tokens = has_pick_rows(problem) ? most_hits(problem) * kHitTokens : problem.max_tokens;
  work->rows = carver.take<u16>(planes * rows_of_tokens * problem.hidden);
  if (problem.precision == Precision::w4a4) work->refused = carver.take<u8>(problem.max_tokens);
  const i32 rows = problem.max_tokens == 1 ? most_rows(problem) : most_hits(problem) * kHitTokens;
  work->y = carver.take<u16>(planes * rows * problem.inter);
  work->z = carver.take<f32>(i64{most_rows(problem)} * problem.hidden);
  return carver.used();
}

i64 bytes(const Problem& problem, const Machine& machine) {
  Work unused;
  return carve(problem, machine, nullptr, &unused);
}

std::vector<Variant> variants_of(const Problem& problem, const Machine& machine, i64 tokens) {
  return whole_variants(load_of(problem, tokens), device_of(machine)->sms);
}

// An expert with more tokens than columns is multiplied again for the rest, where wider tiles do it at once; and where
// tiles are few, only those that split K keep all multiprocessors busy, which take no more tokens than columns. Rows of
// all picks are made before the first of them is multiplied.
// Measured: docs/hopper.md, "Medium batches".
bool suits(const Problem& problem, const Machine& machine, i64 tokens) {
  const LayerLoad load = load_of(problem, tokens);
  const f64 mean = static_cast<f64>(load.slots) / problem.experts;
  const i32 tiles = load.experts * (load.row_tiles[0] + load.row_tiles[1]);
  return mean <= (tiles < 25 * device_of(machine)->sms ? 2.2 : load.by_pick ? 3.1 : 4.2);
}

[[maybe_unused]] Whole bind(const Bound& bound) {
  const Args& args = *bound.args;
  Whole call;
  call.tile = bound.variant;
  carve(*args.problem, *args.machine, bound.scratch, &call.work);
  call.clears = bound.kept == nullptr;
  if (!call.clears) call.work.queue = reinterpret_cast<i32*>(bound.kept);
  call.slots.problem = *args.problem;
  call.slots.tokens = args.tokens;
  call.slots.in = args.picks;
  call.slots.out = args.slots;
  call.slots.fault = args.fault;
  call.hidden = args.hidden;
  call.hidden_scales = args.hidden_scales;
  call.hidden.rows = args.tokens;  // a caller's may be more
  call.table = args.weights.device;
  call.shared = args.shared.asked;
  call.sum.tokens = args.tokens;
  call.sum.hidden = args.problem->hidden;
  call.sum.top_k = args.problem->top_k;
  call.sum.weight_on_input = args.problem->routing.weight_on_input;
  call.sum.addend = args.addend;
  call.sum.addend_weights = args.shared.weights;
  call.sum.out = args.output;
  return call;
}

Status run(const Bound& bound) {
  if constexpr (!gpu::kBuilt) return gpu::not_built();
  else return launch(bind(bound), device_of(*bound.args->machine)->sms, bound.args->stream);
}

}  // namespace

LayerLoad load_of(const Problem& problem, i64 tokens) {
  const i32 rows1 = problem.activation.gated() ? 2 * problem.inter : problem.inter;
  return {{row_tiles(rows1), row_tiles(problem.hidden)},    problem.local_experts, tokens * problem.top_k,
          !problem.batch_invariant && tokens <= kHitTokens, form_of(problem),      has_pick_rows(problem)};
}

bool has_pick_rows(const Problem& problem) {
  return problem.precision == Precision::w4a4 || problem.routing.weight_on_input;
}

// An expert has a hit for every eight of its tokens and one for the rest.
i32 most_hits(const Problem& problem) {
  const i32 picks = problem.max_tokens * problem.top_k;
  return std::min(picks, problem.local_experts + picks / kHitTokens) +
         (problem.max_tokens + kHitTokens - 1) / kHitTokens;
}

gpu::QueueShape queue_shape(i32 multiprocessors) { return {multiprocessors, kMostHits}; }

i32 most_rows(const Problem& problem) { return problem.max_tokens * (problem.top_k + 1); }

extern const Step kWhole;
const Step kWhole = {"sm90",    "whole",     {Stage::route, Stage::combine},
                     can_whole, bytes,       run,
                     describe,  nullptr,     Place::device,
                     &kPacking, variants_of, kRevision,
                     kept,      true,        suits};

}  // namespace fourmoe::sm90
