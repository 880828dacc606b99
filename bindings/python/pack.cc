#include "bindings/python/pack.h"

#include <fmt/format.h>
#include <nanobind/stl/filesystem.h>

#include <cmath>

#include "bindings/python/keywords.h"
#include "bindings/python/py_layer.h"
#include "bindings/python/unlocked.h"
#include "checkpoint/views.h"
#include "weights/stacks.h"

namespace fourmoe::python {
namespace {

using weights::Splits;
using weights::Stack;
using weights::Stacks;

// Reads weight arguments of a layer on a device, and keeps what they are made of.
class Reader {
 public:
  Reader(const Keywords& given, i32 device) : given_(given), device_(device) {}

  Splits read(const char* name) { return splits(name, given_.object(name), device_, &held_); }
  Stacks read_stacks() {
    Stacks stacks;
    stacks.gate = {read("gate"), read("gate_scale"), read("gate_global"), read("gate_bias")};
    stacks.up = {read("up"), read("up_scale"), read("up_global"), read("up_bias")};
    stacks.down = {read("down"), read("down_scale"), read("down_global"), read("down_bias")};
    stacks.input_scale = read("input_scale");
    stacks.inter_scale = read("inter_scale");
    return stacks;
  }

  Held& held() { return held_; }

 private:
  const Keywords& given_;
  i32 device_;
  Held held_;
};

weights::Assembled assemble_unlocked(const Stacks& stacks, bool gated, Executor& executor) {
  const Unlocked unlocked;
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

void require_finite(const char* name, f32 value) {
  if (std::isfinite(value)) return;
  throw Error(Reason::argument_invalid, fmt::format("{} is {}, expected a finite number", name, value));
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
  require_finite("alpha", activation.alpha);
  require_finite("beta", activation.beta);
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
  if (choices.max_tokens < 1 || choices.threads < 0 || choices.threads > kMostThreads) {
    throw Error(Reason::argument_invalid,
                fmt::format("max_tokens is {} and threads {}, expected at least 1 and 0 to {}", choices.max_tokens,
                            choices.threads, kMostThreads));
  }
  return choices;
}

std::vector<f32> to_vector(const Splits& given, i64 count) {
  if (given.empty()) return {};
  if (given.element() != Element::f32 || given.rank() != 1 || given.experts() != count) {
    throw Error(Reason::argument_invalid, fmt::format("{} is {} of {} experts, expected [{}] f32", given.name(),
                                                      weights::element_name(given.element()), given.experts(), count));
  }
  const std::vector<u8> bytes = given.copy();
  std::vector<f32> out(count);
  for (i64 e = 0; e < count; ++e) out[e] = format::load<f32>(bytes.data() + 4 * e);
  return out;
}

// A view of *memory, which becomes a copy of the router.
format::Matrix to_router(const Splits& given, const Problem& p, std::vector<u8>* memory) {
  if (given.empty()) return {};
  const Element element = given.element();
  if (element != Element::f32 && element != Element::f16 && element != Element::bf16) {
    throw Error(Reason::dtype_unsupported,
                fmt::format("router is {}, expected f32, f16, bf16", weights::element_name(element)));
  }
  if (given.rank() != 2 || given.experts() != p.experts || given.extent(1) != p.hidden) {
    const std::string found = given.rank() == 2 ? fmt::format("[{}, {}]", given.experts(), given.extent(1))
                                                : fmt::format("of {} dimensions", given.rank());
    throw Error(Reason::argument_invalid, fmt::format("router is {}, expected [{}, {}]", found, p.experts, p.hidden));
  }
  *memory = given.copy();
  format::Matrix router;
  router.data = memory->data();
  router.data_stride = p.hidden * weights::element_bytes(element);
  router.rows = p.experts;
  router.cols = p.hidden;
  router.encoding = element == Element::f32   ? format::Encoding::f32
                    : element == Element::f16 ? format::Encoding::f16
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
  require_finite("scale", routing.scale);
  routing.weight_on_input = given.get("weight_on_input", false);
  return routing;
}

PyLayer* pack(const nb::dict& dictionary) {
  const Keywords given(dictionary);
  const Choices choices = read_choices(given);
  const Activation activation = read_activation(given);
  Reader reader(given, choices.device);
  const Stacks stacks = reader.read_stacks();
  const Splits router = reader.read("router");
  const Splits router_bias = reader.read("router_bias");
  const Splits selection_bias = reader.read("selection_bias");
  wait_for(given.object("stream"), reader.held().types, choices.device);
  weights::Assembled assembled = assemble_unlocked(stacks, activation.gated(), tbb_executor(choices.threads));
  checkpoint::Layer layer;
  layer.problem = read_problem(given, assembled, activation);
  layer.experts = std::move(assembled.experts);
  layer.owner = std::move(assembled.owner);
  layer.selection_bias = to_vector(selection_bias, layer.problem.experts);
  layer.router_bias = to_vector(router_bias, layer.problem.experts);
  PyLayer::Owners owners;
  layer.router = to_router(router, layer.problem, &owners.router);
  checkpoint::check_finite(layer.router_bias, "router_bias");
  checkpoint::check_finite(layer.router, "router");
  owners.weights = std::move(reader.held().host);
  return new PyLayer(std::move(layer), choices, given.get<std::string>("name", "packed from tensors"),
                     std::move(owners));
}

void refit(PyLayer& layer, const nb::dict& dictionary) {
  const Keywords given(dictionary);
  const i32 device = layer.choices().device;
  Reader reader(given, device);
  const Stacks stacks = reader.read_stacks();
  std::vector<nb::object> types = reader.held().types;
  types.push_back(layer.framework());
  wait_for(given.object("stream"), types, device);
  layer.refit(assemble_unlocked(stacks, layer.problem().activation.gated(), layer.executor()),
              std::move(reader.held().host));
}

PyLayer* load(const nb::dict& dictionary) {
  const Keywords given(dictionary);
  const Choices choices = read_choices(given);
  std::filesystem::path path;
  if (!nb::try_cast(given.object("path"), path)) throw Error(Reason::argument_invalid, "path is not a path");
  i32 index = given.get("layer", -1);
  if (index < 0 && given.has("layer")) {
    throw Error(Reason::argument_invalid, fmt::format("layer is {}, expected at least 0", index));
  }
  const bool shared = given.get("shared", true);
  checkpoint::Layer layer;
  {
    const Unlocked unlocked;
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
