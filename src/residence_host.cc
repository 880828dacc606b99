#include <algorithm>
#include <cmath>
#include <new>

#include "residence.h"
#include "weights/packed.h"

namespace fourmoe {
namespace {

struct Free {
  void operator()(std::byte* memory) const { ::operator delete[](memory, std::align_val_t{kWorkspaceAlignment}); }
};

const weights::Order* order_of(const tune::Sizes& sizes) {
  if (sizes.empty()) return nullptr;
  for (const Step* step : sizes.most().steps) {
    if (step->order != nullptr) return step->order;
  }
  return nullptr;
}

class HostResidence final : public Residence {
 public:
  HostResidence(checkpoint::Layer* layer, const Plans& plans, Executor& executor)
      : layer_(*layer), executor_(executor), order_(order_of(plans.routed)), order_shared_(order_of(plans.shared)) {
    refit();
  }

  i64 packed_bytes() const override {
    return (packed_ ? packed_->bytes() : 0) + (packed_shared_ ? packed_shared_->bytes() : 0);
  }
  weights::ExpertTable routed() const override { return {layer_.experts}; }
  weights::ExpertTable shared() const override { return {std::span(&layer_.shared->expert, 1)}; }
  bool one_table() const override { return false; }
  const f32* selection_bias() const override {
    return layer_.selection_bias.empty() ? nullptr : layer_.selection_bias.data();
  }

  Status enter(Visit* visit) override {
    if (visit->workspace.data != nullptr) return {};
    visit->turn = std::unique_lock(own_workspace_mutex_);
    if (!own_workspace_) own_workspace_.reset(new (std::align_val_t{kWorkspaceAlignment}) std::byte[visit->bytes]);
    visit->workspace = {own_workspace_.get(), visit->bytes};
    return {};
  }

  Status leave(Visit*) override { return {}; }
  Status wait(void*) override { return {}; }
  void complete(Args* args) override { args->executor = &executor_; }

  Status logits(const format::Tensor& hidden, void*, f32* logits) override {
    const f32* bias = layer_.router_bias.empty() ? nullptr : layer_.router_bias.data();
    route::logits(hidden, layer_.router, bias, executor_, logits);
    return {};
  }

  Status pick_shared(const format::Tensor& hidden, void*, i32* ids, f32* weights) override {
    if (ids != nullptr) std::fill_n(ids, hidden.rows, 0);
    std::fill_n(weights, hidden.rows, 1.0f);
    if (layer_.shared->gate.empty()) return {};
    route::logits(hidden, layer_.shared->gate, nullptr, executor_, weights);
    for (i64 t = 0; t < hidden.rows; ++t) weights[t] = 1.0f / (1.0f + std::exp(-weights[t]));
    return {};
  }

  void refit() override {
    const auto pack = [&](std::span<weights::Expert> experts, const weights::Order* order, auto* packed) {
      if (order == nullptr) return;
      if (*packed) (*packed)->repack(experts, executor_);  // in the memory of the old ones
      else *packed = std::make_unique<weights::Packed>(experts, *order, executor_);
    };
    pack(layer_.experts, order_, &packed_);
    if (layer_.shared) pack({&layer_.shared->expert, 1}, order_shared_, &packed_shared_);
  }

 private:
  checkpoint::Layer& layer_;
  Executor& executor_;
  const weights::Order* order_;
  const weights::Order* order_shared_;
  std::unique_ptr<weights::Packed> packed_;
  std::unique_ptr<weights::Packed> packed_shared_;
  std::mutex own_workspace_mutex_;
  std::unique_ptr<std::byte[], Free> own_workspace_;  // made at the first call that brings none
};

}  // namespace

std::unique_ptr<Residence> make_host_residence(checkpoint::Layer* layer, const Plans& plans, Executor& executor) {
  return std::make_unique<HostResidence>(layer, plans, executor);
}

}  // namespace fourmoe
