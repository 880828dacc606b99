// The whole layer in plain double: what every other room must equal within its bounds. Read this to know what fourmoe
// computes.
#include <algorithm>

#include "backends/reference/atom.h"

namespace fourmoe::reference {
namespace {

// out[t] = addend[t] + sum over the token's picks of  w * down( activate( gate(x), up(x) ) )
Row layer(const Args& args, i64 t) {
  const Problem& problem = *args.problem;
  Row sum(problem.hidden, 0.0);
  if (args.addend.addend != nullptr) std::copy_n(args.addend.addend + t * problem.hidden, problem.hidden, sum.begin());

  for (i64 pick = t * problem.top_k; pick < (t + 1) * problem.top_k; ++pick) {
    const i64 local = args.slots.ids[pick] - problem.first_expert;
    if (args.slots.ids[pick] < 0 || local < 0 || local >= problem.local_experts) continue;  // no pick, or not ours
    const weights::Expert& expert = args.weights.experts[local];

    const Row x = token(args, pick, expert);
    const Row y = round(problem, gemm1(problem, expert, x), expert.inter_scale);
    const Row z = gemm2(problem, expert, y);

    const f64 factor = problem.routing.weight_on_input ? 1.0 : args.slots.weights[pick];
    for (i64 h = 0; h < problem.hidden; ++h) sum[h] += factor * z[h];
  }
  return sum;
}

Status run(const Bound& bound) {
  const Args& args = *bound.args;
  const Problem& problem = *args.problem;
  Status routed = route::pick(problem, args.picks, args.tokens, *args.executor, args.slots);
  if (!routed.ok()) return routed;

  args.executor->parallel_for(args.tokens, [&](i64 t) {
    const Row out = layer(args, t);
    u8* row = args.output.output.row(t);
    for (i64 h = 0; h < problem.hidden; ++h) {
      format::write(row, args.output.output.dtype, h, static_cast<f32>(out[h]));
    }
  });
  return {};
}

}  // namespace

extern const Step kWhole;
const Step kWhole = {
    "reference", "whole", {Stage::route, Stage::combine}, can, [](const Problem&, const Machine&) { return i64{0}; },
    run};

}  // namespace fourmoe::reference
