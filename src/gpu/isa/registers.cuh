// registers: moves registers between warpgroups (setmaxnreg). The whole warpgroup calls it, with a multiple of 8.
#pragma once

namespace fourmoe::gpu::isa {

template <int kCount>
__device__ __forceinline__ void registers_take() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

template <int kCount>
__device__ __forceinline__ void registers_give() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

}  // namespace fourmoe::gpu::isa
