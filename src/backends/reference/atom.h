// The reference's way to decode and multiply: exact operands, sums in double. Written for reading, never for speed; its
// steps allocate.
#pragma once

#include <vector>

#include "args.h"

namespace fourmoe::reference {

using Row = std::vector<f64>;

// global * sum_k W[row, k] x[k]
f64 dot(const format::Matrix& weights, i64 row, const Row& x);

// The token of a pick as its expert sees it, [hidden]: rounded to the activations' type, and in w4a8_int8 then to int8,
// or to NVFP4 in w4a4 (with its global), after the routing weight where that multiplies the input.
Row token(const Args& args, i64 pick, const weights::Expert& expert);

// Activated intermediate of one row, [inter], before rounding.
Row gemm1(const Problem& problem, const weights::Expert& expert, const Row& x);

// What rounded values become in w4a8_int8, code times scale; themselves in other precisions.
Row through_int8(const Problem& problem, const Row& values);

// The intermediate as gemm2 sees it, [inter]: rounded like a token.
Row round(const Problem& problem, const Row& y, f32 global);

// Output of one row, [hidden], not yet weighted.
Row gemm2(const Problem& problem, const weights::Expert& expert, const Row& y);

// Accepts what the reference reads: everything that check(problem) accepts.
Verdict can(const Problem& problem, const Machine& machine);

}  // namespace fourmoe::reference
