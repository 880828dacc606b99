#include "backends/cpu/tiles.h"
#include "format/quantise.h"

namespace fourmoe::cpu {
namespace {

using format::Dtype;

u16 round_to(Dtype dtype, f32 value) {
  return dtype == Dtype::f16 ? format::to_f16_saturated(value) : format::to_bf16(value);
}

f32 widened(Dtype dtype, u16 bits) { return dtype == Dtype::f16 ? format::from_f16(bits) : format::from_bf16(bits); }

class Gemm1 final : public Product {
 public:
  explicit Gemm1(const Args& args) : args_(args), problem_(*args.problem), finish_(finish_of(*args.machine)) {}

  i32 cols() const override { return problem_.hidden; }
  i32 panels() const override { return weights::panel_count(kOrder, problem_.inter) * halves(); }
  const std::byte* blob(const weights::Expert& expert) const override { return expert.gemm1; }

  Row row(i32 slot, u16* buffer) const override {
    if (problem_.precision == Precision::w4a4) {
      return {args_.slots.codes + i64{slot} * problem_.hidden / 2,
              args_.slots.scales + i64{slot} * problem_.hidden / 16};
    }
    const i64 pick = args_.slots.slot_pick[slot];
    const u8* hidden = args_.hidden.row(pick / problem_.top_k);
    const bool weighted = problem_.routing.weight_on_input;
    if (args_.hidden.dtype == problem_.activations && !weighted) return {hidden, nullptr};
    round_row(hidden, weighted ? &args_.slots.weights[pick] : nullptr, buffer);
    return {reinterpret_cast<const u8*>(buffer), nullptr};
  }

  void store(const Tile& tile) const override {
    alignas(64) f32 y[kMaxTile * kPanelRows];
    for (i32 panel = 0; panel < tile.panels; panel += halves()) {
      const i32 first = (tile.panel + panel) / halves() * kPanelRows;
      activate(tile, tile.sums + panel * tile.pitch, first, y);
      store_rows(tile, first, y);
    }
  }

 private:
  i32 halves() const { return problem_.activation.gated() ? 2 : 1; }

  void store_rows(const Tile& tile, i32 first, const f32* y) const {
    if (problem_.precision == Precision::w4a4) return quantise(tile, first, y);
    const auto round = problem_.activations == Dtype::f16 ? finish_.round_f16 : finish_.round_bf16;
    round(y, tile.rows, args_.inter.rows + i64{tile.slot} * problem_.inter + first, problem_.inter);
  }

  void activate(const Tile& tile, const f32* gate, i32 first, f32* y) const {
    const weights::Expert& expert = *tile.expert;
    const Activation& activation = problem_.activation;
    const f32 input = problem_.precision == Precision::w4a4 ? expert.input_scale : 1.0f;
    const f32* up = gate + (halves() - 1) * tile.pitch;
    const auto bias = [&](const f32* all) { return all == nullptr ? nullptr : all + first; };
    const int kind = static_cast<int>(activation.kind);
    const auto body = finish_.activate[kind] != nullptr ? finish_.activate[kind] : finish_portable()->activate[kind];
    body({gate, up, tile.factors, tile.rows, expert.gate.global * input, expert.up.global * input,
          bias(expert.gate_bias), bias(expert.up_bias), activation.alpha, activation.beta, activation.limit, y});
  }

  void quantise(const Tile& tile, i32 first, const f32* y) const {
    const i64 at = i64{tile.slot} * problem_.inter + first;
    format::quantise_blocks({y, kPanelRows, args_.inter.codes + at / 2, problem_.inter / 2,
                             args_.inter.scales + at / format::kNvfp4Block, problem_.inter / format::kNvfp4Block},
                            tile.rows, tile.expert->inter_scale);
  }

  // Tokens that are rounded first: of another type than the activations, or multiplied by their routing weight.
  void round_row(const u8* hidden, const f32* weight, u16* out) const {
    const Dtype dtype = problem_.activations;
    for (i32 k = 0; k < problem_.hidden; ++k) {
      out[k] = round_to(dtype, format::read(hidden, args_.hidden.dtype, k));
      if (weight != nullptr) out[k] = round_to(dtype, widened(dtype, out[k]) * *weight);
    }
  }

  const Args& args_;
  const Problem& problem_;
  const Finish& finish_;
};

Status run(const Bound& bound) { return multiply(Gemm1(*bound.args), *bound.args, bound.scratch); }

i64 bytes(const Problem& problem, const Machine& machine) { return scratch_bytes(problem, problem.hidden, machine); }

}  // namespace

extern const Step kGemm1;
const Step kGemm1 = {"cpu", "gemm1", {Stage::gemm1, Stage::gemm1}, can, bytes, run, describe, &kOrder};

}  // namespace fourmoe::cpu
