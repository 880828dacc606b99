// power: e^x in two instructions. The compiler's __expf takes five, so that a result below 2^-126 is not zero.
#pragma once

#include "format/number.h"

namespace fourmoe::gpu::isa {

struct Exponential {
  __device__ __forceinline__ f32 operator()(f32 x) const {
    f32 power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * 1.4426950408889634f));  // 1/ln(2)
    return power;
  }
};

}  // namespace fourmoe::gpu::isa
