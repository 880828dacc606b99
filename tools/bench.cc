// fourmoe bench: how fast this machine runs a layer, and what share of its ceilings that is.
#include <fmt/format.h>

#include <algorithm>
#include <memory>

#include "case.h"
#include "ceiling.h"
#include "command.h"
#include "describe.h"
#include "device_time.h"
#include "host_time.h"
#include "progress.h"
#include "quantity.h"
#include "rotation.h"
#include "table.h"
#include "write_file.h"

namespace fourmoe::tools {
namespace {

using cases::Routes;

struct Options {
  Subject subject;
  std::vector<int> tokens = {1, 16, 256};
  std::string backend = "auto";
  std::string device;
  std::string precision = "w4a16";
  int threads = 0;
  f64 seconds = 1.0;
  bool logits = false;
  bool json = false;
  std::string output;
};

LayerOptions layer_options(const Options& options, Executor* executor) {
  LayerOptions how;
  how.backend = options.backend;
  how.device = device_of(options.device, options.backend);
  how.precision = parse_precision(options.precision);
  how.max_tokens = std::clamp(*std::max_element(options.tokens.begin(), options.tokens.end()), 1, 4096);
  how.executor = executor;
  return how;
}

struct Result {
  i32 tokens = 0;
  Routes routes = Routes::random;
  std::vector<f64> seconds;  // ascending
  f64 active_experts = 0.0;  // mean
  f64 bytes = 0.0;           // of the active experts' weights
  f64 flops = 0.0;

  f64 quantile(f64 q) const {
    return seconds[static_cast<std::size_t>(q * static_cast<f64>(seconds.size() - 1) + 0.5)];
  }
  f64 median() const { return quantile(0.5); }
  const char* routing() const { return routes == Routes::random ? "random" : "skewed"; }
};

// The inputs of all calls of a case, with one output.
void check_memory(const Problem& p, i64 tokens, i64 calls, bool by_logits) {
  const f64 token = calls * (2.0 * p.hidden + 8.0 * p.top_k + (by_logits ? 4.0 * p.experts : 0.0)) + 2.0 * p.hidden;
  const f64 bytes = static_cast<f64>(tokens) * token;
  const i64 memory = machine().memory_bytes;
  if (bytes <= 0.75 * static_cast<f64>(memory)) return;
  throw Error(Reason::out_of_memory,
              fmt::format("{} calls of {} tokens take {}, the machine has {} of memory; --tokens {} would pass", calls,
                          tokens, bytes_text(static_cast<i64>(bytes)), bytes_text(memory),
                          static_cast<i64>(0.75 * static_cast<f64>(memory) / token)));
}

// Calls that take turns: a call reads few of a layer's experts, so as many calls as read kColdBytes before one returns.
std::vector<cases::Call> make_calls(const Problem& problem, i32 tokens, Routes routes, bool by_logits) {
  constexpr i64 kLeastCalls = 4;
  const i64 most_active = std::min<i64>(i64{tokens} * problem.top_k, problem.experts);
  const i64 bytes = std::max<i64>(1, most_active * cases::expert_bytes(problem));
  const i64 count = std::clamp<i64>((kColdBytes + bytes - 1) / bytes, kLeastCalls, 4 * kMostLayers);
  check_memory(problem, tokens, count, by_logits);
  std::vector<cases::Call> calls;
  for (i64 i = 0; i < count; ++i) {
    cases::Spec spec;
    spec.problem = problem;
    spec.tokens = tokens;
    spec.routes = routes;
    spec.by_logits = by_logits;
    spec.seed = static_cast<u64>(i) + 1;
    calls.emplace_back(spec);
  }
  return calls;
}

// Runs the case for the time given, at least five times; inputs and layers change from run to run.
Result measure(const Options& options, Rotation* rotation, i32 tokens, Routes routes, Progress* progress) {
  Result result;
  result.tokens = tokens;
  result.routes = routes;
  const Problem& problem = rotation->at(0).problem();
  const std::vector<cases::Call> calls = make_calls(problem, tokens, routes, options.logits);
  for (const cases::Call& call : calls) {
    result.active_experts += static_cast<f64>(cases::active_experts(call.ids)) / static_cast<f64>(calls.size());
  }
  result.bytes = result.active_experts * static_cast<f64>(cases::expert_bytes(problem));
  result.flops = cases::flops(problem, i64{tokens} * problem.top_k);
  if (const auto& shared = rotation->at(0).weights().shared) {
    result.bytes += static_cast<f64>(cases::expert_bytes(shared->problem));
    result.flops += cases::flops(shared->problem, tokens);
  }
  const auto show = [&] { progress->show(fmt::format("{} tokens, {} routing", tokens, result.routing())); };
  show();
  result.seconds = rotation->on_device() ? time_on_device(rotation->layers, calls, options.seconds)
                                         : time_on_host(rotation, calls, options.seconds, show);
  return result;
}

// The command that repeats a case.
std::string repeat_words(const Options& options, i32 tokens) {
  std::string words = "fourmoe bench ";
  words += options.subject.words();
  if (!options.device.empty()) words += " --device " + options.device;
  words += fmt::format(" --tokens {} --backend {} --precision {} --threads {} --seconds {:g}", tokens, options.backend,
                       options.precision, options.threads, options.seconds);
  if (options.logits) words += " --logits";
  return words;
}

struct Report {
  const Options& options;
  const Rotation& rotation;
  const Ceilings& ceilings;
  const std::vector<Result>& results;
  i32 threads;

