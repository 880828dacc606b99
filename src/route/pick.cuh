// pick: a warp finds one token's picks. Formulas in route.h, all in f64 as on the host.
//
// The choice c_e of every expert lies in shared memory as a key, a u64 whose order is c's; a lane owns the experts
// lane, lane + 32, ... and the best of them. The warp takes the best of all, top_k times.
#pragma once

#include "gpu/fault.h"
#include "gpu/values.cuh"
#include "route/device.h"

namespace fourmoe::route {

inline constexpr u32 kAll = 0xffffffffu;
inline constexpr u64 kMaskedKey = 0x000fffffffffffffu;  // of -infinity
inline constexpr u64 kTakenKey = 0;                     // below every number's

// What one warp needs in shared memory.
struct WarpMemory {
  u64* keys;    // [experts]
  f64* groups;  // [groups] scores
};

inline i32 warp_bytes(const Problem& problem) { return 8 * (problem.experts + problem.routing.groups); }

__device__ __forceinline__ WarpMemory warp_memory(const Problem& problem, u64* shared, u32 warp) {
  u64* keys = shared + warp * (problem.experts + problem.routing.groups);
  return {keys, reinterpret_cast<f64*>(keys + problem.experts)};
}

__device__ __forceinline__ u64 key_of(f64 value) {
  const i64 bits = value == 0.0 ? 0 : __double_as_longlong(value);  // -0 equals 0
  return static_cast<u64>(bits < 0 ? ~bits : bits ^ static_cast<i64>(u64{1} << 63));
}

__device__ __forceinline__ f64 value_of(u64 key) {
  return __longlong_as_double(static_cast<i64>(key >> 63 != 0 ? key ^ u64{1} << 63 : ~key));
}

// What a token's scores share.
struct Softmax {
  f64 largest = 0.0;
  f64 sum = 1.0;
};

__device__ __forceinline__ f64 score_of(Score score, f64 logit, const Softmax& softmax) {
  switch (score) {
    case Score::softmax: return exp(logit - softmax.largest) / softmax.sum;
    case Score::sigmoid: return 1.0 / (1.0 + exp(-logit));
    case Score::sqrt_softplus: return sqrt(fmax(logit, 0.0) + log1p(exp(-fabs(logit))));
    default: return logit;
  }
}

// Fills keys with the logits' bits; false when a logit is NaN or the largest is infinite.
__device__ __forceinline__ bool read_logits(const DeviceSlots& a, const void* row, u32 lane, u64* keys, f64* largest) {
  f32 most = -INFINITY;
  bool nan = false;
#pragma unroll 8
  for (i32 e = lane; e < a.problem.experts; e += 32) {
    const f32 logit = gpu::read(row, a.in.logits.dtype, e);
    nan |= isnan(logit);
    most = fmaxf(most, logit);
    keys[e] = static_cast<u64>(__double_as_longlong(f64{logit}));
  }
  for (int d = 16; d > 0; d /= 2) most = fmaxf(most, __shfl_xor_sync(kAll, most, d));
  *largest = most;
  return __any_sync(kAll, nan) == 0 && isfinite(most);
}

__device__ __forceinline__ f64 sum_exp(const u64* keys, i32 experts, u32 lane, f64 largest) {
  f64 sum = 0.0;
  for (i32 e = lane; e < experts; e += 32) sum += exp(__longlong_as_double(static_cast<i64>(keys[e])) - largest);
  for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(kAll, sum, d);
  return sum;
}

// The two best keys of a group's experts sub, sub + width, ... and of the `width` lanes side by side.
__device__ __forceinline__ f64 group_score(const u64* keys, i32 size, i32 best, i32 sub, i32 width) {
  u64 first = kMaskedKey;
  u64 second = kMaskedKey;
  for (i32 i = sub; i < size; i += width) {
    second = max(second, min(first, keys[i]));
    first = max(first, keys[i]);
  }
  for (i32 d = 1; d < width; d *= 2) {
    const u64 other_first = __shfl_xor_sync(kAll, first, d);
    const u64 other_second = __shfl_xor_sync(kAll, second, d);
    second = max(min(first, other_first), max(second, other_second));
    first = max(first, other_first);
  }
  return best == 1 || size <= 1 ? value_of(first) : value_of(first) + value_of(second);
}

// Lanes side by side share a group as far as 32 lanes go.
__device__ __forceinline__ void mask_groups(const Problem& problem, u32 lane, const WarpMemory& memory) {
  const i32 groups = problem.routing.groups;
  const i32 size = problem.experts / groups;
  i32 width = 1;
  while (2 * width * groups <= 32) width *= 2;
  const i32 sub = lane % width;
  for (i32 base = 0; base < groups; base += 32 / width) {
    const i32 g = base + lane / width;
    const bool real = g < groups;
    const f64 score =
        group_score(memory.keys + (real ? g : 0) * size, real ? size : 0, problem.routing.group_best, sub, width);
    if (real && sub == 0) memory.groups[g] = score;
  }
  __syncwarp();
  for (i32 g = lane / width; g < groups; g += 32 / width) {
    const f64 mine = memory.groups[g];
    i32 rank = 0;
    for (i32 h = 0; h < groups; ++h) rank += memory.groups[h] > mine || (memory.groups[h] == mine && h < g);
    if (rank < problem.routing.groups_kept) continue;
    for (i32 i = sub; i < size; i += width) memory.keys[g * size + i] = kMaskedKey;
  }
  __syncwarp();
}

struct Best {
  u64 key;
  i32 expert;
};

__device__ __forceinline__ Best best_of_lane(const u64* keys, i32 experts, u32 lane) {
  Best best = {kTakenKey, experts};
#pragma unroll 4
  for (i32 e = lane; e < experts; e += 32) {
    if (keys[e] > best.key) best = {keys[e], e};
  }
  return best;
}

// Lane p returns pick p: the largest keys in descending order, ties to the lower expert.
__device__ __forceinline__ i32 take_best(u64* keys, i32 experts, i32 top_k, u32 lane) {
  Best best = best_of_lane(keys, experts, lane);
  i32 mine = -1;
  for (i32 p = 0; p < top_k; ++p) {
    const u32 high = static_cast<u32>(best.key >> 32);
    const u32 top = __reduce_max_sync(kAll, high);
    const u32 low = __reduce_max_sync(kAll, high == top ? static_cast<u32>(best.key) : 0u);
    const bool wins = best.key == (u64{top} << 32 | low);
    const i32 expert = static_cast<i32>(__reduce_min_sync(kAll, wins ? static_cast<u32>(best.expert) : ~0u));
    if (lane == static_cast<u32>(p)) mine = expert;
    if (best.expert != expert) continue;
    keys[expert] = kTakenKey;
    best = best_of_lane(keys, experts, lane);
  }
  return mine;
}

__device__ __forceinline__ f32 weigh(const Routing& routing, f64 score, i32 top_k) {
  f64 sum = 1e-20;
  for (i32 p = 0; p < top_k; ++p) sum += __shfl_sync(kAll, score, p);
  const f64 factor = (routing.renormalise ? 1.0 / sum : 1.0) * routing.scale;
  return static_cast<f32>(score * factor);
}

__device__ __forceinline__ void write_pick(const DeviceSlots& a, i32 token, u32 lane, i32 id, f32 weight) {
  if (lane >= static_cast<u32>(a.problem.top_k)) return;
  const i64 pick = i64{token} * a.problem.top_k + lane;
  a.out.ids[pick] = id;
  a.out.weights[pick] = weight;
}

__device__ __forceinline__ void refuse_token(const DeviceSlots& a, i32 token, u32 lane, gpu::FaultKind kind,
                                             i32 position) {
  const u64 key = gpu::fault_key(kind, token, position);
  if (lane == 0) atomicMin(reinterpret_cast<unsigned long long*>(&a.fault->first), key);
  write_pick(a, token, lane, kRefused, 0.0f);
}

__device__ __forceinline__ void pick_from_logits(const DeviceSlots& a, i32 token, u32 lane, const WarpMemory& memory) {
  const Problem& problem = a.problem;
  const i32 experts = problem.experts;
  const void* row = a.in.logits.row(token);
  u64* keys = memory.keys;
  Softmax softmax;
  if (!read_logits(a, row, lane, keys, &softmax.largest)) {
    return refuse_token(a, token, lane, gpu::FaultKind::logits, 0);
  }
  const Score score = problem.routing.score;
  if (score == Score::softmax) softmax.sum = sum_exp(keys, experts, lane, softmax.largest);
#pragma unroll 4
  for (i32 e = lane; e < experts; e += 32) {
    const f64 s = score_of(score, __longlong_as_double(static_cast<i64>(keys[e])), softmax);
    keys[e] = key_of(s + (a.in.bias != nullptr ? f64{a.in.bias[e]} : 0.0));
  }
  if (problem.routing.groups_kept < problem.routing.groups) {
    __syncwarp();
    mask_groups(problem, lane, memory);
  }
  const i32 id = take_best(keys, experts, problem.top_k, lane);
  const f64 s = id < 0 ? 0.0 : score_of(score, gpu::read(row, a.in.logits.dtype, id), softmax);
  write_pick(a, token, lane, id, weigh(problem.routing, s, problem.top_k));
}

__device__ __forceinline__ i64 read_id(const DeviceSlots& a, i32 token, u32 position) {
  const u8* row = a.in.ids.row(token);
  return a.in.ids.dtype == format::Dtype::i64 ? reinterpret_cast<const i64*>(row)[position]
                                              : i64{reinterpret_cast<const i32*>(row)[position]};
}

__device__ __forceinline__ void copy_picks(const DeviceSlots& a, i32 token, u32 lane) {
  const bool real = lane < static_cast<u32>(a.problem.top_k);
  const i64 id = real ? read_id(a, token, lane) : -1;
  const u32 bad = __ballot_sync(kAll, id < -1 || id >= a.problem.experts);
  if (bad != 0) return refuse_token(a, token, lane, gpu::FaultKind::id, __ffs(static_cast<int>(bad)) - 1);
  const f32 weight = id < 0 ? 0.0f : gpu::read(a.in.weights.row(token), a.in.weights.dtype, lane);
  write_pick(a, token, lane, static_cast<i32>(id), weight);
}

__device__ __forceinline__ void pick_token(const DeviceSlots& a, i32 token, u32 lane, const WarpMemory& memory) {
  if (a.in.logits.data == nullptr) copy_picks(a, token, lane);
  else pick_from_logits(a, token, lane, memory);
}

// One thread, after all picks of the call and before its end: the value that the sentence names.
__device__ __forceinline__ void settle_fault(const DeviceSlots& a) {
  gpu::Fault* fault = a.fault;
  const u64 first = fault->first;
  if (first == fault->settled || gpu::fault_kind(first) == gpu::FaultKind::none) return;
  if (gpu::fault_kind(first) == gpu::FaultKind::id) {
    fault->value = read_id(a, gpu::fault_token(first), gpu::fault_position(first));
    fault->experts = a.problem.experts;
  }
  fault->settled = first;
}

}  // namespace fourmoe::route
