// screen: one warp picks for one token, with f32 where that decides and f64 for the few experts that remain.
//
// A lane has kOwn experts side by side and their choices c_e in f32, each within `error` of its f64. The top_k largest
// of the lanes' best bound from below what can be picked; what lies above the bound, mostly top_k experts and a few,
// gets its choice in f64 and is ranked by counting. Where groups are too close to be told apart, or more experts pass
// than a warp has lanes, the screen says that it cannot tell.
#pragma once

#include "route/team.cuh"

namespace fourmoe::route {

// Of the largest |s| or |b|. expf, 1 + x, the quotient and s + b are off by 6 * 2^-24 at most, log1pf and the root by
// less; the rest is margin. Below kTinyError scores may have left the f32 numbers.
inline constexpr f32 kScreenError = 0x1p-20f;
inline constexpr f32 kTinyError = 1e-18f;
inline constexpr i32 kScreened = 512;  // experts, at most: 16 a lane

// Experts of a lane.
FOURMOE_HD i32 screen_owns(i32 experts) { return experts <= 128 ? 4 : experts <= 256 ? 8 : 16; }

// Softmax is screened by its logits, of which its choices are a function that only grows.
FOURMOE_HD bool can_screen(const DeviceSlots& a) {
  const Routing& routing = a.problem.routing;
  const i32 experts = a.problem.experts;
  const i32 own = screen_owns(experts);
  const bool grouped = routing.groups_kept < routing.groups;
  const i32 size = grouped ? experts / routing.groups : own;  // experts of a group
  const i32 lanes = (experts + own - 1) / own / (grouped ? routing.groups : 1) * (grouped ? routing.groups_kept : 1);
  if (experts < 32 || experts > kScreened || lanes < 2 * a.problem.top_k) return false;
  if (size % own != 0 || (size / own & (size / own - 1)) != 0) return false;
  return routing.score != Score::softmax || (a.in.bias == nullptr && (!grouped || routing.group_best == 1));
}

// Shared memory of the screen lies in a team's: what remains, and before that the lanes' best.
struct Candidate {
  i32 expert;
  f32 logit;
};

// What a screen found.
struct Screened {
  enum class Outcome { unclear, refused, told } outcome;
  i32 candidates;  // in the team's keys
  f32 largest;     // logit
  f64 sum;         // of softmax's exps, 1 where they are renormalised
};

template <i32 kOwn>
struct Owned {
  i32 first;  // expert
  f32 logits[kOwn];
  f32 choices[kOwn];  // -infinity for no expert, and for one that is out
  f32 error;          // of each
};

template <i32 kOwn, class Read>
__device__ __forceinline__ void read_each(i32 first, i32 count, Read read, f32 (&x)[kOwn]) {
#pragma unroll
  for (i32 i = 0; i < kOwn; ++i) {
    if (first + i < count) x[i] = read(first + i);
  }
}

// Leaves x as it is where there is no expert.
template <i32 kOwn>
__device__ __forceinline__ void read_owned(const void* row, format::Dtype dtype, i32 first, i32 count, f32 (&x)[kOwn]) {
  const bool aligned = reinterpret_cast<u64>(row) % 16 == 0 && count % 4 == 0;
  if (dtype != format::Dtype::f32) {
    read_each(
        first, count, [=](i32 e) { return gpu::read(row, dtype, e); }, x);
  } else if (!aligned) {
    read_each(
        first, count, [=](i32 e) { return static_cast<const f32*>(row)[e]; }, x);
  } else {
#pragma unroll
    for (i32 i = 0; i < kOwn; i += 4) {
      if (first + i >= count) continue;
      const float4 quad = *reinterpret_cast<const float4*>(static_cast<const f32*>(row) + first + i);
      x[i] = quad.x, x[i + 1] = quad.y, x[i + 2] = quad.z, x[i + 3] = quad.w;
    }
  }
}

__device__ __forceinline__ f32 near_sigmoid(f32 logit) { return __fdividef(1.0f, 1.0f + expf(-logit)); }
__device__ __forceinline__ f32 near_softplus(f32 logit) {
  return sqrtf(fmaxf(logit, 0.0f) + log1pf(expf(-fabsf(logit))));
}

// Logits and biases to choices and their error; NaN or infinite where the bias or a score is not finite.
template <i32 kOwn>
__device__ __forceinline__ void choose_near(Score score, const f32 (&bias)[kOwn], i32 count, Owned<kOwn>* own) {
  if (score == Score::sigmoid) {
#pragma unroll
    for (i32 i = 0; i < kOwn; ++i) own->choices[i] = near_sigmoid(own->logits[i]);
  } else if (score == Score::sqrt_softplus) {
#pragma unroll
    for (i32 i = 0; i < kOwn; ++i) own->choices[i] = near_softplus(own->logits[i]);
  } else {
#pragma unroll
    for (i32 i = 0; i < kOwn; ++i) own->choices[i] = own->logits[i];
  }
  u32 most = 0;
#pragma unroll
  for (i32 i = 0; i < kOwn; ++i) {
    const u32 size = __float_as_uint(own->choices[i]) & 0x7fffffffu;
    if (own->choices[i] != -INFINITY) most = max(most, max(size, __float_as_uint(bias[i]) & 0x7fffffffu));
    own->choices[i] = own->first + i < count ? own->choices[i] + bias[i] : -INFINITY;
  }
  own->error = __uint_as_float(__reduce_max_sync(kAll, most)) * kScreenError + kTinyError;
}

// Score of the group of lanes that this one is in, within 3 errors.
template <i32 kOwn>
__device__ __forceinline__ f32 near_group(const Owned<kOwn>& own, i32 width, bool pairs) {
  f32 first = own.choices[0];
  f32 second = -INFINITY;
#pragma unroll
  for (i32 i = 1; i < kOwn; ++i) {
    second = fmaxf(second, fminf(first, own.choices[i]));
    first = fmaxf(first, own.choices[i]);
  }
#pragma unroll 1
  for (i32 d = 1; d < width; d *= 2) {
    const f32 other_first = __shfl_xor_sync(kAll, first, d);
    const f32 other_second = __shfl_xor_sync(kAll, second, d);
    second = fmaxf(fminf(first, other_first), fmaxf(second, other_second));
    first = fmaxf(first, other_first);
  }
  return pairs ? first + second : first;
}

// Takes out the experts of groups that are not kept; false if groups are too close.
template <i32 kOwn>
__device__ __forceinline__ bool keep_groups(const Problem& problem, u32 lane, Owned<kOwn>* own) {
  const Routing& routing = problem.routing;
  const i32 width = problem.experts / routing.groups / kOwn;
  const f32 mine = near_group(*own, width, routing.group_best == 2);
  const f32 gap = 8.0f * own->error;
  i32 above = 0;
  i32 not_below = 0;
#pragma unroll 4
  for (i32 g = 0; g < routing.groups; ++g) {
    const f32 other = __shfl_sync(kAll, mine, g * width);
    above += other > mine + gap;
    not_below += other >= mine - gap;
  }
  const bool real = own->first < problem.experts;
  const bool out = above >= routing.groups_kept;
  if (__any_sync(kAll, real && !out && not_below > routing.groups_kept)) return false;
#pragma unroll
  for (i32 i = 0; i < kOwn; ++i) own->choices[i] = out ? -INFINITY : own->choices[i];
  return true;
}

__device__ __forceinline__ u32 order_of(f32 value) {
  const u32 bits = __float_as_uint(value);
  return bits >> 31 != 0 ? ~bits : bits | 0x80000000u;
}

// At most the top_k largest of the lanes' best: their order without its last five bits, which then tell lanes apart.
template <i32 kOwn>
__device__ __forceinline__ f32 bound_picks(const Owned<kOwn>& own, i32 top_k, u32 lane, uint2* bests) {
  f32 best = own.choices[0];
#pragma unroll
  for (i32 i = 1; i < kOwn; ++i) best = fmaxf(best, own.choices[i]);
  const u32 mine = (order_of(best) & ~31u) | lane;
  reinterpret_cast<u32*>(bests)[lane] = mine;
  __syncwarp();
  i32 rank = 0;
#pragma unroll
  for (i32 i = 0; i < 16; ++i) {
    const uint2 two = bests[i];
    rank += (two.x > mine) + (two.y > mine);
  }
  const u32 order = __shfl_sync(kAll, mine, __ffs(static_cast<int>(__ballot_sync(kAll, rank == top_k - 1))) - 1) & ~31u;
  return __uint_as_float(order >> 31 != 0 ? order & 0x7fffffffu : ~order);
}

// Writes the experts whose choice is at least `bound`, as far as they fit; returns their number.
template <i32 kOwn>
__device__ __forceinline__ i32 list_candidates(const Owned<kOwn>& own, f32 bound, u32 lane, Candidate* to) {
  i32 count = 0;
#pragma unroll
  for (i32 i = 0; i < kOwn; ++i) {
    const bool passes = own.choices[i] >= bound;
    const u32 all = __ballot_sync(kAll, passes);
    const i32 at = count + __popc(all & ((1u << lane) - 1u));
    if (passes && at < 32) to[at] = {own.first + i, own.logits[i]};
    count += __popc(all);
  }
  return count;
}

// In an order that depends on nothing but kOwn.
template <i32 kOwn>
__device__ __forceinline__ f64 sum_of_exps(const Owned<kOwn>& own, f64 largest) {
  f64 sum = 0.0;
#pragma unroll
  for (i32 i = 0; i < kOwn; ++i) sum += exp(own.logits[i] - largest);  // of no expert: exp(-infinity)
#pragma unroll
  for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(kAll, sum, d);
  return sum;
}

template <i32 kOwn>
__device__ __forceinline__ Screened screen(const DeviceSlots& a, const Team& team) {
  const Problem& problem = a.problem;
  const Routing& routing = problem.routing;
  Owned<kOwn> own;
  own.first = static_cast<i32>(team.lane) * kOwn;
  f32 bias[kOwn];
#pragma unroll
  for (i32 i = 0; i < kOwn; ++i) own.logits[i] = -INFINITY, bias[i] = 0.0f;
  read_owned(a.in.logits.row(team.token), a.in.logits.dtype, own.first, problem.experts, own.logits);
  if (a.in.bias != nullptr) read_owned(a.in.bias, format::Dtype::f32, own.first, problem.experts, bias);
  u32 most = 0;
#pragma unroll
  for (i32 i = 0; i < kOwn; ++i) most = max(most, isnan(own.logits[i]) ? ~0u : order_of(own.logits[i]));
  most = __reduce_max_sync(kAll, most);
  if (most >= order_of(INFINITY) || most == order_of(-INFINITY)) return {Screened::Outcome::refused, 0, 0.0f, 1.0};
  Screened found = {Screened::Outcome::unclear, 0, __uint_as_float(most >> 31 != 0 ? most & 0x7fffffffu : ~most), 1.0};
  choose_near(routing.score, bias, problem.experts, &own);
  if (!(own.error < INFINITY)) return found;
  if (routing.groups_kept < routing.groups && !keep_groups(problem, team.lane, &own)) return found;
  const f32 least = bound_picks(own, problem.top_k, team.lane, reinterpret_cast<uint2*>(team.scores));
  const bool plain = routing.score != Score::softmax || least - found.largest > -600.0f;  // or exps are 0
  if (!(least > -INFINITY) || !plain) return found;
  found.candidates = list_candidates(own, least - 4.0f * own.error, team.lane, reinterpret_cast<Candidate*>(team.keys));
  if (found.candidates > 32) return found;
  if (routing.score == Score::softmax && !routing.renormalise) found.sum = sum_of_exps(own, found.largest);
  found.outcome = Screened::Outcome::told;
  return found;
}

// Experts ranked above this lane's candidate.
__device__ __forceinline__ i32 rank_of(const Team& team, i32 candidates, f64 choice, i32 expert) {
  const Candidate* list = reinterpret_cast<const Candidate*>(team.keys);
  i32 rank = 0;
#pragma unroll 4
  for (i32 j = 0; j < candidates; ++j) {  // without branches: lanes would take turns
    const f64 other = team.scores[j];
    rank += static_cast<i32>(other > choice) | (static_cast<i32>(other == choice) & (list[j].expert < expert));
  }
  return rank;
}

// Candidates, a lane each, to choices.
__device__ __forceinline__ Choice rank_candidates(const DeviceSlots& a, const Team& team, const Screened& found) {
  const i32 lane = static_cast<i32>(team.lane);
  const Routing& routing = a.problem.routing;
  Candidate* list = reinterpret_cast<Candidate*>(team.keys);
  __syncwarp();
  const bool real = lane < found.candidates;
  const Candidate mine = real ? list[lane] : Candidate{0, 0.0f};
  const f64 bias = a.in.bias != nullptr ? f64{a.in.bias[mine.expert]} : 0.0;
  f64 score =
      routing.score == Score::softmax ? exp(mine.logit - f64{found.largest}) : score_of(routing.score, mine.logit);
  if (found.sum != 1.0) score /= found.sum;
  const f64 choice = score + bias;
  if (real) team.scores[lane] = choice;
  __syncwarp();
  const i32 rank = rank_of(team, found.candidates, choice, mine.expert);
  __syncwarp();
  const bool picked = real && rank < a.problem.top_k;
  if (picked) team.scores[rank] = score, list[rank].expert = mine.expert;
  __syncwarp();
  const bool has = lane < a.problem.top_k;
  return {has ? list[lane].expert : -1, has ? team.scores[lane] : 0.0};
}

__device__ __forceinline__ Screened screen_token(const DeviceSlots& a, const Team& team) {
  const i32 owns = screen_owns(a.problem.experts);
  return owns == 4 ? screen<4>(a, team) : owns == 8 ? screen<8>(a, team) : screen<16>(a, team);
}

}  // namespace fourmoe::route
