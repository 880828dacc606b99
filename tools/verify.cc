// fourmoe verify: every step that this machine can run, against the reference, on a checkpoint's own weights.
#include <fmt/format.h>

#include <algorithm>
#include <memory>
#include <optional>

#include "backends/list.h"
#include "case.h"
#include "command.h"
#include "describe.h"
#include "layer.h"
#include "mirror.h"
#include "progress.h"
#include "quantity.h"
#include "table.h"

namespace fourmoe::tools {
namespace {

using cases::Routes;
using format::Dtype;

struct Options {
  std::string path;
  int layer = -1;
  std::string backend = "auto";
  std::string device;
  int threads = 0;
  bool json = false;
};

// Inputs that have broken kernels: extremes of size, of count and of routing.
struct Input {
  const char* name;
  i32 tokens;
  f32 amplitude;
  Routes routes;
  Dtype hidden;
};

constexpr Input kInputs[] = {
    {"random", 7, 1.0f, Routes::random, Dtype::bf16},
    {"large values", 3, 1e4f, Routes::random, Dtype::bf16},
    {"tiny values", 3, 1e-6f, Routes::random, Dtype::bf16},
    {"one token", 1, 1.0f, Routes::random, Dtype::bf16},
    {"no tokens", 0, 1.0f, Routes::random, Dtype::bf16},
    {"all to one expert, repeated", 5, 1.0f, Routes::one_expert, Dtype::bf16},
    {"missing picks", 5, 1.0f, Routes::holes, Dtype::bf16},
    {"skewed routing", 9, 1.0f, Routes::skewed, Dtype::bf16},
    {"f16 tokens", 3, 1.0f, Routes::random, Dtype::f16},
    {"f32 tokens", 3, 1.0f, Routes::random, Dtype::f32},
};

struct Outcome {
  const Input* input = nullptr;
  f64 rel_l2 = 0.0;
  f64 bound = 0.0;
  std::string error;  // when the step refused to run
  bool passed() const { return error.empty() && rel_l2 <= bound; }
};

// One step at one precision on one set of weights; of a GPU's room steps that follow each other together, since none of
// them can hand its result to the reference.
struct Verification {
  std::string weights;  // "3" or "3 shared"
  std::string step;     // or steps
  Precision precision = Precision::w4a16;
  Verdict verdict;
  std::vector<Outcome> outcomes;

  bool passed() const {
    return std::all_of(outcomes.begin(), outcomes.end(), [](const Outcome& o) { return o.passed(); });
  }
  const Outcome* worst() const {
    const auto less = [](const Outcome& a, const Outcome& b) {
      return std::pair(!a.passed(), a.rel_l2) < std::pair(!b.passed(), b.rel_l2);
    };
    const auto found = std::max_element(outcomes.begin(), outcomes.end(), less);
    return found == outcomes.end() ? nullptr : &*found;
  }
};

bool overlaps(const Span& a, const Span& b) { return a.first <= b.last && b.first <= a.last; }

// The step, and for the stages that it leaves the reference's steps, on a GPU those of its own room.
std::vector<const Step*> pins(const Step* step) {
  const std::string_view room = step->place == Place::device ? step->room : "reference";
  std::vector<const Step*> pinned = {step};
  for (const Step* other : backends::list()) {
    if (other->room == room && other->name != "whole" && !overlaps(other->span, step->span)) pinned.push_back(other);
  }
  return pinned;
}

cases::Spec spec_of(const Input& input, const Problem& problem, Precision precision) {
  cases::Spec spec;
  spec.problem = problem;
  spec.problem.precision = precision;
  spec.tokens = input.tokens;
  spec.seed = static_cast<u64>(&input - kInputs) + 1;
  spec.routes = input.routes;
  spec.amplitude = input.amplitude;
  spec.hidden = input.hidden;
  return spec;
}

Status compute(Layer* layer, const cases::Spec& spec, std::vector<f64>* values) {
  const cases::Call call(spec);
  std::vector<u8> bytes;
  if (Status status = cases::run_mirrored(layer, call.view(&bytes, Dtype::f32)); !status.ok()) return status;
  values->resize(bytes.size() / 4);
  for (std::size_t i = 0; i < values->size(); ++i)
    (*values)[i] = format::read(bytes.data(), Dtype::f32, static_cast<i64>(i));
  return {};
}

// Verifies all steps on one set of weights at one precision; the reference's outputs are computed once.
class Bench {
 public:
  Bench(std::string name, const checkpoint::Layer& weights, Precision precision, i32 device, Executor* executor)
      : name_(std::move(name)), weights_(weights), device_(device), executor_(executor) {
    problem_ = weights_.problem;
    problem_.precision = precision;
    problem_.max_tokens = kMostTokens;
  }

  bool possible() const { return check(problem_).accepted(); }

