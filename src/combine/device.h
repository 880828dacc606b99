// combine on a device: the contract of combine.h over device memory, bit for bit the host's sum.
#pragma once

#include "combine/combine.h"

namespace fourmoe::combine {

// All pointers are device memory of the caller's; rows begin at multiples of 16 bytes.
struct DeviceSum {
  i32 tokens = 0;
  i32 hidden = 0;  // multiple of 16
  i32 top_k = 0;
  bool weight_on_input = false;    // the routing weight has multiplied the input: w_p is 1
  const i32* pick_slot = nullptr;  // [tokens, top_k]; route::kRefused gives the token a row of NaN
  const f32* weights = nullptr;    // [tokens, top_k]
  const f32* rows = nullptr;       // [slots, hidden] z of gemm2
  In addend;
  const f32* addend_weights = nullptr;  // [tokens] that multiply the addend; null for 1
  Out out;
};

// Captured in a graph it follows what the buffers hold at each replay. Zero tokens launch nothing.
Status launch_combine(const DeviceSum& sum, void* stream);

}  // namespace fourmoe::combine
