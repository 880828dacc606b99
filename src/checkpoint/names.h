// names: from the tensors' names to the layers, experts and projections that they belong to.
//
// A tensor of an expert is <base>.experts.<expert>.<projection>.<attribute> (one expert) or
// <base>.experts.<projection><. or _><attribute> (a stack of all experts), where <base> holds the layer's number. What
// stands before the number is found, not assumed. Spellings are rows of tables in names.cc.
#pragma once

#include <array>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "checkpoint/safetensors.h"

namespace fourmoe::checkpoint {

// Name and tensor; null for none. Owned by the TensorMap.
using Named = const TensorMap::value_type*;

enum class Projection : u8 { gate, up, down, gate_up };
inline constexpr std::size_t kProjections = 4;

// The tensors of one projection of one expert, or of a stack.
struct Parts {
  Named weight = nullptr;   // codes or dense values
  Named scale = nullptr;    // block scales; of FP8: one scale of the matrix
  Named global = nullptr;   // global scale
  Named input = nullptr;    // input scale
  Named bias = nullptr;     // of the projection
  Named foreign = nullptr;  // a tensor whose meaning this reader does not know
  bool global_divides = false;
  bool input_divides = false;
};

using ProjectionParts = std::array<Parts, kProjections>;  // by Projection

inline const Parts& part(const ProjectionParts& parts, Projection which) {
  return parts[static_cast<std::size_t>(which)];
}

struct LayerTensors {
  i32 index = 0;                           // number in the model
  std::string base;                        // "model.layers.3.mlp": all names of the layer's MoE begin with it
  bool extra = false;                      // outside the main run of layers (MTP); then `index` was assigned
  std::map<i32, ProjectionParts> experts;  // by expert; empty when stacked
  ProjectionParts stacks;
  ProjectionParts shared;
  Named shared_gate = nullptr;     // [1, hidden]
  Named router = nullptr;          // [experts, hidden]
  Named router_bias = nullptr;     // [experts], added to logits
  Named selection_bias = nullptr;  // [experts], selects only
  Named hash_table = nullptr;      // picks by token id: no router can reproduce them

  bool stacked() const { return experts.empty(); }
};

// All layers with experts, ascending by index. `gate_bias_selects`: see Family. `layers`: number of ordinary layers,
// after which extra ones are numbered; 0 when unknown.
std::vector<LayerTensors> find_layers(const TensorMap& tensors, bool gate_bias_selects, i32 layers);

// A tensor of the layer's MoE, by its name, whose meaning this reader does not know; null for none.
Named find_unknown(const TensorMap& tensors, const LayerTensors& layer);

// Name that a tensor beside `weight` would have: ("x.weight", "weight_scale") -> "x.weight_scale".
std::string sibling_name(std::string_view weight, std::string_view attribute);

// Name of the weight of a projection that the layer lacks, spelled as the rest of its names are.
std::string missing_weight_name(const LayerTensors& layer, i32 expert, Projection which);

}  // namespace fourmoe::checkpoint
