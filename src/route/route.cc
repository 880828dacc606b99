#include "route/route.h"

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

#include "args.h"
#include "format/quantise.h"

namespace fourmoe::route {
namespace {

constexpr f64 kMasked = -std::numeric_limits<f64>::infinity();
constexpr i64 kTokensPerTask = 16;  // a token's top-k takes microseconds: enough of them to outweigh a task's start

// What one token needs while its picks are found; one a task.
struct Scratch {
  explicit Scratch(const Problem& problem)
      : logits(problem.experts), scores(problem.experts), choice(problem.experts), order(problem.experts) {}
  std::vector<f64> logits;
  std::vector<f64> scores;  // s_e
  std::vector<f64> choice;  // c_e, masked ones -infinity
  std::vector<i32> order;
};

f64 score_of(Score score, f64 logit) {
  switch (score) {
    case Score::sigmoid: return 1.0 / (1.0 + std::exp(-logit));
    // log1p(exp(x)) without overflow for large x.
    case Score::sqrt_softplus: return std::sqrt(std::max(logit, 0.0) + std::log1p(std::exp(-std::fabs(logit))));
    default: return logit;
  }
}

void score(Score kind, const std::vector<f64>& logits, std::vector<f64>* scores) {
  if (kind != Score::softmax) {
    std::transform(logits.begin(), logits.end(), scores->begin(), [&](f64 l) { return score_of(kind, l); });
    return;
  }
  const f64 largest = *std::max_element(logits.begin(), logits.end());
  f64 sum = 0.0;
  for (std::size_t e = 0; e < logits.size(); ++e) sum += (*scores)[e] = std::exp(logits[e] - largest);
  for (f64& s : *scores) s /= sum;
}

f64 group_score(const f64* choice, i32 size, i32 best) {
  f64 first = kMasked;
  f64 second = kMasked;
  for (i32 i = 0; i < size; ++i) {
    if (choice[i] > first) second = std::exchange(first, choice[i]);
    else second = std::max(second, choice[i]);
  }
  return best == 1 || size == 1 ? first : first + second;
}

void mask_groups(const Problem& problem, std::vector<f64>* choice) {
  const Routing& routing = problem.routing;
  if (routing.groups_kept == routing.groups) return;
  const i32 size = problem.experts / routing.groups;
  std::vector<std::pair<f64, i32>> groups(routing.groups);  // (-score, group): sorted best first, ties to lower group
  for (i32 g = 0; g < routing.groups; ++g) {
    groups[g] = {-group_score(choice->data() + g * size, size, routing.group_best), g};
  }
  std::sort(groups.begin(), groups.end());
  for (i32 rank = routing.groups_kept; rank < routing.groups; ++rank) {
    std::fill_n(choice->begin() + groups[rank].second * size, size, kMasked);
  }
}

void weigh(const Routing& routing, const std::vector<f64>& scores, const i32* ids, i32 top_k, f32* weights) {
  f64 sum = 1e-20;
  for (i32 p = 0; p < top_k; ++p) sum += scores[ids[p]];
  const f64 factor = (routing.renormalise ? 1.0 / sum : 1.0) * routing.scale;
  for (i32 p = 0; p < top_k; ++p) weights[p] = static_cast<f32>(scores[ids[p]] * factor);
}

bool read_logits(const format::Tensor& logits, i32 token, std::vector<f64>* out) {
  const u8* row = logits.row(token);
  for (i64 e = 0; e < logits.cols; ++e) (*out)[e] = format::read(row, logits.dtype, e);
  const f64 largest = *std::max_element(out->begin(), out->end());
  const bool nan = std::any_of(out->begin(), out->end(), [](f64 l) { return std::isnan(l); });
  return !nan && std::isfinite(largest);
}

Status pick_from_logits(const Problem& problem, const In& in, i32 token, Scratch* s, const Out& out) {
  if (!read_logits(in.logits, token, &s->logits)) return refuse_logits(token);
  score(problem.routing.score, s->logits, &s->scores);
  for (i32 e = 0; e < problem.experts; ++e) s->choice[e] = s->scores[e] + (in.bias != nullptr ? f64{in.bias[e]} : 0.0);
  mask_groups(problem, &s->choice);
  std::iota(s->order.begin(), s->order.end(), 0);
  std::partial_sort(s->order.begin(), s->order.begin() + problem.top_k, s->order.end(),
                    [&](i32 a, i32 b) { return s->choice[a] != s->choice[b] ? s->choice[a] > s->choice[b] : a < b; });
  i32* ids = out.ids + i64{token} * problem.top_k;
  std::copy_n(s->order.begin(), problem.top_k, ids);
  weigh(problem.routing, s->scores, ids, problem.top_k, out.weights + i64{token} * problem.top_k);
  return {};
}

i64 read_id(const format::Tensor& ids, i32 token, i32 p) {
  const u8* row = ids.row(token);
  return ids.dtype == format::Dtype::i64 ? format::load<i64>(row + 8 * p) : i64{format::load<i32>(row + 4 * p)};
}

Status copy_picks(const Problem& problem, const In& in, i32 token, const Out& out) {
  for (i32 p = 0; p < problem.top_k; ++p) {
    const i64 id = read_id(in.ids, token, p);
    if (id < -1 || id >= problem.experts) return refuse_id(token, p, id, problem.experts);
    out.ids[i64{token} * problem.top_k + p] = static_cast<i32>(id);
    out.weights[i64{token} * problem.top_k + p] =
        id < 0 ? 0.0f : format::read(in.weights.row(token), in.weights.dtype, p);
  }
  return {};
}

}  // namespace

Status refuse_logits(i32 token) {
  return refuse(Reason::value_not_finite,
                fmt::format("router_logits of token {} hold NaN or +infinity, or are all -infinity; a layer's own "
                            "router makes such ones of hidden_states or of weights that are not finite",
                            token));
}

Status refuse_id(i32 token, i32 position, i64 id, i32 experts) {
  return refuse(Reason::pick_out_of_range,
                fmt::format("topk_ids[{}, {}] is {}, expected -1 to {}", token, position, id, experts - 1));
}

Status refuse_scale(i64 token, i64 block, u8 byte) {
  return refuse(Reason::scale_invalid,
                fmt::format("hidden_scales[{}, {}] is 0x{:02x}: NaN or negative", token, block, byte));
}

Status check_bias(std::span<const f32> bias) {
  const auto odd = std::find_if(bias.begin(), bias.end(), [](f32 value) { return !std::isfinite(value); });
  if (odd == bias.end()) return {};
  return refuse(Reason::value_not_finite,
                fmt::format("selection_bias[{}] is {}, expected a finite number", odd - bias.begin(), *odd));
}

Status pick(const Problem& problem, const In& in, i32 tokens, Executor& executor, const Out& out) {
  std::atomic<i32> first_bad{tokens};
  const auto pick_one = [&](i32 token, Scratch* scratch) {
    return in.logits.empty() ? copy_picks(problem, in, token, out) : pick_from_logits(problem, in, token, scratch, out);
  };
  executor.parallel_for((tokens + kTokensPerTask - 1) / kTokensPerTask, [&](i64 task) {
    Scratch scratch(problem);
    const i32 end = static_cast<i32>(std::min<i64>(tokens, (task + 1) * kTokensPerTask));
    for (i32 token = static_cast<i32>(task * kTokensPerTask); token < end; ++token) {
      if (pick_one(token, &scratch).ok()) continue;
      for (i32 seen = first_bad; token < seen && !first_bad.compare_exchange_weak(seen, token);) {
      }
    }
  });
  Scratch scratch(problem);
  return first_bad < tokens ? pick_one(first_bad, &scratch) : Status{};
}

void sort(const Problem& problem, i32 tokens, const Out& out) {
  const i64 picks = i64{tokens} * problem.top_k;
  std::fill_n(out.expert_begin, problem.local_experts + 1, 0);
  for (i64 i = 0; i < picks; ++i) {
    const i32 local = out.ids[i] - problem.first_expert;
    out.pick_slot[i] = out.ids[i] < 0 || local < 0 || local >= problem.local_experts ? -1 : local;
    if (out.pick_slot[i] >= 0) ++out.expert_begin[local + 1];
  }
  std::partial_sum(out.expert_begin, out.expert_begin + problem.local_experts + 1, out.expert_begin);
  // Each begin serves as its expert's cursor and ends as the next one's begin; shifting by one restores them.
  for (i64 i = 0; i < picks; ++i) {
    if (out.pick_slot[i] < 0) continue;
    const i32 slot = out.expert_begin[out.pick_slot[i]]++;
    out.pick_slot[i] = slot;
    out.slot_pick[slot] = static_cast<i32>(i);
  }
  std::copy_backward(out.expert_begin, out.expert_begin + problem.local_experts,
                     out.expert_begin + problem.local_experts + 1);
  out.expert_begin[0] = 0;
}

void logits(const format::Tensor& hidden, const format::Matrix& router, const f32* bias, Executor& executor,
            f32* logits) {
  const i64 tokens = hidden.rows;
  const i64 experts = router.rows;
  constexpr i64 kRows = 8;  // router rows decoded once for all tokens of a task
  executor.parallel_for((experts + kRows - 1) / kRows, [&](i64 task) {
    std::vector<f64> weights(router.cols);
    for (i64 e = task * kRows; e < std::min(experts, (task + 1) * kRows); ++e) {
      for (i64 k = 0; k < router.cols; ++k) weights[k] = format::weight_at(router, e, k);
      for (i64 t = 0; t < tokens; ++t) {
        const u8* row = hidden.row(t);
        f64 sum = 0.0;
        for (i64 k = 0; k < router.cols; ++k) sum += weights[k] * format::read(row, hidden.dtype, k);
        logits[t * experts + e] = static_cast<f32>(sum * router.global + (bias != nullptr ? f64{bias[e]} : 0.0));
      }
    }
  });
}

namespace {

void widen(const u8* row, format::Dtype dtype, f32 weight, std::vector<f32>* x) {
  const i64 count = static_cast<i64>(x->size());
  f32* out = x->data();
  if (dtype == format::Dtype::bf16) {  // a loop without branches, which compilers turn into vectors
    for (i64 k = 0; k < count; ++k) out[k] = format::from_bf16(format::load<u16>(row + 2 * k)) * weight;
    return;
  }
  for (i64 k = 0; k < count; ++k) out[k] = format::read(row, dtype, k) * weight;
}

// Codes and scales of one slot.
struct QuantisedRow {
  u8* codes;   // [hidden / 2]
  u8* scales;  // [hidden / 16]

