// Mirror: a call with tensors in host memory, made where the layer lives. On a GPU its tensors are copied there and the
// results back; on the host it is the call itself. Tests and the command share it.
#pragma once

#include "gpu/runtime.h"
#include "layer.h"

namespace fourmoe::cases {

class Mirror {
 public:
  // Copies what the call points to, its output's old contents included. Throws Error.
  Mirror(const Layer& layer, const LayerCall& host);

  const LayerCall& call() const { return call_; }  // its stream may be set
  LayerCall& call() { return call_; }
  void refresh();  // the inputs, from the host call
  void fetch();    // the results, to the host call's memory; waits

 private:
  struct Part {
    void* host = nullptr;
    i64 bytes = 0;
    bool result = false;
    gpu::Buffer device;
  };
  void* add(void* host, i64 bytes, bool result);
  void add(format::Tensor* tensor, bool result);

  i32 device_;
  LayerCall call_;
  std::vector<Part> parts_;
};

// Runs the call, waits for it and fetches its results.
Status run_mirrored(Layer* layer, const LayerCall& host, Workspace workspace = {});

}  // namespace fourmoe::cases
