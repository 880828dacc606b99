// fourmoe bench: how fast this machine runs a layer, and what share of its ceilings that is.
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <memory>

#include "case.h"
#include "ceiling.h"
#include "command.h"
#include "describe.h"
#include "device_time.h"
#include "layer.h"
#include "progress.h"
#include "quantity.h"
#include "table.h"

namespace fourmoe::tools {
namespace {

using cases::Routes;
using Clock = std::chrono::steady_clock;

struct Options {
  std::string path;
  std::string shape;
  int layer = -1;
  std::vector<int> tokens = {1, 16, 256};
  std::string backend = "auto";
  std::string device;
  std::string precision = "w4a16";
  int threads = 0;
  f64 seconds = 1.0;
  bool json = false;
  std::string output;
};

// Weights come from memory when at least this much of other weights, and twice the last-level cache, was read since.
constexpr i64 kColdBytes = i64{1} << 30;
constexpr i64 kMostLayers = 64;

// Random weights whose matrices are windows of one pool. The blobs that a room packs from them are memory of their own,
// and the pool is quickly filled, however large the layer.
struct Pool {
  std::vector<u8> codes;
  std::vector<u8> scales;
};

i64 largest_codes(const Problem& p) { return i64{p.hidden} * p.inter / 2; }

std::shared_ptr<Pool> make_pool(const Problem& p) {
  constexpr i64 kSpread = 1 << 16;  // offsets of the windows
  auto pool = std::make_shared<Pool>();
  std::mt19937_64 random(1);
  pool->codes.resize(static_cast<std::size_t>(largest_codes(p) + kSpread));
  pool->scales.resize(static_cast<std::size_t>(largest_codes(p) / 8 + kSpread));
  for (u8& byte : pool->codes) byte = static_cast<u8>(random() >> 32);
  // E4M3 of 2^-3 to 2^2, and E8M0 of about the same.
  for (u8& byte : pool->scales) {
    const u64 bits = random() >> 32;
    byte = p.encoding == format::Encoding::mxfp4 ? static_cast<u8>(124 + bits % 6)
                                                 : static_cast<u8>((4 + bits % 6) << 3 | (bits >> 8) % 8);
  }
  return pool;
}

format::Matrix window(const Pool& pool, const Problem& p, i32 rows, i32 cols, std::mt19937_64* random) {
  format::Matrix matrix;
  matrix.rows = rows;
  matrix.cols = cols;
  matrix.encoding = p.encoding;
  matrix.data_stride = cols / 2;
  matrix.scales_stride = cols / format::block_of(p.encoding);
  const u64 offset = (*random)() % (1 << 16);
  matrix.data = pool.codes.data() + offset;
  matrix.scales = pool.scales.data() + offset;
  matrix.global = p.encoding == format::Encoding::mxfp4 ? 1.0f : 0.17f / std::sqrt(static_cast<f32>(cols));
  return matrix;
}

checkpoint::Layer random_weights(const Problem& p, const std::shared_ptr<Pool>& pool, u64 seed) {
  std::mt19937_64 random(seed);
  checkpoint::Layer layer;
  layer.problem = p;
  for (i32 e = 0; e < p.local_experts; ++e) {
    weights::Expert expert;
    if (p.activation.gated()) expert.gate = window(*pool, p, p.inter, p.hidden, &random);
    expert.up = window(*pool, p, p.inter, p.hidden, &random);
    expert.down = window(*pool, p, p.hidden, p.inter, &random);
    expert.input_scale = 5.0f / format::kNvfp4Max;
    expert.inter_scale = 4.0f / format::kNvfp4Max;
    layer.experts.push_back(expert);
  }
  layer.owner = pool;
  return layer;
}

// The layers that take turns, so that no case finds its weights in a cache.
struct Rotation {
  std::vector<std::unique_ptr<Layer>> layers;
  std::string weights;     // where they come from
  f64 pack_seconds = 0.0;  // the least that making one of them took

