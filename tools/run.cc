// fourmoe run: one MoE layer of a checkpoint on the user's tokens.
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <memory>
#include <set>

#include "case.h"
#include "command.h"
#include "describe.h"
#include "layer.h"
#include "mirror.h"
#include "progress.h"
#include "quantity.h"
#include "table.h"
#include "tensors.h"
#include "write_file.h"

namespace fourmoe::tools {
namespace {

using format::Dtype;
using format::Tensor;
using Clock = std::chrono::steady_clock;

struct Options {
  std::string path;
  int layer = 0;
  std::string input;
  std::string output;
  std::string backend = "auto";
  std::string device;
  std::string precision = "w4a16";
  int threads = 0;
  bool picks = false;
  int check = -1;
  bool json = false;
};

// Views of the input file; logits, or ids and weights, or neither.
struct Input {
  Tensor hidden;
  Tensor logits;
  Tensor ids;
  Tensor weights;

  std::string routing() const {
    if (!logits.empty()) return "router_logits of the input";
    return ids.empty() ? "router of the checkpoint" : "topk_ids and topk_weights of the input";
  }
};

Input read_input(const TensorFile& file) {
  Input in;
  in.hidden = file.matrix("hidden_states");
  if (file.has("router_logits")) in.logits = file.matrix("router_logits");
  if (file.has("topk_ids")) in.ids = file.matrix("topk_ids");
  if (file.has("topk_weights")) in.weights = file.matrix("topk_weights");
  return in;
}

struct Statistics {
  f64 least = 0.0;
  f64 most = 0.0;
  f64 rms = 0.0;
  i64 not_finite = 0;
};

Statistics measure(const std::vector<f64>& values) {
  Statistics s;
  f64 squares = 0.0;
  i64 finite = 0;
  for (const f64 value : values) {
    if (!std::isfinite(value)) {
      ++s.not_finite;
      continue;
    }
    s.least = finite == 0 ? value : std::min(s.least, value);
    s.most = finite == 0 ? value : std::max(s.most, value);
    squares += value * value;
    ++finite;
  }
  s.rms = finite == 0 ? 0.0 : std::sqrt(squares / static_cast<f64>(finite));
  return s;
}

struct Check {
  i64 tokens = 0;  // 0: not made
  f64 rel_l2 = 0.0;
  f64 bound = 0.0;
  bool passed() const { return tokens == 0 || rel_l2 <= bound; }
};

struct Outcome {
  std::vector<u8> output;  // [T, hidden] in the dtype of hidden_states
  std::vector<i32> ids;    // [T, top_k]
  std::vector<f32> weights;
  std::vector<f64> seconds;  // of each run, ascending
  Statistics statistics;
  Check check;

