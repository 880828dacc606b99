// PyLayer: what `fourmoe.Layer` holds: the library's layer, the Python objects that own its weights, and one more
// layer for each other precision or plan that a call asked for.
#pragma once

#include <memory>
#include <mutex>
#include <optional>
#include <shared_mutex>

#include "bindings/python/array.h"
#include "layer.h"
#include "weights/stacks.h"

namespace fourmoe::python {

// The arguments of one call, as Python gave them; each may be None but hidden_states.
struct CallArguments {
  nb::handle hidden_states;  // [T, hidden] f32|f16|bf16; with hidden_scales [T, hidden/2] u8
  nb::handle topk_ids;       // [T, top_k] i32|i64
  nb::handle topk_weights;   // [T, top_k] f32|f16|bf16
  nb::handle router_logits;  // [T, experts] f32|f16|bf16
  nb::handle hidden_scales;  // [T, hidden/16] e4m3|u8
  nb::handle out;            // [>= T, hidden] f32|f16|bf16
  nb::handle workspace;      // [>= workspace_bytes()] u8
  nb::handle stream;
  std::optional<std::string> precision;
  std::optional<std::string> plan;
};

// What a layer is made of, apart from its weights.
struct Choices {
  i32 device = -1;
  Precision precision = Precision::w4a16;
  std::string plan = "auto";
  i32 max_tokens = 1024;
  i32 threads = 0;
  bool batch_invariant = false;
  std::optional<std::string> tuning;
};

class PyLayer {
 public:
  // What `source` views in host memory. What it views in a GPU's must only stay until the layer is made.
  struct Owners {
    std::vector<nb::object> weights;
    std::vector<u8> router;
  };

  // `what` names the layer in explain().
  PyLayer(checkpoint::Layer source, const Choices& choices, std::string what, Owners owners);
  ~PyLayer();

  nb::object call(const CallArguments& arguments);
  void refit(weights::Assembled assembled, std::vector<nb::object> owners);

  // Bytes that any buffer given as workspace must have, wherever it begins.
  i64 workspace_bytes(i64 tokens, const std::optional<std::string>& precision, const std::optional<std::string>& plan);
  void wait(nb::handle stream);
  std::string explain(i64 tokens) const;
  std::string repr() const;

  const Layer& layer() const { return *layer_; }
  const Problem& problem() const { return layer().problem(); }
  const Choices& choices() const { return choices_; }
  nb::object framework() const { return framework_; }  // type of the last call's tokens, or None
  Executor& executor() const { return *executor_; }

  // An integer that names this layer as long as it lives, for operators that can only carry numbers.
  i64 handle() const { return handle_; }
  static PyLayer* find(i64 handle);  // null when the layer is gone

 private:
  struct Variant {
    Precision precision;
    std::string plan;
    std::unique_ptr<Layer> layer;
  };

  LayerOptions options(Precision precision, const std::string& plan) const;
  Layer& choose(const std::optional<std::string>& precision, const std::optional<std::string>& plan);

  Choices choices_;
  nb::object framework_ = nb::none();  // under the interpreter's lock
  std::string what_;
  Executor* executor_;
  i64 handle_;
  std::shared_mutex refit_mutex_;        // calls share it, refit has it alone
  std::shared_ptr<const void> made_of_;  // memory of what a refit leaves: router and shared experts
  std::unique_ptr<Layer> layer_;         // never replaced
  std::mutex variants_mutex_;
  std::vector<Variant> variants_;  // layers of other precisions and plans
  Owners owners_;
};

Precision parse_precision(const std::string& word);

}  // namespace fourmoe::python