  Verification verify(const Step* step) {
    Machine target = machine();
    target.device = device_;
    Problem problem = problem_;
    // It may serve few tokens alone.
    while (problem.max_tokens > 1 && !step->can(problem, target).accepted()) problem.max_tokens /= 2;
    Verification v = {name_, step_words(*step), problem.precision, step->can(problem, target), {}};
    if (!v.verdict.accepted()) return v;
    LayerOptions how = options();
    how.device = device_;
    how.max_tokens = problem.max_tokens;
    how.pinned = pins(step);
    Layer layer(weights_, how);
    if (step->place == Place::device) v.step = steps_words(layer.plan());
    for (std::size_t i = 0; i < std::size(kInputs); ++i) {
      if (kInputs[i].tokens > problem.max_tokens) continue;
      Problem as = problem;
      as.activations = kInputs[i].hidden == Dtype::f16 ? Dtype::f16 : Dtype::bf16;
      if (step->can(as, target).accepted()) v.outcomes.push_back(compare(&layer, i));
    }
    return v;
  }

 private:
  static constexpr i32 kMostTokens = 16;

  LayerOptions options() const {
    LayerOptions how;
    how.precision = problem_.precision;
    how.max_tokens = kMostTokens;
    how.executor = executor_;
    return how;
  }

  const std::vector<f64>& reference(std::size_t input) {
    if (!reference_) {
      LayerOptions how = options();
      how.backend = "reference";
      reference_ = std::make_unique<Layer>(weights_, how);
      expected_.resize(std::size(kInputs));
      known_.resize(std::size(kInputs), false);
    }
    if (!known_[input]) {
      throw_unless_ok(
          compute(reference_.get(), spec_of(kInputs[input], problem_, problem_.precision), &expected_[input]));
      known_[input] = true;
    }
    return expected_[input];
  }

  Outcome compare(Layer* layer, std::size_t input) {
    Outcome outcome = {&kInputs[input], 0.0, cases::bound(problem_), ""};
    std::vector<f64> found;
    const Status status = compute(layer, spec_of(kInputs[input], problem_, problem_.precision), &found);
    if (status.ok()) outcome.rel_l2 = cases::rel_l2(found, reference(input));
    else outcome.error = fmt::format("{}: {}", reason_name(status.reason), status.detail);
    return outcome;
  }

