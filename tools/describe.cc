#include "describe.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cstdio>

#include "quantity.h"

namespace fourmoe::tools {

std::string shape_words(const Problem& p) {
  return fmt::format("hidden {}, inter {}, {} experts, top-{}", p.hidden, p.inter, p.experts, p.top_k);
}

std::string routing_words(const Routing& routing) {
  std::string words(score_name(routing.score));
  if (routing.groups > 1) {
    words += fmt::format(", best {} of {} groups (by their best {})", routing.groups_kept, routing.groups,
                         routing.group_best);
  }
  if (routing.renormalise) words += ", renormalised";
  if (routing.scale != 1.0f) words += fmt::format(", times {:g}", routing.scale);
  if (routing.weight_on_input) words += ", weighs the input";
  return words;
}

std::string activation_words(const Activation& activation) {
  std::string words(activation_name(activation.kind));
  if (activation.kind == ActivationKind::swiglu_clamped) {
    words += fmt::format(" (alpha {:g}, beta {:g}, limit {:g})", activation.alpha, activation.beta, activation.limit);
  }
  return words;
}

std::string machine_words(const Machine& machine) {
  return fmt::format("{}, {} thread{}, {}{}, {} memory", machine.cpu_name, machine.cores, machine.cores == 1 ? "" : "s",
                     cpu_level_name(machine.cpu_level), machine.cpu_level_forced ? " (forced)" : "",
                     bytes_text(machine.memory_bytes));
}

std::string device_words(const Device& device) {
  return fmt::format("cuda:{} {}, compute capability {}.{}, {} SMs, {} memory", device.index, device.name, device.major,
                     device.minor, device.sms, bytes_text(device.memory_bytes));
}

std::string span_words(const Span& span) {
  const auto first = kStageNames[static_cast<std::size_t>(span.first)];
  const auto last = kStageNames[static_cast<std::size_t>(span.last)];
  return span.first == span.last ? std::string(first) : fmt::format("{}..{}", first, last);
}

std::string step_words(const Step& step) { return fmt::format("{}.{}", step.room, step.name); }

std::string steps_words(const plan::Plan& plan) {
  std::string words;
  for (const Step* step : plan.steps) words += (words.empty() ? "" : ", ") + step_words(*step);
  return words;
}

std::string choice_words(const plan::Plan& plan, const Machine& machine) {
  std::string words;
  for (const Step* step : plan.steps) {
    if (step->describe == nullptr || !step->in_room()) continue;
    const std::string choice = step->describe(plan.problem, machine);
    if (choice.empty() || words.find(choice) != std::string::npos) continue;
    words += (words.empty() ? "" : ", ") + choice;
  }
  return words;
}

std::string choice_text(const plan::Choice& choice) {
  std::string text;
  for (const std::string& words : choice) {
    if (words.starts_with("host.") || words.starts_with("device.")) continue;
    text += (text.empty() ? "" : " + ") + words;
  }
  return text;
}

Json problem_json(const Problem& p) {
  Json activation = {{"kind", activation_name(p.activation.kind)}};
  if (p.activation.kind == ActivationKind::swiglu_clamped) {
    activation["alpha"] = p.activation.alpha;
    activation["beta"] = p.activation.beta;
    activation["limit"] = p.activation.limit;
  }
  return {{"hidden", p.hidden},
          {"inter", p.inter},
          {"experts", p.experts},
          {"top_k", p.top_k},
          {"activation", activation},
          {"routing",
           {{"score", score_name(p.routing.score)},
            {"groups", p.routing.groups},
            {"groups_kept", p.routing.groups_kept},
            {"group_best", p.routing.group_best},
            {"renormalise", p.routing.renormalise},
            {"scale", p.routing.scale},
            {"weight_on_input", p.routing.weight_on_input}}},
          {"precision", precision_name(p.precision)},
          {"encoding", format::encoding_name(p.encoding)},
          {"max_tokens", p.max_tokens}};
}

Json machine_json(const Machine& machine) {
  Json devices = Json::array();
  for (const Device& d : machine.devices) {
    devices.push_back({{"index", d.index},
                       {"name", d.name},
                       {"compute_capability", fmt::format("{}.{}", d.major, d.minor)},
                       {"sms", d.sms},
                       {"memory_bytes", d.memory_bytes},
                       {"l2_bytes", d.l2_bytes}});
  }
  return {{"cpu", machine.cpu_name},
          {"cpu_level", cpu_level_name(machine.cpu_level)},
          {"cpu_level_forced", machine.cpu_level_forced},
          {"threads", machine.cores},
          {"memory_bytes", machine.memory_bytes},
          {"numa_nodes", machine.nodes},
          {"memory", machine.placement == Placement::interleave ? "interleave" : "local"},
          {"affinity", machine.affinity == Affinity::cores ? "cores" : "none"},
          {"cuda", machine.cuda},
          {"devices", devices}};
}

Json steps_json(const plan::Plan& plan) {
  Json steps = Json::array();
  for (const Step* step : plan.steps) steps.push_back(step_words(*step));
  return steps;
}

std::string json_text(const Json& json) {
  return json.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
}

void print_json(const Json& json) { fmt::print("{}", json_text(json)); }

// H, I, E and k of one layer's routed experts, from the models' config.json.
std::vector<NamedShape> named_shapes() {
  return {{"qwen3-30b", "2048,768,128,8", "Qwen3-30B-A3B"},
          {"qwen3-235b", "4096,1536,128,8", "Qwen3-235B-A22B"},
          {"dsv3", "7168,2048,256,8", "DeepSeek-V3 and R1"},
          {"kimi-k2", "7168,2048,384,8", "Kimi-K2"},
          {"v4-flash", "4096,2048,256,6", "DeepSeek-V4-Flash"},
          {"gpt-oss-120b", "2880,2880,128,4", "gpt-oss-120b: MXFP4, clamped SwiGLU"},
          {"gpt-oss-20b", "2880,2880,32,4", "gpt-oss-20b: MXFP4, clamped SwiGLU"},
          {"glm-4", "5120,1536,160,8", "GLM-4.5, 4.6 and 4.7"},
          {"qwen3-next", "2048,512,512,10", "Qwen3-Next-80B-A3B"},
          {"nemotron-nano", "2688,1856,128,6", "Nemotron-3-Nano: ReLU squared, no gate"},
          {"tiny", "128,64,32,4", "examples/tiny-moe"}};
}

namespace {

bool parse_numbers(const std::string& text, std::array<i32, 4>* numbers) {
  const char* at = text.data();
  const char* end = at + text.size();
  for (std::size_t i = 0; i < numbers->size(); ++i) {
    const auto [rest, error] = std::from_chars(at, end, (*numbers)[i]);
    if (error != std::errc()) return false;
    at = rest;
    if (i + 1 < numbers->size() && (at == end || *at++ != ',')) return false;
  }
  return at == end;
}

}  // namespace

Problem parse_shape(const std::string& text) {
  std::string numbers_text = text;
  std::string known;
  for (const NamedShape& shape : named_shapes()) {
    known += fmt::format(", {}", shape.name);
    if (text == shape.name) numbers_text = shape.numbers;
  }
  std::array<i32, 4> numbers = {};
  if (!parse_numbers(numbers_text, &numbers)) {
    throw Error(Reason::argument_invalid,
                fmt::format("shape '{}' is neither H,I,E,k nor one of {}", text, known.substr(2)));
  }
  Problem problem;
  problem.hidden = numbers[0];
  problem.inter = numbers[1];
  problem.experts = problem.local_experts = numbers[2];
  problem.top_k = numbers[3];
  if (text.starts_with("gpt-oss-")) {
    problem.encoding = format::Encoding::mxfp4;
    problem.activation.kind = ActivationKind::swiglu_clamped;
  }
  if (text == "nemotron-nano") problem.activation.kind = ActivationKind::relu2;
  return problem;
}

Precision parse_precision(const std::string& word) {
  return *std::find_if(kPrecisions.begin(), kPrecisions.end() - 1,
                       [&](Precision p) { return precision_name(p) == word; });
}

}  // namespace fourmoe::tools
