#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <new>

#include "gpu/fault.h"
#include "gpu/kept.h"
#include "gpu/runtime.h"
#include "residence.h"
#include "route/shared.h"
#include "weights/device_packed.h"
#include "weights/place.h"

namespace fourmoe {
namespace {

using format::Dtype;
using format::Matrix;
using format::Tensor;

// All plans of a layer take steps of one room, which read one packing.
const weights::Packing* packing_of(const tune::Sizes& sizes) {
  for (const Step* step : sizes.most().steps) {
    if (step->packing != nullptr) return step->packing;
  }
  return nullptr;
}

// A dense matrix of few rows: the router, or the gate of the shared experts.
class DeviceMatrix {
 public:
  // Takes memory at the first call and fills it in each. Throws Error.
  void set(const char* name, const Matrix& matrix) {
    if (matrix.empty()) return;
    switch (matrix.encoding) {
      case format::Encoding::bf16: tensor_.dtype = Dtype::bf16; break;
      case format::Encoding::f16: tensor_.dtype = Dtype::f16; break;
      case format::Encoding::f32: tensor_.dtype = Dtype::f32; break;
      default:
        throw Error(Reason::encoding_unsupported, fmt::format("{} is {}; on a GPU bf16, f16 or f32 would pass", name,
                                                              format::encoding_name(matrix.encoding)));
    }
    const i64 row = format::row_bytes(matrix.encoding, matrix.cols);
    if (memory_.data() == nullptr) {
      throw_unless_ok(gpu::Buffer::make(gpu::Kind::device, row * matrix.rows, name, &memory_));
    }
    for (i64 r = 0; r < matrix.rows; ++r) {
      throw_unless_ok(gpu::copy(memory_.data() + r * row, matrix.row(r), row, nullptr, name));
    }
    tensor_ = {memory_.data(), tensor_.dtype, matrix.rows, matrix.cols, matrix.cols};
  }
  const Tensor& tensor() const { return tensor_; }
  i64 bytes() const { return memory_.bytes(); }

 private:
  gpu::Buffer memory_;
  Tensor tensor_;
};

class DeviceFloats {
 public:
  void set(const char* name, std::span<const f32> values) {
    const i64 bytes = static_cast<i64>(values.size_bytes());
    if (memory_.data() == nullptr) {
      throw_unless_ok(gpu::Buffer::make(gpu::Kind::device, bytes, name, &memory_));
    }
    throw_unless_ok(gpu::copy(memory_.data(), values.data(), bytes, nullptr, name));
  }
  const f32* get() const { return memory_.as<f32>(); }  // null for none

 private:
  gpu::Buffer memory_;
};

class DeviceResidence final : public Residence {
 public:
  DeviceResidence(checkpoint::Layer* layer, const Plans& plans, Executor& executor)
      : layer_(*layer),
        executor_(executor),
        device_(device_of(plans.routed.most().machine)->index),
        most_tokens_(plans.routed.most().problem.max_tokens) {
    const gpu::Current current(device_);
    throw_unless_ok(current.status());
    throw_unless_ok(gpu::Buffer::make(gpu::Kind::pinned, sizeof(gpu::Fault), "fault record", &fault_));
    new (fault_.data()) gpu::Fault;
    throw_unless_ok(gpu::Event::make(&own_workspace_done_));
    set_numbers();
    kept_.emplace(plans.routed.kept_bytes() + plans.shared.kept_bytes());
    one_table_ = layer_.shared && fits_table(plans);
    packed_.emplace(plans.routed.most().problem, one_table_ ? all_experts() : layer_.experts, *packing_of(plans.routed),
                    device_, executor);
    if (one_table_) {
      shared_table_ = weights::entries_from(packed_->table(), plans.routed.most().problem);
    } else if (layer_.shared) {
      packed_shared_.emplace(plans.shared.most().problem, std::span(&layer_.shared->expert, 1),
                             *packing_of(plans.shared), device_, executor);
    }
    forget_sources();
  }

  i64 packed_bytes() const override { return packed_->bytes() + (packed_shared_ ? packed_shared_->bytes() : 0); }
  weights::ExpertTable routed() const override { return {layer_.experts, &packed_->table()}; }
  weights::ExpertTable shared() const override {
    return {std::span(&layer_.shared->expert, 1), one_table_ ? &shared_table_ : &packed_shared_->table()};
  }
  bool one_table() const override { return one_table_; }
  const f32* selection_bias() const override { return selection_bias_.get(); }

