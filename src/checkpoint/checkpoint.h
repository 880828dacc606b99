// Checkpoint: a model's files as one set of MoE layers, whatever their dialect.
//
// Files come from outside and are distrusted: every header, offset, shape, dtype and scale is validated before it is
// used, and a fault throws Error with one line that names file, tensor and offset. Files are memory mapped; a loaded
// layer reads from the mapping except where a dialect must be rearranged (transposed stacks, GGUF nibbles).
#pragma once

#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "checkpoint/safetensors.h"
#include "executor.h"
#include "flow.h"
#include "weights/expert_table.h"

namespace fourmoe::checkpoint {

// What stands out in a layer's scales; zero everywhere in a plain checkpoint.
struct Oddities {
  i32 gate_up_differ = 0;    // experts whose gate and up have different global scales
  f32 largest_ratio = 1.0f;  // largest ratio between the two
  i32 inputs_missing = 0;    // projections without input scale
  i32 inputs_zero = 0;       // projections whose input scale is 0
  i32 globals_invalid = 0;   // projections whose global scale is not finite and positive; load refuses them
};

// The always-active experts beside the routed ones.
struct SharedInfo {
  i32 inter = 0;
  format::Encoding encoding = format::Encoding::bf16;
  bool gated = false;  // its output is weighted by a sigmoid of its own
};

struct LayerInfo {
  i32 index = 0;       // number in the model
  std::string prefix;  // common beginning of its tensors' names
  std::string layout;  // "per-expert", "stacked", "transposed", "interleaved", "gguf"
  Problem problem;     // shapes, routing, activation, encoding of the experts
  std::optional<SharedInfo> shared;
  bool router = false;  // the checkpoint has the layer's router
  bool biases = false;  // the projections have biases
  i64 bytes = 0;        // of the experts, scales included
  Oddities oddities;
};

struct Info {
  std::string path;
  std::string family;     // "qwen3_moe", "deepseek_v3", ...: model_type of config.json, or how it was recognised
  std::string dialect;    // "modelopt", "compressed-tensors", "mxfp4", "gguf", "dense"
  std::string algorithm;  // quant_algo or format as the checkpoint names it; empty for dense
  std::string producer;   // name and version where recorded
  i64 files = 0;
  i64 tensors = 0;
  i64 bytes = 0;                  // of all tensors
  std::vector<LayerInfo> layers;  // MoE layers in order
};

// One layer's weights as views; copies where rearranged. Everything is kept alive by `owner`.
struct Layer {
  Problem problem;                       // precision w4a16, all experts local, max_tokens 0
  std::vector<weights::Expert> experts;  // [experts], without packed blobs

  format::Matrix router;            // [experts, hidden] dense; empty when the checkpoint has none
  std::vector<f32> router_bias;     // [experts] added to logits; empty for none
  std::vector<f32> selection_bias;  // [experts] (e_score_correction_bias); empty for none
  bool picked_by_token = false;     // picks come from a table of token ids, so that no logits give them

  struct Shared {
    Problem problem;  // experts 1, top_k 1, score none
    weights::Expert expert;
    format::Matrix gate;  // [1, hidden] dense: weight is its sigmoid; empty: weight 1
  };
  std::optional<Shared> shared;

  std::vector<std::string> notes;  // oddities in words, one line each
  std::shared_ptr<const void> owner;
};

class Checkpoint {
 public:
  // A folder (config.json beside model.safetensors or an index), a .safetensors file, or a .gguf file. Reads headers
  // only.
  static Checkpoint open(const std::filesystem::path& path);

  // Indices of the MoE layers in the model, ascending.
  std::vector<i32> layers() const;

  // Headers and the scalars of the scales; never the weights.
  Info inspect() const;

  // All tensors of a safetensors checkpoint, experts or not; empty for a .gguf.
  const TensorMap& tensors() const;

  // Throws layer_missing with the layers there are; tensor_*, scale_invalid, global_invalid name tensor and expert.
  // Scale bytes of all experts are checked here, in parallel.
  Layer load(i32 layer, Executor& executor) const;

  struct Impl;

 private:
  explicit Checkpoint(std::shared_ptr<const Impl> impl) : impl_(std::move(impl)) {}
  std::shared_ptr<const Impl> impl_;
};

}  // namespace fourmoe::checkpoint