  const Layer& layer() const { return *rotation.layers.front(); }
  const Device* device() const { return fourmoe::device_of(layer().plan().machine); }  // null: the host
};

std::string ceilings_words(const Report& r) {
  const f64 bytes = r.ceilings.read_bytes_per_second / 1e9;
  if (r.device() != nullptr) return fmt::format("copy {:.0f} GB/s, read plus write, measured in this run", bytes);
  return fmt::format("read {:.1f} GB/s, {} {:.0f} GFLOP/s, measured in this run", bytes, r.ceilings.unit,
                     r.ceilings.flops_per_second / 1e9);
}

std::string weights_words(const Report& r) {
  const Rotation& rotation = r.rotation;
  const i64 bytes = cases::expert_bytes(r.layer().problem()) * r.layer().problem().local_experts;
  std::string words =
      fmt::format("{} a layer, {} layer{} in turn, packed in {} ({:.1f} GB/s)", bytes_text(bytes),
                  rotation.layers.size(), rotation.layers.size() == 1 ? "" : "s", duration_text(rotation.pack_seconds),
                  static_cast<f64>(bytes) / rotation.pack_seconds / 1e9);
  if (rotation.packed_per_second == 0.0) return words;
  return words + fmt::format("; {:.1f} GB/s into memory that was touched", rotation.packed_per_second / 1e9);
}

std::string percent(f64 share) { return fmt::format("{:.0f} %", 100.0 * share); }

std::string report_text(const Report& r) {
  const Problem& p = r.layer().problem();
  Facts facts;
  facts.add("machine", machine_words(machine()));
  if (r.device() != nullptr) facts.add("device", device_words(*r.device()));
  facts.add("layer",
            fmt::format("{}: {}, {}, {}, {}", r.rotation.weights, shape_words(p), activation_words(p.activation),
                        format::encoding_name(p.encoding), precision_name(p.precision)));
  facts.add("plan", fmt::format("{} ({}), {} thread{}", steps_words(r.layer().plan()),
                                choice_words(r.layer().plan(), r.layer().plan().machine), r.threads,
                                r.threads == 1 ? "" : "s"));
  facts.add("weights", weights_words(r));
  for (const std::string& note : r.layer().notes()) facts.add("note", note);
  facts.add("ceilings", ceilings_words(r));
  facts.add("version", FOURMOE_VERSION);
  Table table({">tokens", "routing", ">median us", ">p10 us", ">p90 us", ">runs", ">active", ">MB", ">GB/s",
               r.device() != nullptr ? ">of copy" : ">of read", ">GFLOP/s", ">of peak", ">tokens/s"});
  for (const Result& c : r.results) {
    const f64 rate = c.bytes / c.median();
    const f64 flops = c.flops / c.median();
    table.add({std::to_string(c.tokens), c.routing(), fmt::format("{:.1f}", 1e6 * c.median()),
               fmt::format("{:.1f}", 1e6 * c.quantile(0.1)), fmt::format("{:.1f}", 1e6 * c.quantile(0.9)),
               std::to_string(c.seconds.size()), fmt::format("{:.4g}", c.active_experts),
               fmt::format("{:.1f}", c.bytes / 1e6), fmt::format("{:.1f}", rate / 1e9),
               percent(rate / r.ceilings.read_bytes_per_second), fmt::format("{:.1f}", flops / 1e9),
               r.device() != nullptr ? "-" : percent(flops / r.ceilings.flops_per_second),
               count_text(c.tokens / c.median())});
  }
  std::string text = facts.text() + "\n" + table.text() + "\nrepeat one line:\n";
  for (std::size_t i = 0; i < r.results.size(); ++i) {
    const bool first = i == 0 || r.results[i].tokens != r.results[i - 1].tokens;
    if (first) text += "  " + repeat_words(r.options, r.results[i].tokens) + "\n";
  }
  return text;
}

Json ceilings_json(const Report& r) {
  if (r.device() != nullptr) return {{"copy_bytes_per_second", r.ceilings.read_bytes_per_second}};
  return {{"read_bytes_per_second", r.ceilings.read_bytes_per_second},
          {"flops_per_second", r.ceilings.flops_per_second},
          {"flops_unit", r.ceilings.unit},
          {"fma_flops_per_second", r.ceilings.fma_flops_per_second}};
}

Json report_json(const Report& r) {
  Json cases_json = Json::array();
  for (const Result& c : r.results) {
    const f64 rate = c.bytes / c.median();
    const f64 flops = c.flops / c.median();
    cases_json.push_back(
        {{"tokens", c.tokens},
         {"routing", c.routing()},
         {"runs", c.seconds.size()},
         {"median_us", 1e6 * c.median()},
         {"p10_us", 1e6 * c.quantile(0.1)},
         {"p90_us", 1e6 * c.quantile(0.9)},
         {"active_experts", c.active_experts},
         {"bytes", c.bytes},
         {"bytes_per_second", rate},
         {r.device() != nullptr ? "share_of_copy" : "share_of_read", rate / r.ceilings.read_bytes_per_second},
         {"flops", c.flops},
         {"flops_per_second", flops},
         {"share_of_peak", nullptr},
         {"tokens_per_second", c.tokens / c.median()},
         {"steps", plan::choice_of(r.layer().plan(c.tokens))},
         {"command", repeat_words(r.options, c.tokens)}});
    if (r.device() == nullptr) cases_json.back()["share_of_peak"] = flops / r.ceilings.flops_per_second;
  }
  return {{"version", FOURMOE_VERSION},
          {"machine", machine_json(machine())},
          {"threads", r.threads},
          {"weights", r.rotation.weights},
          {"layers_in_turn", r.rotation.layers.size()},
          {"pack_seconds", r.rotation.pack_seconds},
          {"packed_bytes_per_second", r.rotation.packed_per_second},
          {"problem", problem_json(r.layer().problem())},
          {"steps", steps_json(r.layer().plan())},
          {"choice", choice_words(r.layer().plan(), r.layer().plan().machine)},
          {"ceilings", ceilings_json(r)},
          {"cases", cases_json}};
}

int run(const Options& options) {
  if (options.subject.path.empty() == options.subject.shape.empty())
    throw CLI::ValidationError("give either PATH or --shape");
  if (!options.output.empty()) check_output(options.output, options.subject.path);
  Executor& executor = tbb_executor(options.threads);
  Ceilings ceilings;
  Rotation rotation;
  std::vector<Result> results;
  {
    Progress progress("bench");
    rotation = make_rotation(options.subject, layer_options(options, &executor), &progress);
    progress.show("measuring packing and the ceilings");
    if (rotation.on_device()) {
      ceilings.read_bytes_per_second = measure_copy_rate(rotation.at(0).plan().machine.device);
    } else {
      rotation.packed_per_second = measure_packing(rotation.at(0), executor);
      ceilings = measure_ceilings(executor, rotation.at(0).problem());
    }
    for (const int tokens : options.tokens) {
      for (const Routes routes : {Routes::random, Routes::skewed}) {
        results.push_back(measure(options, &rotation, tokens, routes, &progress));
      }
    }
  }
  const Report report = {options, rotation, ceilings, results, executor.threads()};
  if (options.json) print_json(report_json(report));
  else fmt::print("{}", report_text(report));
  if (!options.output.empty()) write_file(options.output, json_text(report_json(report)));
  return kSuccess;
}

}  // namespace

Command add_bench(CLI::App& app) {
  auto options = std::make_shared<Options>();
  CLI::App* sub = app.add_subcommand("bench", "measure a layer, of random weights or of a checkpoint");
  CLI::Option* path = sub->add_option("path", options->subject.path, "checkpoint")->type_name("PATH");
  add_shape(sub, &options->subject.shape)->excludes(path);
  add_layer(sub, &options->subject.layer, "layer of the checkpoint; the first MoE layer if not given");
  sub->add_option("--tokens", options->tokens, "token counts, one case each")
      ->delimiter(',')
      ->check(within(1, 1 << 20))
      ->capture_default_str();
  add_backend(sub, &options->backend);
  add_device(sub, &options->device);
  add_precision(sub, &options->precision);
  add_threads(sub, &options->threads);
  sub->add_option("--seconds", options->seconds, "time for each case, at least five runs")
      ->check(within(0.0, 3600.0))
      ->capture_default_str();
  sub->add_flag("--shared", options->subject.shared,
                "with the checkpoint's shared expert, or one of the shape of the routed ones");
  sub->add_flag("--logits", options->logits, "calls bring router logits, so that choosing experts is measured too");
  sub->add_flag("--json", options->json, "print one JSON object");
  sub->add_option("--output", options->output, "write the JSON object to this file too")->type_name("FILE");
  std::string footer = "Shapes (hidden, inter, experts, top-k of the routed experts):\n";
  for (const NamedShape& shape : named_shapes()) {
    footer += fmt::format("  {:<14} {:<18} {}\n", shape.name, shape.numbers, shape.model);
  }
  footer +=
      "\nGB/s counts the weights of the experts that the tokens reach, 0.5625 bytes each in NVFP4; layers take turns,\n"
      "so that weights come from memory. On a GPU a CUDA graph replays them; the ceiling is a copy, read plus "
      "write.\n\n"
      "Examples:\n  fourmoe bench --shape qwen3-30b --tokens 1,16,256\n"
      "  fourmoe bench examples/tiny-moe/nvfp4 --layer 0 --tokens 8 --json";
  sub->footer(footer);
  return {sub, [options] { return run(*options); }};
}

}  // namespace fourmoe::tools
