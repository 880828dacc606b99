#include "backends/cpu/tiles.h"

namespace fourmoe::cpu {
namespace {

class Gemm2 final : public Product {
 public:
  explicit Gemm2(const Args& args) : args_(args), problem_(*args.problem), atom_(*atom_of(args.machine->cpu_level)) {}

  i32 cols() const override { return problem_.inter; }
  i32 panels() const override { return weights::panel_count(kOrder, problem_.hidden); }
  i32 strip_panels() const override { return kStripPanels; }
  const std::byte* blob(const weights::Expert& expert) const override { return expert.gemm2; }

  void load(i32 slot, f32* x, i64 stride) const override {
    const i32 blocks = problem_.inter / 16;
    if (problem_.precision == Precision::w4a4) {
      widen_nvfp4(args_.inter.codes + i64{slot} * problem_.inter / 2, args_.inter.scales + i64{slot} * blocks, blocks,
                  x, stride);
      return;
    }
    const u8* row = reinterpret_cast<const u8*>(args_.inter.rows + i64{slot} * problem_.inter);
    (problem_.activations == format::Dtype::f16 ? atom_.widen_f16 : atom_.widen_bf16)(row, blocks, x, stride);
  }

  void store(const Tile& tile) const override {
    const weights::Expert& expert = *tile.expert;
    const f32 global = expert.down.global * (problem_.precision == Precision::w4a4 ? expert.inter_scale : 1.0f);
    for (i32 p = 0; p < tile.panels; ++p) {
      const i32 first = (tile.panel + p) * kPanelRows;
      for (i32 r = 0; r < tile.rows; ++r) {
        const f32* sums = tile.sums + (p * tile.rows + r) * kPanelRows;
        f32* z = args_.partial.rows + i64{tile.slot + r} * problem_.hidden + first;
        for (i32 i = 0; i < kPanelRows; ++i) z[i] = sums[i] * global;
        for (i32 i = 0; i < kPanelRows && expert.down_bias != nullptr; ++i) z[i] += expert.down_bias[first + i];
      }
    }
  }

 private:
  const Args& args_;
  const Problem& problem_;
  const Atom& atom_;
};

Status run(const Bound& bound) { return multiply(Gemm2(*bound.args), *bound.args, bound.scratch); }

i64 bytes(const Problem& problem, const Machine& machine) { return scratch_bytes(problem.inter, machine); }

}  // namespace

extern const Step kGemm2;
const Step kGemm2 = {"cpu", "gemm2", {Stage::gemm2, Stage::gemm2}, can, bytes, run, describe, &kOrder};

}  // namespace fourmoe::cpu
