// gemm2: every slot's intermediate times the down projection of its expert.
//
//   z = global_down * sum_i W_down[h, i] y[i] + bias_down[h]
// In w4a8_int8 y is int8 times the scale of its group of 32 columns, of the row that gemm1 left (format/quantise.h).
// In w4a4 the expert's intermediate scale joins the global. z stays f32 and is not yet weighted by the router.
// Products are exact; sums are f32 or better; a slot's result does not depend on the other slots.
#pragma once

#include "flow.h"

namespace fourmoe::gemm2 {

// In the workspace. Overwritten; rows beyond the slots in use are left alone.
struct Out {
  f32* rows = nullptr;  // [slots, hidden] f32
};

}  // namespace fourmoe::gemm2
