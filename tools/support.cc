// fourmoe support: what works where, asked of every step of backends/list.cc. The same on every machine.
#include <fmt/format.h>

#include <memory>
#include <optional>

#include "backends/list.h"
#include "command.h"
#include "describe.h"
#include "machine.h"
#include "table.h"

namespace fourmoe::tools {
namespace {

constexpr format::Encoding kEncodings[] = {format::Encoding::nvfp4, format::Encoding::mxfp4, format::Encoding::bf16,
                                           format::Encoding::f16,   format::Encoding::f32,   format::Encoding::fp8};

constexpr ActivationKind kActivations[] = {ActivationKind::swiglu, ActivationKind::swiglu_clamped,
                                           ActivationKind::geglu_erf, ActivationKind::geglu_tanh,
                                           ActivationKind::relu2};

// A problem that every step could take.
Problem usual(Precision precision, format::Encoding encoding) {
  Problem p;
  p.hidden = 1024;
  p.inter = 512;
  p.experts = p.local_experts = 64;
  p.top_k = 4;
  p.max_tokens = 64;
  p.precision = precision;
  p.encoding = encoding;
  return p;
}

Machine machine_of(CpuLevel level) {
  Machine m;
  m.cpu_name = "any";
  m.cpu_level = level;
  m.cores = 1;
  return m;
}

bool accepts(const Step& step, const Problem& problem, CpuLevel level) {
  return check(problem).accepted() && step.can(problem, machine_of(level)).accepted();
}

// The last of the levels accepts what the others do.
bool accepts(const Step& step, const Problem& problem) { return accepts(step, problem, kCpuLevels.back()); }

void append(std::string* words, std::string_view word) {
  *words += fmt::format("{}{}", words->empty() ? "" : ", ", word);
}

std::string encodings(const Step& step, Precision precision) {
  std::string words;
  for (const format::Encoding encoding : kEncodings) {
    if (accepts(step, usual(precision, encoding))) append(&words, format::encoding_name(encoding));
  }
  return words.empty() ? "-" : words;
}

std::string activations(const Step& step) {
  std::string words;
  bool all = true;
  for (const ActivationKind kind : kActivations) {
    Problem p = usual(Precision::w4a16, format::Encoding::nvfp4);
    p.activation.kind = kind;
    if (accepts(step, p)) append(&words, activation_name(kind));
    else all = false;
  }
  if (all) return "all";
  return words.empty() ? "-" : words;
}

// Levels at which the step runs, and what it makes of each.
std::string processors(const Step& step) {
  const Problem p = usual(Precision::w4a16, format::Encoding::nvfp4);
  std::string words;
  for (const CpuLevel level : kCpuLevels) {
    if (accepts(step, p, level)) append(&words, cpu_level_name(level));
  }
  if (step.describe == nullptr && words == "portable, avx2, avx512, vnni, amx") return "any";
  return words.empty() ? "-" : words;
}

int run(bool markdown) {
  Table table({"step", "stages", "processor", "w4a16 weights", "w4a4 weights", "activations"});
  for (const Step* step : backends::list()) {
    const std::string name = step_words(*step);
    table.add({markdown ? fmt::format("`{}`", name) : name, span_words(step->span), processors(*step),
               encodings(*step, Precision::w4a16), encodings(*step, Precision::w4a4), activations(*step)});
  }
  fmt::print("{}", markdown ? table.markdown() : table.text());
  return kSuccess;
}

}  // namespace

Command add_support(CLI::App& app) {
  auto markdown = std::make_shared<bool>(false);
  CLI::App* sub = app.add_subcommand("support", "list every step and what it takes, whatever this machine is");
  sub->add_flag("--markdown", *markdown, "as a table of Markdown, for README.md");
  sub->footer("What this machine takes of a layer: fourmoe explain.\n\nExample:\n  fourmoe support --markdown");
  return {sub, [markdown] { return run(*markdown); }};
}

}  // namespace fourmoe::tools
