// source: what a checkpoint of any container answers. Checkpoint forwards to one of these.
#pragma once

#include <filesystem>
#include <memory>
#include <vector>

#include "checkpoint/checkpoint.h"

namespace fourmoe::checkpoint {

class LayerSource {
 public:
  virtual ~LayerSource() = default;
  virtual std::vector<i32> layers() const = 0;  // ascending
  virtual Info inspect() const = 0;
  virtual Layer load(i32 layer, Executor& executor) const = 0;
  virtual const TensorMap& tensors() const = 0;
};

// A folder with config.json beside model.safetensors or an index, or a single .safetensors file beside config.json.
std::unique_ptr<LayerSource> open_safetensors(const std::filesystem::path& path);

std::unique_ptr<LayerSource> open_gguf(const std::filesystem::path& path);

// Throws layer_missing with the layers that there are.
[[noreturn]] void refuse_layer(const std::string& path, i32 layer, const std::vector<i32>& layers);

// Runs task(0..count-1) on the executor. Of all Errors thrown, that of the lowest index is thrown here, so that the
// message does not depend on threads.
void run_all(Executor& executor, i64 count, const std::function<void(i64 index)>& task);

}  // namespace fourmoe::checkpoint
