// ring: staged shared memory between a loader and its consumers.
//
// Stage s is full when every loading warp has announced its bytes and these have arrived, and empty when every
// consuming warp has let go of it. Loaders and consumers walk the ring with a cursor each, in the same order, and never
// meet otherwise. Waits end: a stage that does not change for kWaitCycles is a fault and traps.
#pragma once

#include "gpu/isa/bulk.cuh"
#include "gpu/isa/order.cuh"

namespace fourmoe::gpu {

inline constexpr i64 kWaitCycles = 80'000'000'000;  // about 40 s: twice what a queue's wait may take (gpu/queue.h)

__device__ __forceinline__ void wait(u64* barrier, u32 parity) {
  if (isa::barrier_try(barrier, parity)) return;
  const i64 begin = clock64();
  while (!isa::barrier_try(barrier, parity)) {
    if (clock64() - begin > kWaitCycles) __trap();
  }
}

// Arrivals of a warp at a barrier. One lane arrives for all, behind a __syncwarp or a product of the whole warp, which
// compute-sanitizer's racecheck does not follow: built for it, every lane arrives for itself.
#ifdef FOURMOE_RACECHECK
inline constexpr u32 kArrivals = 32;
#else
inline constexpr u32 kArrivals = 1;
#endif

// The whole warp, in step: it has read and written what the barrier is about.
__device__ __forceinline__ void arrive(u64* barrier) {
  if (kArrivals == 32 || threadIdx.x % 32 == 0) isa::barrier_arrive(barrier);
}

template <int kStages>
struct Ring {
  u64 full[kStages];
  u64 empty[kStages];

  // One thread, before the block's first sync. loads: arrivals that fill a stage.
  __device__ void init(u32 loads, u32 consuming_warps) {
    for (int s = 0; s < kStages; ++s) {
      isa::barrier_init(&full[s], loads);
      isa::barrier_init(&empty[s], consuming_warps * kArrivals);
    }
    isa::barrier_fence_init();
  }
};

template <int kStages>
struct Cursor {
  int stage = 0;
  u32 lap = 0;  // parity of the times that the ring has been walked

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) stage = 0, lap ^= 1;
  }
};

}  // namespace fourmoe::gpu
