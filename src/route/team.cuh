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

// What lane p of a team's first warp has of pick p: first its score, which is the weight where the caller gives that.
struct Choice {
  i32 id = -1;
  f64 score = 0.0;
};
struct Pick {
  i32 id = -1;
  f32 weight = 0.0f;
};

// The first warp. Apart from the choice, since that others wait for.
__device__ __forceinline__ Pick weigh_choice(const DeviceSlots& a, const Choice& choice) {
  if (a.in.logits.data == nullptr) return {choice.id, static_cast<f32>(choice.score)};
  return {choice.id, weigh(a.problem.routing, choice.score, a.problem.top_k)};
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