  QuantisedRow(const Args& args, i64 slot)
      : codes(args.slots.codes + slot * (args.problem->hidden / 2)),
        scales(args.slots.scales + slot * (args.problem->hidden / format::kNvfp4Block)) {}

  void copy(const u8* from_codes, const u8* from_scales, i64 hidden) const {
    std::memcpy(codes, from_codes, hidden / 2);
    std::memcpy(scales, from_scales, hidden / format::kNvfp4Block);
  }
};

// A token's rows, one a slot. Experts that share an input scale, as some checkpoints' all do, share the quantised row.
void quantise_token(const Args& args, i64 token, std::vector<f32>* x) {
  const Problem& problem = *args.problem;
  const bool weighted = problem.routing.weight_on_input;
  std::vector<std::pair<f32, i64>> made;  // input scale, slot
  if (!weighted && args.hidden_scales.empty()) widen(args.hidden.row(token), args.hidden.dtype, 1.0f, x);
  for (i64 pick = token * problem.top_k; pick < (token + 1) * problem.top_k; ++pick) {
    const i64 slot = args.slots.pick_slot[pick];
    if (slot < 0) continue;
    const QuantisedRow out(args, slot);
    if (!args.hidden_scales.empty()) {  // quantised by the caller
      out.copy(args.hidden.row(token), args.hidden_scales.row(token), problem.hidden);
      continue;
    }
    const f32 global = args.weights.experts[args.slots.ids[pick] - problem.first_expert].input_scale;
    const auto same = std::ranges::find(made, global, &std::pair<f32, i64>::first);
    if (same != made.end()) {
      const QuantisedRow known(args, same->second);
      out.copy(known.codes, known.scales, problem.hidden);
      continue;
    }
    if (weighted) widen(args.hidden.row(token), args.hidden.dtype, args.slots.weights[pick], x);
    else made.emplace_back(global, slot);
    format::quantise_row(x->data(), problem.hidden, global, out.codes, out.scales);
  }
}

}  // namespace

void quantise(const Args& args) {
  args.executor->parallel_for(args.tokens, [&](i64 token) {
    std::vector<f32> x(args.problem->hidden);
    quantise_token(args, token, &x);
  });
}

// The stage as a step: what any room without a body of its own uses.
namespace {

Status run_step(const Bound& bound) {
  const Args& args = *bound.args;
  if (Status status = pick(*args.problem, args.picks, args.tokens, *args.executor, args.slots); !status.ok()) {
    return status;
  }
  sort(*args.problem, args.tokens, args.slots);
  if (args.problem->precision == Precision::w4a4) quantise(args);
  return {};
}

}  // namespace

extern const Step kHostStep;
const Step kHostStep = {"host",
                        "route",
                        {Stage::route, Stage::route},
                        [](const Problem&, const Machine&) { return accept(); },
                        [](const Problem&, const Machine&) { return i64{0}; },
                        run_step};

}  // namespace fourmoe::route
