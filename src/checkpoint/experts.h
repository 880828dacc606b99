// experts: the sources of a layer's projections, and their form.
#pragma once

#include <array>
#include <vector>

#include "checkpoint/config.h"
#include "checkpoint/names.h"
#include "checkpoint/views.h"

namespace fourmoe::checkpoint {

// Sizes and spelling that hold for all experts of a layer.
struct Geometry {
  i32 hidden = 0;
  i32 inter = 0;
  i32 experts = 0;
  bool gated = true;
  bool interleaved = false;        // fused gate and up alternate
  bool prefer_transposed = false;  // where shapes fit both ways
};

using ExpertSources = std::array<Source, 3>;  // gate (no parts when not gated), up, down

Geometry geometry_of(const Config& config);

// Throws tensor_mismatch when the number of experts is not the config's, tensor_missing when one or one of its weights
// is absent, naming it.
void check_experts(const LayerTensors& layer, const Config& config);

// Of one expert of a layer that passed check_experts.
ExpertSources find_sources(const LayerTensors& layer, const Geometry& geometry, i32 expert);

// Of the shared expert; its intermediate size is its own. Throws tensor_missing, tensor_mismatch.
ExpertSources find_shared_sources(const LayerTensors& layer, const Geometry& geometry);
bool has_shared(const LayerTensors& layer);

// Forms of the three; all have one encoding, else encoding_unsupported. Throws what examine() throws.
std::array<Form, 3> examine_all(const ExpertSources& sources, const Geometry& geometry);

// "per-expert", "stacked", "transposed", "interleaved".
std::string layout_name(const ExpertSources& sources, const std::array<Form, 3>& forms);

// Bytes of all the experts' tensors.
i64 expert_bytes(const LayerTensors& layer);

}  // namespace fourmoe::checkpoint
