#include "layer.h"

#include <fmt/format.h>

#include <algorithm>
#include <new>
#include <optional>
#include <utility>

#include "gpu/runtime.h"
#include "residence.h"
#include "route/route.h"

namespace fourmoe {
namespace {

using format::Dtype;
using format::Tensor;

// Rows [begin, begin + count) of a view; an empty view stays empty.
Tensor slice(Tensor tensor, i64 begin, i64 count) {
  if (tensor.empty()) return tensor;
  tensor.data = tensor.row(begin);
  tensor.rows = count;
  return tensor;
}

template <class T>
Tensor view(T* data, Dtype dtype, i64 rows, i64 cols) {
  return {data, dtype, rows, cols, cols};
}

// What one pass needs: the two plans run one after the other and share their memory.
struct Pass {
  Workspace plan;
  f32* logits = nullptr;          // [max_tokens, experts], from the layer's own router
  i32* shared_ids = nullptr;      // [max_tokens]
  f32* shared_weights = nullptr;  // [max_tokens]
  f32* addend = nullptr;          // [max_tokens, hidden], the shared experts' output
  std::byte* kept = nullptr;      // Visit::kept
};

Plans make_plans(const checkpoint::Layer& weights, const LayerOptions& options, Dtype activations, tune::Known* known) {
  Plans plans;
  Problem problem = weights.problem;
  problem.precision = options.precision;
  problem.max_tokens = options.max_tokens;
  problem.batch_invariant = options.batch_invariant;
  problem.activations = activations;
  Machine target = machine();
  target.device = options.device;
  const plan::Request request{options.backend, options.pinned, {}};
  plans.status = tune::Sizes::make(problem, target, request, known, &plans.routed);
  if (!plans.status.ok() || !weights.shared) return plans;

  problem = weights.shared->problem;
  problem.precision = format::is_fp4(problem.encoding) ? options.precision : Precision::w4a16;
  problem.max_tokens = options.max_tokens;
  problem.batch_invariant = options.batch_invariant;
  problem.activations = activations;
  plans.status = tune::Sizes::make(problem, target, request, known, &plans.shared);
  if (!plans.status.ok()) plans.status.detail = "shared experts: " + plans.status.detail;
  return plans;
}

}  // namespace

struct Layer::Impl {
  checkpoint::Layer weights;
  Plans bf16;
  Plans f16;
  std::vector<std::string> notes;  // of the file of measured choices
  std::unique_ptr<Residence> home;

