#include <algorithm>

#include "backends/reference/atom.h"
#include "format/quantise.h"
#include "gemm1/activation.h"

namespace fourmoe::reference {
namespace {

// Through f32, as every room holds it before it rounds.
f64 round_to(format::Dtype dtype, f64 value) {
  const f32 single = static_cast<f32>(value);
  return dtype == format::Dtype::f16 ? format::from_f16(format::to_f16_saturated(single))
                                     : format::from_bf16(format::to_bf16(single));
}

Row through_nvfp4(const Row& values, f32 global) {
  const i64 n = static_cast<i64>(values.size());
  const std::vector<f32> single(values.begin(), values.end());
  std::vector<u8> codes(n / 2);
  std::vector<u8> scales(n / format::kNvfp4Block);
  std::vector<f32> decoded(n);
  format::quantise_row(single.data(), n, global, codes.data(), scales.data());
  format::dequantise_row(codes.data(), scales.data(), n, decoded.data());
  Row out(decoded.begin(), decoded.end());
  for (f64& value : out) value *= global;
  return out;
}

// Stage by stage: every slot's intermediate, where whole.cc goes token by token.
Status run(const Bound& bound) {
  const Args& args = *bound.args;
  const Problem& problem = *args.problem;
  const i64 inter = problem.inter;
  args.executor->parallel_for(args.slots.expert_begin[problem.local_experts], [&](i64 slot) {
    const i64 pick = args.slots.slot_pick[slot];
    const weights::Expert& expert = args.weights.experts[args.slots.ids[pick] - problem.first_expert];
    const Row y = gemm1(problem, expert, token(args, pick, expert));
    const std::vector<f32> single(y.begin(), y.end());
    if (problem.precision == Precision::w4a4) {
      format::quantise_row(single.data(), inter, expert.inter_scale, args.inter.codes + slot * (inter / 2),
                           args.inter.scales + slot * (inter / format::kNvfp4Block));
      return;
    }
    for (i64 i = 0; i < inter; ++i) format::write(args.inter.rows + slot * inter, problem.activations, i, single[i]);
  });
  return {};
}

}  // namespace

f64 dot(const format::Matrix& weights, i64 row, const Row& x) {
  f64 sum = 0.0;
  for (i64 k = 0; k < weights.cols; ++k) sum += format::weight_at(weights, row, k) * x[k];
  return sum * weights.global;
}

Row through_int8(const Problem& problem, const Row& values) {
  if (problem.precision != Precision::w4a8_int8) return values;
  const std::vector<f32> single(values.begin(), values.end());
  std::vector<i8> codes(values.size());
  std::vector<f32> halves(values.size() / format::kInt8Group + 1);
  format::quantise_int8(single.data(), static_cast<i64>(values.size()), codes.data(), halves.data());
  Row out(values.size());
  for (std::size_t i = 0; i < out.size(); ++i) out[i] = codes[i] * 2.0 * halves[i / format::kInt8Group];
  return out;
}

Row token(const Args& args, i64 pick, const weights::Expert& expert) {
  const Problem& problem = *args.problem;
  const f32 weight = args.slots.weights[pick];
  const u8* row = args.hidden.row(pick / problem.top_k);
  Row x(problem.hidden);
  if (!args.hidden_scales.empty()) {  // quantised by the caller
    const u8* scales = args.hidden_scales.row(pick / problem.top_k);
    for (i64 k = 0; k < problem.hidden; ++k) {
      x[k] = f64{format::from_e2m1(format::code_at(row, k))} * format::from_e4m3(scales[k / format::kNvfp4Block]) *
             expert.input_scale;
    }
    return x;
  }
  for (i64 k = 0; k < problem.hidden; ++k) x[k] = format::read(row, args.hidden.dtype, k);
  const bool weighted = problem.routing.weight_on_input;
  if (problem.precision == Precision::w4a4) {
    for (f64& value : x) value = weighted ? static_cast<f32>(value) * weight : value;
    return through_nvfp4(x, expert.input_scale);
  }
  for (f64& value : x) {
    value = round_to(problem.activations, value);
    if (weighted) value = round_to(problem.activations, value * weight);
  }
  return through_int8(problem, x);
}

Row gemm1(const Problem& problem, const weights::Expert& expert, const Row& x) {
  Row y(problem.inter);
  for (i64 i = 0; i < problem.inter; ++i) {
    f64 gate = 0.0;
    if (problem.activation.gated()) gate = dot(expert.gate, i, x) + (expert.gate_bias ? expert.gate_bias[i] : 0.0f);
    const f64 up = dot(expert.up, i, x) + (expert.up_bias ? expert.up_bias[i] : 0.0f);
    y[i] = fourmoe::gemm1::activate(problem.activation, gate, up);
  }
  return y;
}

Row round(const Problem& problem, const Row& y, f32 global) {
  if (problem.precision == Precision::w4a4) return through_nvfp4(y, global);
  Row rounded(y.size());
  std::transform(y.begin(), y.end(), rounded.begin(), [&](f64 value) { return round_to(problem.activations, value); });
  return through_int8(problem, rounded);
}

Verdict can(const Problem&, const Machine&) { return accept(); }

extern const Step kGemm1;
const Step kGemm1 = {
    "reference", "gemm1", {Stage::gemm1, Stage::gemm1}, can, [](const Problem&, const Machine&) { return i64{0}; },
    run};

}  // namespace fourmoe::reference
