// scales: the scalars of a layer, what stands out in them, and what they become.
#pragma once

#include <array>
#include <string>
#include <vector>

#include "checkpoint/checkpoint.h"

namespace fourmoe::checkpoint {

// Where a scalar was read, for messages.
struct Origin {
  std::string file;
  std::string tensor;
  i64 offset = 0;

  std::string text() const;  // `model.safetensors: tensor "x" at offset 12`
};

// A global or input scale as a multiplier: divisors are already inverted.
struct Scalar {
  f32 value = 1.0f;
  bool present = false;
  Origin origin;
};

struct ProjectionScales {
  Scalar global;
  Scalar input;
};

// By expert: gate, up, down. Gate stays absent in layers without one.
struct LayerScales {
  std::vector<std::array<ProjectionScales, 3>> experts;
  bool gated = true;
};

// Counts for `inspect`; never throws.
Oddities find_oddities(const LayerScales& scales);

// Throws global_invalid for the first global that is not finite and positive.
void check_globals(const LayerScales& scales);

// An expert's global scales of what w4a4 quantises.
struct InputScales {
  f32 tokens = 1.0f;  // larger one of its gate's and up's
  f32 inter = 1.0f;   // its down's
};

// By expert. Throws global_invalid for NaN, infinite and negative ones; where an expert's are missing or 0, the largest
// of the layer stands in, or 1 if there is none.
std::vector<InputScales> resolve_inputs(const LayerScales& scales);

// Oddities in words, one line each.
std::vector<std::string> describe(const Oddities& oddities, i32 experts, bool gated);

}  // namespace fourmoe::checkpoint
