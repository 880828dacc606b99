// Ceilings: what this machine can do at best, measured in the run that quotes shares of them.
#pragma once

#include <string>

#include "executor.h"
#include "flow.h"

namespace fourmoe::tools {

struct Ceilings {
  f64 read_bytes_per_second = 0.0;  // of memory far larger than the caches, four streams a thread
  f64 fma_flops_per_second = 0.0;   // f32 fused multiply-add, two operations each, from registers alone
  f64 flops_per_second = 0.0;       // of the unit that can multiply the problem's operands exactly, and its name
  std::string unit;
};

// Takes about half a second; the best of a few repetitions, with all threads of the executor.
Ceilings measure_ceilings(Executor& executor, const Problem& problem);

}  // namespace fourmoe::tools
