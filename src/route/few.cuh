// few: slots of a few picks, by one block, stable as in sort.cuh.
//
// A pick's key is its local expert, then its own number: keys in order are picks in the order of slots. Up to
// kCompared picks, a slot is the number of keys below its own; beyond, every warp counts its share of the picks in a
// byte of each expert's kMaxWarps.
#pragma once

#include "route/sort.cuh"

namespace fourmoe::route {

inline constexpr i32 kKeyPicks = 4096;
inline constexpr u32 kNoExpert = 0xfffff;       // of a key: no slot
inline constexpr u32 kRefusedExpert = 0xffffe;  // of a token that was refused
inline constexpr i32 kCompared = 64;
inline constexpr i32 kMostCounted = 224 * kMaxWarps;  // picks: a warp's share, of whole 32s, fits a byte
static_assert(kMostCounted < kKeyPicks);

// Shared memory of one block.
struct FewPicks {
  i32 picks;
  u32* keys;     // [picks], then all ones up to a multiple of four
  uint4* bytes;  // [local] a byte for each warp: its picks of the expert
  u32* begin;    // [local] first slots
  u32* sums;     // [32] of warps
  u8* ranks;     // [picks] among the warp's picks of the expert
};

FOURMOE_HD i32 key_bytes(i32 picks) { return (picks + 3) / 4 * 16; }

// Behind the keys.
inline i32 few_bytes(i32 local, i32 picks) {
  return picks <= kCompared ? 0 : 20 * local + 128 + (picks + 15) / 16 * 16;
}

__device__ __forceinline__ FewPicks few_picks(const DeviceSlots& a, uint4* keys) {
  const i32 picks = a.tokens * a.problem.top_k;
  const i32 local = a.problem.local_experts;
  uint4* bytes = keys + key_bytes(picks) / 16;
  u32* sums = reinterpret_cast<u32*>(bytes + local);
  u32* begin = sums + 32;
  return {picks, reinterpret_cast<u32*>(keys), bytes, begin, sums, reinterpret_cast<u8*>(begin + local)};
}

__device__ __forceinline__ u32 key_of_pick(const DeviceSlots& a, i32 id, i32 pick) {
  const i32 local = local_of(a, id);
  const u32 expert = local >= 0 ? static_cast<u32>(local) : id == kRefused ? kRefusedExpert : kNoExpert;
  return expert * kKeyPicks + static_cast<u32>(pick);
}

// Any time before the keys are read.
__device__ __forceinline__ void pad_keys(const FewPicks& few) {
  const i32 pad = few.picks + static_cast<i32>(threadIdx.x);
  if (pad < (few.picks + 3) / 4 * 4) few.keys[pad] = ~0u;
}

__device__ __forceinline__ void write_slot(const DeviceSlots& a, u32 key, i32 slot) {
  const u32 expert = key / kKeyPicks;
  const i32 pick = static_cast<i32>(key % kKeyPicks);
  const bool real = expert < kRefusedExpert;
  a.out.pick_slot[pick] = real ? slot : expert == kRefusedExpert ? kRefused : -1;
  if (real) a.out.slot_pick[slot] = pick;
}

__device__ __forceinline__ i32 count_below(const FewPicks& few, u32 bound) {
  const uint4* quads = reinterpret_cast<const uint4*>(few.keys);
  i32 below = 0;
#pragma unroll 2
  for (i32 q = 0; q < (few.picks + 3) / 4; ++q) {
    const uint4 four = quads[q];
    below += (four.x < bound) + (four.y < bound) + (four.z < bound) + (four.w < bound);
  }
  return below;
}

// A thread each for the bounds of experts and for the picks.
__device__ __forceinline__ void place_by_comparing(const DeviceSlots& a, const FewPicks& few) {
  const i32 bounds = a.problem.local_experts + 1;
#pragma unroll 1
  for (i32 i = threadIdx.x; i < bounds + few.picks; i += blockDim.x) {
    const bool is_bound = i < bounds;
    const u32 key = is_bound ? static_cast<u32>(i) * kKeyPicks : few.keys[i - bounds];
    const i32 below = count_below(few, key);
    if (is_bound) write_begin(a, i, below);
    else write_slot(a, key, below);
  }
}

// Of the warp's share: ranks, and its bytes.
__device__ __forceinline__ void count_share(const FewPicks& few, const Span& share) {
  const u32 lane = threadIdx.x % 32;
  u8* mine = reinterpret_cast<u8*>(few.bytes) + threadIdx.x / 32;
#pragma unroll 1
  for (i32 base = share.begin; base < share.end; base += 32) {
    const i32 pick = base + static_cast<i32>(lane);
    const u32 expert = pick < share.end ? few.keys[pick] / kKeyPicks : kNoExpert;
    const u32 same = __match_any_sync(kAll, expert);
    const u32 rank = __popc(same & ((1u << lane) - 1u));
    const bool real = expert < kRefusedExpert;
    const u32 place = real ? mine[expert * 16] + rank : 0;
    __syncwarp();
    if (real && rank == 0) mine[expert * 16] = static_cast<u8>(place + __popc(same));
    if (real) few.ranks[pick] = static_cast<u8>(place);
    __syncwarp();
  }
}

// Bytes of the warps below `warps`.
__device__ __forceinline__ u32 add_bytes(const uint4& bytes, i32 warps) {
  const u32 words[4] = {bytes.x, bytes.y, bytes.z, bytes.w};
  u32 sum = 0;
#pragma unroll
  for (i32 i = 0; i < 4; ++i) {
    const i32 below = min(max(warps - 4 * i, 0), 4);
    sum = __dp4a(words[i], below == 4 ? 0x01010101u : 0x01010101u & ((1u << 8 * below) - 1u), sum);
  }
  return sum;
}

// All warps' bytes to first slots.
__device__ __forceinline__ void begin_few(const DeviceSlots& a, const FewPicks& few) {
  const i32 local = a.problem.local_experts;
  u32 first = 0;
#pragma unroll 1
  for (i32 base = 0; base < local; base += blockDim.x) {
    const i32 e = base + static_cast<i32>(threadIdx.x);
    u32 total;
    const u32 begin = first + scan(e < local ? add_bytes(few.bytes[e], kMaxWarps) : 0, few.sums, &total);
    first += total;
    if (e >= local) continue;
    few.begin[e] = begin;
    write_begin(a, e, static_cast<i32>(begin));
  }
  if (threadIdx.x == 0) write_begin(a, local, static_cast<i32>(first));
}

// kMaxWarps warps.
__device__ __forceinline__ void place_by_counting(const DeviceSlots& a, const FewPicks& few) {
#pragma unroll 1
  for (i32 e = threadIdx.x; e < a.problem.local_experts; e += blockDim.x) few.bytes[e] = {};
  __syncthreads();
  const i32 warp = threadIdx.x / 32;
  const i32 size = (few.picks + 32 * kMaxWarps - 1) / (32 * kMaxWarps) * 32;
  const Span share = {min(warp * size, few.picks), min((warp + 1) * size, few.picks)};
  count_share(few, share);
  __syncthreads();
  begin_few(a, few);
  __syncthreads();
#pragma unroll 1
  for (i32 pick = share.begin + threadIdx.x % 32; pick < share.end; pick += 32) {
    const u32 key = few.keys[pick];
    const u32 expert = key / kKeyPicks;
    u32 slot = 0;
    if (expert < kRefusedExpert) slot = few.begin[expert] + add_bytes(few.bytes[expert], warp) + few.ranks[pick];
    write_slot(a, key, static_cast<i32>(slot));
  }
}

// After the keys are written; the block keeps step.
__device__ __forceinline__ void place_few(const DeviceSlots& a, const FewPicks& few) {
  if (few.picks <= kCompared) place_by_comparing(a, few);
  else place_by_counting(a, few);
}

}  // namespace fourmoe::route
