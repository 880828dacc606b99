// pick: one token's picks, by the first warp of its team wherever screen.cuh can tell, else all in f64.
//
// In f64 the team scores, then its first warp picks; no sum depends on the size of the team. The choice c_e of every
// expert lies in shared memory as a key, a u64 whose order is c's; a lane of the first warp owns the experts lane,
// lane + 32, ... and the best of them. The warp takes the best of all, top_k times.
#pragma once

#include "route/screen.cuh"

namespace fourmoe::route {

__device__ __forceinline__ void write_score(const DeviceSlots& a, const Team& team, i32 e, f64 score) {
  team.scores[e] = score;
  team.keys[e] = key_of(score + (a.in.bias != nullptr ? f64{a.in.bias[e]} : 0.0));
}

// The warp's experts: their scores, or their logits for softmax. Notes the largest logit, +infinity for a NaN.
template <class Read>
__device__ __forceinline__ void survey(const DeviceSlots& a, const Team& team, Read read) {
  const Score score = a.problem.routing.score;
  f32 most = -INFINITY;
#pragma unroll 2
  for (i32 e = team.rank * 32 + team.lane; e < a.problem.experts; e += team.warps * 32) {
    const f32 logit = read(e);
    most = isnan(logit) ? INFINITY : fmaxf(most, logit);
    if (score == Score::softmax) team.scores[e] = logit;
    else write_score(a, team, e, score_of(score, logit));
  }
#pragma unroll 1
  for (int d = 16; d > 0; d /= 2) most = fmaxf(most, __shfl_xor_sync(kAll, most, d));
  if (team.lane == 0) team.largest[team.rank] = most;
}

__device__ __forceinline__ void survey_logits(const DeviceSlots& a, const Team& team) {
  const void* row = a.in.logits.row(team.token);
  const format::Dtype dtype = a.in.logits.dtype;
  if (dtype == format::Dtype::f32) survey(a, team, [=](i32 e) { return static_cast<const f32*>(row)[e]; });
  else survey(a, team, [=](i32 e) { return gpu::read(row, dtype, e); });
}

__device__ __forceinline__ f32 largest_of(const Team& team) {
  f32 most = team.largest[0];
#pragma unroll 1
  for (i32 w = 1; w < team.warps; ++w) most = fmaxf(most, team.largest[w]);
  return most;
}

// Logits to exp(l - largest).
__device__ __forceinline__ void write_exps(const Team& team, i32 experts, f64 largest) {
#pragma unroll 1
  for (i32 e = team.rank * 32 + team.lane; e < experts; e += team.warps * 32) {
    team.scores[e] = exp(team.scores[e] - largest);
  }
}

// Every warp of a team adds all, in the same order.
__device__ __forceinline__ f64 sum_exps(const Team& team, i32 experts) {
  f64 sum = 0.0;
#pragma unroll 1
  for (i32 e = team.lane; e < experts; e += 32) sum += team.scores[e];
#pragma unroll 1
  for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(kAll, sum, d);
  return sum;
}

__device__ __forceinline__ void write_shares(const DeviceSlots& a, const Team& team, f64 sum) {
#pragma unroll 1
  for (i32 e = team.rank * 32 + team.lane; e < a.problem.experts; e += team.warps * 32) {
    write_score(a, team, e, team.scores[e] / sum);
  }
}

// The two best keys of a group's experts sub, sub + width, ... and of the `width` lanes side by side.
__device__ __forceinline__ f64 group_score(const u64* keys, i32 size, i32 best, i32 sub, i32 width) {
  u64 first = kMaskedKey;
  u64 second = kMaskedKey;
#pragma unroll 1
  for (i32 i = sub; i < size; i += width) {
    second = max(second, min(first, keys[i]));
    first = max(first, keys[i]);
  }
#pragma unroll 1
  for (i32 d = 1; d < width; d *= 2) {
    const u64 other_first = __shfl_xor_sync(kAll, first, d);
    const u64 other_second = __shfl_xor_sync(kAll, second, d);
    second = max(min(first, other_first), max(second, other_second));
    first = max(first, other_first);
  }
  return best == 1 || size <= 1 ? value_of(first) : value_of(first) + value_of(second);
}

// Lanes side by side share a group as far as 32 lanes go.
__device__ __forceinline__ void mask_groups(const Problem& problem, const Team& team) {
  const i32 groups = problem.routing.groups;
  const i32 size = problem.experts / groups;
  i32 width = 1;
  while (2 * width * groups <= 32) width *= 2;
  const i32 sub = team.lane % width;
#pragma unroll 1
  for (i32 base = 0; base < groups; base += 32 / width) {
    const i32 g = base + team.lane / width;
    const bool real = g < groups;
    const f64 score =
        group_score(team.keys + (real ? g : 0) * size, real ? size : 0, problem.routing.group_best, sub, width);
    if (real && sub == 0) team.groups[g] = score;
  }
  __syncwarp();
#pragma unroll 1
  for (i32 g = team.lane / width; g < groups; g += 32 / width) {
    const f64 mine = team.groups[g];
    i32 rank = 0;
#pragma unroll 1
    for (i32 h = 0; h < groups; ++h) rank += team.groups[h] > mine || (team.groups[h] == mine && h < g);
    if (rank < problem.routing.groups_kept) continue;
#pragma unroll 1
    for (i32 i = sub; i < size; i += width) team.keys[g * size + i] = kMaskedKey;
  }
  __syncwarp();
}

struct Keyed {
  u64 key;
  i32 expert;
};

// The lane's two best; a key that is taken stands for one that is not known.
struct Best {
  Keyed first;
  Keyed second;
};

__device__ __forceinline__ Best best_of_lane(const u64* keys, i32 experts, u32 lane) {
  Best best = {{kTakenKey, experts}, {kTakenKey, experts}};
#pragma unroll 1
  for (i32 e = lane; e < experts; e += 32) {
    const Keyed choice = {keys[e], e};
    if (choice.key > best.first.key) best = {choice, best.first};
    else if (choice.key > best.second.key) best.second = choice;
  }
  return best;
}

// The lane whose first choice is the largest, ties to the lower expert.
__device__ __forceinline__ i32 best_lane(const Keyed& choice) {
  const u32 high = static_cast<u32>(choice.key >> 32);
  u32 winners = __ballot_sync(kAll, high == __reduce_max_sync(kAll, high));
  if (__popc(winners) == 1) return __ffs(static_cast<int>(winners)) - 1;
  const bool ahead = winners >> (threadIdx.x % 32) & 1u;
  const u32 low = static_cast<u32>(choice.key);
  const u32 lowest = __reduce_max_sync(kAll, ahead ? low : 0u);  // no lane may pass by
  const u32 expert = ahead && low == lowest ? static_cast<u32>(choice.expert) : ~0u;
  winners = __ballot_sync(kAll, expert == __reduce_min_sync(kAll, expert));
  return __ffs(static_cast<int>(winners)) - 1;
}

// Lane p returns pick p: the largest keys in descending order.
__device__ __forceinline__ i32 take_best(u64* keys, i32 experts, i32 top_k, u32 lane) {
  Best best = best_of_lane(keys, experts, lane);
  i32 mine = -1;
#pragma unroll 1
  for (i32 p = 0; p < top_k; ++p) {
    const i32 owner = best_lane(best.first);
    const i32 expert = __shfl_sync(kAll, best.first.expert, owner);
    if (lane == static_cast<u32>(p)) mine = expert;
    if (lane != static_cast<u32>(owner)) continue;
    keys[expert] = kTakenKey;
    best = {best.second, {kTakenKey, experts}};
    if (best.first.key == kTakenKey) best = best_of_lane(keys, experts, lane);
  }
  return mine;
}

// Everything in f64. `sync` meets all warps of the team; teams of a block keep step.
template <class Sync>
__device__ __forceinline__ Choice choose_exactly(const DeviceSlots& a, const Team& team, Sync sync) {
  const Problem& problem = a.problem;
  const bool real = team.token >= 0;
  if (real) survey_logits(a, team);
  sync();
  const f32 largest = real ? largest_of(team) : 0.0f;
  if (problem.routing.score == Score::softmax) {
    if (real) write_exps(team, problem.experts, largest);
    sync();
    const f64 sum = real ? sum_exps(team, problem.experts) : 0.0;
    sync();
    if (real) write_shares(a, team, sum);
    sync();
  }
  if (team.rank != 0 || !real) return {};
  if (!isfinite(largest)) return refuse_token(a, team, gpu::FaultKind::logits, 0);
  if (problem.routing.groups_kept < problem.routing.groups) mask_groups(problem, team);
  const i32 id = take_best(team.keys, problem.experts, problem.top_k, team.lane);
  return {id, id < 0 ? 0.0 : team.scores[id]};
}

// One warp where a screen can be had, in f64 too if the screen cannot tell.
template <class Sync, class Ready>
__device__ __forceinline__ Choice choose_by_logits(const DeviceSlots& a, const Team& team, Sync sync, Ready ready) {
  Team exact = team;
  const bool alone = team.screened;
  if (alone) {
    if (team.rank != 0 || team.token < 0) return {};
    const Screened found = screen_token(a, team, ready);
    if (found.outcome == Screened::Outcome::refused) return refuse_token(a, team, gpu::FaultKind::logits, 0);
    if (found.outcome != Screened::Outcome::unclear) return take_screened(a, team, found);
    __syncwarp();
    exact.warps = 1;
  }
  ready();
  return choose_exactly(a, exact, [=] {
    if (alone) __syncwarp();
    else sync();
  });
}

__device__ __forceinline__ i64 read_id(const DeviceSlots& a, i32 token, u32 position) {
  const u8* row = a.in.ids.row(token);
  return a.in.ids.dtype == format::Dtype::i64 ? reinterpret_cast<const i64*>(row)[position]
                                              : i64{reinterpret_cast<const i32*>(row)[position]};
}

__device__ __forceinline__ Choice copy_picks(const DeviceSlots& a, const Team& team) {
  const bool real = team.lane < static_cast<u32>(a.problem.top_k);
  const i64 id = real ? read_id(a, team.token, team.lane) : -1;
  const u32 bad = __ballot_sync(kAll, id < -1 || id >= a.problem.experts);
  if (bad != 0) return refuse_token(a, team, gpu::FaultKind::id, __ffs(static_cast<int>(bad)) - 1);
  if (id < 0) return {};
  return {static_cast<i32>(id), gpu::read(a.in.weights.row(team.token), a.in.weights.dtype, team.lane)};
}

// `ready` is called before any of the call's input is read.
template <class Sync, class Ready>
__device__ __forceinline__ Choice choose(const DeviceSlots& a, const Team& team, Sync sync, Ready ready) {
  if (a.in.logits.data != nullptr) return choose_by_logits(a, team, sync, ready);
  ready();
  return team.token >= 0 && team.rank == 0 ? copy_picks(a, team) : Choice{};
}

// What has_pick() lanes then write.
template <class Sync>
__device__ __forceinline__ Pick pick_token(const DeviceSlots& a, const Team& team, Sync sync) {
  return weigh_choice(a, team.token, choose(a, team, sync, [] {}));
}

// One thread, after all picks of the call and before its end: the value that the sentence names. The record is the
// layer's: what another stream's call has found there is that call's to settle, for only its ids have the value.
__device__ __forceinline__ void settle_fault(const DeviceSlots& a) {
  gpu::Fault* fault = a.fault;
  const u64 first = fault->first;
  if (first == fault->settled || gpu::fault_kind(first) == gpu::FaultKind::none) return;
  if (gpu::fault_kind(first) == gpu::FaultKind::id) {
    const i32 token = gpu::fault_token(first), position = gpu::fault_position(first);
    if (a.in.ids.data == nullptr || token >= a.tokens || position >= a.problem.top_k) return;
    const i64 id = read_id(a, token, position);
    if (id >= -1 && id < a.problem.experts) return;
    fault->value = id;
    fault->experts = a.problem.experts;
  }
  fault->settled = first;
}

}  // namespace fourmoe::route
