// fourmoe explain: which steps accept a layer on this machine, and what the planner makes of it.
#include <fmt/format.h>

#include <memory>

#include "checkpoint/checkpoint.h"
#include "command.h"
#include "describe.h"
#include "explain_text.h"
#include "machine.h"
#include "plan.h"

namespace fourmoe::tools {
namespace {

struct Options {
  std::string path;
  std::string shape;
  int layer = -1;
  int tokens = 1024;
  std::string backend = "auto";
  std::string device;
  std::string precision = "w4a16";
  bool json = false;
};

// Problem of the layer that was named, or of the first; *what says which.
Problem read_problem(const Options& options, std::string* what) {
  if (!options.shape.empty()) {
    *what = options.shape;
    return parse_shape(options.shape);
  }
  const checkpoint::Info info = checkpoint::Checkpoint::open(options.path).inspect();
  std::string known;
  for (const checkpoint::LayerInfo& layer : info.layers) {
    known += fmt::format("{}{}", known.empty() ? "" : ", ", layer.index);
    if (options.layer >= 0 && layer.index != options.layer) continue;
    *what = fmt::format("{}, layer {}", info.path, layer.index);
    return layer.problem;
  }
  throw Error(Reason::layer_missing, options.layer < 0 ? fmt::format("{} has no MoE layers", info.path)
                                                       : fmt::format("{} has no MoE layer {}; it has {}", info.path,
                                                                     options.layer, known.empty() ? "none" : known));
}

Json sizes_json(const Explained& layer) {
  Json sizes = Json::array();
  for (const tune::Sized& size : layer.sizes.all()) {
    Json json = {{"tokens", size.plan.problem.max_tokens},
                 {"steps", plan::choice_of(size.plan)},
                 {"by", tune::source_name(size.source)},
                 {"floor_us", nullptr},
                 {"measured_us", nullptr},
                 {"default_us", nullptr}};
    if (layer.floor(size) > 0.0) json["floor_us"] = 1e6 * layer.floor(size);
    if (size.measured) json["measured_us"] = 1e6 * size.measured->seconds;
    if (size.measured) json["default_us"] = 1e6 * size.measured->default_seconds;
    sizes.push_back(std::move(json));
  }
  return sizes;
}

Json layer_json(const Explained& layer) {
  const plan::Plan& plan = layer.plan();
  Json steps = Json::array();
  for (const plan::Candidate& c : plan.candidates) {
    steps.push_back({{"step", step_words(*c.step)},
                     {"stages", span_words(c.step->span)},
                     {"accepted", c.verdict.accepted()},
                     {"chosen", c.chosen},
                     {"reason", reason_name(c.verdict.reason)},
                     {"detail", detail_words(c, plan.problem, plan.machine)}});
  }
  Json json = {{"machine", machine_json(machine())},
               {"layer", layer.what},
               {"problem", problem_json(plan.problem)},
               {"steps", steps},
               {"plan", nullptr},
               {"sizes", nullptr},
               {"workspace_bytes", nullptr},
               {"notes", layer.notes}};
  if (layer.status.ok()) {
    json["plan"] = steps_json(plan);
    json["sizes"] = sizes_json(layer);
    json["workspace_bytes"] = layer.sizes.workspace_bytes();
  }
  return json;
}

int run(const Options& options) {
  if (options.path.empty() == options.shape.empty()) {
    throw CLI::ValidationError("give either PATH or --shape");
  }
  std::string what;
  Problem problem = read_problem(options, &what);
  problem.precision = parse_precision(options.precision);
  problem.max_tokens = options.tokens;
  Machine target = machine();
  target.device = device_of(options.device, options.backend);
  const Explained layer = explain(what, problem, target, options.backend, std::nullopt);
  if (options.json) print_json(layer_json(layer));
  else fmt::print("{}", explain_text(layer));
  std::fflush(stdout);
  throw_unless_ok(layer.status);
  return kSuccess;
}

}  // namespace

Command add_explain(CLI::App& app) {
  auto options = std::make_shared<Options>();
  CLI::App* sub = app.add_subcommand("explain", "say which steps accept a layer on this machine, and the plan");
  CLI::Option* path = sub->add_option("path", options->path, "checkpoint")->type_name("PATH");
  add_shape(sub, &options->shape)->excludes(path);
  add_layer(sub, &options->layer, "layer of the checkpoint; the first MoE layer if not given");
  sub->add_option("--tokens", options->tokens, "most tokens of one call; sizes the workspace")
      ->check(within(0, 1 << 24))
      ->capture_default_str();
  add_backend(sub, &options->backend);
  add_device(sub, &options->device);
  add_precision(sub, &options->precision);
  sub->add_flag("--json", options->json, "print one JSON object");
  sub->footer(
      "Examples:\n  fourmoe explain examples/tiny-moe/nvfp4 --tokens 16\n"
      "  fourmoe explain --shape dsv3 --precision w4a4\n  fourmoe explain --shape 2880,2880,128,4 --json");
  return {sub, [options] { return run(*options); }};
}

}  // namespace fourmoe::tools
