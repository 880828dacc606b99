// Layer: weights, plan and workspace of one MoE layer: what bindings and tools hold.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "checkpoint/checkpoint.h"
#include "plan.h"
#include "tune/sizes.h"
#include "weights/packed.h"

namespace fourmoe {

struct LayerOptions {
  std::string backend = "auto";     // "auto", or a room of backends/list.cc
  std::vector<const Step*> pinned;  // see plan::Request; for verification
  Precision precision = Precision::w4a16;
  i32 device = -1;               // an index into machine().devices: weights, tensors and work are on that GPU; -1: host
  i32 max_tokens = 1024;         // most tokens of one pass; run splits longer calls
  bool batch_invariant = false;  // see Problem; costs the smallest calls on a GPU up to a fifth of their time
  Executor* executor = nullptr;  // null: the process's oneTBB executor
  std::optional<std::string> tuning;  // file of measured choices (tune/book.h); unset: machine().tuning_path; "": none
};

// One call. Exactly one of: logits; ids and weights; neither (then the checkpoint's router computes logits). All
// pointers are to memory of the layer's device.
struct LayerCall {
  format::Tensor hidden;          // [T, hidden] bf16|f16|f32; with hidden_scales: [T, hidden/2] u8, E2M1 pairs
  format::Tensor hidden_scales;   // [T, hidden/16] u8, E4M3 of tokens quantised before (w4a4), or empty
  format::Tensor logits;          // [T, experts] f32|f16|bf16, or empty
  format::Tensor ids;             // [T, top_k] i32|i64, or empty
  format::Tensor weights;         // [T, top_k] f32|f16|bf16, or empty
  format::Tensor output;          // [>= T, hidden] f32|f16|bf16; overwritten, rows beyond T untouched
  i32* picked_ids = nullptr;      // [T, top_k] receives the picks; null for not wanted
  f32* picked_weights = nullptr;  // [T, top_k] receives their weights; null for not wanted
  void* stream = nullptr;         // cudaStream_t that the work goes to; null: the default stream. GPUs only
};

class Layer {
 public:
  // Plans, and packs the weights if the chosen steps read packed ones, on a GPU into its memory. The experts' matrices
  // and biases of a layer on a GPU may lie in that GPU's memory, where what fills them must have ended: they are read
  // here alone, and weights() then has null in their place. Throws Error.
  Layer(checkpoint::Layer weights, const LayerOptions& options);

  ~Layer();
  Layer(Layer&&) noexcept;
  Layer& operator=(Layer&&) noexcept;

  const plan::Plan& plan() const;            // of the routed experts, for calls of max_tokens
  const plan::Plan& plan(i64 tokens) const;  // for calls of so many
  const tune::Sizes& sizes() const;          // all of them, of the routed experts and bf16 tokens
  const Problem& problem() const { return plan().problem; }
  const checkpoint::Layer& weights() const;
  std::vector<std::string> notes() const;  // oddities of the weights, and of the file of measured choices
  i64 workspace_bytes() const;             // for one pass of max_tokens
  i64 packed_bytes() const;                // 0 where the room reads the checkpoint's matrices

  // Never throws. Given a workspace of workspace_bytes() it makes no memory of its own for the tokens; given none it
  // uses memory that the layer keeps, and calls from several threads then take turns.
  // On a GPU the work is enqueued and nothing is waited for, so a graph can capture it (with a workspace given, or
  // after a first call outside of the capture). What only kernels can find wrong, as an id out of range, wait()
  // reports, or else the next call, which then does nothing.
  Status run(const LayerCall& call, Workspace workspace = {});

  // Waits for the stream's work and reports what it found wrong. At once ok on the host.
  Status wait(void* stream = nullptr);

  // The routed experts' calls of the bucket of so many tokens, of bf16 and f32 or of f16, follow the choice from now
  // on; empty: the rule. Refuses one that cannot be followed. No call may be under way; workspace_bytes() may grow, and
  // graphs that captured the layer's own workspace are to be captured anew.
  Status choose(i64 tokens, const plan::Choice& choice, format::Dtype hidden = format::Dtype::bf16);

  // Other weights of the same shapes for the same plans, as the constructor takes them; on a GPU the packed weights
  // keep their addresses, so captured graphs stay valid. No call may be under way; on a GPU it waits for all that the
  // GPU's streams hold. Throws Error: tensor_mismatch where shapes differ; a refusal leaves the old weights.
  void refit(checkpoint::Layer weights);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace fourmoe
