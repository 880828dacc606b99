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

// What a block sorts, by how many of its warps, and what it needs in shared memory.
struct Sorting {
  Span chunk;
  i32 warps;       // that have a share
  const i32* ids;  // of all picks
  u32* sums;       // [32] of warps
  u32* begin;      // [local] first slot of each expert, of this chunk's picks
  u32* cursors;    // [warps, local] picks counted, then the warp's next slots
};

inline i32 sort_bytes(i32 local, i32 warps) { return 4 * (32 + local + warps * local); }

__device__ __forceinline__ Sorting sorting(const DeviceSlots& a, Span chunk, i32 most_warps, const i32* ids,
                                           void* shared) {
  const i32 enough = (chunk.end - chunk.begin + 31) / 32;
  u32* sums = static_cast<u32*>(shared);
  u32* begin = sums + 32;
  return {chunk, min(enough, most_warps), ids, sums, begin, begin + a.problem.local_experts};
}

__device__ __forceinline__ Span warp_share(const Sorting& s) {
  const i32 picks = s.chunk.end - s.chunk.begin;
  const i32 share = ((picks + s.warps - 1) / s.warps + 31) / 32 * 32;
  const i32 begin = s.chunk.begin + static_cast<i32>(threadIdx.x / 32) * share;
  return {min(begin, s.chunk.end), min(begin + share, s.chunk.end)};
}

// Walks a warp's share in order; each pick takes its expert's cursor and moves it on.
template <bool kPlace>
__device__ __forceinline__ void walk(const DeviceSlots& a, const Sorting& s) {
  const u32 lane = threadIdx.x % 32;
  const Span share = warp_share(s);
  u32* cursors = s.cursors + threadIdx.x / 32 * a.problem.local_experts;
#pragma unroll 1
  for (i32 base = share.begin; base < share.end; base += 32) {
    const i32 pick = base + lane;
    const i32 id = pick < share.end ? s.ids[pick] : -1;
    const i32 local = local_of(a, id);
    const u32 same = __match_any_sync(kAll, local);
    const u32 rank = __popc(same & ((1u << lane) - 1u));
    const u32 place = local >= 0 ? cursors[local] + rank : 0;
    __syncwarp();
    if (local >= 0 && rank == 0) cursors[local] = place + __popc(same);
    __syncwarp();
    if (!kPlace || pick >= share.end) continue;
    const i32 slot = local >= 0 ? static_cast<i32>(s.begin[local] + place) : id == kRefused ? kRefused : -1;
    a.out.pick_slot[pick] = slot;
    if (local >= 0) a.out.slot_pick[slot] = pick;
  }
}

// Sum of `value` over the block's threads before this one; *total over all. Every thread calls it.
__device__ __forceinline__ u32 scan(u32 value, u32* sums, u32* total) {
  const u32 lane = threadIdx.x % 32;
  const u32 warp = threadIdx.x / 32;
  u32 inclusive = value;
#pragma unroll
  for (u32 d = 1; d < 32; d *= 2) {
    const u32 below = __shfl_up_sync(kAll, inclusive, d);
    if (lane >= d) inclusive += below;
  }
  if (lane == 31) sums[warp] = inclusive;
  __syncthreads();
  const u32 sum = lane < blockDim.x / 32 ? sums[lane] : 0;
  const u32 before = __reduce_add_sync(kAll, lane < warp ? sum : 0);
  *total = __reduce_add_sync(kAll, sum);
  __syncthreads();
  return before + inclusive - value;
}

// Picks of expert e in the warps before each warp, in place; returns those of all.
__device__ __forceinline__ u32 add_warps(const Sorting& s, i32 local, i32 e) {
  u32 counts[kMaxWarps];
#pragma unroll
  for (i32 w = 0; w < kMaxWarps; ++w) counts[w] = w < s.warps ? s.cursors[w * local + e] : 0;
  u32 before = 0;
#pragma unroll
  for (i32 w = 0; w < kMaxWarps; ++w) {
    if (w < s.warps) s.cursors[w * local + e] = before;
    before += counts[w];
  }
  return before;
}

// Counts a chunk: cursors = picks of the same expert in the warps before, begin = picks of the expert in the chunk.
__device__ __forceinline__ void count_chunk(const DeviceSlots& a, const Sorting& s) {
  const i32 local = a.problem.local_experts;
#pragma unroll 1
  for (i32 i = threadIdx.x; i < s.warps * local; i += blockDim.x) s.cursors[i] = 0;
  __syncthreads();
  walk<false>(a, s);
  __syncthreads();
#pragma unroll 1
  for (i32 e = threadIdx.x; e < local; e += blockDim.x) s.begin[e] = add_warps(s, local, e);
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

// Of expert_begin, entry `local` included.
__device__ __forceinline__ void write_begin(const DeviceSlots& a, i32 local, i32 slot) {
  a.out.expert_begin[local] = slot;
  if (a.out.progress == nullptr) return;
  a.out.progress[local] = 0;
  if (local == a.problem.local_experts) a.out.progress[local + 1] = 0;
}

// Turns the counts of all chunks into begin; block 0 writes expert_begin. A chunk alone needs no counts in memory.
__device__ __forceinline__ void begin_experts(const DeviceSlots& a, i32 chunks, i32 chunk, const Sorting& s) {
  const i32 local = a.problem.local_experts;
  u32 first = 0;
#pragma unroll 1
  for (i32 base = 0; base < local; base += blockDim.x) {
    const i32 e = base + static_cast<i32>(threadIdx.x);
    Counts counts = {0, 0};
    if (e < local) counts = chunks == 1 ? Counts{0, s.begin[e]} : sum_chunks(a.chunk_counts, local, chunks, chunk, e);
    u32 total;
    const u32 begin = first + scan(counts.all, s.sums, &total);
    first += total;
    if (e >= local) continue;
    s.begin[e] = begin + counts.before;
    if (chunk == 0) write_begin(a, e, static_cast<i32>(begin));
  }
  if (chunk == 0 && threadIdx.x == 0) write_begin(a, local, static_cast<i32>(first));
}

// After begin_experts: the slots of a chunk's picks.
__device__ __forceinline__ void place_chunk(const DeviceSlots& a, const Sorting& s) {
  __syncthreads();
  walk<true>(a, s);
}

}  // namespace fourmoe::route
