// The plan of quantize: which tensors become NVFP4, under which names, and which share a global scale.
#pragma once

#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "checkpoint/safetensors.h"
#include "format/tensor.h"

namespace fourmoe::checkpoint {

// A dense matrix that becomes `module`.weight, .weight_scale and .weight_scale_2.
struct QuantizeTarget {
  std::string module;      // "model.layers.0.mlp.experts.3.gate_proj"
  std::string source;      // tensor that it is, or that it is a slice of
  format::Matrix dense;    // bf16, f16 or f32; the input's memory
  std::size_t global = 0;  // index of the global scale that it shares
};

// One input file's tensors, taken apart.
struct ShardPlan {
  std::string file;
  Metadata metadata;
  std::vector<std::pair<std::string, StoredTensor>> kept;  // copied as they are
  std::vector<QuantizeTarget> targets;
};

struct QuantizePlan {
  std::vector<ShardPlan> shards;
  std::vector<std::vector<std::pair<std::size_t, std::size_t>>> globals;  // global -> (shard, target) that share it
  i64 layers = 0;
  std::map<std::string, i32> experts;  // of each layer, by the prefix of their names
};

// What one input file holds.
struct Shard {
  std::string file;
  TensorMap tensors;
  Metadata metadata;
};

// Families (model_type) whose layers outside the routed experts can be quantised too: those where the result has been
// compared with modelopt's export, byte for byte (tests/fixtures/full-*).
std::span<const std::string_view> full_recipe_families();

// Checks completeness, dtypes and shapes of all routed experts. With `linears`, attention, shared experts and dense
// layers become targets too. Throws Error as quantize() says.
QuantizePlan plan_quantisation(const std::vector<Shard>& shards, bool linears);

// Modules that stay in high precision, with prefixes that cover no quantised module shortened to `prefix*` or
// `prefix.*`, sorted: modelopt's summary (export/quant_utils.py, _prefix_wildcard_summarize_exclude_modules).
std::vector<std::string> summarise_excluded(const std::vector<std::string>& kept,
                                            const std::vector<std::string>& quantised);

// The modules of a plan that modelopt would list as excluded: every kept matrix, and lm_head even where it is tied.
std::vector<std::string> excluded_modules(const QuantizePlan& plan);

}  // namespace fourmoe::checkpoint
