// Layer: weights, plan and workspace of one MoE layer: what bindings and tools hold.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "checkpoint/checkpoint.h"
#include "plan.h"
#include "weights/packed.h"

namespace fourmoe {

struct LayerOptions {
  std::string backend = "auto";     // "auto", or a room of backends/list.cc
  std::vector<const Step*> pinned;  // see plan::Request; for verification
  Precision precision = Precision::w4a16;
  i32 max_tokens = 1024;         // most tokens of one pass; run splits longer calls
  Executor* executor = nullptr;  // null: the process's oneTBB executor
};

// One call. Exactly one of: logits; ids and weights; neither (then the checkpoint's router computes logits).
struct LayerCall {
  format::Tensor hidden;          // [T, hidden] bf16|f16|f32
  format::Tensor logits;          // [T, experts] f32|f16|bf16, or empty
  format::Tensor ids;             // [T, top_k] i32|i64, or empty
  format::Tensor weights;         // [T, top_k] f32|f16|bf16, or empty
  format::Tensor output;          // [>= T, hidden] f32|f16|bf16; overwritten, rows beyond T untouched
  i32* picked_ids = nullptr;      // [T, top_k] receives the picks; null for not wanted
  f32* picked_weights = nullptr;  // [T, top_k] receives their weights; null for not wanted
};

class Layer {
 public:
  // Plans, and packs the weights if the chosen steps read packed ones. Throws Error.
  Layer(checkpoint::Layer weights, const LayerOptions& options);

  ~Layer();
  Layer(Layer&&) noexcept;
  Layer& operator=(Layer&&) noexcept;

  const plan::Plan& plan() const;  // of the routed experts
  const Problem& problem() const { return plan().problem; }
  const checkpoint::Layer& weights() const;
  i64 workspace_bytes() const;  // for one pass of max_tokens
  i64 packed_bytes() const;     // 0 where the room reads the checkpoint's matrices

  // Replaces the routed experts' weights: packs them into the memory of the old ones. Same number of experts, shapes
  // and encoding, else throws Error(argument_invalid). `owner` keeps what they point to. No call may be under way.
  void refit(std::vector<weights::Expert> experts, std::shared_ptr<const void> owner);

  // Never throws. Given a workspace of workspace_bytes() it makes no memory of its own for the tokens; given none it
  // uses memory that the layer keeps, and calls from several threads then take turns.
  Status run(const LayerCall& call, Workspace workspace = {});

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace fourmoe
