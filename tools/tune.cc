// fourmoe tune: which plan is fastest here for calls of each size, measured and stored for all later layers.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <memory>

#include "command.h"
#include "describe.h"
#include "device_time.h"
#include "inputs.h"
#include "progress.h"
#include "rotation.h"
#include "table.h"
#include "tune/race.h"

namespace fourmoe::tools {
namespace {

std::vector<int> buckets(int most) {
  std::vector<int> all;
  for (int bucket = 1; bucket <= most; bucket = plan::bucket_of(bucket + 1)) all.push_back(bucket);
  return all;
}

struct Options {
  Subject subject;
  std::vector<int> tokens = buckets(4096);
  std::string device = "cuda:0";
  std::string precision = "w4a16";
  bool batch_invariant = false;
  f64 seconds = 0.05;
  bool json = false;
  bool dry_run = false;
  std::string output;
};

// One plan for calls of one size.
struct Entrant {
  plan::Choice choice;
  f64 seconds = 0.0;  // median of a call; 0: it failed
};

struct Case {
  i32 tokens = 0;
  tune::Source source = tune::Source::rule;  // of the default
  std::vector<Entrant> entrants;             // the default first
  std::size_t winner = 0;
  f64 floor = 0.0;  // seconds that copying the weights' bytes would take

  const Entrant& standing() const { return entrants.front(); }
  const Entrant& chosen() const { return entrants[winner]; }
  const Entrant& best() const {
    return *std::min_element(entrants.begin(), entrants.end(),
                             [](const Entrant& a, const Entrant& b) { return rank(a) < rank(b); });
  }

 private:
  static f64 rank(const Entrant& e) { return e.seconds > 0.0 ? e.seconds : INFINITY; }
};

LayerOptions layer_options(const Options& options) {
  LayerOptions how;
  how.device = parse_device(options.device);
  how.precision = parse_precision(options.precision);
  how.batch_invariant = options.batch_invariant;
  how.max_tokens = *std::max_element(options.tokens.begin(), options.tokens.end());
  how.executor = &tbb_executor();
  how.tuning = "";  // the default is what this library takes where nobody has tuned
  return how;
}

// Seconds of a call from rates that an H200 does not exceed: how often to run it, not what it should take.
f64 guess_seconds(const Problem& p, i64 tokens) {
  const f64 weights = f64{1} * p.hidden * p.inter * (p.activation.gated() ? 3 : 2);
  return 1e-5 +
         std::max(tune::expected_bytes(p, tokens) / 4.5e12, 2.0 * static_cast<f64>(tokens * p.top_k) * weights / 8e14);
}

// How one call size is measured: a replay of a few milliseconds, and as many as the time for each plan allows.
struct Effort {
  i64 runs;
  i32 rounds;

  Effort(const Problem& problem, i64 tokens, f64 seconds) {
    const f64 guess = guess_seconds(problem, tokens);
    runs = std::clamp<i64>(static_cast<i64>(2e-3 / guess), 1, 16);
    rounds = static_cast<i32>(std::clamp(seconds / (guess * static_cast<f64>(runs)), 5.0, 101.0));
  }
};

void choose_all(Rotation* rotation, i64 tokens, const plan::Choice& choice) {
  for (const auto& layer : rotation->layers) throw_unless_ok(layer->choose(tokens, choice));
}

// All plans for the size take turns on the same calls. The layers' choices are as before in the end.
Case measure(Rotation* rotation, const tune::Sized& standing, f64 seconds, i32 tokens) {
  const Problem& problem = standing.plan.problem;
  Case result;
  result.tokens = tokens;
  result.source = standing.source;
  result.entrants.push_back({plan::choice_of(standing.plan)});
  std::vector<plan::Choice> others = plan::alternatives(problem, standing.plan.machine, {});
  // The rule with its variants by name is the default over again.
  if (standing.source == tune::Source::rule && !others.empty()) others.erase(others.begin());
  for (plan::Choice& choice : others) {
    if (choice != result.standing().choice) result.entrants.push_back({std::move(choice)});
  }
  const Effort effort(problem, tokens, seconds);
  std::vector<Inputs> inputs;
  std::vector<LayerCall> calls;
  for (i64 i = 0; i < effort.runs; ++i) inputs.emplace_back(problem, tokens, static_cast<u64>(tokens * 131 + i));
  for (Inputs& input : inputs) calls.push_back(input.call());
  Replays replays(rotation->layers, calls, effort.runs);
  for (const Entrant& entrant : result.entrants) {
    choose_all(rotation, tokens, entrant.choice);
    replays.seconds(replays.capture());  // warms up
  }
  choose_all(rotation, tokens, result.standing().choice);
  const tune::Placing placing =
      tune::race(result.entrants.size(), effort.rounds, [&](std::size_t entrant) { return replays.seconds(entrant); });
  replays.check();
  result.winner = placing.winner;
  for (std::size_t i = 0; i < placing.seconds.size(); ++i) result.entrants[i].seconds = placing.seconds[i];
  return result;
}

struct Report {
  const Options& options;
  const Rotation& rotation;
  const std::vector<Case>& cases;
  f64 copy_bytes_per_second;
  std::string path;  // where choices were stored; empty: nowhere

