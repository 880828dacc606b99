// Residence: where a layer lives, the host or one GPU: the memory of its weights and of its own workspace, and what a
// pass computes beside its plan (the checkpoint's router, the shared experts' picks). layer.cc knows no more of either.
#pragma once

#include <memory>
#include <mutex>

#include "layer.h"

namespace fourmoe {

// The plans for tokens of each 16-bit type: f16 tokens stay f16, all others are computed in bf16.
struct Plans {
  tune::Sizes routed;
  tune::Sizes shared;  // empty where the layer has no shared experts
  Status status;
};

// One call, from before its first pass to after its last.
struct Visit {
  const LayerCall& call;
  Workspace workspace;                // the caller's; without data: the layer's own, which enter fills in
  i64 bytes = 0;                      // that the call needs of it
  std::unique_lock<std::mutex> turn;  // held while the layer's own is in use
  std::byte* kept = nullptr;          // of the workspace: routed plans', then that of the shared experts' plans
};

class Residence {
 public:
  virtual ~Residence() = default;

  virtual i64 packed_bytes() const = 0;
  virtual weights::ExpertTable routed() const = 0;
  virtual weights::ExpertTable shared() const = 0;
  virtual bool one_table() const = 0;             // the shared expert is an entry of the routed ones' table, after them
  virtual const f32* selection_bias() const = 0;  // [experts]; null for none

  // Refuses pointers of another place, reports what an earlier call left behind, and finds the workspace. The layer's
  // own is handed out to one visit at a time.
  virtual Status enter(Visit* visit) = 0;
  virtual Status leave(Visit* visit) = 0;
  virtual Status wait(void* stream) = 0;

  virtual void complete(Args* args) = 0;  // with what plans need of this place
  // Router logits [tokens, experts] f32 of a pass.
  virtual Status logits(const format::Tensor& hidden, void* stream, f32* logits) = 0;
  // Every token's one pick is the shared expert 0; it weighs 1, or the sigmoid of its own gate. [tokens] each; ids may
  // be null.
  virtual Status pick_shared(const format::Tensor& hidden, void* stream, i32* ids, f32* weights) = 0;

  // Takes the weights that `layer` holds by now, of the same shapes, in place of those before. Throws Error.
  virtual void refit() = 0;
};

// Both pack and throw Error. `layer` outlives them; the host's fills in its experts' blobs.
std::unique_ptr<Residence> make_host_residence(checkpoint::Layer* layer, const Plans& plans, Executor& executor);
std::unique_ptr<Residence> make_device_residence(checkpoint::Layer* layer, const Plans& plans, Executor& executor);

}  // namespace fourmoe
