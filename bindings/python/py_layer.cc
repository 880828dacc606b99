#include "bindings/python/py_layer.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <span>

#include "bindings/python/unlocked.h"
#include "explain_text.h"
#include "status.h"

namespace fourmoe::python {
namespace {

constexpr auto kFloats = {Element::f32, Element::f16, Element::bf16};
constexpr auto kIds = {Element::i32, Element::i64};

struct Registry {
  std::mutex mutex;
  std::map<i64, PyLayer*> layers;
  i64 last = 0;
};

Registry& registry() {
  static Registry all;
  return all;
}

// Of the output for tokens of a type; bf16 for quantised ones.
Element element_of(format::Dtype dtype) {
  if (dtype == format::Dtype::f16) return Element::f16;
  return dtype == format::Dtype::f32 ? Element::f32 : Element::bf16;
}

// The memory from the first byte of a view to its last; rows may follow each other in either direction.
std::span<const u8> extent_of(const format::Tensor& t) {
  if (t.empty() || t.rows == 0) return {};
  const u8* first = t.row(t.stride < 0 ? t.rows - 1 : 0);
  const i64 bytes = ((t.rows - 1) * std::abs(t.stride) + t.cols) * format::dtype_bytes(t.dtype);
  return {first, static_cast<std::size_t>(bytes)};
}

// `name` names what is written.
void check_apart(const char* name, std::span<const u8> written, const char* other, std::span<const u8> memory) {
  const u8* a = memory.data();
  const u8* b = written.data();
  if (memory.empty() || written.empty() || a + memory.size() <= b || b + written.size() <= a) return;
  throw Error(Reason::argument_invalid,
              fmt::format("{} shares memory with {}, expected memory of its own", name, other));
}

// What a call writes shares no memory with what it reads, nor with each other. Of a workspace it writes the first
// `used` bytes.
void check_all_apart(const LayerCall& call, const Workspace& workspace, i64 used) {
  const std::span<const u8> out = extent_of(call.output);
  const std::span<const u8> scratch(reinterpret_cast<const u8*>(workspace.data),
                                    static_cast<std::size_t>(workspace.data != nullptr ? used : 0));
  for (const auto& [name, tensor] : {std::pair{"hidden_states", &call.hidden},
                                     {"hidden_scales", &call.hidden_scales},
                                     {"topk_ids", &call.ids},
                                     {"topk_weights", &call.weights},
                                     {"router_logits", &call.logits}}) {
    const std::span<const u8> memory = extent_of(*tensor);
    check_apart("out", out, name, memory);
    check_apart("workspace", scratch, name, memory);
  }
  check_apart("workspace", scratch, "out", out);
}

void check_out(const format::Tensor& out, i64 tokens, i64 hidden) {
  if (out.rows < tokens || out.cols != hidden) {
    throw Error(Reason::argument_invalid,
                fmt::format("out is [{}, {}], expected [{}, {}] or more rows", out.rows, out.cols, tokens, hidden));
  }
  if (out.stride >= hidden || tokens <= 1) return;
  throw Error(Reason::stride_unsupported,
              fmt::format("out has rows {} elements apart, expected at least {}", out.stride, hidden));
}

Workspace workspace_of(nb::handle object, i32 device, i64 needed, std::vector<nb::object>* owners) {
  if (object.is_none()) return {};
  const Array array = view("workspace", object, Access::write);
  if (array.owner.is_valid()) owners->push_back(array.owner);
  const bool bytes = array.element == Element::u8 && array.rank == 1 && (array.strides[0] == 1 || array.shape[0] <= 1);
  if (!bytes || array.device != device) {
    throw Error(
        Reason::argument_invalid,
        fmt::format("workspace is {}-dimensional {} on {}, expected contiguous 1-dimensional u8 on {}", array.rank,
                    weights::element_name(array.element), device_words(array.device), device_words(device)));
  }
  const i64 skipped = -reinterpret_cast<std::intptr_t>(array.data) & (kWorkspaceAlignment - 1);
  if (array.shape[0] - skipped < needed) {
    throw Error(Reason::workspace_too_small, fmt::format("workspace has {} bytes, expected {} (workspace_bytes())",
                                                         array.shape[0], needed + kWorkspaceAlignment - 1));
  }
  return {reinterpret_cast<std::byte*>(array.data) + skipped, array.shape[0] - skipped};
}

LayerCall convert(const CallArguments& arguments, i32 device, std::vector<nb::object>* owners) {
  LayerCall call;
  if (arguments.hidden_states.is_none()) throw Error(Reason::argument_invalid, "hidden_states is None");
  const bool quantised = !arguments.hidden_scales.is_none();
  call.hidden = quantised ? matrix("hidden_states", arguments.hidden_states, device, {Element::u8}, owners)
                          : matrix("hidden_states", arguments.hidden_states, device, kFloats, owners);
  call.hidden_scales = matrix("hidden_scales", arguments.hidden_scales, device, {Element::e4m3, Element::u8}, owners);
  call.ids = matrix("topk_ids", arguments.topk_ids, device, kIds, owners);
  call.weights = matrix("topk_weights", arguments.topk_weights, device, kFloats, owners);
  call.logits = matrix("router_logits", arguments.router_logits, device, kFloats, owners);
  return call;
}

// The columns of what chooses the experts, named before anything is computed or made.
void check_routes(const LayerCall& call, const Problem& p) {
  const auto check = [&](const char* name, const format::Tensor& t, i64 cols) {
    if (t.empty() || (t.rows == call.hidden.rows && t.cols == cols)) return;
    throw Error(Reason::argument_invalid,
                fmt::format("{} is [{}, {}], expected [{}, {}]", name, t.rows, t.cols, call.hidden.rows, cols));
  };
  const bool quantised = call.hidden.dtype == format::Dtype::u8;
  check("hidden_states", call.hidden, quantised ? p.hidden / 2 : p.hidden);
  check("hidden_scales", call.hidden_scales, p.hidden / format::kNvfp4Block);
  check("topk_ids", call.ids, p.top_k);
  check("topk_weights", call.weights, p.top_k);
  check("router_logits", call.logits, p.experts);
}

}  // namespace

Precision parse_precision(const std::string& word) {
  for (const Precision precision : kPrecisions) {
    if (word == precision_name(precision)) return precision;
  }
  throw Error(Reason::argument_invalid,
              fmt::format("precision is '{}', expected 'w4a16', 'w4a4' or 'w4a8_int8'", word));
}

PyLayer::PyLayer(checkpoint::Layer source, const Choices& choices, std::string what, Owners owners)
    : choices_(choices),
      what_(std::move(what)),
      executor_(&tbb_executor(choices.threads)),
      made_of_(source.owner),
      owners_(std::move(owners)) {
  {
    const Unlocked unlocked;
    layer_ = std::make_unique<Layer>(std::move(source), options(choices.precision, choices.plan));
  }
  const std::lock_guard<std::mutex> lock(registry().mutex);
  handle_ = ++registry().last;
  registry().layers[handle_] = this;
}

PyLayer::~PyLayer() {
  const std::lock_guard<std::mutex> lock(registry().mutex);
  registry().layers.erase(handle_);
}

PyLayer* PyLayer::find(i64 handle) {
  const std::lock_guard<std::mutex> lock(registry().mutex);
  const auto found = registry().layers.find(handle);
  return found == registry().layers.end() ? nullptr : found->second;
}

LayerOptions PyLayer::options(Precision precision, const std::string& plan) const {
  LayerOptions options;
  options.backend = plan;
  options.precision = precision;
  options.max_tokens = choices_.max_tokens;
  options.executor = executor_;
  options.device = choices_.device;
  options.batch_invariant = choices_.batch_invariant;
  options.tuning = choices_.tuning;
  return options;
}

namespace {

// What a layer for another precision or plan is packed from; not there when it lay in a GPU's memory.
void check_sources(const checkpoint::Layer& weights, const Choices& own, Precision precision, const std::string& plan) {
  const auto gone = [](const weights::Expert& e) { return e.up.empty() || e.down.empty(); };
  const auto gate_gone = [&](const weights::Expert& e) { return weights.problem.activation.gated() && e.gate.empty(); };
  const std::vector<weights::Expert>& all = weights.experts;
  if (std::none_of(all.begin(), all.end(), gone) && std::none_of(all.begin(), all.end(), gate_gone)) return;
  throw Error(
      Reason::argument_invalid,
      fmt::format("precision '{}' and plan '{}' are not the layer's, '{}' and '{}', and its weights lay in memory "
                  "of {}, which it does not keep; a layer packed with them would pass",
                  precision_name(precision), plan, precision_name(own.precision), own.plan, device_words(own.device)));
}

}  // namespace

// The layer itself, or one for another precision or plan, which packs the same weights once more at its first call.
Layer& PyLayer::choose(const std::optional<std::string>& precision_word, const std::optional<std::string>& plan_word) {
  const Precision precision = precision_word ? parse_precision(*precision_word) : choices_.precision;
  const std::string& plan = plan_word ? *plan_word : choices_.plan;
  if (precision == choices_.precision && plan == choices_.plan) return *layer_;
  const Unlocked unlocked;
  const std::shared_lock<std::shared_mutex> no_refit(refit_mutex_);
  const std::lock_guard<std::mutex> lock(variants_mutex_);
  for (Variant& known : variants_) {
    if (known.precision == precision && known.plan == plan) return *known.layer;
  }
  check_sources(layer_->weights(), choices_, precision, plan);
  variants_.push_back({precision, plan, std::make_unique<Layer>(layer_->weights(), options(precision, plan))});
  return *variants_.back().layer;
}

nb::object PyLayer::call(const CallArguments& arguments) {
  std::vector<nb::object> owners;  // until the call ends
  LayerCall call = convert(arguments, choices_.device, &owners);
  const Problem& p = problem();
  check_routes(call, p);
  const bool own = arguments.out.is_none();
  nb::object out = own ? empty_like(arguments.hidden_states, {call.hidden.rows, p.hidden},
                                    element_of(call.hidden.dtype), choices_.device)
                       : nb::borrow(arguments.out);
  call.output = matrix("out", out, choices_.device, kFloats, &owners, Access::write);
  check_out(call.output, call.hidden.rows, p.hidden);
  call.stream = stream_of(arguments.stream, arguments.hidden_states.type(), choices_.device);
  if (!framework_.is(arguments.hidden_states.type())) framework_ = nb::borrow(arguments.hidden_states.type());
  const bool completes = own && choices_.device >= 0 && is_immutable(arguments.hidden_states);
  Layer& layer = choose(arguments.precision, arguments.plan);
  const i64 used = layer.workspace_bytes();
  const Workspace workspace = workspace_of(arguments.workspace, choices_.device, used, &owners);
  check_all_apart(call, workspace, used);
  Status status;
  {
    const Unlocked unlocked;
    const std::shared_lock<std::shared_mutex> lock(refit_mutex_);
    status = layer.run(call, workspace);
    if (status.ok() && completes) status = layer.wait(call.stream);
  }
  if (status.detail.starts_with("output ")) status.detail.replace(0, 6, "out");  // its name here
  throw_unless_ok(status);
  return own ? back_to(arguments.hidden_states, std::move(out), choices_.device) : out;
}

void PyLayer::refit(weights::Assembled assembled, std::vector<nb::object> owners) {
  {
    const Unlocked unlocked;
    const std::unique_lock<std::shared_mutex> lock(refit_mutex_);
    const std::lock_guard<std::mutex> variants_lock(variants_mutex_);
    checkpoint::Layer next = layer_->weights();
    next.experts = std::move(assembled.experts);
    next.owner = std::move(assembled.owner);
    next.problem.hidden = assembled.hidden;
    next.problem.inter = assembled.inter;
    next.problem.local_experts = static_cast<i32>(next.experts.size());
    next.problem.encoding = assembled.encoding;
    layer_->refit(next);
    for (Variant& known : variants_) known.layer->refit(next);
    owners_.weights.swap(owners);  // counts no references, so it needs no interpreter lock; the old ones go at the end
  }
}

i64 PyLayer::workspace_bytes(i64 tokens, const std::optional<std::string>& precision,
                             const std::optional<std::string>& plan) {
  if (tokens < 0) throw Error(Reason::argument_invalid, fmt::format("tokens is {}, expected at least 0", tokens));
  return choose(precision, plan).workspace_bytes() + kWorkspaceAlignment - 1;
}

void PyLayer::wait(nb::handle stream) {
  void* address = stream_of(stream, framework_, choices_.device);
  Status status;
  {
    const Unlocked unlocked;
    const std::shared_lock<std::shared_mutex> lock(refit_mutex_);
    status = layer_->wait(address);
    const std::lock_guard<std::mutex> variants_lock(variants_mutex_);
    for (Variant& known : variants_) {
      if (status.ok()) status = known.layer->wait(address);
    }
  }
  throw_unless_ok(status);
}

std::string PyLayer::explain(i64 tokens) const {
  Problem p = problem();
  if (tokens < 0 || tokens > (1 << 24)) {
    throw Error(Reason::argument_invalid, fmt::format("tokens is {}, expected 0 to {}", tokens, 1 << 24));
  }
  p.max_tokens = static_cast<i32>(tokens);
  return tools::explain_text(tools::explain(what_, p, layer().plan().machine, choices_.plan, choices_.tuning));
}

std::string PyLayer::repr() const {
  const Problem& p = problem();
  return fmt::format("<fourmoe.Layer: {}; hidden {}, inter {}, {} experts ({} here), top-{}, {}, {}, {}, on {}>", what_,
                     p.hidden, p.inter, p.experts, p.local_experts, p.top_k, activation_name(p.activation.kind),
                     format::encoding_name(p.encoding), precision_name(p.precision), device_words(choices_.device));
}

}  // namespace fourmoe::python
