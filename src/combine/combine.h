// combine: the weighted sum of each token's picks.
//
//   out[t] = round( addend[t] + sum over picks p = 0 .. k-1, in this order, of w_p * z[slot(p)] )
// w_p is 1 where the routing weight has multiplied the input. A token without local picks gets its addend, or zeros.
#pragma once

#include "flow.h"

namespace fourmoe::combine {

struct In {
  const f32* addend = nullptr;  // [tokens, hidden] f32: the shared experts' part; the workspace's; null for none
};

// Overwritten; rows beyond `tokens` are left alone.
struct Out {
  format::Tensor output;  // [>= tokens, hidden] f32|f16|bf16; caller's
};

}  // namespace fourmoe::combine
