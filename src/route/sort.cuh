// sort: picks to slots by counting, stable: the slots of an expert are in the order of its picks.
//
// A block sorts a chunk of consecutive picks; each of its warps has a share of the chunk, and counts before it places.
// Ranks come from the order of picks alone, never from the order in which threads run.
#pragma once

#include "route/pick.cuh"

namespace fourmoe::route {

inline constexpr i32 kMinChunk = 1024;  // picks

struct Span {
  i32 begin;
  i32 end;
};

inline i32 chunk_picks(i64 picks) {
  const i64 share = (picks + kMaxChunks - 1) / kMaxChunks;
  return static_cast<i32>(share <= kMinChunk ? kMinChunk : (share + 31) / 32 * 32);
}

// What a block needs in shared memory.
struct SortMemory {
  u32* sums;     // [32] of warps
  u32* begin;    // [local] first slot of each expert, of this chunk's picks
  u32* cursors;  // [warps, local] picks counted, then the warp's next slots
};

inline i32 sort_bytes(i32 local, i32 warps) { return 4 * (32 + local + warps * local); }

__device__ __forceinline__ SortMemory sort_memory(i32 local, void* shared) {
  u32* sums = static_cast<u32*>(shared);
  return {sums, sums + 32, sums + 32 + local};
}

__device__ __forceinline__ i32 local_of(const DeviceSlots& a, i32 id) {
  const i32 local = id - a.problem.first_expert;
  return id < 0 || local < 0 || local >= a.problem.local_experts ? -1 : local;
}

__device__ __forceinline__ Span warp_share(Span chunk) {
  const i32 warps = blockDim.x / 32;
  const i32 share = ((chunk.end - chunk.begin + warps - 1) / warps + 31) / 32 * 32;
  const i32 begin = chunk.begin + static_cast<i32>(threadIdx.x / 32) * share;
  return {min(begin, chunk.end), min(begin + share, chunk.end)};
}

// Walks a warp's share in order; each pick takes its expert's cursor and moves it on.
template <bool kPlace>
__device__ __forceinline__ void walk(const DeviceSlots& a, Span share, u32* cursors) {
  const u32 lane = threadIdx.x % 32;
  for (i32 base = share.begin; base < share.end; base += 32) {
    const i32 pick = base + lane;
    const i32 id = pick < share.end ? a.out.ids[pick] : -1;
    const i32 local = local_of(a, id);
    const u32 same = __match_any_sync(kAll, local);
    const u32 rank = __popc(same & ((1u << lane) - 1u));
    const u32 slot = local >= 0 ? cursors[local] + rank : 0;
    __syncwarp();
    if (local >= 0 && rank == 0) cursors[local] = slot + __popc(same);
    __syncwarp();
    if (!kPlace || pick >= share.end) continue;
    a.out.pick_slot[pick] = local >= 0 ? static_cast<i32>(slot) : id == kRefused ? kRefused : -1;
    if (local >= 0) a.out.slot_pick[slot] = pick;
  }
}

// Sum of `value` over the block's threads before this one; *total over all. Every thread calls it.
__device__ __forceinline__ u32 scan(u32 value, u32* sums, u32* total) {
  const u32 lane = threadIdx.x % 32;
  const u32 warp = threadIdx.x / 32;
  u32 inclusive = value;
  for (u32 d = 1; d < 32; d *= 2) {
    const u32 below = __shfl_up_sync(kAll, inclusive, d);
    if (lane >= d) inclusive += below;
  }
  if (lane == 31) sums[warp] = inclusive;
  __syncthreads();
  u32 before = 0;
  *total = 0;
  for (u32 w = 0; w < blockDim.x / 32; ++w) {
    if (w == warp) before = *total;
    *total += sums[w];
  }
  __syncthreads();
  return before + inclusive - value;
}

// Counts a chunk: cursors = picks of the same expert in the warps before, begin = picks of the expert in the chunk.
__device__ __forceinline__ void count_chunk(const DeviceSlots& a, Span chunk, const SortMemory& m) {
  const i32 local = a.problem.local_experts;
  const i32 warps = blockDim.x / 32;
  for (i32 i = threadIdx.x; i < warps * local; i += blockDim.x) m.cursors[i] = 0;
  __syncthreads();
  walk<false>(a, warp_share(chunk), m.cursors + threadIdx.x / 32 * local);
  __syncthreads();
  for (i32 e = threadIdx.x; e < local; e += blockDim.x) {
    u32 before = 0;
    for (i32 w = 0; w < warps; ++w) {
      const u32 count = m.cursors[w * local + e];
      m.cursors[w * local + e] = before;
      before += count;
    }
    m.begin[e] = before;
  }
}

// Picks of expert e in the chunks before `chunk` and in all of them.
struct Counts {
  u32 before;
  u32 all;
};

__device__ __forceinline__ Counts sum_chunks(const u32* chunk_counts, i32 local, i32 chunks, i32 chunk, i32 e) {
  Counts counts = {0, 0};
#pragma unroll 16
  for (i32 c = 0; c < chunks; ++c) {
    const u32 count = chunk_counts[i64{c} * local + e];
    counts.before += c < chunk ? count : 0;
    counts.all += count;
  }
  return counts;
}

// Turns the counts of all chunks into begin; block 0 writes expert_begin. A chunk alone needs no counts in memory.
__device__ __forceinline__ void begin_experts(const DeviceSlots& a, i32 chunks, i32 chunk, const SortMemory& m) {
  const i32 local = a.problem.local_experts;
  u32 first = 0;
  for (i32 base = 0; base < local; base += blockDim.x) {
    const i32 e = base + static_cast<i32>(threadIdx.x);
    Counts counts = {0, 0};
    if (e < local) counts = chunks == 1 ? Counts{0, m.begin[e]} : sum_chunks(a.chunk_counts, local, chunks, chunk, e);
    u32 total;
    const u32 begin = first + scan(counts.all, m.sums, &total);
    first += total;
    if (e >= local) continue;
    m.begin[e] = begin + counts.before;
    if (chunk == 0) a.out.expert_begin[e] = static_cast<i32>(begin);
  }
  if (chunk == 0 && threadIdx.x == 0) a.out.expert_begin[local] = static_cast<i32>(first);
}

// After count_chunk: the slots of a chunk's picks.
__device__ __forceinline__ void place_chunk(const DeviceSlots& a, Span chunk, const SortMemory& m) {
  const i32 local = a.problem.local_experts;
  const i32 warps = blockDim.x / 32;
  __syncthreads();
  for (i32 e = threadIdx.x; e < local; e += blockDim.x) {
    for (i32 w = 0; w < warps; ++w) m.cursors[w * local + e] += m.begin[e];
  }
  __syncthreads();
  walk<true>(a, warp_share(chunk), m.cursors + threadIdx.x / 32 * local);
}

}  // namespace fourmoe::route