  bool on_device() const { return layers.front()->plan().machine.device >= 0; }
  Layer& at(i64 turn) { return *layers[static_cast<std::size_t>(turn) % layers.size()]; }
};

// The memory that holds the packed weights, and the cache before it.
struct Store {
  i64 memory_bytes;
  i64 cache_bytes;
};

Store store_of(i32 device) {
  const Machine& m = machine();
  if (device < 0 || device >= static_cast<i32>(m.devices.size())) return {m.memory_bytes, m.cache_bytes};
  return {m.devices[device].memory_bytes, m.devices[device].l2_bytes};
}

i64 copies_to_be_cold(i64 bytes, const Store& store) {
  const i64 budget = store.memory_bytes / 4;
  const i64 wanted = (std::max(kColdBytes, 2 * store.cache_bytes) + bytes - 1) / bytes;
  return std::clamp<i64>(std::min(wanted, budget / bytes), 1, kMostLayers);
}

LayerOptions layer_options(const Options& options, Executor* executor) {
  LayerOptions how;
  how.backend = options.backend;
  how.device = device_of(options.device, options.backend);
  how.precision = parse_precision(options.precision);
  how.max_tokens = std::clamp(*std::max_element(options.tokens.begin(), options.tokens.end()), 1, 4096);
  how.executor = executor;
  return how;
}

// Expert bytes of all, and the same packed: what making the layer will take.
void check_memory(const Problem& p, const Store& store) {
  const i64 bytes = cases::expert_bytes(p) * p.local_experts;
  if (bytes <= store.memory_bytes / 4 * 3) return;
  throw Error(Reason::out_of_memory, fmt::format("the layer has {} of weights, the device {} of memory",
                                                 bytes_text(bytes), bytes_text(store.memory_bytes)));
}

void add_layer(Rotation* rotation, checkpoint::Layer weights, const LayerOptions& options) {
  const Clock::time_point start = Clock::now();
  rotation->layers.push_back(std::make_unique<Layer>(std::move(weights), options));
  const f64 seconds = std::chrono::duration<f64>(Clock::now() - start).count();
  rotation->pack_seconds = rotation->layers.size() == 1 ? seconds : std::min(rotation->pack_seconds, seconds);
}

Rotation make_rotation(const Options& options, Executor* executor, Progress* progress) {
  Rotation rotation;
  const Store store = store_of(device_of(options.device, options.backend));
  if (options.shape.empty()) {
    const auto checkpoint = checkpoint::Checkpoint::open(options.path);
    i32 index = options.layer;
    if (index < 0) {
      const checkpoint::Info info = checkpoint.inspect();
      if (info.layers.empty()) throw Error(Reason::layer_missing, fmt::format("{} has no MoE layers", info.path));
      index = info.layers.front().index;
    }
    checkpoint::Layer weights = checkpoint.load(index, *executor);
    weights.shared.reset();  // the figures are those of the routed experts
    const i64 copies = copies_to_be_cold(cases::expert_bytes(weights.problem) * weights.problem.local_experts, store);
    for (i64 i = 0; i < copies; ++i) {
      progress->show_count("packing weights", i, copies);
      add_layer(&rotation, weights, layer_options(options, executor));
    }
    rotation.weights = fmt::format("layer {} of {}", index, options.path);
    return rotation;
  }
  const Problem problem = parse_shape(options.shape);
  if (const Verdict verdict = check(problem); !verdict.accepted()) throw Error(verdict.reason, verdict.detail);
  check_memory(problem, store);
  const std::shared_ptr<Pool> pool = make_pool(problem);
  const i64 copies = copies_to_be_cold(cases::expert_bytes(problem) * problem.local_experts, store);
  for (i64 i = 0; i < copies; ++i) {
    progress->show_count("packing weights", i, copies);
    add_layer(&rotation, random_weights(problem, pool, static_cast<u64>(i) + 1), layer_options(options, executor));
  }
  rotation.weights = fmt::format("random, {}", options.shape);
  return rotation;
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

// Runs the case for the time given, at least five times; inputs and layers change from run to run.
Result measure(Rotation* rotation, i32 tokens, Routes routes, f64 budget, Progress* progress) {
  // On a GPU a few megabytes of one token's experts would stay in the cache until their turn comes again.
  const int call_count = rotation->on_device() && tokens <= 512 ? 16 : 4;
  constexpr std::size_t kLeast = 5;
  constexpr std::size_t kMost = 100000;
  Result result;
  result.tokens = tokens;
  result.routes = routes;
  std::vector<cases::Call> calls;
  for (int i = 0; i < call_count; ++i) {
    cases::Spec spec;
    spec.problem = rotation->at(0).problem();
    spec.tokens = tokens;
    spec.routes = routes;
    spec.seed = static_cast<u64>(i) + 1;
    calls.emplace_back(spec);
    result.active_experts += static_cast<f64>(cases::active_experts(calls.back().ids)) / call_count;
  }
  const Problem& problem = rotation->at(0).problem();
  result.bytes = result.active_experts * static_cast<f64>(cases::expert_bytes(problem));
  result.flops = cases::flops(problem, i64{tokens} * problem.top_k);
  if (rotation->on_device()) {
    progress->show(fmt::format("{} tokens, {} routing", tokens, result.routing()));
    result.seconds = time_on_device(rotation->layers, calls, budget);
    return result;
  }
  // A layer makes its workspace in its first call, and memory is first touched then.
  const i64 warm_up = std::max<i64>(2, static_cast<i64>(rotation->layers.size()));
  std::vector<u8> output;
  f64 spent = 0.0;
  for (i64 turn = 0; result.seconds.size() < kLeast || (spent < budget && result.seconds.size() < kMost); ++turn) {
    const LayerCall call = calls[static_cast<std::size_t>(turn) % call_count].view(&output, format::Dtype::bf16);
    const Clock::time_point start = Clock::now();
    throw_unless_ok(rotation->at(turn).run(call));
    const f64 seconds = std::chrono::duration<f64>(Clock::now() - start).count();
    progress->show(fmt::format("{} tokens, {} routing", tokens, result.routing()));
    if (turn < warm_up) continue;
    result.seconds.push_back(seconds);
    spent += seconds;
  }
  std::sort(result.seconds.begin(), result.seconds.end());
  return result;
}

// The command that repeats a case.
std::string repeat_words(const Options& options, i32 tokens) {
  std::string words = "fourmoe bench ";
  words += options.shape.empty() ? options.path : "--shape " + options.shape;
  if (options.layer >= 0) words += fmt::format(" --layer {}", options.layer);
  if (!options.device.empty()) words += " --device " + options.device;
  words += fmt::format(" --tokens {} --backend {} --precision {} --threads {} --seconds {:g}", tokens, options.backend,
                       options.precision, options.threads, options.seconds);
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
  return fmt::format("read {:.1f} GB/s, f32 multiply-add {:.0f} GFLOP/s, measured in this run", bytes,
                     r.ceilings.flops_per_second / 1e9);
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
  const i64 bytes = cases::expert_bytes(p) * p.local_experts;
  facts.add("weights", fmt::format("{} a layer, {} layer{} in turn, packed in {} ({:.1f} GB/s)", bytes_text(bytes),
                                   r.rotation.layers.size(), r.rotation.layers.size() == 1 ? "" : "s",
                                   duration_text(r.rotation.pack_seconds),
                                   static_cast<f64>(bytes) / r.rotation.pack_seconds / 1e9));
  facts.add("ceilings", ceilings_words(r));
  facts.add("version", FOURMOE_VERSION);
  Table table({">tokens", "routing", ">median us", ">p10 us", ">p90 us", ">runs", ">active", ">MB", ">GB/s",
               r.device() != nullptr ? ">of copy" : ">of read", ">GFLOP/s", ">of FMA", ">tokens/s"});
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
          {"fma_flops_per_second", r.ceilings.flops_per_second}};
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
         {"share_of_fma", nullptr},
         {"tokens_per_second", c.tokens / c.median()},
         {"command", repeat_words(r.options, c.tokens)}});
    if (r.device() == nullptr) cases_json.back()["share_of_fma"] = flops / r.ceilings.flops_per_second;
  }
  return {{"version", FOURMOE_VERSION},
          {"machine", machine_json(machine())},
          {"threads", r.threads},
          {"weights", r.rotation.weights},
          {"layers_in_turn", r.rotation.layers.size()},
          {"pack_seconds", r.rotation.pack_seconds},
          {"problem", problem_json(r.layer().problem())},
          {"steps", steps_json(r.layer().plan())},
          {"choice", choice_words(r.layer().plan(), r.layer().plan().machine)},
          {"ceilings", ceilings_json(r)},
          {"cases", cases_json}};
}

