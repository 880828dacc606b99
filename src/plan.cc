#include "plan.h"

#include <fmt/format.h>

#include <algorithm>

#include "backends/list.h"

namespace fourmoe::plan {
namespace {

using format::Dtype;
using format::Tensor;

bool ends_at(const Plan& plan, Stage stage) {
  return std::any_of(plan.steps.begin(), plan.steps.end(), [&](const Step* s) { return s->span.last == stage; });
}

// Tokens and intermediate between the stages: on the host as codes in w4a4, on a GPU always as the rows that its
// tensor cores multiply: two planes of bf16 for f16, of which the tokens' lie where gemm2 puts its result later.
void lay_out_rows(const Plan& plan, Carver* carver, Args* args) {
  const Problem& p = plan.problem;
  const i64 picks = i64{p.max_tokens} * p.top_k;
  const bool on_device = plan.machine.device >= 0;
  const bool codes = p.precision == Precision::w4a4 && !on_device;
  const i64 planes = on_device && p.precision == Precision::w4a16 && p.activations == Dtype::f16 ? 2 : 1;
  if (ends_at(plan, Stage::gemm2)) args->partial.rows = carver->take<f32>(picks * p.hidden);
  const bool shares = planes == 2 && ends_at(plan, Stage::gemm1) && ends_at(plan, Stage::gemm2);
  if (ends_at(plan, Stage::route)) {
    if (shares) args->slots.rows = reinterpret_cast<u16*>(args->partial.rows);
    else if (on_device) args->slots.rows = carver->take<u16>(planes * picks * p.hidden);
    if (codes) args->slots.codes = carver->take<u8>(picks * p.hidden / 2);
    if (codes) args->slots.scales = carver->take<u8>(picks * p.hidden / format::kNvfp4Block);
  }
  if (ends_at(plan, Stage::gemm1)) {
    if (!codes) args->inter.rows = carver->take<u16>(planes * picks * p.inter);
    if (codes) args->inter.codes = carver->take<u8>(picks * p.inter / 2);
    if (codes) args->inter.scales = carver->take<u8>(picks * p.inter / format::kNvfp4Block);
  }
}

// The one layout of the workspace: what passes between stages, then the steps' scratch, which they share.
std::byte* lay_out(const Plan& plan, Carver* carver, Args* args, i64 scratch_bytes) {
  const Problem& p = plan.problem;
  const i64 picks = i64{p.max_tokens} * p.top_k;
  args->slots.ids = carver->take<i32>(picks);
  args->slots.weights = carver->take<f32>(picks);
  args->slots.expert_begin = carver->take<i32>(p.local_experts + 1);
  if (plan.machine.device >= 0) args->slots.progress = carver->take<u64>(route::progress_words(p.local_experts));
  args->slots.slot_pick = carver->take<i32>(picks);
  args->slots.pick_slot = carver->take<i32>(picks);
  lay_out_rows(plan, carver, args);
  return carver->take<std::byte>(scratch_bytes);
}

i64 scratch_bytes(const Plan& plan) {
  i64 most = 0;
  for (const Step* step : plan.steps) most = std::max(most, step->bytes(plan.problem, plan.machine));
  return most;
}

// Parts for all steps that could be chosen: a choice may change, and what a step kept is where it was.
void lay_out_kept(Plan* plan) {
  plan->kept.assign(plan->steps.size(), -1);
  for (const Candidate& candidate : plan->candidates) {
    if (!candidate.verdict.accepted() || candidate.step->kept == nullptr) continue;
    for (std::size_t i = 0; i < plan->steps.size(); ++i) {
      if (plan->steps[i] == candidate.step) plan->kept[i] = plan->kept_bytes;
    }
    const i64 bytes = candidate.step->kept(plan->problem, plan->machine);
    plan->kept_bytes += (bytes + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment;
  }
}

bool asked_for(const Step& step, const Request& request) {
  const bool pinned_elsewhere = std::any_of(request.pinned.begin(), request.pinned.end(), [&](const Step* pin) {
    return pin != &step && pin->span.first <= step.span.last && step.span.first <= pin->span.last;
  });
  if (pinned_elsewhere) return false;
  const bool pinned = std::find(request.pinned.begin(), request.pinned.end(), &step) != request.pinned.end();
  return pinned || request.backend == "auto" || step.room == request.backend || !step.in_room();
}

Place place_of(const Machine& machine) { return machine.device >= 0 ? Place::device : Place::host; }

// Of a step that works in the other kind of memory: what else it would refuse, as that is the better advice.
Verdict judge_elsewhere(const Step& step, const Problem& problem, const Machine& machine) {
  if (step.place == Place::host) {
    return reject(Reason::not_asked_for, fmt::format("it works in host memory, the plan is for cuda:{}; device host "
                                                     "would pass",
                                                     machine.device));
  }
  const Verdict verdict = step.can(problem, machine);
  if (!verdict.accepted()) return verdict;
  return reject(Reason::not_asked_for, "it works on a GPU, the plan is for the host; device cuda:0 would pass");
}

Verdict judge(const Step& step, const Problem& problem, const Machine& machine, const Request& request) {
  if (step.place != place_of(machine)) return judge_elsewhere(step, problem, machine);
  if (!asked_for(step, request)) {
    return reject(Reason::not_asked_for, fmt::format("backend {} was asked for", request.backend));
  }
  return step.can(problem, machine);
}

// Depth first in the order given: the first cover found prefers earlier steps at each stage.
bool cover(const std::vector<Candidate>& candidates, int stage, std::vector<const Step*>* steps) {
  if (stage > static_cast<int>(Stage::combine)) return true;
  for (const Candidate& candidate : candidates) {
    if (!candidate.verdict.accepted() || static_cast<int>(candidate.step->span.first) != stage) continue;
    steps->push_back(candidate.step);
    if (cover(candidates, static_cast<int>(candidate.step->span.last) + 1, steps)) return true;
    steps->pop_back();
  }
  return false;
}

std::string words_of(const Step& step, const std::string& variant) {
  return fmt::format("{}.{}{}{}", step.room, step.name, variant.empty() ? "" : " ", variant);
}

std::vector<Variant> variants_of(const Step& step, const Plan& plan) {
  if (step.variants == nullptr) return {Variant{}};
  return step.variants(plan.problem, plan.machine, bucket_of(plan.problem.max_tokens));
}

// Steps of the rule's room, which read the weights that it has packed, and bodies of the stage folders.
bool in_room_of(const Step& step, const Plan& plan) { return step.room == plan.backend || !step.in_room(); }

// The step and variant that the words name, to begin at `stage`.
Status find(const Plan& plan, const std::string& words, int stage, const Step** step, Variant* variant) {
  const std::string name = words.substr(0, words.find(' '));
  for (const Candidate& c : plan.candidates) {
    if (words_of(*c.step, "") != name || !c.verdict.accepted() || !in_room_of(*c.step, plan)) continue;
    if (static_cast<int>(c.step->span.first) != stage) continue;
    *step = c.step;
    *variant = {};
    if (name == words) return {};
    for (Variant& known : variants_of(*c.step, plan)) {
      if (words_of(*c.step, known.name) != words) continue;
      *variant = std::move(known);
      return {};
    }
  }
  return refuse(Reason::no_plan, fmt::format("the choice has '{}', which does not serve stage {} here", words,
                                             kStageNames[static_cast<std::size_t>(stage)]));
}

// Replaces the rule's steps by those of the choice.
Status follow(const Choice& choice, Plan* plan) {
  std::vector<const Step*> steps;
  std::vector<Variant> variants;
  int stage = 0;
  for (const std::string& words : choice) {
    if (stage > static_cast<int>(Stage::combine)) {
      return refuse(Reason::no_plan, fmt::format("the choice goes on after combine, with '{}'", words));
    }
    Status status = find(*plan, words, stage, &steps.emplace_back(), &variants.emplace_back());
    if (!status.ok()) return status;
    stage = static_cast<int>(steps.back()->span.last) + 1;
  }
  if (stage <= static_cast<int>(Stage::combine)) {
    return refuse(Reason::no_plan,
                  fmt::format("the choice ends before {}", kStageNames[static_cast<std::size_t>(stage)]));
  }
  plan->steps = std::move(steps);
  plan->variants = std::move(variants);
  return {};
}

// Appends every choice that begins with `begun`, which covers the flow up to `stage`.
void list_choices(const Plan& plan, const Choice& begun, int stage, std::vector<Choice>* choices) {
  if (stage > static_cast<int>(Stage::combine)) return choices->push_back(begun);
  for (const Candidate& c : plan.candidates) {
    if (!c.verdict.accepted() || !in_room_of(*c.step, plan) || static_cast<int>(c.step->span.first) != stage) continue;
    for (const Variant& variant : variants_of(*c.step, plan)) {
      Choice longer = begun;
      longer.push_back(words_of(*c.step, variant.name));
      list_choices(plan, longer, static_cast<int>(c.step->span.last) + 1, choices);
    }
  }
}

// The list's order, but steps of the room that was asked for come before the host's bodies, and those that do not suit
// come last.
std::vector<Candidate> preferred(std::vector<Candidate> candidates, const Plan& plan, const Request& request) {
  const i64 tokens = bucket_of(plan.problem.max_tokens);
  std::stable_partition(candidates.begin(), candidates.end(),
                        [&](const Candidate& c) { return c.step->room == request.backend; });
  std::stable_partition(candidates.begin(), candidates.end(), [&](const Candidate& c) {
    return !c.verdict.accepted() || c.step->suits == nullptr || c.step->suits(plan.problem, plan.machine, tokens);
  });
  return candidates;
}

// A room is asked for with the kind of device that it computes on.
Status check_place(const Step& step, const Machine& machine) {
  if (step.place == place_of(machine)) return {};
  if (step.place == Place::device) {
    return refuse(Reason::argument_invalid,
                  fmt::format("backend {} computes on a GPU; with device cuda:0 it would pass", step.room));
  }
  return refuse(Reason::argument_invalid, fmt::format("backend {} computes on the host, device cuda:{} was asked for; "
                                                      "with device host it would pass",
                                                      step.room, machine.device));
}

Status check_backend(const std::string& backend, const Machine& machine) {
  if (backend == "auto") return {};
  std::string rooms = "auto";
  for (const Step* step : backends::list()) {
    if (!step->in_room()) continue;
    if (step->room == backend) return check_place(*step, machine);
    if (rooms.find(step->room) == std::string::npos) rooms += fmt::format(", {}", step->room);
  }
  return refuse(Reason::argument_invalid, fmt::format("no backend is called '{}'; there are {}", backend, rooms));
}

Status check_device(const Machine& machine) {
  if (machine.device < 0 || device_of(machine) != nullptr) return {};
  if (!machine.cuda) {
    return refuse(Reason::not_built,
                  fmt::format("device cuda:{} was asked for and this build has no CUDA; device host, "
                              "or a build with FOURMOE_CUDA=ON, would pass",
                              machine.device));
  }
  return refuse(Reason::device_missing, fmt::format("device cuda:{} was asked for, this machine has {} GPUs",
                                                    machine.device, machine.devices.size()));
}

Status refuse_plan(const Plan& plan) {
  std::string why;
  for (const Candidate& c : plan.candidates) {
    if (c.verdict.accepted() || c.verdict.reason == Reason::not_asked_for) continue;
    if (c.step->place != place_of(plan.machine)) continue;
    why += fmt::format("{}{}.{}: {}", why.empty() ? "" : "; ", c.step->room, c.step->name, c.verdict.detail);
  }
  return refuse(Reason::no_plan, fmt::format("no accepted steps cover the layer ({})", why));
}

Status check_address(const char* name, const void* address, i32 bytes) {
  const auto rest = reinterpret_cast<std::uintptr_t>(address) % bytes;
  if (rest == 0) return {};
  return refuse(Reason::argument_invalid,
                fmt::format("{} begins {} bytes after a multiple of {}, expected a multiple", name, rest, bytes));
}

Status check_tensor(const char* name, const Tensor& tensor, i64 rows, i64 cols, std::initializer_list<Dtype> dtypes) {
  if (tensor.empty() && rows > 0) return refuse(Reason::argument_invalid, fmt::format("{} is null", name));
  if (std::find(dtypes.begin(), dtypes.end(), tensor.dtype) == dtypes.end()) {
    return refuse(Reason::dtype_unsupported, fmt::format("{} is {}", name, format::dtype_name(tensor.dtype)));
  }
  if (tensor.rows < rows || tensor.cols != cols) {
    return refuse(Reason::argument_invalid,
                  fmt::format("{} is [{}, {}], expected [{}, {}]", name, tensor.rows, tensor.cols, rows, cols));
  }
  if (tensor.stride < cols && rows > 1) {
    return refuse(Reason::stride_unsupported,
                  fmt::format("{} has rows {} elements apart, expected at least {}", name, tensor.stride, cols));
  }
  return check_address(name, tensor.data, format::dtype_bytes(tensor.dtype));
}

// Tokens as values, or as codes with scales where the plan would quantise them itself.
Status check_hidden(const Plan& plan, const Args& args) {
  const Problem& p = plan.problem;
  if (args.hidden_scales.empty()) {
    return check_tensor("hidden_states", args.hidden, args.tokens, p.hidden, {Dtype::f32, Dtype::f16, Dtype::bf16});
  }
  if (p.precision != Precision::w4a4 || p.routing.weight_on_input) {
    return refuse(Reason::argument_invalid,
                  "hidden_scales is given; w4a4 without routing weights on the input would pass");
  }
  const i64 blocks = p.hidden / format::kNvfp4Block;
  Status status = check_tensor("hidden_states", args.hidden, args.tokens, p.hidden / 2, {Dtype::u8});
  if (status.ok()) status = check_tensor("hidden_scales", args.hidden_scales, args.tokens, blocks, {Dtype::u8});
  if (plan.machine.device >= 0) return status;  // a kernel sees the scales: gpu/fault.h
  for (i64 t = 0; status.ok() && t < args.tokens; ++t) {
    const u8* scales = args.hidden_scales.row(t);
    const u8* bad = std::find_if(scales, scales + blocks, [](u8 byte) { return byte > format::kLargestScale; });
    if (bad != scales + blocks) return route::refuse_scale(t, bad - scales, *bad);
  }
  return status;
}

}  // namespace

Status check(const Plan& plan, const Args& args) {
  const Problem& p = plan.problem;
  if (args.tokens < 0 || args.tokens > p.max_tokens) {
    return refuse(Reason::argument_invalid, fmt::format("{} tokens, expected 0 to {}", args.tokens, p.max_tokens));
  }
  if (static_cast<i32>(args.weights.experts.size()) != p.local_experts) {
    return refuse(Reason::argument_invalid, fmt::format("expert table has {} entries, expected {}",
                                                        args.weights.experts.size(), p.local_experts));
  }
  const auto floats = {Dtype::f32, Dtype::f16, Dtype::bf16};
  Status status = check_hidden(plan, args);
  if (status.ok()) status = check_tensor("output", args.output.output, args.tokens, p.hidden, floats);
  const bool routed = !args.picks.logits.empty();
  if (routed != args.picks.ids.empty() && args.tokens > 0) {
    return refuse(Reason::argument_invalid, "give either router_logits, or topk_ids with topk_weights");
  }
  if (status.ok() && routed) {
    status = check_tensor("router_logits", args.picks.logits, args.tokens, p.experts, floats);
  } else if (status.ok()) {
    status = check_tensor("topk_ids", args.picks.ids, args.tokens, p.top_k, {Dtype::i32, Dtype::i64});
    if (status.ok()) status = check_tensor("topk_weights", args.picks.weights, args.tokens, p.top_k, floats);
  }
  if (status.ok()) status = check_address("picked_ids", args.picked.ids, 4);
  if (status.ok()) status = check_address("picked_weights", args.picked.weights, 4);
  return status;
}

Status make(const Problem& problem, const Machine& machine, const Request& request, Plan* out) {
  *out = Plan{};
  out->problem = problem;
  out->machine = machine;
  if (Status status = check_backend(request.backend, machine); !status.ok()) return status;
  const Verdict general = check(problem);
  for (const Step* step : backends::list()) {
    out->candidates.push_back({step, general.accepted() ? judge(*step, problem, machine, request) : general, false});
  }
  if (!general.accepted()) return refuse(general.reason, general.detail);
  if (Status status = check_device(machine); !status.ok()) return status;
  if (!cover(preferred(out->candidates, *out, request), 0, &out->steps)) return refuse_plan(*out);
  out->variants.resize(out->steps.size());
  for (const Step* step : out->steps) {
    if (step->in_room()) out->backend = step->room;
  }
  if (!request.choice.empty()) {
    if (Status status = follow(request.choice, out); !status.ok()) return status;
  }
  for (Candidate& candidate : out->candidates) {
    candidate.chosen = std::find(out->steps.begin(), out->steps.end(), candidate.step) != out->steps.end();
  }
  Args unused;
  Carver carver(nullptr);
  lay_out(*out, &carver, &unused, scratch_bytes(*out));
  out->workspace_bytes = carver.used();
  lay_out_kept(out);
  return {};
}

bool Plan::takes_shared() const {
  return std::any_of(steps.begin(), steps.end(), [](const Step* step) { return step->takes_shared; });
}

Choice choice_of(const Plan& plan) {
  Choice choice;
  for (std::size_t i = 0; i < plan.steps.size(); ++i) {
    choice.push_back(words_of(*plan.steps[i], plan.variants[i].name));
  }
  return choice;
}

std::vector<Choice> alternatives(const Problem& problem, const Machine& machine, const Request& request) {
  Plan rule;
  std::vector<Choice> choices;
  if (!make(problem, machine, {request.backend, request.pinned, {}}, &rule).ok()) return choices;
  list_choices(rule, {}, 0, &choices);
  Choice first;  // with the variants that the rule takes
  for (const Step* step : rule.steps) first.push_back(words_of(*step, variants_of(*step, rule).front().name));
  const auto found = std::find(choices.begin(), choices.end(), first);
  if (found == choices.end()) return {first};  // pinned steps of another room
  std::rotate(choices.begin(), found, found + 1);
  return choices;
}

Status run(const Plan& plan, Args args, Workspace workspace) {
  if (Status status = check(plan, args); !status.ok()) return status;
  if (args.tokens == 0) return {};
  if (workspace.data == nullptr || workspace.bytes < plan.workspace_bytes) {
    return refuse(Reason::workspace_too_small, fmt::format("workspace has {} bytes, the plan needs {}",
                                                           workspace.data ? workspace.bytes : 0, plan.workspace_bytes));
  }
  if (Status status = check_alignment(workspace); !status.ok()) return status;
  args.problem = &plan.problem;
  args.machine = &plan.machine;
  Carver carver(workspace.data);
  std::byte* scratch = lay_out(plan, &carver, &args, scratch_bytes(plan));
  if (args.picked.ids != nullptr) args.slots.ids = args.picked.ids;
  if (args.picked.weights != nullptr) args.slots.weights = args.picked.weights;
  for (std::size_t i = 0; i < plan.steps.size(); ++i) {
    const Step* step = plan.steps[i];
    std::byte* kept = args.kept != nullptr && plan.kept[i] >= 0 ? args.kept + plan.kept[i] : nullptr;
    if (Status status = step->run({step, &args, scratch, kept, plan.variants[i].number}); !status.ok()) return status;
  }
  return {};
}

}  // namespace fourmoe::plan
