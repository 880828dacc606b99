// order: what one thread wrote before it said so, another sees after it heard (PTX ISA, memory consistency model).
#pragma once

#include "format/number.h"

namespace fourmoe::gpu::isa {

// Adds to a counter that others poll; this thread's earlier writes, and those it saw, come before.
__device__ __forceinline__ void add_release(i32* counter, i32 value) {
  asm volatile("red.add.release.gpu.global.s32 [%0], %1;" ::"l"(counter), "r"(value) : "memory");
}
__device__ __forceinline__ void add_release(u64* counter, u64 value) {
  asm volatile("red.add.release.gpu.global.u64 [%0], %1;" ::"l"(counter), "l"(value) : "memory");
}

__device__ __forceinline__ i32 load_acquire(const i32* counter) {
  i32 value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
  return value;
}
__device__ __forceinline__ u64 load_acquire(const u64* counter) {
  u64 value;
  asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(counter) : "memory");
  return value;
}

// A number that stands for itself: who polls it sees it, soon, and nothing else follows from it.
__device__ __forceinline__ void store_relaxed(u32* at, u32 value) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(at), "r"(value) : "memory");
}
__device__ __forceinline__ void store_relaxed(uint2* at, uint2 value) {  // two
  asm volatile("st.relaxed.gpu.global.v2.u32 [%0], {%1, %2};" ::"l"(at), "r"(value.x), "r"(value.y) : "memory");
}
__device__ __forceinline__ uint2 load_relaxed(const uint2* at) {
  uint2 v;
  asm volatile("ld.relaxed.gpu.global.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(at) : "memory");
  return v;
}

__device__ __forceinline__ uint4 load_relaxed(const uint4* at) {
  uint4 v;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(at)
               : "memory");
  return v;
}

// Others may read or change the counter meanwhile.
__device__ __forceinline__ void store_relaxed(i32* counter, i32 value) {
  asm volatile("st.relaxed.gpu.global.s32 [%0], %1;" ::"l"(counter), "r"(value) : "memory");
}

// How a queue (gpu/queue.h) reaches its counters.
struct Atomic {
  static __device__ __forceinline__ i32 add(i32* counter, i32 value) { return atomicAdd(counter, value); }
  static __device__ __forceinline__ void add_release(i32* counter, i32 value) { isa::add_release(counter, value); }
  static __device__ __forceinline__ i32 load_acquire(const i32* counter) { return isa::load_acquire(counter); }
  static __device__ __forceinline__ void store(i32* counter, i32 value) { isa::store_relaxed(counter, value); }
};

// Orders ordinary accesses to global memory and those of the copy engine, in either direction.
__device__ __forceinline__ void fence_copy_engine() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

}  // namespace fourmoe::gpu::isa