// To a temporary name beside `path`, then renamed.
void write_file(const std::string& path, const std::string& text) {
  const std::string temporary = fmt::format("{}.{}.partial", path, ::getpid());
  std::ofstream out(temporary, std::ios::binary);
  out << text;
  out.close();
  std::error_code error;
  if (out) std::filesystem::rename(temporary, path, error);
  if (out && !error) return;
  std::filesystem::remove(temporary, error);
  throw Error(Reason::write_failed, fmt::format("{} cannot be written", path));
}

int run(const Options& options) {
  if (options.path.empty() == options.shape.empty()) throw CLI::ValidationError("give either PATH or --shape");
  if (!options.output.empty() &&
      !std::filesystem::is_directory(std::filesystem::absolute(options.output).parent_path())) {
    throw Error(Reason::write_failed, fmt::format("output {}: its folder does not exist", options.output));
  }
  Executor& executor = tbb_executor(options.threads);
  Ceilings ceilings;
  Rotation rotation;
  std::vector<Result> results;
  {
    Progress progress("bench");
    rotation = make_rotation(options, &executor, &progress);
    progress.show("measuring the ceilings");
    if (rotation.on_device()) ceilings.read_bytes_per_second = measure_copy_rate(rotation.at(0).plan().machine.device);
    else ceilings = measure_ceilings(executor);
    for (const int tokens : options.tokens) {
      for (const Routes routes : {Routes::random, Routes::skewed}) {
        results.push_back(measure(&rotation, tokens, routes, options.seconds, &progress));
      }
    }
  }
  const Report report = {options, rotation, ceilings, results, executor.threads()};
  if (options.json) print_json(report_json(report));
  else fmt::print("{}", report_text(report));
  if (!options.output.empty()) write_file(options.output, report_json(report).dump(2) + "\n");
  return kSuccess;
}

}  // namespace

