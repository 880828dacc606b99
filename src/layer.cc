#include "layer.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <mutex>
#include <new>

namespace fourmoe {
namespace {

using format::Dtype;
using format::Tensor;

struct Free {
  void operator()(std::byte* memory) const { ::operator delete[](memory, std::align_val_t{kWorkspaceAlignment}); }
};

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

const weights::Order* order_of(const plan::Plan& plan) {
  for (const Step* step : plan.steps) {
    if (step->order != nullptr) return step->order;
  }
  return nullptr;
}

// What one pass needs: the two plans run one after the other and share their memory.
struct Pass {
  Workspace plan;
  f32* logits = nullptr;          // [max_tokens, experts], from the layer's own router
  i32* shared_ids = nullptr;      // [max_tokens]
  f32* shared_weights = nullptr;  // [max_tokens]
  f32* addend = nullptr;          // [max_tokens, hidden], the shared experts' output
};

// A plan for tokens of each 16-bit type: f16 tokens stay f16, all others are computed in bf16.
struct Plans {
  plan::Plan routed;
  plan::Plan shared;
  Status status;
};

Plans make_plans(const checkpoint::Layer& weights, const LayerOptions& options, Dtype activations) {
  Plans plans;
  Problem problem = weights.problem;
  problem.precision = options.precision;
  problem.max_tokens = options.max_tokens;
  problem.activations = activations;
  const plan::Request request{options.backend, options.pinned};
  plans.status = plan::make(problem, machine(), request, &plans.routed);
  if (!plans.status.ok() || !weights.shared) return plans;

  problem = weights.shared->problem;
  problem.precision = format::is_fp4(problem.encoding) ? options.precision : Precision::w4a16;
  problem.max_tokens = options.max_tokens;
  problem.activations = activations;
  plans.status = plan::make(problem, machine(), request, &plans.shared);
  return plans;
}

}  // namespace

struct Layer::Impl {
  checkpoint::Layer weights;
  Executor* executor = nullptr;
  Plans bf16;
  Plans f16;
  std::unique_ptr<weights::Packed> packed;
  std::unique_ptr<weights::Packed> packed_shared;
  std::mutex own_workspace_mutex;
  std::unique_ptr<std::byte[], Free> own_workspace;  // made at the first call that brings none

