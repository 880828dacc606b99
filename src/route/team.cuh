// team: the warps that pick for a token, their memory, the formulas of route.h in f64, and what they hand on.
#pragma once

#include "gpu/fault.h"
#include "gpu/values.cuh"
#include "route/device.h"

namespace fourmoe::route {

inline constexpr u32 kAll = 0xffffffffu;
inline constexpr u64 kMaskedKey = 0x000fffffffffffffu;  // of -infinity
inline constexpr u64 kTakenKey = 0;                     // below every number's

inline constexpr i32 kMaxWarps = 16;  // of a block

// The warps that share a token, and where they meet.
struct Team {
  i32 token;      // -1 for none: the team only keeps step
  i32 rank;       // of this warp
  i32 warps;      // of the team
  bool screened;  // can_screen(), which the host has asked: it divides
  u32 lane;
  f64* scores;   // [experts] s_e; shared memory, as all below
  u64* keys;     // [experts] of c_e
  f64* groups;   // [groups] scores
  f32* largest;  // [kMaxWarps] largest logit that each warp saw
};

// u64 words of a team's memory.
FOURMOE_HD i32 team_words(const Problem& problem) {
  return 2 * problem.experts + problem.routing.groups + kMaxWarps / 2;
}

// The memory of a block's team number `index`.
__device__ __forceinline__ void place_team(const Problem& problem, u64* shared, i32 index, Team* team) {
  u64* memory = shared + index * team_words(problem);
  team->scores = reinterpret_cast<f64*>(memory);
  team->keys = memory + problem.experts;
  team->groups = team->scores + 2 * problem.experts;
  team->largest = reinterpret_cast<f32*>(team->groups + problem.routing.groups);
}

__device__ __forceinline__ u64 key_of(f64 value) {
  const i64 bits = value == 0.0 ? 0 : __double_as_longlong(value);  // -0 equals 0
  return static_cast<u64>(bits < 0 ? ~bits : bits ^ static_cast<i64>(u64{1} << 63));
}

__device__ __forceinline__ f64 value_of(u64 key) {
  return __longlong_as_double(static_cast<i64>(key >> 63 != 0 ? key ^ u64{1} << 63 : ~key));
}

// s_e of every score but softmax, which needs two sums.
__device__ __forceinline__ f64 score_of(Score score, f64 logit) {
  switch (score) {
    case Score::sigmoid: return 1.0 / (1.0 + exp(-logit));
    case Score::sqrt_softplus: return sqrt(fmax(logit, 0.0) + log1p(exp(-fabs(logit))));
    default: return logit;
  }
}

__device__ __forceinline__ f32 weigh(const Routing& routing, f64 score, i32 top_k) {
  f64 sum = 1e-20;
#pragma unroll 4
  for (i32 p = 0; p < top_k; ++p) sum += __shfl_sync(kAll, score, p);
  const f64 factor = (routing.renormalise ? 1.0 / sum : 1.0) * routing.scale;
  return static_cast<f32>(score * factor);
}

// The local expert of an id; -1 for none.
__device__ __forceinline__ i32 local_of(const DeviceSlots& a, i32 id) {
  const i32 local = id - a.problem.first_expert;
  return id < 0 || local < 0 || local >= a.problem.local_experts ? -1 : local;
}

// What makes scores of one token's logits.
struct Scale {
  f32 largest = 0.0f;  // logit; softmax
  bool scored = true;  // a Choice has its score: else none was needed to choose
};

// What lane p of a team's first warp has of pick p: first its score, which is the weight where the caller gives that.
struct Choice {
  i32 id = -1;
  f64 score = 0.0;
  Scale scale = {};
};
struct Pick {
  i32 id = -1;
  f32 weight = 0.0f;
};

// Of softmax not yet divided by the sum.
__device__ __forceinline__ f64 score_logit(Score score, f64 logit, f64 largest) {
  return score == Score::softmax ? exp(logit - largest) : score_of(score, logit);
}

// A warp: the sum of a token's exp(l - largest).
__device__ __forceinline__ f64 sum_exps(const DeviceSlots& a, i32 token, f64 largest) {
  const void* row = a.in.logits.row(token);
  f64 sum = 0.0;
#pragma unroll 1
  for (i32 e = threadIdx.x % 32; e < a.problem.experts; e += 32) {
    sum += exp(gpu::read(row, a.in.logits.dtype, e) - largest);
  }
#pragma unroll 1
  for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(kAll, sum, d);
  return sum;
}

// The first warp. Apart from the choice, since that others wait for.
__device__ __forceinline__ Pick weigh_choice(const DeviceSlots& a, i32 token, const Choice& choice) {
  const Routing& routing = a.problem.routing;
  if (a.in.logits.data == nullptr) return {choice.id, static_cast<f32>(choice.score)};
  f64 score = choice.score;
  if (!choice.scale.scored) {
    const f64 largest = choice.scale.largest;
    const f64 logit = choice.id < 0 ? 0.0f : gpu::read(a.in.logits.row(token), a.in.logits.dtype, choice.id);
    score = score_logit(routing.score, logit, largest);
    if (routing.score == Score::softmax && !routing.renormalise) score /= sum_exps(a, token, largest);
  }
  return {choice.id, weigh(routing, score, a.problem.top_k)};
}

__device__ __forceinline__ bool has_pick(const DeviceSlots& a, const Team& team) {
  return team.token >= 0 && team.rank == 0 && team.lane < static_cast<u32>(a.problem.top_k);
}

__device__ __forceinline__ i64 pick_index(const DeviceSlots& a, const Team& team) {
  return i64{team.token} * a.problem.top_k + team.lane;
}

__device__ __forceinline__ void write_pick(const DeviceSlots& a, const Team& team, const Pick& pick) {
  if (!has_pick(a, team)) return;
  a.out.ids[pick_index(a, team)] = pick.id;
  a.out.weights[pick_index(a, team)] = pick.weight;
}

__device__ __forceinline__ Choice refuse_token(const DeviceSlots& a, const Team& team, gpu::FaultKind kind,
                                               i32 position) {
  const u64 key = gpu::fault_key(kind, team.token, position);
  if (team.lane == 0) atomicMin(reinterpret_cast<unsigned long long*>(&a.fault->first), key);
  return {kRefused, 0.0};
}

}  // namespace fourmoe::route
