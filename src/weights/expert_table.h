// Expert table: expert -> where its weights are and the f32 numbers that go with them.
//
// Kernels reach weights through this table alone, so an expert may lie in a mapped file, in packed memory of one or
// many buffers, or with a peer. Entry i is local expert i, that is expert first_expert + i of the layer.
#pragma once

#include <span>

#include "format/tensor.h"

namespace fourmoe::weights {

struct Expert {
  // As the checkpoint stores them; read by the reference and by packers. `gate` is empty when the layer has none.
  format::Matrix gate;  // [inter, hidden]
  format::Matrix up;    // [inter, hidden]
  format::Matrix down;  // [hidden, inter]

  // As a room streams them (order: the room's tiles); null in rooms that read the matrices above.
  const std::byte* gemm1 = nullptr;  // gate and up
  const std::byte* gemm2 = nullptr;  // down

  const f32* gate_bias = nullptr;  // [inter]; null for none
  const f32* up_bias = nullptr;    // [inter]; null for none
  const f32* down_bias = nullptr;  // [hidden]; null for none

  // w4a4: global scales of what is quantised, multipliers, each expert's own as checkpoints record them. Engines that
  // quantise a token once for all experts take their largest; on the shipped model that moves a block's output by 1-4
  // %.
  f32 input_scale = 1.0f;  // of the tokens (input_scale of gate and up)
  f32 inter_scale = 1.0f;  // of the intermediate (input_scale of down)
};

// The table as kernels read it: all arrays lie in the memory of one GPU, [local_experts] unless said; owner:
// weights::DevicePacked.
struct DeviceTable {
  const std::byte* const* gemm1 = nullptr;  // blobs of gate and up, in the room's tiles; their addresses never change
  const std::byte* const* gemm2 = nullptr;  // blobs of down
  const f32* gemm1_globals = nullptr;       // [local_experts, 2] of gate and of up; w4a4: times input_scale
  const f32* gemm2_globals = nullptr;       // of down; w4a4: times inter_scale
  const f32* gate_bias = nullptr;           // [local_experts, inter]; null for none
  const f32* up_bias = nullptr;             // [local_experts, inter]; null for none
  const f32* down_bias = nullptr;           // [local_experts, hidden]; null for none
  const f32* input_scale = nullptr;         // w4a4, as in Expert
  const f32* inter_scale = nullptr;         // w4a4, as in Expert
};

struct ExpertTable {
  std::span<const Expert> experts;      // [local_experts]; owner: whoever loaded the layer
  const DeviceTable* device = nullptr;  // null unless the plan is for a GPU; outlives the call
};

}  // namespace fourmoe::weights