  f64 median() const { return seconds[seconds.size() / 2]; }
};

std::vector<f64> widen(const std::vector<u8>& bytes, Dtype dtype) {
  std::vector<f64> values(bytes.size() / static_cast<std::size_t>(format::dtype_bytes(dtype)));
  for (std::size_t i = 0; i < values.size(); ++i) values[i] = format::read(bytes.data(), dtype, static_cast<i64>(i));
  return values;
}

LayerCall call_of(const Input& in, std::vector<u8>* output) {
  output->assign(static_cast<std::size_t>(in.hidden.rows * in.hidden.cols * format::dtype_bytes(in.hidden.dtype)), 0);
  LayerCall call;
  call.hidden = in.hidden;
  call.logits = in.logits;
  call.ids = in.ids;
  call.weights = in.weights;
  call.output = {output->data(), in.hidden.dtype, in.hidden.rows, in.hidden.cols, in.hidden.cols};
  return call;
}

bool is_float(Dtype dtype) { return dtype == Dtype::f32 || dtype == Dtype::f16 || dtype == Dtype::bf16; }

// Once for the result; short calls again, for at most half a second, so that the speed is that of a warm layer.
Outcome compute(Layer* layer, const Input& in) {
  constexpr f64 kEnough = 0.5;
  constexpr std::size_t kMostRuns = 101;
  if (!is_float(in.hidden.dtype)) {
    throw Error(Reason::dtype_unsupported,
                fmt::format("hidden_states is {}, expected bf16, f16 or f32", format::dtype_name(in.hidden.dtype)));
  }
  if (const i64 hidden = layer->problem().hidden; in.hidden.cols != hidden) {  // rows without columns may be any number
    throw Error(Reason::argument_invalid, fmt::format("hidden_states is [{}, {}], expected [{}, {}]", in.hidden.rows,
                                                      in.hidden.cols, in.hidden.rows, hidden));
  }
  Outcome out;
  LayerCall call = call_of(in, &out.output);
  out.ids.resize(static_cast<std::size_t>(in.hidden.rows * layer->problem().top_k));
  out.weights.resize(out.ids.size());
  call.picked_ids = out.ids.data();
  call.picked_weights = out.weights.data();
  cases::Mirror mirror(*layer, call);
  f64 spent = 0.0;
  do {
    const Clock::time_point start = Clock::now();
    throw_unless_ok(layer->run(mirror.call()));
    throw_unless_ok(layer->wait());
    out.seconds.push_back(std::chrono::duration<f64>(Clock::now() - start).count());
    spent += out.seconds.back();
  } while (spent < kEnough && out.seconds.size() < kMostRuns);
  if (out.seconds.size() > 2) out.seconds.erase(out.seconds.begin());  // it made the workspace
  std::sort(out.seconds.begin(), out.seconds.end());
  mirror.fetch();
  out.statistics = measure(widen(out.output, in.hidden.dtype));
  return out;
}

// The reference computes in double at about a tenth of a GFLOP/s a thread: by default it gets work for seconds.
i64 check_tokens(const Options& options, const Problem& problem, i64 tokens) {
  constexpr f64 kAffordable = 2e9;
  if (options.check >= 0) return std::min<i64>(options.check, tokens);
  const f64 a_token = cases::flops(problem, problem.top_k);
  return std::min<i64>(tokens, static_cast<i64>(kAffordable / a_token));
}

// Tokens evenly spread over the call, computed again by the reference room. A token's result does not depend on its
// batch, so a few stand for themselves.
Check compare(const Options& options, const checkpoint::Layer& weights, const Input& in, const Outcome& out, i64 tokens,
              Executor* executor) {
  Check check;
  check.tokens = tokens;
  if (tokens == 0) return check;
  std::vector<i64> rows;
  for (i64 i = 0; i < tokens; ++i) rows.push_back(i * in.hidden.rows / tokens);
  const Rows hidden = take_rows(in.hidden, rows);
  const Rows logits = take_rows(in.logits, rows);
  const Rows ids = take_rows(in.ids, rows);
  const Rows pick_weights = take_rows(in.weights, rows);
  const Input few = {hidden.view, logits.view, ids.view, pick_weights.view};
  LayerOptions how;
  how.backend = "reference";
  how.precision = parse_precision(options.precision);
  how.max_tokens = static_cast<i32>(std::min<i64>(tokens, 64));
  how.executor = executor;
  Layer reference(weights, how);
  std::vector<u8> expected;
  throw_unless_ok(reference.run(call_of(few, &expected)));
  const Tensor all = {const_cast<u8*>(out.output.data()), in.hidden.dtype, in.hidden.rows, in.hidden.cols,
                      in.hidden.cols};
  std::vector<f64> found = widen(take_rows(all, rows).memory, in.hidden.dtype);
  std::vector<f64> wanted = widen(expected, in.hidden.dtype);
  for (std::size_t i = 0; i < found.size(); ++i) {  // a token that overflows does so in both
    if (!std::isfinite(found[i]) && !std::isfinite(wanted[i])) found[i] = wanted[i] = 0.0;
  }
  check.rel_l2 = cases::rel_l2(found, wanted);
  // Both outputs are rounded to 16 bits, so neighbours may differ by an ulp: docs/design.md section 4.
  const f64 unrounded = how.precision == Precision::w4a16 ? 2e-4 : 3e-3;
  check.bound = how.precision == Precision::w4a4 ? 1e-2 : in.hidden.dtype == Dtype::f32 ? unrounded : 3e-3;
  return check;
}

void check_paths(const Options& options) {
  if (options.output.empty()) throw Error(Reason::argument_invalid, "--output is empty");
  if (same_file(options.input, options.output)) {
    throw Error(Reason::file_exists, fmt::format("output {} is the input", options.output));
  }
  check_output(options.output, options.path);
}

// Wider elements first, so that every tensor is aligned in the file.
void write_output(const Options& options, const Input& in, const Outcome& out, i32 top_k) {
  std::vector<checkpoint::TensorToWrite> tensors;
  const i64 tokens = in.hidden.rows;
  if (options.picks) {
    const i64 bytes = static_cast<i64>(out.ids.size()) * 4;
    tensors.push_back({"topk_ids", "I32", {tokens, top_k}, out.ids.data(), bytes});
    tensors.push_back({"topk_weights", "F32", {tokens, top_k}, out.weights.data(), bytes});
  }
  tensors.push_back({"output",
                     stored_dtype(in.hidden.dtype),
                     {tokens, in.hidden.cols},
                     out.output.data(),
                     static_cast<i64>(out.output.size())});
  checkpoint::write_safetensors(options.output, tensors, {});
}

std::string backend_words(const Options& options, const plan::Plan& plan, i32 threads) {
  const std::string choice = choice_words(plan, plan.machine);
  std::string why = "asked for";
  if (options.backend == "auto") {
    why = "the first whose steps accept";
    for (const plan::Candidate& c : plan.candidates) {
      if (c.chosen || !c.step->in_room() || c.step->place != plan.steps.front()->place) continue;
      if (c.verdict.accepted()) break;
      why += fmt::format("; {} does not: {}", step_words(*c.step), c.verdict.detail);
    }
  }
  return fmt::format("{}{}, {} thread{} ({})", plan.backend, choice.empty() ? "" : " " + choice, threads,
                     threads == 1 ? "" : "s", why);
}

struct Report {
  const Options& options;
  const Layer& layer;
  const Input& in;
  const Outcome& out;
  i32 threads;
  i64 expert_bytes;
};

i64 sum_bytes(const checkpoint::Layer& layer) {
  i64 bytes = 0;
  for (const weights::Expert& e : layer.experts) bytes += e.gate.bytes() + e.up.bytes() + e.down.bytes();
  return bytes;
}

void print_text(const Report& r) {
  const Problem& p = r.layer.problem();
  const Statistics& s = r.out.statistics;
  const i64 tokens = r.in.hidden.rows;
  const auto dtype = format::dtype_name(r.in.hidden.dtype);
  Facts facts;
  facts.add("layer", fmt::format("{} of {}: {}, {}", r.options.layer, r.options.path, shape_words(p),
                                 activation_words(p.activation)));
  facts.add("weights", fmt::format("{} of {} experts{}", bytes_text(r.expert_bytes), format::encoding_name(p.encoding),
                                   r.layer.packed_bytes() == 0
                                       ? ", read in place"
                                       : fmt::format(", packed in {}", bytes_text(r.layer.packed_bytes()))));
  for (const std::string& note : r.layer.notes()) facts.add("note", note);
  facts.add("backend", backend_words(r.options, r.layer.plan(), r.threads));
  facts.add("precision", std::string(precision_name(p.precision)));
  facts.add("routing", fmt::format("{}: {}", r.in.routing(), routing_words(p.routing)));
  facts.add("tokens", fmt::format("{} in {}, {} of {} experts active", tokens, dtype, cases::active_experts(r.out.ids),
                                  p.experts));
  facts.add("output", fmt::format("[{}, {}] {}: min {}, max {}, rms {}, {} not finite", tokens, p.hidden, dtype,
                                  number_text(s.least), number_text(s.most), number_text(s.rms), s.not_finite));
  if (r.out.check.tokens > 0) {
    facts.add("check", fmt::format("rel-L2 {} against the reference on {} of {} tokens (bound {}): {}",
                                   number_text(r.out.check.rel_l2), r.out.check.tokens, tokens,
                                   number_text(r.out.check.bound), r.out.check.passed() ? "ok" : "FAILED"));
  } else {
    facts.add("check", "not made; --check N compares N tokens with the reference");
  }
  facts.add("speed", fmt::format("{} tokens/s ({} a call, median of {} run{})",
                                 count_text(static_cast<f64>(tokens) / r.out.median()), duration_text(r.out.median()),
                                 r.out.seconds.size(), r.out.seconds.size() == 1 ? "" : "s"));
  facts.add("wrote", r.options.output);
  fmt::print("{}", facts.text());
}

Json report_json(const Report& r) {
  const Problem& p = r.layer.problem();
  const Statistics& s = r.out.statistics;
  Json json = {{"checkpoint", r.options.path},
               {"layer", r.options.layer},
               {"problem", problem_json(p)},
               {"notes", r.layer.notes()},
               {"backend", r.layer.plan().backend},
               {"steps", steps_json(r.layer.plan())},
               {"choice", choice_words(r.layer.plan(), r.layer.plan().machine)},
               {"threads", r.threads},
               {"weight_bytes", r.expert_bytes},
               {"packed_bytes", r.layer.packed_bytes()},
               {"workspace_bytes", r.layer.workspace_bytes()},
               {"routing", r.in.routing()},
               {"tokens", r.in.hidden.rows},
               {"active_experts", cases::active_experts(r.out.ids)},
               {"output",
                {{"path", r.options.output},
                 {"dtype", format::dtype_name(r.in.hidden.dtype)},
                 {"shape", {r.in.hidden.rows, p.hidden}},
                 {"min", s.least},
                 {"max", s.most},
                 {"rms", s.rms},
                 {"not_finite", s.not_finite}}},
               {"check", nullptr},
               {"seconds", r.out.median()},
               {"runs", r.out.seconds.size()},
               {"tokens_per_second", static_cast<f64>(r.in.hidden.rows) / r.out.median()}};
  if (r.out.check.tokens > 0) {
    json["check"] = {{"tokens", r.out.check.tokens},
                     {"rel_l2", r.out.check.rel_l2},
                     {"bound", r.out.check.bound},
                     {"passed", r.out.check.passed()}};
  }
  return json;
}

int run(const Options& options) {
  check_paths(options);
  const TensorFile file(options.input);
  const Input in = read_input(file);
  Executor& executor = tbb_executor(options.threads);
  Outcome out;
  std::unique_ptr<Layer> layer;
  {
    Progress progress("run");
    progress.show("loading the layer");
    const checkpoint::Layer weights = checkpoint::Checkpoint::open(options.path).load(options.layer, executor);
    LayerOptions how;
    how.backend = options.backend;
    how.device = device_of(options.device, options.backend);
    how.precision = parse_precision(options.precision);
    how.max_tokens = static_cast<i32>(std::clamp<i64>(in.hidden.rows, 1, 4096));
    how.executor = &executor;
    layer = std::make_unique<Layer>(weights, how);
    progress.show("computing");
    out = compute(layer.get(), in);
    progress.show("comparing with the reference");
    out.check = compare(options, weights, in, out, check_tokens(options, layer->problem(), in.hidden.rows), &executor);
    progress.show("writing");
  }
  if (!out.check.passed()) {
    throw Error(
        Reason::internal,
        fmt::format("rel-L2 {} against the reference on {} tokens is beyond the bound of {}; nothing was written "
                    "(--check 0 leaves the comparison out)",
                    number_text(out.check.rel_l2), out.check.tokens, number_text(out.check.bound)));
  }
  write_output(options, in, out, layer->problem().top_k);
  const Report report = {options, *layer, in, out, executor.threads(), sum_bytes(layer->weights())};
  if (options.json) print_json(report_json(report));
  else print_text(report);
  return kSuccess;
}

}  // namespace

Command add_run(CLI::App& app) {
  auto options = std::make_shared<Options>();
  CLI::App* sub = app.add_subcommand("run", "run one MoE layer of a checkpoint on hidden states from a file");
  sub->add_option("path", options->path, "checkpoint folder, .safetensors or .gguf file")
      ->required()
      ->type_name("PATH");
  add_layer(sub, &options->layer, "number of the layer in the model")->required();
  sub->add_option("--input", options->input, "file with hidden_states and, if wanted, routing (see below)")
      ->required()
      ->type_name("X.safetensors");
  sub->add_option("--output", options->output, "file to write: output [T, H], in the dtype of hidden_states")
      ->required()
      ->type_name("Y.safetensors");
  sub->add_flag("--picks", options->picks, "write topk_ids and topk_weights too");
  add_backend(sub, &options->backend);
  add_device(sub, &options->device);
  add_precision(sub, &options->precision);
  add_threads(sub, &options->threads);
  sub->add_option("--check", options->check,
                  "compare N tokens with the reference; by default as many as it computes in seconds")
      ->check(within(0, 1 << 30))
      ->type_name("N");
  sub->add_flag("--json", options->json, "print one JSON object");
  sub->footer(
      "X holds hidden_states [T, H] (bf16, f16 or f32) and one of: router_logits [T, E]; topk_ids with topk_weights\n"
      "[T, k], where the id -1 is no pick; neither: then the checkpoint's own router picks.\n\n"
      "Example:\n"
      "  fourmoe run examples/tiny-moe/nvfp4 --layer 0 --input x.safetensors --output y.safetensors --picks");
  return {sub, [options] { return run(*options); }};
}

}  // namespace fourmoe::tools
