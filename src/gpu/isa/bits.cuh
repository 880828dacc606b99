// bits: logic of three operands, wide reads of shared memory and transposes, where the compiler would take more
// instructions.
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

__device__ __forceinline__ void store_shared_16(u32 address, uint4 v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

// base + bytes in global memory, computed here and not before: in an unrolled loop the compiler would hold all
// addresses at once.
template <class T>
__device__ __forceinline__ T* advance(T* base, i64 bytes) {
  asm volatile("add.s64 %0, %0, %1;" : "+l"(base) : "l"(bytes));
  __builtin_assume(__isGlobal(base));
  return base;
}

// An 8x8 matrix of 16-bit values held by a warp (lane 4g + t: row g, columns 2t and 2t + 1) to its transpose, held
// alike.
__device__ __forceinline__ u32 transpose(u32 pair) {
  u32 out;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(pair));
  return out;
}

}  // namespace fourmoe::gpu::isa
