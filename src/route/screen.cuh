// screen: one warp picks for one token, with f32 where that decides and f64 for the few experts that remain.
//
// A lane has kOwn experts side by side and their choices c_e in f32, each within `error` of its f64, and the warp takes
// the largest of all, top_k times. Where two that follow each other are too close, the top_k largest of the lanes' best
// bound from below what can be picked; what lies above the bound, mostly top_k experts and a few, gets its choice in
// f64 and is ranked by counting. Where groups are too close to be told apart, or more experts pass than a warp has
// lanes, the screen says that it cannot tell.
#pragma once

#include <utility>

#include "gpu/isa/launch.cuh"
#include "route/team.cuh"

namespace fourmoe::route {

// Of the largest |s| or |b|. expf, 1 + x, the quotient and s + b are off by 6 * 2^-24 at most, log1pf and the root by
// less; the rest is margin. Below kTinyError scores may have left the f32 numbers.
inline constexpr f32 kScreenError = 0x1p-20f;
inline constexpr f32 kTinyError = 1e-18f;
inline constexpr i32 kScreened = 512;  // experts, at most: 16 a lane
// Logits that differ by this much have exps that differ by far more than f64 rounds, 2^-52 of them.
inline constexpr f32 kExpGap = 0x1p-40f;
inline constexpr f32 kDeepest = -600.0f;  // below the largest logit: beyond, exps come near to 0

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

// [32] experts in the order of picks, and those that remain; in the memory of scores and of keys.
__device__ __forceinline__ i32* picked_of(const Team& team) { return reinterpret_cast<i32*>(team.scores); }
__device__ __forceinline__ i32* candidates_of(const Team& team) { return reinterpret_cast<i32*>(team.keys); }

// What a screen found.
struct Screened {
  enum class Outcome { unclear, refused, screened, picked } outcome;
  i32 candidates;
  Scale scale;
};

template <i32 kOwn>
struct Owned {
  i32 first;   // expert
  bool exact;  // choices are the logits themselves
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
#pragma unroll
  for (i32 i = 0; i < kOwn; ++i) own->choices[i] = own->logits[i] + 0.0f;  // -0 is 0
  own->error = kExpGap;
  if (own->exact) return;
  if (score == Score::sigmoid) {
#pragma unroll
    for (i32 i = 0; i < kOwn; ++i) own->choices[i] = near_sigmoid(own->logits[i]);
  } else if (score == Score::sqrt_softplus) {
#pragma unroll
    for (i32 i = 0; i < kOwn; ++i) own->choices[i] = near_softplus(own->logits[i]);
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
__device__ __forceinline__ f32 value_of(u32 order) {
  return __uint_as_float(order >> 31 != 0 ? order & 0x7fffffffu : ~order);
}

// Batcher's odd-even merge sort: which keys to put in order, one pair after the other.
template <i32 kKeys>
struct Network {
  i32 count = 0;
  i32 pairs[kKeys * 4][2] = {};

  constexpr Network() {
    for (i32 p = 1; p < kKeys; p *= 2) {
      for (i32 k = p; k >= 1; k /= 2) {
        for (i32 i = k % p; i + k < kKeys; ++i) {
          if ((i - k % p) / k % 2 != 0 || i / (2 * p) != (i + k) / (2 * p)) continue;
          pairs[count][0] = i;
          pairs[count++][1] = i + k;
        }
      }
    }
  }
};

// A lane's choices by size, the largest first; of equal ones the lower expert. The low word of a key tells the expert.
template <i32 kOwn>
struct Sorted {
  static constexpr Network<kOwn> kNetwork = {};
  u64 keys[kOwn];

  __device__ __forceinline__ explicit Sorted(const f32 (&choices)[kOwn]) {
#pragma unroll
    for (u32 i = 0; i < kOwn; ++i) keys[i] = u64{order_of(choices[i])} << 32 | (kOwn - 1 - i);
    sort(std::make_integer_sequence<i32, kNetwork.count>());
  }

  __device__ __forceinline__ u32 order() const { return static_cast<u32>(keys[0] >> 32); }
  __device__ __forceinline__ i32 which() const { return kOwn - 1 - static_cast<i32>(static_cast<u32>(keys[0])); }
  __device__ __forceinline__ void drop(bool largest) {
#pragma unroll
    for (i32 i = 0; i + 1 < kOwn; ++i) keys[i] = largest ? keys[i + 1] : keys[i];
    keys[kOwn - 1] = largest ? 0 : keys[kOwn - 1];
  }

 private:
  template <i32... kPairs>
  __device__ __forceinline__ void sort(std::integer_sequence<i32, kPairs...>) {
    (exchange(std::integral_constant<i32, kNetwork.pairs[kPairs][0]>(),
              std::integral_constant<i32, kNetwork.pairs[kPairs][1]>()),
     ...);
  }
  template <i32 kLarge, i32 kSmall>
  __device__ __forceinline__ void exchange(std::integral_constant<i32, kLarge>, std::integral_constant<i32, kSmall>) {
    const u64 a = keys[kLarge], b = keys[kSmall];
    keys[kLarge] = max(a, b);
    keys[kSmall] = min(a, b);
  }
};

// Writes the top_k largest in their order; false, and nothing that counts, if f32 leaves it open. Which lane has the
// largest is found by orders without their last five bits, which name lanes instead, so it is asked to have it in full.
template <i32 kOwn>
__device__ __forceinline__ bool take_nearly(const Owned<kOwn>& own, i32 top_k, f32 lowest, u32 lane, i32* to) {
  const f32 gap = own.exact ? own.error : 4.0f * own.error;
  Sorted<kOwn> sorted(own.choices);
  f32 before = INFINITY;
  bool clear = true;
#pragma unroll 1
  for (i32 p = 0; p <= top_k; ++p) {  // one more: it must lie below
    const u32 mine = sorted.order(), most = __reduce_max_sync(kAll, mine);
    const bool wins = 31 - (__reduce_max_sync(kAll, (mine & ~31u) | (31 - lane)) & 31u) == lane;
    const f32 value = value_of(most);
    clear &= before - value > gap || (own.exact && before == value);  // equal in f64, too: the lower expert first
    clear &= (!wins || mine == most) && (p == top_k || value > lowest);
    before = value;
    if (wins && p < top_k) to[p] = own.first + sorted.which();
    sorted.drop(wins);
  }
  return __all_sync(kAll, clear);
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
  return value_of(order);
}

// Writes the experts whose choice is at least `bound`, as far as they fit; returns their number.
template <i32 kOwn>
__device__ __forceinline__ i32 list_candidates(const Owned<kOwn>& own, f32 bound, u32 lane, i32* to) {
  i32 count = 0;
#pragma unroll
  for (i32 i = 0; i < kOwn; ++i) {
    const bool passes = own.choices[i] >= bound;
    const u32 all = __ballot_sync(kAll, passes);
    const i32 at = count + __popc(all & ((1u << lane) - 1u));
    if (passes && at < 32) to[at] = own.first + i;
    count += __popc(all);
  }
  return count;
}

// All that could be picked, a lane each, as far as f32 tells; false if there are too many.
template <i32 kOwn>
__device__ __forceinline__ bool screen_out(const Owned<kOwn>& own, i32 top_k, f32 lowest, const Team& team,
                                           i32* candidates) {
  __syncwarp();
  const f32 least = bound_picks(own, top_k, team.lane, reinterpret_cast<uint2*>(team.scores));
  if (!(least > lowest)) return false;
  *candidates = list_candidates(own, least - 4.0f * own.error, team.lane, candidates_of(team));
  return *candidates <= 32;
}

template <i32 kOwn, class Ready>
__device__ __forceinline__ Screened screen(const DeviceSlots& a, const Team& team, Ready ready) {
  const Problem& problem = a.problem;
  const Routing& routing = problem.routing;
  Owned<kOwn> own;
  own.first = static_cast<i32>(team.lane) * kOwn;
  own.exact = a.in.bias == nullptr && (routing.score == Score::softmax || routing.score == Score::none);
  f32 bias[kOwn];
#pragma unroll
  for (i32 i = 0; i < kOwn; ++i) own.logits[i] = -INFINITY, bias[i] = 0.0f;
  const void* row = gpu::isa::here(a.in.logits.row(team.token));
  ready();
  read_owned(row, a.in.logits.dtype, own.first, problem.experts, own.logits);
  if (a.in.bias != nullptr) read_owned(a.in.bias, format::Dtype::f32, own.first, problem.experts, bias);
  u32 most = 0;
#pragma unroll
  for (i32 i = 0; i < kOwn; ++i) most = max(most, isnan(own.logits[i]) ? ~0u : order_of(own.logits[i]));
  most = __reduce_max_sync(kAll, most);
  if (most >= order_of(INFINITY) || most == order_of(-INFINITY)) return {Screened::Outcome::refused};
  Screened found = {Screened::Outcome::unclear};
  found.scale = {value_of(most), false};
  choose_near(routing.score, bias, problem.experts, &own);
  if (!(own.error < INFINITY)) return found;
  if (routing.groups_kept < routing.groups && !keep_groups(problem, team.lane, &own)) return found;
  const f32 lowest = routing.score == Score::softmax ? found.scale.largest + kDeepest : -INFINITY;
  found.candidates = problem.top_k;
  if (take_nearly(own, problem.top_k, lowest, team.lane, picked_of(team))) found.outcome = Screened::Outcome::picked;
  else if (screen_out(own, problem.top_k, lowest, team, &found.candidates)) found.outcome = Screened::Outcome::screened;
  return found;
}

template <class Ready>
__device__ __forceinline__ Screened screen_token(const DeviceSlots& a, const Team& team, Ready ready) {
  const i32 owns = screen_owns(a.problem.experts);
  return owns == 4 ? screen<4>(a, team, ready) : owns == 8 ? screen<8>(a, team, ready) : screen<16>(a, team, ready);
}

// Candidates, a lane each: how many rank above, of ties the lower expert.
__device__ __forceinline__ i32 rank_exactly(const DeviceSlots& a, const Team& team, const Screened& found) {
  const i32* experts = candidates_of(team);
  const bool real = static_cast<i32>(team.lane) < found.candidates;
  const i32 mine = real ? experts[team.lane] : 0;
  const f64 logit = gpu::read(a.in.logits.row(team.token), a.in.logits.dtype, mine);
  const f64 bias = a.in.bias != nullptr ? f64{a.in.bias[mine]} : 0.0;
  const f64 choice = score_logit(a.problem.routing.score, logit, found.scale.largest) + bias;
  if (real) team.scores[team.lane] = choice;
  __syncwarp();
  i32 rank = 0;
#pragma unroll 4
  for (i32 j = 0; j < found.candidates; ++j) {  // without branches: lanes would take turns
    const f64 other = team.scores[j];
    rank += static_cast<i32>(other > choice) | (static_cast<i32>(other == choice) & (experts[j] < mine));
  }
  return rank;
}

// What a screen found to choices, of which the scores are still the logits.
__device__ __forceinline__ Choice take_screened(const DeviceSlots& a, const Team& team, const Screened& found) {
  const i32 lane = static_cast<i32>(team.lane), top_k = a.problem.top_k;
  i32* picked = picked_of(team);
  __syncwarp();
  if (found.outcome == Screened::Outcome::screened) {
    const i32 rank = rank_exactly(a, team, found);
    __syncwarp();
    if (lane < found.candidates && rank < top_k) picked[rank] = candidates_of(team)[lane];
    __syncwarp();
  }
  return {lane < top_k ? picked[lane] : -1, 0.0, found.scale};
}

}  // namespace fourmoe::route
