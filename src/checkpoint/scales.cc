#include "checkpoint/scales.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <string_view>

#include "checkpoint/mapped_file.h"
#include "status.h"

namespace fourmoe::checkpoint {
namespace {

constexpr std::array<std::string_view, 3> kNames = {"gate", "up", "down"};

bool is_valid(const Scalar& scalar) { return scalar.present && std::isfinite(scalar.value) && scalar.value > 0.0f; }

void check_input(const Scalar& scalar, std::size_t expert, std::string_view projection) {
  if (!scalar.present || scalar.value == 0.0f || is_valid(scalar)) return;
  throw Error(Reason::global_invalid, fmt::format("{}: input scale of expert {}'s {} is {}, not finite and positive",
                                                  scalar.origin.text(), expert, projection, scalar.value));
}

}  // namespace

std::string Origin::text() const { return fmt::format("{}: tensor {} at offset {}", file, quote(tensor), offset); }

Oddities find_oddities(const LayerScales& scales) {
  Oddities out;
  for (const auto& expert : scales.experts) {
    const Scalar &gate = expert[0].global, &up = expert[1].global;
    if (gate.present && up.present && gate.value != up.value) {
      ++out.gate_up_differ;
      const f32 ratio = std::max(gate.value / up.value, up.value / gate.value);
      if (std::isfinite(ratio)) out.largest_ratio = std::max(out.largest_ratio, ratio);
    }
    for (std::size_t p = scales.gated ? 0 : 1; p < 3; ++p) {
      out.globals_invalid += expert[p].global.present && !is_valid(expert[p].global);
      out.inputs_missing += !expert[p].input.present;
      out.inputs_zero += expert[p].input.present && expert[p].input.value == 0.0f;
    }
  }
  return out;
}

void check_globals(const LayerScales& scales) {
  for (std::size_t e = 0; e < scales.experts.size(); ++e) {
    for (std::size_t p = 0; p < 3; ++p) {
      const Scalar& global = scales.experts[e][p].global;
      if (!global.present || is_valid(global)) continue;
      throw Error(Reason::global_invalid,
                  fmt::format("{}: global scale of expert {}'s {} is {}, not finite and positive", global.origin.text(),
                              e, kNames[p], global.value));
    }
  }
}

std::vector<InputScales> resolve_inputs(const LayerScales& scales) {
  std::vector<InputScales> own;  // 0 where there is none
  InputScales largest{0.0f, 0.0f};
  for (std::size_t e = 0; e < scales.experts.size(); ++e) {
    InputScales& here = own.emplace_back(InputScales{0.0f, 0.0f});
    for (std::size_t p = 0; p < 3; ++p) {
      const Scalar& input = scales.experts[e][p].input;
      check_input(input, e, kNames[p]);
      f32& scale = p < 2 ? here.tokens : here.inter;
      if (is_valid(input)) scale = std::max(scale, input.value);
    }
    largest.tokens = std::max(largest.tokens, here.tokens);
    largest.inter = std::max(largest.inter, here.inter);
  }
  for (InputScales& here : own) {
    if (here.tokens == 0.0f) here.tokens = largest.tokens > 0.0f ? largest.tokens : 1.0f;
    if (here.inter == 0.0f) here.inter = largest.inter > 0.0f ? largest.inter : 1.0f;
  }
  return own;
}

std::vector<std::string> describe(const Oddities& oddities, i32 experts, bool gated) {
  std::vector<std::string> notes;
  const i32 projections = experts * (gated ? 3 : 2);
  if (oddities.gate_up_differ > 0) {
    notes.push_back(fmt::format("gate and up have different global scales in {} of {} experts, up to {:.4g} times",
                                oddities.gate_up_differ, experts, oddities.largest_ratio));
  }
  if (oddities.globals_invalid > 0) {
    notes.push_back(
        fmt::format("{} of {} global scales are not finite and positive", oddities.globals_invalid, projections));
  }
  if (oddities.inputs_missing == projections) {
    notes.push_back("no input scales: w4a4 quantises with scale 1");
  } else if (oddities.inputs_missing > 0) {
    notes.push_back(fmt::format("{} of {} input scales are missing; the largest of the layer stands in",
                                oddities.inputs_missing, projections));
  }
  if (oddities.inputs_zero > 0) {
    notes.push_back(fmt::format("{} of {} input scales are 0; the largest of the layer stands in", oddities.inputs_zero,
                                projections));
  }
  return notes;
}

}  // namespace fourmoe::checkpoint
