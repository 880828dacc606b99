// Stacks: a layer's experts from tensors in memory, each projection a stack [experts, rows, columns] or a list of them.
#pragma once

#include <memory>

#include "executor.h"
#include "weights/expert_table.h"
#include "weights/splits.h"

namespace fourmoe::weights {

// One projection of all local experts, [R = outputs, C = inputs]. The element types say how it is encoded:
//   codes u8 [E, R, C/2] with scales [E, R, C/16] e4m3 or u8: nvfp4;  [E, R, C/32] e8m0 or u8: mxfp4
//   codes e4m3 [E, R, C] without scales: fp8;  f32, f16 or bf16 [E, R, C] without scales: dense
struct Stack {
  Splits codes;
  Splits scales;   // not given unless 4-bit
  Splits globals;  // [E] f32 multipliers; not given: 1
  Splits bias;     // [E, R] f32|f16|bf16; not given: none
};

struct Stacks {
  Stack gate;          // [I, H]; not given when the activation has no gate
  Stack up;            // [I, H]
  Stack down;          // [H, I]
  Splits input_scale;  // [E] or [1] f32, multipliers of w4a4; not given: 1
  Splits inter_scale;  // [E] or [1] f32
};

struct Assembled {
  std::vector<Expert> experts;  // matrices are views of the caller's tensors
  format::Encoding encoding = format::Encoding::nvfp4;
  i32 hidden = 0;
  i32 inter = 0;
  std::shared_ptr<const void> owner;  // biases widened to f32
};

// Checks that all tensors agree, that every global is valid and every block scale in host memory (in parallel), and
// makes the expert table. Codes and scales in a GPU's memory are not read: DevicePacked checks those scales. All else
// is copied to the host; what fills memory of a GPU must have ended. Throws Error naming the tensor, or the split and
// expert, what was expected and what was found.
Assembled assemble(const Stacks& stacks, bool gated, Executor& executor);

}  // namespace fourmoe::weights