  i32 device() const { return bf16.routed.most().machine.device; }
  i64 lay_out(std::byte* base, Pass* pass) const;
  Status run_shared(const Plans& plans, const LayerCall& call, const Tensor& hidden, const Pass& pass) const;
  Status add_shared(const Plans& plans, const LayerCall& call, const Pass& pass, Args* args) const;
  Status run_pass(const LayerCall& call, i64 begin, i64 count, const Pass& pass) const;
  Status run_passes(const Visit& visit);
  Status run(const LayerCall& call, Workspace workspace);
};

i64 Layer::Impl::lay_out(std::byte* base, Pass* pass) const {
  const Problem& problem = bf16.routed.most().problem;
  const i64 tokens = problem.max_tokens;
  Carver carver(base);
  for (const Plans* plans : {&bf16, &f16}) {  // a room may hold tokens of each type in its own form
    for (const tune::Sizes* sizes : {&plans->routed, &plans->shared}) {
      pass->plan.bytes = std::max(pass->plan.bytes, sizes->workspace_bytes());
    }
  }
  pass->plan.data = carver.take<std::byte>(pass->plan.bytes);
  if (!weights.router.empty()) pass->logits = carver.take<f32>(tokens * problem.experts);
  if (weights.shared) {
    pass->shared_ids = carver.take<i32>(tokens);
    pass->shared_weights = carver.take<f32>(tokens);
    pass->addend = carver.take<f32>(tokens * problem.hidden);
  }
  return carver.used();
}

Layer::Layer(checkpoint::Layer weights, const LayerOptions& options) : impl_(std::make_unique<Impl>()) {
  if (options.max_tokens < 1) {
    throw Error(Reason::argument_invalid, fmt::format("max_tokens is {}, expected at least 1", options.max_tokens));
  }
  throw_unless_ok(route::check_bias(weights.selection_bias));
  impl_->weights = std::move(weights);
  tune::Known known(options.tuning);
  impl_->bf16 = make_plans(impl_->weights, options, Dtype::bf16, &known);
  impl_->f16 = make_plans(impl_->weights, options, Dtype::f16, &known);
  impl_->notes = known.notes();
  throw_unless_ok(impl_->bf16.status);
  Executor& executor = options.executor != nullptr ? *options.executor : tbb_executor();
  const auto make = options.device < 0 ? make_host_residence : make_device_residence;
  impl_->home = make(&impl_->weights, impl_->bf16, executor);
}

Layer::~Layer() = default;
Layer::Layer(Layer&&) noexcept = default;
Layer& Layer::operator=(Layer&&) noexcept = default;

const plan::Plan& Layer::plan() const { return impl_->bf16.routed.most(); }
const plan::Plan& Layer::plan(i64 tokens) const { return impl_->bf16.routed.at(tokens).plan; }
const tune::Sizes& Layer::sizes() const { return impl_->bf16.routed; }

std::vector<std::string> Layer::notes() const {
  std::vector<std::string> all = impl_->weights.notes;
  all.insert(all.end(), impl_->notes.begin(), impl_->notes.end());
  return all;
}

Status Layer::choose(i64 tokens, const plan::Choice& choice, Dtype hidden) {
  return (hidden == Dtype::f16 ? impl_->f16 : impl_->bf16).routed.choose(tokens, choice);
}
const checkpoint::Layer& Layer::weights() const { return impl_->weights; }

i64 Layer::workspace_bytes() const {
  Pass unused;
  return impl_->lay_out(nullptr, &unused);
}

i64 Layer::packed_bytes() const { return impl_->home->packed_bytes(); }

namespace {

// Tokens that come quantised have no values for a router or for shared experts of another precision.
Status check_quantised(const checkpoint::Layer& weights, const LayerCall& call) {
  if (call.ids.empty() && call.logits.empty() && call.hidden.rows > 0) {
    return refuse(Reason::argument_invalid, "hidden_scales is given; give topk_ids and topk_weights, or router_logits");
  }
  if (weights.shared)
    return refuse(Reason::argument_invalid, "hidden_scales is given, but the layer has shared experts");
  if (call.hidden_scales.rows != call.hidden.rows) {
    return refuse(Reason::argument_invalid, fmt::format("hidden_scales has {} rows, hidden_states {}",
                                                        call.hidden_scales.rows, call.hidden.rows));
  }
  return {};
}

// The views as a whole; plan::run checks each pass's part again, with its rows.
Status check_call(const checkpoint::Layer& weights, const LayerCall& call) {
  const i64 tokens = call.hidden.rows;
  if (!call.logits.empty() && !call.ids.empty()) {
    return refuse(Reason::argument_invalid, "router_logits and topk_ids are both given; give one");
  }
  if (call.ids.empty() != call.weights.empty()) {
    return refuse(Reason::argument_invalid, "topk_ids and topk_weights go together");
  }
  if (weights.picked_by_token && call.ids.empty() && tokens > 0) {
    return refuse(Reason::tensor_missing, "the layer picks by a table of token ids; give topk_ids and topk_weights");
  }
  if (call.logits.empty() && call.ids.empty() && weights.router.empty() && tokens > 0) {
    return refuse(Reason::tensor_missing,
                  "the checkpoint has no router for this layer; give router_logits, or topk_ids and topk_weights");
  }
  for (const auto& [name, tensor] : {std::pair{"router_logits", &call.logits}, std::pair{"topk_ids", &call.ids},
                                     std::pair{"topk_weights", &call.weights}}) {
    if (!tensor->empty() && tensor->rows != tokens) {
      return refuse(Reason::argument_invalid,
                    fmt::format("{} has {} rows, hidden_states {}", name, tensor->rows, tokens));
    }
  }
  if (call.output.rows < tokens) {
    return refuse(Reason::argument_invalid,
                  fmt::format("output has {} rows, hidden_states {}", call.output.rows, tokens));
  }
  if (call.hidden.empty() && tokens > 0) return refuse(Reason::argument_invalid, "hidden_states is null");
  const i64 cols = weights.problem.hidden / (call.hidden_scales.empty() ? 1 : 2);
  if (!call.hidden.empty() && call.hidden.cols != cols) {
    return refuse(Reason::argument_invalid,
                  fmt::format("hidden_states is [{}, {}], expected [{}, {}]", tokens, call.hidden.cols, tokens, cols));
  }
  return call.hidden_scales.empty() ? Status{} : check_quantised(weights, call);
}

}  // namespace

Status Layer::Impl::run_shared(const Plans& plans, const LayerCall& call, const Tensor& hidden,
                               const Pass& pass) const {
  if (Status status = home->pick_shared(hidden, call.stream, pass.shared_ids, pass.shared_weights); !status.ok()) {
    return status;
  }
  Args args;
  home->complete(&args);
  args.stream = call.stream;
  args.weights = home->shared();
  args.tokens = static_cast<i32>(hidden.rows);
  args.hidden = hidden;
  args.picks.ids = view(pass.shared_ids, Dtype::i32, hidden.rows, 1);
  args.picks.weights = view(pass.shared_weights, Dtype::f32, hidden.rows, 1);
  args.output.output = view(pass.addend, Dtype::f32, hidden.rows, hidden.cols);
  if (pass.kept != nullptr) args.kept = pass.kept + plans.routed.kept_bytes();
  return plan::run(plans.shared.at(args.tokens).plan, args, pass.plan);
}

// With the routed experts where the plan can, else before them.
Status Layer::Impl::add_shared(const Plans& plans, const LayerCall& call, const Pass& pass, Args* args) const {
  if (!home->one_table() || !plans.routed.at(args->tokens).plan.takes_shared()) {
    args->addend.addend = pass.addend;
    return run_shared(plans, call, args->hidden, pass);
  }
  args->shared.asked = true;
  if (weights.shared->gate.empty()) return {};
  args->shared.weights = pass.shared_weights;
  return home->pick_shared(args->hidden, call.stream, nullptr, pass.shared_weights);
}

Status Layer::Impl::run_pass(const LayerCall& call, i64 begin, i64 count, const Pass& pass) const {
  const Plans& plans = call.hidden.dtype == Dtype::f16 ? f16 : bf16;
  if (!plans.status.ok()) return plans.status;
  const Problem& problem = plans.routed.most().problem;
  Args args;
  home->complete(&args);
  args.stream = call.stream;
  args.weights = home->routed();
  args.tokens = static_cast<i32>(count);
  args.hidden = slice(call.hidden, begin, count);
  args.hidden_scales = slice(call.hidden_scales, begin, count);
  args.picks.logits = slice(call.logits, begin, count);
  args.picks.ids = slice(call.ids, begin, count);
  args.picks.weights = slice(call.weights, begin, count);
  args.picks.bias = home->selection_bias();
  args.output.output = slice(call.output, begin, count);
  const bool own_logits = call.logits.empty() && call.ids.empty();
  if (own_logits) args.picks.logits = view(pass.logits, Dtype::f32, count, problem.experts);
  args.kept = pass.kept;
  if (call.picked_ids != nullptr) args.picked.ids = call.picked_ids + begin * problem.top_k;
  if (call.picked_weights != nullptr) args.picked.weights = call.picked_weights + begin * problem.top_k;
  if (own_logits || weights.shared) {  // a call that is refused has computed nothing
    if (Status status = plan::check(plans.routed.at(count).plan, args); !status.ok()) return status;
  }
  if (own_logits) {
    if (Status status = home->logits(args.hidden, call.stream, pass.logits); !status.ok()) return status;
  }
  if (weights.shared) {
    if (Status status = add_shared(plans, call, pass, &args); !status.ok()) return status;
  }
  return plan::run(plans.routed.at(count).plan, args, pass.plan);
}

Status Layer::Impl::run_passes(const Visit& visit) {
  const LayerCall& call = visit.call;
  Pass pass;
  lay_out(visit.workspace.data, &pass);
  pass.kept = visit.kept;
  const i64 most = bf16.routed.most().problem.max_tokens;
  for (i64 begin = 0; begin < call.hidden.rows; begin += most) {
    const i64 count = std::min(most, call.hidden.rows - begin);
    Status status = run_pass(call, begin, count, pass);
    if (!status.ok() && begin > 0) status.detail += fmt::format(" (counting from token {})", begin);
    if (!status.ok()) return status;
  }
  return {};
}

Status Layer::Impl::run(const LayerCall& call, Workspace workspace) {
  if (Status status = check_call(weights, call); !status.ok()) return status;
  Pass unused;
  Visit visit = {call, workspace, lay_out(nullptr, &unused), {}};
  if (workspace.data != nullptr && workspace.bytes < visit.bytes) {
    return refuse(Reason::workspace_too_small,
                  fmt::format("workspace has {} bytes, the layer needs {}", workspace.bytes, visit.bytes));
  }
  if (Status status = check_alignment(workspace); !status.ok()) return status;
  std::optional<gpu::Current> current;
  if (device() >= 0) current.emplace(device());
  if (current && !current->status().ok()) return current->status();
  if (Status status = home->enter(&visit); !status.ok()) return status;
  Status status = run_passes(visit);
  Status left = home->leave(&visit);
  return status.ok() ? left : status;
}

Status Layer::wait(void* stream) {
  std::optional<gpu::Current> current;
  if (impl_->device() >= 0) current.emplace(impl_->device());
  if (current && !current->status().ok()) return current->status();
  return impl_->home->wait(stream);
}

Status Layer::run(const LayerCall& call, Workspace workspace) {
  try {
    return impl_->run(call, workspace);
  } catch (const Error& error) {
    return refuse(error.reason(), error.what());
  } catch (const std::bad_alloc&) {
    return refuse(Reason::out_of_memory, "an allocation failed while the layer ran");
  } catch (const std::exception& error) {
    return refuse(Reason::internal, error.what());
  }
}

namespace {

// Numbers of a clamp that is not used do not matter.
bool same(const Activation& a, const Activation& b) {
  return a == b || (a.kind == b.kind && a.kind != ActivationKind::swiglu_clamped);
}

bool same(const Problem& a, const Problem& b) {
  return a.hidden == b.hidden && a.inter == b.inter && a.experts == b.experts && a.first_expert == b.first_expert &&
         a.local_experts == b.local_experts && a.encoding == b.encoding && same(a.activation, b.activation);
}

std::string form_words(const Problem& p) {
  const Activation& a = p.activation;
  std::string more;
  if (a.kind == ActivationKind::swiglu_clamped) {
    more = fmt::format(" (alpha {}, beta {}, limit {})", a.alpha, a.beta, a.limit);
  }
  if (p.local_experts != p.experts) more += fmt::format(", from expert {} of {}", p.first_expert, p.experts);
  return fmt::format("{} experts of [{}, {}] {}, {}{}", p.local_experts, p.inter, p.hidden,
                     format::encoding_name(p.encoding), activation_name(a.kind), more);
}

// All that same shapes are about.
std::string form_words(const checkpoint::Layer& layer) {
  std::string words = form_words(layer.problem);
  if (!layer.router.empty()) words += ", a router";
  if (!layer.selection_bias.empty()) words += ", a selection bias";
  if (layer.shared) words += fmt::format(", shared {}", form_words(layer.shared->problem));
  return words;
}

}  // namespace

void Layer::refit(checkpoint::Layer weights) {
  const checkpoint::Layer& held = impl_->weights;
  const bool fits = same(weights.problem, held.problem) && weights.experts.size() == held.experts.size() &&
                    weights.shared.has_value() == held.shared.has_value() &&
                    (!held.shared || same(weights.shared->problem, held.shared->problem)) &&
                    weights.router.empty() == held.router.empty() &&
                    weights.selection_bias.size() == held.selection_bias.size();
  if (!fits) {
    throw Error(Reason::tensor_mismatch, fmt::format("the new weights are {}, expected {} as the layer's",
                                                     form_words(weights), form_words(held)));
  }
  throw_unless_ok(route::check_bias(weights.selection_bias));
  checkpoint::Layer before = std::exchange(impl_->weights, std::move(weights));
  try {
    impl_->home->refit();
  } catch (...) {
    impl_->weights = std::move(before);
    throw;
  }
}

}  // namespace fourmoe