Command add_bench(CLI::App& app) {
  auto options = std::make_shared<Options>();
  CLI::App* sub = app.add_subcommand("bench", "measure a layer, of random weights or of a checkpoint");
  CLI::Option* path = sub->add_option("path", options->path, "checkpoint")->type_name("PATH");
  add_shape(sub, &options->shape)->excludes(path);
  add_layer(sub, &options->layer, "layer of the checkpoint; the first MoE layer if not given");
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
  sub->add_flag("--json", options->json, "print one JSON object");
  sub->add_option("--output", options->output, "write the JSON object to this file too")->type_name("FILE");
  std::string footer = "Shapes (hidden, inter, experts, top-k of the routed experts):\n";
  for (const NamedShape& shape : named_shapes()) {
    footer += fmt::format("  {:<14} {:<18} {}\n", shape.name, shape.numbers, shape.model);
  }
  footer +=
      "\nGB/s counts the weights of the experts that the tokens reach, 0.5625 bytes each; layers take turns, so that\n"
      "weights come from memory. On a GPU a CUDA graph replays them; the ceiling is a copy, read plus write.\n\n"
      "Examples:\n  fourmoe bench --shape qwen3-30b --tokens 1,16,256\n"
      "  fourmoe bench examples/tiny-moe/nvfp4 --layer 0 --tokens 8 --json";
  sub->footer(footer);
  return {sub, [options] { return run(*options); }};
}

}  // namespace fourmoe::tools