  Status enter(Visit* visit) override {
    if (Status status = check_places(*visit); !status.ok()) return status;
    if (Status status = take_fault(); !status.ok()) {
      status.detail += " (found by an earlier call; this one did nothing)";
      return status;
    }
    if (visit->call.hidden.rows > most_tokens_) split_ = true;
    Status status = visit->workspace.data != nullptr ? Status{} : lend_workspace(visit);
    if (status.ok()) visit->kept = kept_->find(visit->workspace.data);
    return status;
  }

  Status leave(Visit* visit) override {
    if (!visit->turn.owns_lock() || lent_to_capture_) return {};
    return own_workspace_done_.record(visit->call.stream);
  }

  Status wait(void* stream) override {
    if (Status status = gpu::synchronise(stream); !status.ok()) return status;
    return take_fault();
  }

  void complete(Args* args) override { args->fault = fault_.as<gpu::Fault>(); }

  Status logits(const Tensor& hidden, void* stream, f32* logits) override {
    if constexpr (!gpu::kBuilt) return gpu::synchronise(stream);
    else return route::launch_logits({hidden, router_.tensor(), router_bias_.get(), logits}, stream);
  }

  Status pick_shared(const Tensor& hidden, void* stream, i32* ids, f32* weights) override {
    if (ids != nullptr) {
      if (Status status = gpu::fill(ids, 0, hidden.rows * 4, stream); !status.ok()) return status;
    }
    if constexpr (!gpu::kBuilt) return gpu::synchronise(stream);
    else return route::launch_shared_weights({hidden, shared_gate_.tensor(), nullptr, weights}, stream);
  }

  void refit() override {
    const gpu::Current current(device_);
    throw_unless_ok(current.status());
    throw_unless_ok(gpu::synchronise_device());  // calls that are enqueued, on any stream, read the old weights
    packed_->refit(one_table_ ? all_experts() : layer_.experts, executor_);  // the first: it refuses before it writes
    if (packed_shared_) packed_shared_->refit(std::span(&layer_.shared->expert, 1), executor_);
    set_numbers();
    forget_sources();
  }

 private:
  // The shared expert has the shape of the routed ones, and a plan takes it for one of them.
  bool fits_table(const Plans& plans) const {
    const Problem& routed = plans.routed.most().problem;
    const Problem& shared = plans.shared.most().problem;
    return packing_of(plans.routed) == packing_of(plans.shared) && routed.inter == shared.inter &&
           routed.encoding == shared.encoding && routed.precision == shared.precision &&
           routed.activation == shared.activation &&
           routed.local_experts % 2 == 0 &&  // entry [local_experts] begins where the copy engine can, at 16 bytes
           std::any_of(plans.routed.all().begin(), plans.routed.all().end(),
                       [](const tune::Sized& size) { return size.plan.takes_shared(); });
  }

  // The routed experts, then the shared one.
  std::vector<weights::Expert> all_experts() const {
    std::vector<weights::Expert> all = layer_.experts;
    all.push_back(layer_.shared->expert);
    return all;
  }

  // Weights in a GPU's memory are packed and not read again, so that their owner may free them.
  void forget_sources() {
    for (weights::Expert& expert : layer_.experts) forget(&expert);
    if (layer_.shared) forget(&layer_.shared->expert);
  }

  void forget(weights::Expert* expert) const {
    const auto is_on_gpu = [&](const void* at) { return at != nullptr && weights::place_of(at, device_) >= 0; };
    for (Matrix* matrix : {&expert->gate, &expert->up, &expert->down}) {
      if (is_on_gpu(matrix->data) || is_on_gpu(matrix->scales)) matrix->data = matrix->scales = nullptr;
    }
    for (const f32** bias : {&expert->gate_bias, &expert->up_bias, &expert->down_bias}) {
      if (is_on_gpu(*bias)) *bias = nullptr;
    }
  }

  void set_numbers() {
    router_.set("router", layer_.router);
    if (layer_.shared) shared_gate_.set("gate of the shared experts", layer_.shared->gate);
    if (!layer_.router_bias.empty()) router_bias_.set("router bias", layer_.router_bias);
    if (!layer_.selection_bias.empty()) selection_bias_.set("selection bias", layer_.selection_bias);
    throw_unless_ok(gpu::synchronise(nullptr));
  }

