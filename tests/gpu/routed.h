// routed: one call of route, on the host and on the device, from the same inputs.
#pragma once

#include <random>
#include <string>
#include <vector>

#include "device_memory.h"
#include "gpu/fault.h"
#include "route/device.h"

namespace fourmoe::gpu_tests {

// Inputs of a call: logits, or ids and weights.
struct Input {
  std::vector<f32> logits;  // [tokens, experts]
  std::vector<f32> bias;    // [experts] or empty
  std::vector<i64> ids;     // [tokens, top_k]
  std::vector<f32> weights;
};

inline Problem problem_of(i32 experts, i32 top_k, i32 tokens) {
  Problem p;
  p.hidden = p.inter = 16;
  p.experts = p.local_experts = experts;
  p.top_k = top_k;
  p.max_tokens = tokens;
  return p;
}

// Every eighth logit repeats another one's value, so that there are ties; some are -infinity.
inline Input random_logits(const Problem& p, i32 tokens, u64 seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<f32> normal(0.0f, 2.0f);
  Input in;
  in.logits.resize(i64{tokens} * p.experts);
  for (std::size_t i = 0; i < in.logits.size(); ++i) {
    in.logits[i] = i > 8 && random() % 8 == 0 ? in.logits[i - 1 - random() % 8] : normal(random);
    if (random() % 64 == 0) in.logits[i] = -INFINITY;
    if (random() % 64 == 0) in.logits[i] = 30.0f + static_cast<f32>(random() % 64);  // scores that saturate
  }
  for (i32 t = 0; t < tokens; ++t) in.logits[i64{t} * p.experts] = normal(random);  // never all -infinity
  return in;
}

inline Input random_ids(const Problem& p, i32 tokens, u64 seed) {
  std::mt19937_64 random(seed);
  Input in;
  for (i64 i = 0; i < i64{tokens} * p.top_k; ++i) {
    in.ids.push_back(random() % 4 == 0 ? -1 : static_cast<i64>(random() % p.experts));
    in.weights.push_back(static_cast<f32>(random() % 256) / 256.0f);  // exact in f16 and bf16
  }
  return in;
}

struct Result {
  Status status;
  std::vector<i32> ids, begin, slot_pick, pick_slot;
  std::vector<f32> weights;
  std::vector<u64> progress;
};

inline Result run_host(const Problem& p, const Input& input, i32 tokens) {
  const i64 picks = i64{tokens} * p.top_k;
  Result r{{},
           std::vector<i32>(picks),
           std::vector<i32>(p.local_experts + 1),
           std::vector<i32>(picks),
           std::vector<i32>(picks),
           std::vector<f32>(picks),
           std::vector<u64>(route::progress_words(p.local_experts))};
  route::In in;
  if (input.ids.empty()) {
    in.logits = {const_cast<f32*>(input.logits.data()), format::Dtype::f32, tokens, p.experts, p.experts};
  } else {
    in.ids = {const_cast<i64*>(input.ids.data()), format::Dtype::i64, tokens, p.top_k, p.top_k};
    in.weights = {const_cast<f32*>(input.weights.data()), format::Dtype::f32, tokens, p.top_k, p.top_k};
  }
  in.bias = input.bias.empty() ? nullptr : input.bias.data();
  const route::Out out{r.ids.data(), r.weights.data(), r.begin.data(), r.slot_pick.data(), r.pick_slot.data()};
  r.status = route::pick(p, in, tokens, tbb_executor(8), out);
  if (r.status.ok()) route::sort(p, tokens, out);
  return r;
}

// The device's side of a call; its buffers serve any number of launches.
class Routed {
 public:
  Routed(const Problem& p, const Input& input, i32 tokens)
      : problem(p),
        logits(input.logits),
        bias(input.bias),
        given_ids(input.ids),
        given_weights(input.weights),
        ids(i64{tokens} * p.top_k),
        begin(p.local_experts + 1),
        slot_pick(i64{tokens} * p.top_k),
        pick_slot(i64{tokens} * p.top_k),
        weights(i64{tokens} * p.top_k),
        progress(route::progress_words(p.local_experts)),
        fault(std::vector<gpu::Fault>(1)),
        scratch(route::sort_scratch_bytes(p) / 4) {
    args.problem = p;
    args.tokens = tokens;
    if (input.ids.empty()) {
      args.in.logits = {logits.get(), format::Dtype::f32, tokens, p.experts, p.experts};
    } else {
      args.in.ids = {given_ids.get(), format::Dtype::i64, tokens, p.top_k, p.top_k};
      args.in.weights = {given_weights.get(), format::Dtype::f32, tokens, p.top_k, p.top_k};
    }
    args.in.bias = input.bias.empty() ? nullptr : bias.get();
    args.out = {ids.get(), weights.get(), begin.get(), slot_pick.get(), pick_slot.get()};
    args.out.progress = progress.get();
    args.fault = fault.get();
    args.chunk_counts = scratch.get();
  }

  void poison() {
    ids.poison(), begin.poison(), slot_pick.poison(), pick_slot.poison(), weights.poison(), scratch.poison();
    progress.poison();
  }
  Result read() const {
    return {gpu::to_status(fault.read()[0]),
            ids.read(),
            begin.read(),
            slot_pick.read(),
            pick_slot.read(),
            weights.read(),
            progress.read()};
  }

  Problem problem;
  Device<f32> logits, bias;
  Device<i64> given_ids;
  Device<f32> given_weights;
  Device<i32> ids, begin, slot_pick, pick_slot;
  Device<f32> weights;
  Device<u64> progress;
  Device<gpu::Fault> fault;
  Device<u32> scratch;
  route::DeviceSlots args;
};

// Equal but for an ulp of the weights (route/device.h); slots not in use keep their poison.
inline void expect_same(const Result& device, const Result& host, const std::string& what) {
  ASSERT_TRUE(host.status.ok()) << what << ": " << host.status.detail;
  EXPECT_TRUE(device.status.ok()) << what << ": " << device.status.detail;
  ASSERT_EQ(device.ids, host.ids) << what;
  EXPECT_EQ(device.begin, host.begin) << what;
  EXPECT_EQ(device.progress, host.progress) << what;
  EXPECT_EQ(device.pick_slot, host.pick_slot) << what;
  const i32 slots = host.begin.back();
  for (std::size_t i = 0; i < host.slot_pick.size(); ++i) {
    ASSERT_EQ(device.slot_pick[i], static_cast<i32>(i) < slots ? host.slot_pick[i] : poison<i32>()) << what << " " << i;
  }
  for (std::size_t i = 0; i < host.weights.size(); ++i) {
    ASSERT_LE(ulps(device.weights[i], host.weights[i]), 1) << what << ", weight " << i << ": " << device.weights[i];
  }
}

}  // namespace fourmoe::gpu_tests