  void pack();
  i64 lay_out(std::byte* base, Pass* pass) const;
  Status run_pass(const LayerCall& call, i64 begin, i64 count, const Pass& pass) const;
  Status run(const LayerCall& call, Workspace workspace);
};

void Layer::Impl::pack() {
  if (const weights::Order* order = order_of(bf16.routed)) {
    packed = std::make_unique<weights::Packed>(weights.experts, *order, *executor);
  }
  if (!weights.shared) return;
  if (const weights::Order* order = order_of(bf16.shared)) {
    const std::span<weights::Expert> shared(&weights.shared->expert, 1);
    packed_shared = std::make_unique<weights::Packed>(shared, *order, *executor);
  }
}

i64 Layer::Impl::lay_out(std::byte* base, Pass* pass) const {
  const Problem& problem = bf16.routed.problem;
  const i64 tokens = problem.max_tokens;
  Carver carver(base);
  pass->plan.bytes = std::max(bf16.routed.workspace_bytes, bf16.shared.workspace_bytes);
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
  impl_->weights = std::move(weights);
  impl_->executor = options.executor != nullptr ? options.executor : &tbb_executor();
  impl_->bf16 = make_plans(impl_->weights, options, Dtype::bf16);
  impl_->f16 = make_plans(impl_->weights, options, Dtype::f16);
  throw_unless_ok(impl_->bf16.status);
  impl_->pack();
}

Layer::~Layer() = default;
Layer::Layer(Layer&&) noexcept = default;
Layer& Layer::operator=(Layer&&) noexcept = default;

const plan::Plan& Layer::plan() const { return impl_->bf16.routed; }
const checkpoint::Layer& Layer::weights() const { return impl_->weights; }

i64 Layer::workspace_bytes() const {
  Pass unused;
  return impl_->lay_out(nullptr, &unused);
}

i64 Layer::packed_bytes() const {
  return (impl_->packed ? impl_->packed->bytes() : 0) + (impl_->packed_shared ? impl_->packed_shared->bytes() : 0);
}

namespace {

bool same_form(const format::Matrix& a, const format::Matrix& b) {
  return a.rows == b.rows && a.cols == b.cols && a.encoding == b.encoding && a.empty() == b.empty();
}

}  // namespace

void Layer::refit(std::vector<weights::Expert> experts, std::shared_ptr<const void> owner) {
  std::vector<weights::Expert>& current = impl_->weights.experts;
  if (experts.size() != current.size()) {
    throw Error(Reason::argument_invalid, fmt::format("{} experts, the layer has {}", experts.size(), current.size()));
  }
  for (std::size_t e = 0; e < experts.size(); ++e) {
    const weights::Expert& old = current[e];
    if (same_form(experts[e].gate, old.gate) && same_form(experts[e].up, old.up) &&
        same_form(experts[e].down, old.down)) {
      continue;
    }
    throw Error(Reason::argument_invalid,
                fmt::format("expert {} differs from the layer's in shape or encoding: up is [{}, {}] {}, expected [{}, "
                            "{}] {} (columns unpacked)",
                            e, experts[e].up.rows, experts[e].up.cols, format::encoding_name(experts[e].up.encoding),
                            old.up.rows, old.up.cols, format::encoding_name(old.up.encoding)));
  }
  if (impl_->packed) impl_->packed->repack(experts, *impl_->executor);
  current = std::move(experts);
  impl_->weights.owner = std::move(owner);
}

namespace {

// Every token's one pick is the shared expert; it weighs 1, or the sigmoid of its own gate.
void pick_shared(const checkpoint::Layer::Shared& shared, const Tensor& hidden, Executor& executor, const Pass& pass) {
  std::fill_n(pass.shared_ids, hidden.rows, 0);
  std::fill_n(pass.shared_weights, hidden.rows, 1.0f);
  if (shared.gate.empty()) return;
  route::logits(hidden, shared.gate, nullptr, executor, pass.shared_weights);
  for (i64 t = 0; t < hidden.rows; ++t) pass.shared_weights[t] = 1.0f / (1.0f + std::exp(-pass.shared_weights[t]));
}

Status run_shared(const checkpoint::Layer::Shared& shared, const plan::Plan& plan, const Tensor& hidden,
                  Executor& executor, const Pass& pass) {
  pick_shared(shared, hidden, executor, pass);
  Args args;
  args.executor = &executor;
  args.weights = {std::span(&shared.expert, 1)};
  args.tokens = static_cast<i32>(hidden.rows);
  args.hidden = hidden;
  args.picks.ids = view(pass.shared_ids, Dtype::i32, hidden.rows, 1);
  args.picks.weights = view(pass.shared_weights, Dtype::f32, hidden.rows, 1);
  args.output.output = view(pass.addend, Dtype::f32, hidden.rows, hidden.cols);
  return plan::run(plan, args, pass.plan);
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
  if (!call.hidden.empty() && call.hidden.cols != weights.problem.hidden) {
    return refuse(Reason::argument_invalid, fmt::format("hidden_states is [{}, {}], expected [{}, {}]", tokens,
                                                        call.hidden.cols, tokens, weights.problem.hidden));
  }
  return {};
}

}  // namespace

Status Layer::Impl::run_pass(const LayerCall& call, i64 begin, i64 count, const Pass& pass) const {
  const Plans& plans = call.hidden.dtype == Dtype::f16 ? f16 : bf16;
  if (!plans.status.ok()) return plans.status;
  const Problem& problem = plans.routed.problem;
  Args args;
  args.executor = executor;
  args.weights = {weights.experts};
  args.tokens = static_cast<i32>(count);
  args.hidden = slice(call.hidden, begin, count);
  args.picks.logits = slice(call.logits, begin, count);
  args.picks.ids = slice(call.ids, begin, count);
  args.picks.weights = slice(call.weights, begin, count);
  args.picks.bias = weights.selection_bias.empty() ? nullptr : weights.selection_bias.data();
  args.output.output = slice(call.output, begin, count);
  if (call.logits.empty() && call.ids.empty()) {
    const f32* bias = weights.router_bias.empty() ? nullptr : weights.router_bias.data();
    route::logits(args.hidden, weights.router, bias, *executor, pass.logits);
    args.picks.logits = view(pass.logits, Dtype::f32, count, problem.experts);
  }
  if (weights.shared) {
    const Status status = run_shared(*weights.shared, plans.shared, args.hidden, *executor, pass);
    if (!status.ok()) return status;
    args.addend.addend = pass.addend;
  }
  if (call.picked_ids != nullptr) args.picked.ids = call.picked_ids + begin * problem.top_k;
  if (call.picked_weights != nullptr) args.picked.weights = call.picked_weights + begin * problem.top_k;
  return plan::run(plans.routed, args, pass.plan);
}

Status Layer::Impl::run(const LayerCall& call, Workspace workspace) {
  if (Status status = check_call(weights, call); !status.ok()) return status;
  std::unique_lock<std::mutex> lock(own_workspace_mutex, std::defer_lock);
  Pass pass;
  const i64 needed = lay_out(nullptr, &pass);
  if (workspace.data == nullptr) {
    lock.lock();
    if (!own_workspace) own_workspace.reset(new (std::align_val_t{kWorkspaceAlignment}) std::byte[needed]);
    workspace = {own_workspace.get(), needed};
  }
  if (workspace.bytes < needed) {
    return refuse(Reason::workspace_too_small,
                  fmt::format("workspace has {} bytes, the layer needs {}", workspace.bytes, needed));
  }
  lay_out(workspace.data, &pass);
  const i64 most = bf16.routed.problem.max_tokens;
  for (i64 begin = 0; begin < call.hidden.rows; begin += most) {
    const i64 count = std::min(most, call.hidden.rows - begin);
    Status status = run_pass(call, begin, count, pass);
    if (!status.ok() && begin > 0) status.detail += fmt::format(" (counting from token {})", begin);
    if (!status.ok()) return status;
  }
  return {};
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

}  // namespace fourmoe
