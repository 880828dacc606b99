// fourmoe: the C++ face over fourmoe.h. Owning handles, exceptions, typed views; header-only, nothing of its own.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "fourmoe/fourmoe.h"

namespace fourmoe {

// Thrown for every status but FOURMOE_OK; what() names the tensor, the expert, what was expected and what was found.
class Error : public std::runtime_error {
 public:
  Error(fourmoe_status status, const char* detail) : std::runtime_error(detail), status_(status) {}
  fourmoe_status status() const { return status_; }
  std::string name() const { return fourmoe_status_name(status_); }

 private:
  fourmoe_status status_;
};

inline void check(fourmoe_status status) {
  if (status != FOURMOE_OK) throw Error(status, fourmoe_last_error());
}

// A view of [rows, cols] elements, rows contiguous unless a stride (in elements) is given.
inline fourmoe_tensor view(void* data, fourmoe_dtype dtype, std::int64_t rows, std::int64_t cols,
                           std::int64_t stride = 0) {
  return {data, dtype, 0, rows, cols, stride != 0 ? stride : cols};
}

struct Options {
  std::string backend = "auto";
  fourmoe_precision precision = FOURMOE_W4A16;
  std::int32_t max_tokens = 0;                 // of one pass; 0: the library's default
  std::int32_t threads = 0;                    // 0 to 1024, 0: all
  const fourmoe_executor* executor = nullptr;  // a thread pool of the host program; see fourmoe_executor
  std::string device = "host";                 // or "cuda:0", ...
  bool batch_invariant = false;                // a token's bits do not depend on how many others a call has
  std::optional<std::string> tuning;           // file of measured choices; unset: the user's; "": none

  // Points into these options: valid while they live, unchanged.
  fourmoe_options c() const {
    return {sizeof(fourmoe_options),
            backend.c_str(),
            precision,
            max_tokens,
            threads,
            executor,
            device.c_str(),
            batch_invariant,
            0,
            tuning ? tuning->c_str() : nullptr};
  }
};

// What a call takes; start from Call{} and set what applies.
struct Call : fourmoe_call {
  Call() : fourmoe_call{} { struct_size = sizeof(fourmoe_call); }
};

class Layer {
 public:
  explicit Layer(fourmoe_layer* layer) : layer_(layer) {}  // owns it from now on

  // From tensors in memory; see fourmoe_layer_desc for where they may lie, and for how long.
  static Layer create(const fourmoe_layer_desc& desc, const Options& options = {}) {
    fourmoe_layer* layer = nullptr;
    const fourmoe_options converted = options.c();
    check(fourmoe_layer_create(&desc, &converted, &layer));
    return Layer(layer);
  }

  fourmoe_layer_info info() const {
    fourmoe_layer_info info{};
    info.struct_size = sizeof info;
    check(fourmoe_layer_get_info(layer_.get(), &info));
    return info;
  }

  // See fourmoe_layer_run; without a workspace the layer's own, and calls take turns.
  void run(const Call& call, void* workspace = nullptr, std::int64_t workspace_bytes = 0) {
    check(fourmoe_layer_run(layer_.get(), &call, workspace, workspace_bytes));
  }

  // Waits for a GPU's work and throws what it found wrong.
  void wait(void* stream = nullptr) { check(fourmoe_layer_wait(layer_.get(), stream)); }

  // Other weights of the same shapes, from tensors as create takes them.
  void refit(const fourmoe_layer_desc& desc) { check(fourmoe_layer_refit(layer_.get(), &desc)); }

 private:
  struct Free {
    void operator()(fourmoe_layer* layer) const { fourmoe_layer_free(layer); }
  };
  std::unique_ptr<fourmoe_layer, Free> layer_;
};

class Checkpoint {
 public:
  explicit Checkpoint(const std::string& path) {
    fourmoe_checkpoint* checkpoint = nullptr;
    check(fourmoe_checkpoint_open(path.c_str(), &checkpoint));
    checkpoint_.reset(checkpoint);
  }

  // Indices of the MoE layers, ascending.
  std::vector<std::int32_t> layers() const {
    std::int64_t count = 0;
    check(fourmoe_checkpoint_layers(checkpoint_.get(), nullptr, 0, &count));
    std::vector<std::int32_t> found(static_cast<std::size_t>(count));
    check(fourmoe_checkpoint_layers(checkpoint_.get(), found.data(), count, &count));
    return found;
  }

  Layer load(std::int32_t layer, const Options& options = {}) const {
    fourmoe_layer* loaded = nullptr;
    const fourmoe_options converted = options.c();
    check(fourmoe_layer_load(checkpoint_.get(), layer, &converted, &loaded));
    return Layer(loaded);
  }

 private:
  struct Free {
    void operator()(fourmoe_checkpoint* checkpoint) const { fourmoe_checkpoint_close(checkpoint); }
  };
  std::unique_ptr<fourmoe_checkpoint, Free> checkpoint_;
};

}  // namespace fourmoe
