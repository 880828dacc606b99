#include "bindings/python/pack.h"

#include <fmt/format.h>
#include <nanobind/stl/filesystem.h>

#include "bindings/python/keywords.h"
#include "bindings/python/py_layer.h"
#include "weights/stacks.h"

namespace fourmoe::python {
namespace {

using weights::Splits;
using weights::Stack;
using weights::Stacks;

// Weight arguments as lists of splits, and what keeps their memory alive.
struct Weights {
  Stacks stacks;
  std::vector<nb::object> held;
};

struct Names {
  const char* codes;
  const char* scales;
  const char* globals;
  const char* bias;
};

Stack read_stack(const Keywords& given, const Names& names, std::vector<nb::object>* held) {
  Stack stack;
  stack.codes = splits(names.codes, given.object(names.codes), held);
  stack.scales = splits(names.scales, given.object(names.scales), held);
  stack.globals = splits(names.globals, given.object(names.globals), held);
  stack.bias = splits(names.bias, given.object(names.bias), held);
  return stack;
}

Weights read_weights(const Keywords& given) {
  Weights weights;
  weights.stacks.gate = read_stack(given, {"gate", "gate_scale", "gate_global", "gate_bias"}, &weights.held);
  weights.stacks.up = read_stack(given, {"up", "up_scale", "up_global", "up_bias"}, &weights.held);
  weights.stacks.down = read_stack(given, {"down", "down_scale", "down_global", "down_bias"}, &weights.held);
  weights.stacks.input_scale = splits("input_scale", given.object("input_scale"), &weights.held);
  weights.stacks.inter_scale = splits("inter_scale", given.object("inter_scale"), &weights.held);
  return weights;
}

weights::Assembled assemble_unlocked(const Stacks& stacks, bool gated, Executor& executor) {
  const nb::gil_scoped_release unlocked;
  return weights::assemble(stacks, gated, executor);
}

template <class Enum>
Enum by_name(const char* argument, const std::string& word, std::initializer_list<Enum> all,
             std::string_view (*name)(Enum)) {
  std::string known;
  for (const Enum value : all) {
    if (name(value) == word) return value;
    known += fmt::format("{}'{}'", known.empty() ? "" : ", ", name(value));
  }
  throw Error(Reason::argument_invalid, fmt::format("{} is '{}', expected one of {}", argument, word, known));
}

Activation read_activation(const Keywords& given) {
  using enum ActivationKind;
  Activation activation;
  activation.kind = by_name(
      "activation", given.get<std::string>("activation", "swiglu"),
      {swiglu, swiglu_clamped, geglu_erf, geglu_tanh, relu2},
      +[](ActivationKind kind) { return activation_name(kind); });
  activation.alpha = given.get("alpha", activation.alpha);
  activation.beta = given.get("beta", activation.beta);
  activation.limit = given.get("limit", activation.limit);
  if (!(activation.limit > 0.0f)) {
    throw Error(Reason::argument_invalid, fmt::format("limit is {}, expected above 0", activation.limit));
  }
  return activation;
}

std::optional<std::string> read_tuning(const Keywords& given) {
  if (!given.has("tuning")) return std::nullopt;
  std::filesystem::path path;
  if (nb::try_cast(given.object("tuning"), path)) return path.string();
  throw Error(Reason::argument_invalid,
              fmt::format("tuning is {}, expected a path", nb::repr(given.object("tuning")).c_str()));
}

Choices read_choices(const Keywords& given) {
  Choices choices;
  choices.device = parse_device(nb::str(given.has("device") ? given.object("device") : nb::str("cpu")).c_str());
  choices.precision = parse_precision(given.get<std::string>("precision", "w4a16"));
  choices.plan = given.get<std::string>("plan", "auto");
  choices.max_tokens = given.get("max_tokens", choices.max_tokens);
  choices.threads = given.get("threads", 0);
  choices.batch_invariant = given.get("batch_invariant", false);
  choices.tuning = read_tuning(given);
  if (choices.max_tokens < 1 || choices.threads < 0) {
    throw Error(Reason::argument_invalid, fmt::format("max_tokens is {} and threads {}, expected at least 1 and 0",
                                                      choices.max_tokens, choices.threads));
  }
  return choices;
}

std::vector<f32> read_vector(const char* name, nb::handle object, i64 count) {
  std::vector<nb::object> held;
  const Splits given = splits(name, object, &held);
  if (given.empty()) return {};
  if (given.element() != Element::f32 || given.rank() != 1 || given.experts() != count || given.device() >= 0) {
    throw Error(Reason::argument_invalid, fmt::format("{} is {} of {} experts, expected [{}] f32 on cpu", name,
                                                      weights::element_name(given.element()), given.experts(), count));
  }
  std::vector<f32> out(count);
  for (i64 e = 0; e < count; ++e) out[e] = format::load<f32>(given.at(e));
  return out;
}

format::Matrix read_router(nb::handle object, const Problem& p, std::vector<nb::object>* held) {
  if (object.is_none()) return {};
  const format::Tensor given = matrix("router", object, -1, {Element::f32, Element::f16, Element::bf16});
  if (given.rows != p.experts || given.cols != p.hidden) {
    throw Error(Reason::argument_invalid,
                fmt::format("router is [{}, {}], expected [{}, {}]", given.rows, given.cols, p.experts, p.hidden));
  }
  held->push_back(nb::borrow(object));
  format::Matrix router;
  router.data = static_cast<const u8*>(given.data);
  router.data_stride = given.stride * format::dtype_bytes(given.dtype);
  router.rows = p.experts;
  router.cols = p.hidden;
  router.encoding = given.dtype == format::Dtype::f32   ? format::Encoding::f32
                    : given.dtype == format::Dtype::f16 ? format::Encoding::f16
                                                        : format::Encoding::bf16;
  return router;
}

Problem read_problem(const Keywords& given, const weights::Assembled& assembled, const Activation& activation) {
  Problem p;
  p.hidden = assembled.hidden;
  p.inter = assembled.inter;
  p.local_experts = static_cast<i32>(assembled.experts.size());
  p.first_expert = given.get("first_expert", 0);
  p.experts = given.get("experts", p.local_experts);
  p.top_k = given.get("top_k", 0);
  p.encoding = assembled.encoding;
  p.activation = activation;
  p.routing = read_routing(given);
  const Verdict verdict = check(p);
  if (!verdict.accepted()) throw Error(verdict.reason, verdict.detail);
  return p;
}

}  // namespace

Routing read_routing(const Keywords& given) {
  Routing routing;
  routing.score = by_name(
      "score", given.get<std::string>("score", "softmax"),
      {Score::softmax, Score::sigmoid, Score::sqrt_softplus, Score::none},
      +[](Score score) { return score_name(score); });
  routing.groups = given.get("groups", 1);
  routing.groups_kept = given.get("groups_kept", routing.groups);
  routing.group_best = given.get("group_best", 2);
  routing.renormalise = given.get("renormalise", true);
  routing.scale = given.get("scale", 1.0f);
  routing.weight_on_input = given.get("weight_on_input", false);
  return routing;
}

PyLayer* pack(const nb::dict& dictionary) {
  const Keywords given(dictionary);
  const Choices choices = read_choices(given);
  const Activation activation = read_activation(given);
  Weights weights = read_weights(given);
  weights::Assembled assembled = assemble_unlocked(weights.stacks, activation.gated(), tbb_executor(choices.threads));
  checkpoint::Layer layer;
  layer.problem = read_problem(given, assembled, activation);
  layer.experts = std::move(assembled.experts);
  layer.owner = std::move(assembled.owner);
  layer.selection_bias = read_vector("selection_bias", given.object("selection_bias"), layer.problem.experts);
  layer.router_bias = read_vector("router_bias", given.object("router_bias"), layer.problem.experts);
  layer.router = read_router(given.object("router"), layer.problem, &weights.held);
  return new PyLayer(std::move(layer), choices, given.get<std::string>("name", "packed from tensors"),
                     std::move(weights.held));
}

void refit(PyLayer& layer, const nb::dict& dictionary) {
  Weights weights = read_weights(Keywords(dictionary));
  layer.refit(assemble_unlocked(weights.stacks, layer.problem().activation.gated(), layer.executor()),
              std::move(weights.held));
}

PyLayer* load(const nb::dict& dictionary) {
  const Keywords given(dictionary);
  const Choices choices = read_choices(given);
  std::filesystem::path path;
  if (!nb::try_cast(given.object("path"), path)) throw Error(Reason::argument_invalid, "path is not a path");
  i32 index = given.get("layer", -1);
  const bool shared = given.get("shared", true);
  checkpoint::Layer layer;
  {
    const nb::gil_scoped_release unlocked;
    const checkpoint::Checkpoint checkpoint = checkpoint::Checkpoint::open(path);
    const std::vector<i32> known = checkpoint.layers();
    if (index < 0 && known.size() != 1) {
      throw Error(Reason::argument_invalid,
                  fmt::format("layer is not given; {} has MoE layers {}", path.string(), fmt::join(known, ", ")));
    }
    if (index < 0) index = known.front();
    layer = checkpoint.load(index, tbb_executor(choices.threads));
    if (!shared) layer.shared.reset();
  }
  return new PyLayer(std::move(layer), choices, fmt::format("{}, layer {}", path.string(), index), {});
}

}  // namespace fourmoe::python
