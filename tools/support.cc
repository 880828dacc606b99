// fourmoe support: what works where, asked of every step of backends/list.cc. The same on every machine.
#include <fmt/format.h>

#include <algorithm>
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
constexpr std::pair<i32, i32> kCapabilities[] = {{8, 0}, {9, 0}, {10, 0}, {10, 3}, {12, 0}, {12, 1}};
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
  p.max_tokens = 8;  // steps for few tokens accept it, and all others
  p.precision = precision;
  p.encoding = encoding;
  return p;
}

// Something to run on, made up: the table says what would run where, not what this machine has.
struct Processor {
  std::string name;
  Machine machine;
};

Machine any_machine() {
  Machine m;
  m.cpu_name = "any";
  m.cores = 1;
  return m;
}

std::vector<Processor> processors_of(Place place) {
  std::vector<Processor> all;
  for (const CpuLevel level : kCpuLevels) {
    if (place == Place::device) continue;
    all.push_back({std::string(cpu_level_name(level)), any_machine()});
    all.back().machine.cpu_level = level;
  }
  for (const auto& [major, minor] : kCapabilities) {
    if (place == Place::host) continue;
    all.push_back({fmt::format("GPU {}.{}", major, minor), any_machine()});
    Machine& machine = all.back().machine;
    machine.cuda = true;
    machine.device = 0;
    machine.devices.push_back({0, "any", major, minor, 1, 0, 0});
  }
  return all;
}

bool accepts(const Step& step, const Problem& problem, const Processor& processor) {
  return check(problem).accepted() && step.can(problem, processor.machine).accepted();
}

bool accepts(const Step& step, const Problem& problem) {
  const std::vector<Processor> all = processors_of(step.place);
  return std::any_of(all.begin(), all.end(), [&](const Processor& p) { return accepts(step, problem, p); });
}

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

// Where the step runs.
std::string processors(const Step& step) {
  const Problem p = usual(Precision::w4a16, format::Encoding::nvfp4);
  std::string words;
  for (const Processor& processor : processors_of(step.place)) {
    if (accepts(step, p, processor)) append(&words, processor.name);
  }
  if (step.describe == nullptr && words == "portable, avx2, avx512, vnni, amx") return "any";
  return words.empty() ? "-" : words;
}

int run(bool markdown) {
  Table table({"step", "stages", "processor", "w4a16 weights", "w4a4 weights", "w4a8_int8 weights", "activations"});
  for (const Step* step : backends::list()) {
    const std::string name = step_words(*step);
    table.add({markdown ? fmt::format("`{}`", name) : name, span_words(step->span), processors(*step),
               encodings(*step, Precision::w4a16), encodings(*step, Precision::w4a4),
               encodings(*step, Precision::w4a8_int8), activations(*step)});
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
