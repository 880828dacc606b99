// launch: a kernel that starts before the one it follows has ended (programmatic dependent launch), and the barriers of
// some of a block's warps.
#pragma once

#include "format/number.h"

namespace fourmoe::gpu::isa {

// Until the launches before this one have ended and their writes are visible; at once when there is nothing to wait
// for.
__device__ __forceinline__ void wait_for_earlier() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// From here on the launch after this one may start its blocks where there is room.
__device__ __forceinline__ void release_later() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// What all lanes of a warp have alike, so that the compiler knows it: else it guards every branch that depends on it
// and keeps what it leads to in registers of each lane.
__device__ __forceinline__ int uniform(int value) { return __shfl_sync(~0u, value, 0); }

// A pointer that is computed here, and not where it is first used.
__device__ __forceinline__ const void* here(const void* pointer) {
  asm volatile("" : "+l"(pointer));
  return pointer;
}

// Meets `threads` threads (whole warps) of the block at barrier `id` (1..15; 0 is __syncthreads).
__device__ __forceinline__ void sync_some(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace fourmoe::gpu::isa