  const Problem& problem() const { return rotation.layers.front()->problem(); }
};

// What to store: of two sizes in one bucket the larger counts.
tune::Book to_book(const Report& r) {
  tune::Book book;
  tune::Section& section = book[tune::key_of(r.problem(), r.rotation.layers.front()->plan().machine)];
  section.copy_bytes_per_second = r.copy_bytes_per_second;
  std::map<i32, i32> tokens;
  for (const Case& c : r.cases) {
    const i32 bucket = plan::bucket_of(c.tokens);
    if (c.tokens < tokens[bucket] || c.standing().seconds == 0.0) continue;
    tokens[bucket] = c.tokens;
    section.buckets[bucket] = {c.chosen().choice, c.chosen().seconds, c.standing().seconds};
  }
  return book;
}

std::string micro(f64 seconds) { return seconds == 0.0 ? "failed" : fmt::format("{:.1f}", 1e6 * seconds); }

std::string report_text(const Report& r) {
  const Problem& p = r.problem();
  Facts facts;
  facts.add("device", device_words(*fourmoe::device_of(r.rotation.layers.front()->plan().machine)));
  facts.add("layer",
            fmt::format("{}: {}, {}, {}, {}", r.rotation.weights, shape_words(p), activation_words(p.activation),
                        format::encoding_name(p.encoding), precision_name(p.precision)));
  facts.add("copy", fmt::format("{:.0f} GB/s, read plus write", r.copy_bytes_per_second / 1e9));
  facts.add("stored in", r.path.empty() ? "nothing, as asked for" : r.path);
  Table table({">tokens", ">floor us", ">default us", "by", ">best us", ">plans", ">chosen us", "chosen"});
  for (const Case& c : r.cases) {
    table.add({std::to_string(c.tokens), micro(c.floor), micro(c.standing().seconds),
               std::string(tune::source_name(c.source)), micro(c.best().seconds), std::to_string(c.entrants.size()),
               micro(c.chosen().seconds), c.winner == 0 ? "the default" : choice_text(c.chosen().choice)});
  }
  return facts.text() + "\n" + table.text();
}

Json entrant_json(const Entrant& entrant) {
  Json json = {{"steps", entrant.choice}, {"us", nullptr}};
  if (entrant.seconds > 0.0) json["us"] = 1e6 * entrant.seconds;
  return json;
}

Json report_json(const Report& r) {
  Json cases = Json::array();
  for (const Case& c : r.cases) {
    Json entrants = Json::array();
    for (const Entrant& entrant : c.entrants) entrants.push_back(entrant_json(entrant));
    cases.push_back({{"tokens", c.tokens},
                     {"source", tune::source_name(c.source)},
                     {"floor_us", 1e6 * c.floor},
                     {"chosen", c.winner},
                     {"plans", entrants}});
  }
  Json json = {{"version", FOURMOE_VERSION},
               {"machine", machine_json(machine())},
               {"weights", r.rotation.weights},
               {"problem", problem_json(r.problem())},
               {"layers_in_turn", r.rotation.layers.size()},
               {"copy_bytes_per_second", r.copy_bytes_per_second},
               {"seconds", r.options.seconds},
               {"stored_in", nullptr},
               {"cases", cases}};
  if (!r.path.empty()) json["stored_in"] = r.path;
  return json;
}

// Where choices go; refused before anything is measured.
std::string destination(const Options& options) {
  if (options.dry_run) return "";
  const std::string path = options.output.empty() ? machine().tuning_path : options.output;
  if (!path.empty()) return path;
  throw Error(Reason::argument_invalid,
              "there is no file to store choices in: FOURMOE_TUNING is empty, or there is no home; --output FILE or "
              "--dry-run would pass");
}

int run(const Options& options) {
  if (options.subject.path.empty() == options.subject.shape.empty()) {
    throw CLI::ValidationError("give either PATH or --shape");
  }
  const std::string path = destination(options);
  const LayerOptions how = layer_options(options);
  if (how.device < 0) {
    throw Error(Reason::argument_invalid, "the host's steps have one way to run a layer; --device cuda:0 would pass");
  }
  Rotation rotation;
  std::vector<Case> cases;
  f64 copy = 0.0;
  {
    Progress progress("tune");
    rotation = make_rotation(options.subject, how, &progress);
    const tune::Sizes standing = rotation.at(0).sizes();  // measuring changes the layers' own
    copy = measure_copy_rate(rotation.at(0).plan().machine.device);
    for (const int tokens : options.tokens) {
      progress.show_count(fmt::format("{} tokens", tokens), static_cast<i64>(cases.size()),
                          static_cast<i64>(options.tokens.size()));
      cases.push_back(measure(&rotation, standing.at(tokens), options.seconds, tokens));
      cases.back().floor = tune::expected_bytes(rotation.at(0).problem(), tokens) / copy;
    }
  }
  const Report report = {options, rotation, cases, copy, path};
  if (!path.empty()) tune::store(path, to_book(report));
  if (options.json) print_json(report_json(report));
  else fmt::print("{}", report_text(report));
  return kSuccess;
}

}  // namespace

Command add_tune(CLI::App& app) {
  auto options = std::make_shared<Options>();
  CLI::App* sub = app.add_subcommand("tune", "measure which plan is fastest for calls of each size, and remember it");
  CLI::Option* path = sub->add_option("path", options->subject.path, "checkpoint")->type_name("PATH");
  add_shape(sub, &options->subject.shape)->excludes(path);
  add_layer(sub, &options->subject.layer, "layer of the checkpoint; the first MoE layer if not given");
  sub->add_option("--tokens", options->tokens,
                  "sizes of calls to choose for: 1, 2, 3, 4, 6, 8, ...; one in between counts for the next")
      ->delimiter(',')
      ->check(within(1, 1 << 20))
      ->capture_default_str();
  add_device(sub, &options->device);
  sub->get_option("--device")->description("the GPU that measures")->type_name("cuda:N")->capture_default_str();
  add_precision(sub, &options->precision);
  sub->add_flag("--batch-invariant", options->batch_invariant, "for layers that keep the order of sums");
  sub->add_option("--seconds", options->seconds, "time for each plan at each size, at least five replays")
      ->check(within(0.0, 60.0))
      ->capture_default_str();
  sub->add_flag("--json", options->json, "print one JSON object");
  sub->add_flag("--dry-run", options->dry_run, "measure and store nothing");
  sub->add_option("--output", options->output, "file to store in; if not given, the one that layers read")
      ->type_name("FILE");
  sub->footer(
      "Layers made later take what is stored for their shape, precision and GPU: FOURMOE_TUNING names the file, "
      "without\n"
      "it it is fourmoe/tuning.json in XDG_CACHE_HOME or ~/.cache. A plan is stored in place of the default only "
      "where\n"
      "it was faster beyond noise, twice.\n\n"
      "Examples:\n  fourmoe tune --shape qwen3-30b --tokens 1,8,64,512\n"
      "  fourmoe tune examples/tiny-moe/nvfp4 --layer 0 --device cuda:0 --dry-run");
  return {sub, [options] { return run(*options); }};
}

}  // namespace fourmoe::tools
