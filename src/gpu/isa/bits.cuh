// bits: logic of three operands and wide reads of shared memory, where the compiler would take more instructions.
#pragma once

#include "format/number.h"

namespace fourmoe::gpu::isa {

// (a & mask) | high, one instruction though both are constants: the compiler alone takes two.
__device__ __forceinline__ u32 mask_or(u32 a, u32 mask, u32 high) {
  u32 out;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(out) : "r"(a), "r"(mask), "r"(high));  // (a & b) | c
  return out;
}

// Bits of a where mask is set, of b elsewhere.
__device__ __forceinline__ u32 select(u32 a, u32 b, u32 mask) {
  u32 out;
  asm("lop3.b32 %0, %1, %2, %3, 0xe4;" : "=r"(out) : "r"(a), "r"(b), "r"(mask));  // (a & c) | (b & ~c)
  return out;
}

__device__ __forceinline__ uint4 load_shared_16(u32 address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address));
  return v;
}

__device__ __forceinline__ uint2 load_shared_8(u32 address) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address));
  return v;
}

}  // namespace fourmoe::gpu::isa
