// gemm1: every slot's token times the gate and up projections of its expert, and the activation.
//
//   gate = global_gate * sum_k W_gate[i, k] x[k] + bias_gate[i]      (up alike; no gate for relu2)
//   y    = activate(gate, up), rounded for gemm2
// x in w4a16: the token rounded to Problem::activations (exact unless it is f32), times the routing weight and rounded
// again if that weighs the input. x in w4a4: E2M1 * E4M3 from route, and the expert's input scale joins the globals.
// x in w4a8_int8: w4a16's, then int8 times the scale of its group of 32 columns (format/quantise.h); y is rounded as in
// w4a16, and to int8 where gemm2 reads it.
// Products are exact; sums are f32 or better; a slot's result does not depend on the other slots.
// Bound: rel-L2 <= 2e-4 against the reference before y is rounded, <= 3e-3 after bf16 rounding, <= 1e-2 for w4a4, <=
// 3e-3 for w4a8_int8.
#pragma once

#include "flow.h"

namespace fourmoe::gemm1 {

// In the workspace. Overwritten; rows beyond the slots in use are left alone. On the host there are rows of
// Problem::activations or, in w4a4, codes and scales. On a GPU there are always rows of bf16: in w4a4 the exact values
// of codes and scales without their global, of f16 two planes of max_tokens * top_k slots that sum to the values.
struct Out {
  u16* rows = nullptr;   // [slots, inter] bf16 or f16; null in w4a4 on the host
  u8* codes = nullptr;   // [slots, inter/2] E2M1 pairs, low nibble first; null unless w4a4 on the host
  u8* scales = nullptr;  // [slots, inter/16] E4M3; null unless w4a4 on the host
};

}  // namespace fourmoe::gemm1