  Status check_places(const Visit& visit) const {
    const LayerCall& call = visit.call;
    const std::array<std::pair<const char*, const void*>, 9> all = {{{"hidden_states", call.hidden.data},
                                                                     {"hidden_scales", call.hidden_scales.data},
                                                                     {"router_logits", call.logits.data},
                                                                     {"topk_ids", call.ids.data},
                                                                     {"topk_weights", call.weights.data},
                                                                     {"output", call.output.data},
                                                                     {"picked_ids", call.picked_ids},
                                                                     {"picked_weights", call.picked_weights},
                                                                     {"workspace", visit.workspace.data}}};
    for (const auto& [name, address] : all) {
      if (address == nullptr) continue;
      i32 device = -1;
      if (Status status = gpu::locate(address, &device); !status.ok()) return status;
      if (device == device_) continue;
      const std::string found = device < 0 ? "host memory" : fmt::format("memory of cuda:{}", device);
      return refuse(Reason::memory_misplaced,
                    fmt::format("{} is in {}, expected memory of cuda:{}", name, found, device_));
    }
    return {};
  }

  // The oldest fault that is complete; the record then starts anew.
  Status take_fault() {
    const std::lock_guard<std::mutex> lock(fault_mutex_);
    volatile gpu::Fault& record = *fault_.as<gpu::Fault>();  // kernels write it at any time
    const gpu::Fault found = {record.first, record.settled, record.value, record.experts};
    const gpu::FaultKind kind = gpu::fault_kind(found.first);
    if (kind == gpu::FaultKind::none || (kind == gpu::FaultKind::id && found.settled != found.first)) return {};
    record.settled = gpu::Fault{}.settled;  // before `first`: a fault found between the two must settle later
    record.first = gpu::Fault{}.first;
    Status status = gpu::to_status(found);
    if (split_) status.detail += fmt::format(" (counting from the first token of a pass of {})", most_tokens_);
    return status;
  }

  // The layer's own workspace. Calls on several streams wait for each other; a captured one orders its replays itself.
  Status lend_workspace(Visit* visit) {
    visit->turn = std::unique_lock(own_workspace_mutex_);
    if (Status status = gpu::capturing(visit->call.stream, &lent_to_capture_); !status.ok()) return status;
    const bool fits = own_workspace_.data() != nullptr && own_workspace_.bytes() >= visit->bytes;
    if (!fits && lent_to_capture_) {
      return refuse(Reason::workspace_too_small, fmt::format("a captured call cannot make the layer's own workspace; "
                                                             "{} bytes given, or a call before the capture, would pass",
                                                             visit->bytes));
    }
    if (!fits) {
      Status status = gpu::Buffer::make(gpu::Kind::device, visit->bytes, "the layer's own workspace", &own_workspace_);
      if (!status.ok()) return status;
    }
    visit->workspace = {own_workspace_.data(), visit->bytes};
    return lent_to_capture_ ? Status{} : own_workspace_done_.hold(visit->call.stream);
  }

  checkpoint::Layer& layer_;
  Executor& executor_;
  i32 device_;
  i32 most_tokens_;                 // of one pass
  std::atomic<bool> split_{false};  // a call had more: kernels count tokens within its passes
  gpu::Buffer fault_;               // gpu::Fault, pinned
  std::mutex fault_mutex_;
  DeviceMatrix router_;
  DeviceMatrix shared_gate_;
  DeviceFloats router_bias_;
  DeviceFloats selection_bias_;
  bool one_table_ = false;
  weights::DeviceTable shared_table_;  // of one_table_: the last entry
  std::optional<weights::DevicePacked> packed_;
  std::optional<weights::DevicePacked> packed_shared_;
  std::optional<gpu::Kept> kept_;
  std::mutex own_workspace_mutex_;
  gpu::Buffer own_workspace_;  // made at the first call that brings none; anew when Layer::choose made it too small
  gpu::Event own_workspace_done_;
  bool lent_to_capture_ = false;  // guarded by own_workspace_mutex_
};

}  // namespace

std::unique_ptr<Residence> make_device_residence(checkpoint::Layer* layer, const Plans& plans, Executor& executor) {
  return std::make_unique<DeviceResidence>(layer, plans, executor);
}

}  // namespace fourmoe
