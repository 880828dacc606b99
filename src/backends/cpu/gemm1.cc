#include "backends/cpu/tiles.h"
#include "format/quantise.h"
#include "gemm1/activation.h"

namespace fourmoe::cpu {
namespace {

using format::Dtype;

u16 round_to(Dtype dtype, f32 value) {
  return dtype == Dtype::f16 ? format::to_f16_saturated(value) : format::to_bf16(value);
}

f32 through(Dtype dtype, f32 value) {
  const u16 bits = round_to(dtype, value);
  return dtype == Dtype::f16 ? format::from_f16(bits) : format::from_bf16(bits);
}

class Gemm1 final : public Product {
 public:
  explicit Gemm1(const Args& args) : args_(args), problem_(*args.problem), atom_(*atom_of(args.machine->cpu_level)) {}

  i32 cols() const override { return problem_.hidden; }
  i32 panels() const override { return weights::panel_count(kOrder, problem_.inter) * strip_panels(); }
  i32 strip_panels() const override { return problem_.activation.gated() ? 2 : 1; }
  const std::byte* blob(const weights::Expert& expert) const override { return expert.gemm1; }

  void load(i32 slot, f32* x, i64 stride) const override {
    const i64 pick = args_.slots.slot_pick[slot];
    const i64 token = pick / problem_.top_k;
    const u8* row = args_.hidden.row(token);
    const i32 blocks = problem_.hidden / 16;
    const bool weighted = problem_.routing.weight_on_input;
    if (problem_.precision == Precision::w4a4) {
      widen_nvfp4(args_.slots.codes + i64{slot} * problem_.hidden / 2, args_.slots.scales + i64{slot} * blocks, blocks,
                  x, stride);
    } else if (args_.hidden.dtype == problem_.activations && !weighted) {
      (problem_.activations == Dtype::f16 ? atom_.widen_f16 : atom_.widen_bf16)(row, blocks, x, stride);
    } else {
      load_rounded(row, weighted ? &args_.slots.weights[pick] : nullptr, x, stride);
    }
  }

  void store(const Tile& tile) const override {
    const weights::Expert& expert = *tile.expert;
    const i32 first = tile.panel / strip_panels() * kPanelRows;
    const bool quantised = problem_.precision == Precision::w4a4;
    const f32 input = quantised ? expert.input_scale : 1.0f;
    for (i32 r = 0; r < tile.rows; ++r) {
      const f32* gate = tile.sums + r * kPanelRows;
      const f32* up = gate + (tile.panels - 1) * tile.rows * kPanelRows;
      f32 y[kPanelRows];
      for (i32 i = 0; i < kPanelRows; ++i) {
        const f32 g = gate[i] * (expert.gate.global * input) + (expert.gate_bias ? expert.gate_bias[first + i] : 0.0f);
        const f32 u = up[i] * (expert.up.global * input) + (expert.up_bias ? expert.up_bias[first + i] : 0.0f);
        y[i] = gemm1::activate(problem_.activation, g, u);
      }
      const i64 at = i64{tile.slot + r} * problem_.inter + first;
      if (quantised) {
        format::quantise_row(y, kPanelRows, expert.inter_scale, args_.inter.codes + at / 2,
                             args_.inter.scales + at / format::kNvfp4Block);
        continue;
      }
      for (i32 i = 0; i < kPanelRows; ++i) args_.inter.rows[at + i] = round_to(problem_.activations, y[i]);
    }
  }

 private:
  // Tokens that are rounded first: of another type than the activations, or multiplied by their routing weight.
  void load_rounded(const u8* row, const f32* weight, f32* x, i64 stride) const {
    const Dtype dtype = problem_.activations;
    for (i32 k = 0; k < problem_.hidden; ++k) {
      f32 value = through(dtype, format::read(row, args_.hidden.dtype, k));
      if (weight != nullptr) value = through(dtype, value * *weight);
      x[k / 16 * stride + k % 16] = value;
    }
  }

  const Args& args_;
  const Problem& problem_;
  const Atom& atom_;
};

Status run(const Bound& bound) { return multiply(Gemm1(*bound.args), *bound.args, bound.scratch); }

i64 bytes(const Problem& problem, const Machine& machine) { return scratch_bytes(problem.hidden, machine); }

}  // namespace

extern const Step kGemm1;
const Step kGemm1 = {"cpu", "gemm1", {Stage::gemm1, Stage::gemm1}, can, bytes, run, describe, &kOrder};

}  // namespace fourmoe::cpu
