#include "backends/cpu/tiles.h"

namespace fourmoe::cpu {
namespace {

// Partial rows of more bytes than this leave the second-level caches (1 to 2 MiB a core) before combine reads them.
constexpr i64 kKeptBytes = 4 << 20;

class Gemm2 final : public Product {
 public:
  explicit Gemm2(const Args& args)
      : args_(args),
        problem_(*args.problem),
        finish_(finish_of(*args.machine)),
        past_caches_(args.slots.expert_begin[problem_.local_experts] * i64{problem_.hidden} * 4 > kKeptBytes) {}

  i32 cols() const override { return problem_.inter; }
  i32 panels() const override { return weights::panel_count(kOrder, problem_.hidden); }
  const std::byte* blob(const weights::Expert& expert) const override { return expert.gemm2; }

  Row row(i32 slot, u16*) const override {
    if (problem_.precision == Precision::w4a4) {
      return {args_.inter.codes + i64{slot} * problem_.inter / 2, args_.inter.scales + i64{slot} * problem_.inter / 16};
    }
    return {reinterpret_cast<const u8*>(args_.inter.rows + i64{slot} * problem_.inter), nullptr};
  }

  void store(const Tile& tile) const override {
    const weights::Expert& expert = *tile.expert;
    const f32 global = expert.down.global * (problem_.precision == Precision::w4a4 ? expert.inter_scale : 1.0f);
    for (i32 p = 0; p < tile.panels; ++p) {
      const i32 first = (tile.panel + p) * kPanelRows;
      const f32* bias = expert.down_bias == nullptr ? nullptr : expert.down_bias + first;
      f32* z = args_.partial.rows + i64{tile.slot} * problem_.hidden + first;
      finish_.scale(
          {tile.sums + p * tile.pitch, tile.factors, tile.rows, global, bias, z, problem_.hidden, past_caches_});
    }
  }

  void settle() const override {
    if (past_caches_ && finish_.settle != nullptr) finish_.settle();
  }

 private:
  const Args& args_;
  const Problem& problem_;
  const Finish& finish_;
  bool past_caches_;
};

Status run(const Bound& bound) { return multiply(Gemm2(*bound.args), *bound.args, bound.scratch); }

i64 bytes(const Problem& problem, const Machine& machine) { return scratch_bytes(problem, problem.inter, machine); }

}  // namespace

extern const Step kGemm2;
const Step kGemm2 = {"cpu", "gemm2", {Stage::gemm2, Stage::gemm2}, can, bytes, run, describe, &kOrder};

}  // namespace fourmoe::cpu