  std::string name_;
  const checkpoint::Layer& weights_;
  i32 device_;
  Problem problem_;
  Executor* executor_;
  std::unique_ptr<Layer> reference_;
  std::vector<std::vector<f64>> expected_;
  std::vector<bool> known_;
};

// The shared experts as a layer of their own: one expert that every token picks.
checkpoint::Layer shared_layer(const checkpoint::Layer& layer) {
  checkpoint::Layer shared;
  shared.problem = layer.shared->problem;
  shared.experts = {layer.shared->expert};
  shared.owner = layer.owner;
  return shared;
}

// Steps of rooms that compute on the device; of those of a GPU's room that follow each other the first.
std::vector<const Step*> steps_of(const std::string& backend, i32 device) {
  const Place place = device < 0 ? Place::host : Place::device;
  std::vector<const Step*> steps;
  for (const Step* step : backends::list()) {
    const bool the_measure_itself = step->room == "reference" && step->name == "whole";
    if (!step->in_room() || the_measure_itself || step->place != place) continue;
    if (backend != "auto" && step->room != backend) continue;
    const bool follows = std::any_of(steps.begin(), steps.end(), [&](const Step* s) {
      return s->room == step->room && s->span.last < step->span.first;
    });
    if (place == Place::host || !follows) steps.push_back(step);
  }
  return steps;
}

void verify_weights(const std::string& name, const checkpoint::Layer& weights, const Options& options,
                    Progress* progress, std::vector<Verification>* out) {
  if (const Verdict verdict = check(weights.problem); !verdict.accepted()) {  // of w4a16, which asks for least
    throw Error(verdict.reason, fmt::format("layer {}: {}", name, verdict.detail));
  }
  for (const Precision precision : kPrecisions) {
    const i32 device = device_of(options.device, options.backend);
    Bench bench(name, weights, precision, device, &tbb_executor(options.threads));
    if (!bench.possible()) continue;
    for (const Step* step : steps_of(options.backend, device)) {
      progress->show(fmt::format("layer {}  {}  {}", name, step_words(*step), precision_name(precision)));
      out->push_back(bench.verify(step));
    }
  }
}

std::vector<Verification> verify(const Options& options) {
  const auto checkpoint = checkpoint::Checkpoint::open(options.path);
  std::vector<i32> layers = {options.layer};
  if (options.layer < 0) {
    layers.clear();
    for (const checkpoint::LayerInfo& layer : checkpoint.inspect().layers) layers.push_back(layer.index);
  }
  std::vector<Verification> all;
  Progress progress("verify");
  for (const i32 index : layers) {
    progress.show(fmt::format("loading layer {}", index));
    checkpoint::Layer layer = checkpoint.load(index, tbb_executor(options.threads));
    if (layer.shared) verify_weights(fmt::format("{} shared", index), shared_layer(layer), options, &progress, &all);
    layer.shared.reset();
    verify_weights(std::to_string(index), layer, options, &progress, &all);
  }
  return all;
}

void print_text(const std::vector<Verification>& all) {
  Table table({"layer", "step", "precision", ">inputs", ">worst rel-L2", ">bound", "worst input", "verdict"});
  Table refused({"layer", "step", "precision", "refused because"});
  for (const Verification& v : all) {
    const std::string precision(precision_name(v.precision));
    const Outcome* worst = v.worst();
    if (worst == nullptr) {
      refused.add({v.weights, v.step, precision, v.verdict.detail});
      continue;
    }
    table.add({v.weights, v.step, precision, std::to_string(v.outcomes.size()), number_text(worst->rel_l2),
               number_text(worst->bound), worst->input->name, v.passed() ? "ok" : "FAILED"});
  }
  fmt::print("{}", table.text());
  if (!refused.empty()) fmt::print("\n{}", refused.text());
}

Json verification_json(const Verification& v) {
  Json inputs = Json::array();
  for (const Outcome& o : v.outcomes) {
    inputs.push_back({{"input", o.input->name},
                      {"tokens", o.input->tokens},
                      {"rel_l2", o.rel_l2},
                      {"bound", o.bound},
                      {"passed", o.passed()}});
    if (!o.error.empty()) inputs.back()["error"] = o.error;
  }
  return {{"layer", v.weights},
          {"step", v.step},
          {"precision", precision_name(v.precision)},
          {"accepted", v.verdict.accepted()},
          {"reason", reason_name(v.verdict.reason)},
          {"detail", v.verdict.detail},
          {"passed", v.passed()},
          {"inputs", inputs}};
}

Json report_json(const std::vector<Verification>& all, i64 ran, i64 failed) {
  Json steps = Json::array();
  for (const Verification& v : all) steps.push_back(verification_json(v));
  return {{"machine", machine_json(machine())}, {"passed", ran > 0 && failed == 0}, {"steps", steps}};
}

// One line for each failure, so that a reader of the log needs no JSON.
std::string failure_words(const std::vector<Verification>& all) {
  for (const Verification& v : all) {
    for (const Outcome& o : v.outcomes) {
      if (o.passed()) continue;
      return fmt::format(
          "first: layer {}, {} in {} on '{}': {}", v.weights, v.step, precision_name(v.precision), o.input->name,
          o.error.empty() ? fmt::format("rel-L2 {} beyond {}", number_text(o.rel_l2), number_text(o.bound)) : o.error);
    }
  }
  return "";
}

int run(const Options& options) {
  const std::vector<Verification> all = verify(options);
  const i64 failed = std::count_if(all.begin(), all.end(), [](const Verification& v) { return !v.passed(); });
  const i64 ran = std::count_if(all.begin(), all.end(), [](const Verification& v) { return !v.outcomes.empty(); });
  if (options.json) print_json(report_json(all, ran, failed));
  else print_text(all);
  std::fflush(stdout);
  if (ran == 0) throw Error(Reason::no_plan, "no step could be verified");
  if (failed > 0) {
    throw Error(Reason::internal, fmt::format("{} of {} verifications failed; {}", failed, ran, failure_words(all)));
  }
  return kSuccess;
}

}  // namespace

Command add_verify(CLI::App& app) {
  auto options = std::make_shared<Options>();
  CLI::App* sub = app.add_subcommand("verify", "compare every step of this machine with the reference");
  sub->add_option("path", options->path, "checkpoint folder, .safetensors or .gguf file")
      ->required()
      ->type_name("PATH");
  add_layer(sub, &options->layer, "this layer alone; all MoE layers if not given");
  add_backend(sub, &options->backend);
  add_device(sub, &options->device);
  add_threads(sub, &options->threads);
  sub->add_flag("--json", options->json, "print one JSON object, with every input");
  sub->footer(
      "Inputs are random and adversarial: large and tiny values, no token, one expert for all, repeated and missing\n"
      "picks. The exit code is 1 when a step is beyond its bound. FOURMOE_CPU_LEVEL=portable|avx2|avx512|vnni|amx "
      "verifies\n"
      "another instruction level of the cpu backend.\n\n"
      "Example:\n  fourmoe verify examples/tiny-moe/nvfp4 --layer 0");
  return {sub, [options] { return run(*options); }};
}

}  // namespace fourmoe::tools
