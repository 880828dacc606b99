// order: what one thread wrote before it said so, another sees after it heard (PTX ISA, memory consistency model).
#pragma once

#include "format/number.h"

namespace fourmoe::gpu::isa {

// Adds to a counter that others poll; this thread's earlier writes, and those it saw, come before.
__device__ __forceinline__ void add_release(i32* counter, i32 value) {
  asm volatile("red.add.release.gpu.global.s32 [%0], %1;" ::"l"(counter), "r"(value) : "memory");
}

// The same, and what others wrote before they added is seen afterwards.
__device__ __forceinline__ i32 add_ordered(i32* counter, i32 value) {
  i32 before;
  asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(value) : "memory");
  return before;
}

__device__ __forceinline__ i32 load_acquire(const i32* counter) {
  i32 value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
  return value;
}

// Others may read or change the counter meanwhile.
__device__ __forceinline__ void store_relaxed(i32* counter, i32 value) {
  asm volatile("st.relaxed.gpu.global.s32 [%0], %1;" ::"l"(counter), "r"(value) : "memory");
}

// How a queue (gpu/queue.h) reaches its counters.
struct Atomic {
  static __device__ __forceinline__ i32 add(i32* counter, i32 value) { return atomicAdd(counter, value); }
  static __device__ __forceinline__ void add_release(i32* counter, i32 value) { isa::add_release(counter, value); }
  static __device__ __forceinline__ i32 add_ordered(i32* counter, i32 value) {
    return isa::add_ordered(counter, value);
  }
  static __device__ __forceinline__ i32 load_acquire(const i32* counter) { return isa::load_acquire(counter); }
  static __device__ __forceinline__ void store(i32* counter, i32 value) { isa::store_relaxed(counter, value); }
};

// Orders ordinary accesses to global memory and those of the copy engine, in either direction.
__device__ __forceinline__ void fence_copy_engine() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

}  // namespace fourmoe::gpu::isa
