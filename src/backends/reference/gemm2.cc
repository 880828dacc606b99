#include "backends/reference/atom.h"
#include "format/quantise.h"

namespace fourmoe::reference {
namespace {

// The intermediate that gemm1 left for this slot.
Row read_inter(const Args& args, i64 slot, f32 global) {
  const Problem& problem = *args.problem;
  const i64 inter = problem.inter;
  Row y(inter);
  if (problem.precision == Precision::w4a4) {
    std::vector<f32> decoded(inter);
    format::dequantise_row(args.inter.codes + slot * (inter / 2),
                           args.inter.scales + slot * (inter / format::kNvfp4Block), inter, decoded.data());
    for (i64 i = 0; i < inter; ++i) y[i] = f64{decoded[i]} * global;
    return y;
  }
  for (i64 i = 0; i < inter; ++i) y[i] = format::read(args.inter.rows + slot * inter, problem.activations, i);
  return through_int8(problem, y);
}

Status run(const Bound& bound) {
  const Args& args = *bound.args;
  const Problem& problem = *args.problem;
  args.executor->parallel_for(args.slots.expert_begin[problem.local_experts], [&](i64 slot) {
    const i64 pick = args.slots.slot_pick[slot];
    const weights::Expert& expert = args.weights.experts[args.slots.ids[pick] - problem.first_expert];
    const Row z = gemm2(problem, expert, read_inter(args, slot, expert.inter_scale));
    for (i64 h = 0; h < problem.hidden; ++h) args.partial.rows[slot * problem.hidden + h] = static_cast<f32>(z[h]);
  });
  return {};
}

}  // namespace

Row gemm2(const Problem& problem, const weights::Expert& expert, const Row& y) {
  Row z(problem.hidden);
  for (i64 h = 0; h < problem.hidden; ++h) {
    z[h] = dot(expert.down, h, y) + (expert.down_bias ? expert.down_bias[h] : 0.0f);
  }
  return z;
}

extern const Step kGemm2;
const Step kGemm2 = {
    "reference", "gemm2", {Stage::gemm2, Stage::gemm2}, can, [](const Problem&, const Machine&) { return i64{0}; },
    run};

}  // namespace fourmoe::reference
