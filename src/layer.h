// Layer: weights, plan and workspace of one MoE layer: what bindings and tools hold.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "checkpoint/checkpoint.h"
#include "plan.h"
#include "weights/packed.h"

namespace fourmoe {

struct LayerOptions {
  std::string backend = "auto";  // "auto", "reference", "cpu"
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
  // Plans for bf16 tokens and, when weights are packed by the room, packs them. Throws Error.
  Layer(checkpoint::Layer weights, const LayerOptions& options);

  const Problem& problem() const { return plan_.problem; }
  const plan::Plan& plan() const { return plan_; }
  const checkpoint::Layer& weights() const { return weights_; }
  i64 workspace_bytes() const;  // for one pass of max_tokens
  i64 packed_bytes() const;

  // Needs no allocation when a workspace of workspace_bytes() is given; with null it uses memory that the layer keeps
  // (then calls from several threads are refused by waiting: one runs at a time).
  Status run(const LayerCall& call, Workspace workspace = {});

 private:
  struct Impl;
  checkpoint::Layer weights_;
  plan::Plan plan_;
  std::shared_ptr<Impl> impl_;
};

}  // namespace fourmoe
