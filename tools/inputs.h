// Inputs: the tensors of one call, at random, quickly made: a tuner needs a hundred of them, some of gigabytes.
#pragma once

#include <vector>

#include "layer.h"

namespace fourmoe::tools {

class Inputs {
 public:
  // Each token picks its experts at random among all, no one twice; values are of unit variance and repeat after a
  // million.
  Inputs(const Problem& problem, i64 tokens, u64 seed);

  LayerCall call();  // views of this object's memory, the output too

 private:
  i64 tokens_;
  i64 hidden_size_;
  i64 top_k_;
  std::vector<u16> hidden_;  // [tokens, hidden] bf16
  std::vector<i32> ids_;     // [tokens, top_k]
  std::vector<f32> weights_;
  std::vector<u16> output_;  // [tokens, hidden] bf16
};

}  // namespace fourmoe::tools
