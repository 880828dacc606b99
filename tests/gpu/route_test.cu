// route on a device against the host's body: picks, slots, faults.
#include <gtest/gtest.h>

#include "routed.h"

namespace fourmoe::gpu_tests {
namespace {

using format::Dtype;
using route::kRefused;

struct Form {
  const char* name;
  Routing routing;
  f32 bias = 0.0f;  // standard deviation of the selection bias; 0 for none
  f32 bias_mean = 0.0f;
};

Routing routing(Score score, i32 groups, i32 kept, i32 best, bool renormalise, f32 scale) {
  return {score, groups, kept, best, renormalise, scale, false};
}

const std::vector<Form>& forms() {
  static const std::vector<Form> all = {
      {"softmax", routing(Score::softmax, 1, 1, 2, true, 1.0f)},
      {"softmax shares", routing(Score::softmax, 1, 1, 2, false, 2.5f), 0.01f},
      {"deepseek", routing(Score::sigmoid, 8, 4, 2, true, 2.5f), 0.1f},
      {"negative bias", routing(Score::sigmoid, 8, 4, 2, false, 1.0f), 0.1f, -3.0f},
      {"best of group", routing(Score::softmax, 8, 4, 1, false, 16.0f)},
      {"groups of one", routing(Score::none, 0, 0, 2, false, 1.0f)},  // groups = experts, half kept or top_k
      {"few groups", routing(Score::sqrt_softplus, 2, 1, 2, true, 1.5f), 0.2f},
      {"sqrt softplus", routing(Score::sqrt_softplus, 1, 1, 2, true, 1.5f), 0.2f},
      {"none", routing(Score::none, 1, 1, 2, false, 1.0f)},
  };
  return all;
}

// Runs both ways to launch and compares each with the host.
void check_device(const Problem& p, const Input& input, i32 tokens, const std::string& what) {
  const Result host = run_host(p, input, tokens);
  Routed device(p, input, tokens);
  ASSERT_TRUE(route::launch_slots(device.args, nullptr).ok());
  expect_same(device.read(), host, what + ", slots");
  device.poison();
  ASSERT_TRUE(route::launch_pick(device.args, nullptr).ok());
  ASSERT_TRUE(route::launch_sort(device.args, nullptr).ok());
  expect_same(device.read(), host, what + ", pick and sort");
}

void check_form(const Form& form, i32 experts, i32 top_k, i32 tokens) {
  Problem p = problem_of(experts, top_k, tokens);
  p.routing = form.routing;
  if (p.routing.groups == 0) p.routing.groups = experts, p.routing.groups_kept = std::max(experts / 2, top_k);
  if (p.routing.groups_kept * (experts / p.routing.groups) < top_k) return;  // contradictory
  Input input = random_logits(p, tokens, experts * 131 + top_k * 17 + tokens);
  std::mt19937_64 random(7);
  std::normal_distribution<f32> normal(form.bias_mean, form.bias);
  for (i32 e = 0; form.bias != 0.0f && e < experts; ++e) input.bias.push_back(e % 5 == 0 ? 0.25f : normal(random));
  const std::string sizes =
      " E" + std::to_string(experts) + " k" + std::to_string(top_k) + " T" + std::to_string(tokens);
  check_device(p, input, tokens, form.name + sizes);
}

TEST(DeviceRoute, EveryFormOfRouting) {
  FOURMOE_NEEDS_DEVICE();
  for (const Form& form : forms()) {
    for (const i32 experts : {8, 60, 128, 256, 1024}) {
      if (experts % std::max(form.routing.groups, 1) != 0) continue;
      for (const i32 top_k : {1, 8, 32}) {
        for (const i32 tokens : {1, 7, 64, 300}) {
          if (top_k <= experts) check_form(form, experts, top_k, tokens);
        }
      }
    }
  }
}

// Logits that f32 cannot tell apart, or that tie: what a screen in f32 may not decide.
Input close_logits(const Problem& p, i32 tokens, i32 kind) {
  std::mt19937_64 random(kind);
  std::normal_distribution<f32> normal;
  Input in;
  for (i32 i = 0; i < tokens * p.experts; ++i) {
    const i32 e = i % p.experts;
    switch (kind) {
      case 0: in.logits.push_back(1.0f + 1e-6f * static_cast<f32>(random() % 9)); break;  // more than a warp has lanes
      case 1: in.logits.push_back(0.5f); break;
      case 2: in.logits.push_back(0.01f * static_cast<f32>(e % (p.experts / p.routing.groups))); break;  // equal groups
      case 3: in.logits.push_back(normal(random) - 60.0f); break;
      case 4: in.logits.push_back(normal(random) * 600.0f); break;
      default: in.logits.push_back(random() % 3 == 0 ? -INFINITY : std::round(4.0f * normal(random)) / 4.0f);
    }
    if (e == 3 && kind == 5) in.logits.back() = 1.0f;  // never all -infinity
  }
  return in;
}

TEST(DeviceRoute, CloseCalls) {
  FOURMOE_NEEDS_DEVICE();
  for (const Form& form : forms()) {
    if (form.routing.groups == 0) continue;
    for (i32 kind = 0; kind < 6; ++kind) {
      for (const i32 experts : {64, 256, 512}) {
        Problem p = problem_of(experts, 8, 24);
        p.routing = form.routing;
        Input input = close_logits(p, 24, kind);
        check_device(p, input, 24, std::string(form.name) + ", close " + std::to_string(kind));
        input.bias.assign(experts, 1e4f);  // takes most bits of an f32 score
        check_device(p, input, 24, std::string(form.name) + ", far bias " + std::to_string(kind));
      }
    }
  }
}

// Every kernel once or twice, for sanitizers: they take minutes for the rest.
TEST(DeviceRoute, SmallCalls) {
  FOURMOE_NEEDS_DEVICE();
  for (const i32 tokens : {3, 20, 150}) {
    for (const i32 form : {0, 2, 5, 6}) check_form(forms()[form], 64, 8, tokens);
  }
}

TEST(DeviceRoute, ManyTokens) {
  FOURMOE_NEEDS_DEVICE();
  check_form(forms()[2], 256, 8, 5000);
  check_form(forms()[0], 128, 8, 20000);  // more picks than chunks of 1024
  check_form(forms()[7], 1024, 32, 5000);
}

TEST(DeviceRoute, LogitsOfEveryType) {
  FOURMOE_NEEDS_DEVICE();
  const Problem p = problem_of(40, 6, 33);
  Input input = random_logits(p, 33, 3);
  std::vector<u16> halves[2];
  for (f32& logit : input.logits) logit = format::from_bf16(format::to_bf16(std::clamp(logit, -100.0f, 100.0f)));
  for (const f32 logit : input.logits) halves[0].push_back(format::to_bf16(logit));
  const Result host = run_host(p, input, 33);
  Routed device(p, input, 33);
  const Device<u16> bf16(halves[0]);
  device.args.in.logits = {bf16.get(), Dtype::bf16, 33, 40, 40};
  ASSERT_TRUE(route::launch_slots(device.args, nullptr).ok());
  expect_same(device.read(), host, "bf16");
  for (f32& logit : input.logits) {
    halves[1].push_back(format::to_f16(logit));
    logit = format::from_f16(halves[1].back());
  }
  const Device<u16> f16(halves[1]);
  device.poison();
  device.args.in.logits = {f16.get(), Dtype::f16, 33, 40, 40};
  ASSERT_TRUE(route::launch_slots(device.args, nullptr).ok());
  expect_same(device.read(), run_host(p, input, 33), "f16");
}

TEST(DeviceRoute, GivenPicks) {
  FOURMOE_NEEDS_DEVICE();
  for (const i32 tokens : {1, 7, 300, 5000}) {
    for (const i32 top_k : {1, 8, 32}) {
      Problem p = problem_of(256, top_k, tokens);
      Input input = random_ids(p, tokens, tokens + top_k);
      check_device(p, input, tokens, "ids T" + std::to_string(tokens));
      p.first_expert = 64, p.local_experts = 50;
      check_device(p, input, tokens, "local ids T" + std::to_string(tokens));
      std::fill(input.ids.begin(), input.ids.end(), 77);
      check_device(p, input, tokens, "one expert T" + std::to_string(tokens));
      std::fill(input.ids.begin(), input.ids.end(), -1);
      check_device(p, input, tokens, "no picks T" + std::to_string(tokens));
    }
  }
}

TEST(DeviceRoute, GivenPicksOfEveryType) {
  FOURMOE_NEEDS_DEVICE();
  const Problem p = problem_of(32, 4, 50);
  const Input input = random_ids(p, 50, 9);
  const Result host = run_host(p, input, 50);
  std::vector<i32> ids(50 * 5, 1 << 20);  // rows 5 apart: the fifth is never read
  std::vector<u16> f16(50 * 6), bf16(50 * 6);
  for (i32 i = 0; i < 200; ++i) {
    ids[i / 4 * 5 + i % 4] = static_cast<i32>(input.ids[i]);
    f16[i / 4 * 6 + i % 4] = format::to_f16(input.weights[i]);
    bf16[i / 4 * 6 + i % 4] = format::to_bf16(input.weights[i]);
  }
  const Device<i32> device_ids(ids);
  const Device<u16> device_f16(f16), device_bf16(bf16);
  for (const Dtype dtype : {Dtype::f16, Dtype::bf16}) {
    Routed device(p, input, 50);
    device.args.in.ids = {device_ids.get(), Dtype::i32, 50, 4, 5};
    device.args.in.weights = {(dtype == Dtype::f16 ? device_f16 : device_bf16).get(), dtype, 50, 4, 6};
    ASSERT_TRUE(route::launch_slots(device.args, nullptr).ok());
    expect_same(device.read(), host, "strided");
  }
}

TEST(DeviceRoute, ZeroTokensLeaveNoSlots) {
  FOURMOE_NEEDS_DEVICE();
  Routed device(problem_of(8, 2, 4), {}, 0);
  ASSERT_TRUE(route::launch_slots(device.args, nullptr).ok());
  const Result r = device.read();
  EXPECT_TRUE(r.status.ok());
  EXPECT_EQ(r.begin, std::vector<i32>(9, 0));
  EXPECT_EQ(r.progress, std::vector<u64>(route::progress_words(8), 0));
}

// The host's sentence about the lowest bad token; that token has no slots, and all others have theirs.
void check_refused(const Problem& p, const Input& bad, i32 tokens, const std::vector<i32>& tokens_refused) {
  const Result host = run_host(p, bad, tokens);
  ASSERT_FALSE(host.status.ok());
  Routed device(p, bad, tokens);
  for (const bool together : {true, false}) {
    device.poison();
    device.fault.write(std::vector<gpu::Fault>(1));
    if (together) ASSERT_TRUE(route::launch_slots(device.args, nullptr).ok());
    else ASSERT_TRUE(route::launch_pick(device.args, nullptr).ok() && route::launch_sort(device.args, nullptr).ok());
    const Result r = device.read();
    EXPECT_EQ(r.status.reason, host.status.reason);
    EXPECT_EQ(r.status.detail, host.status.detail);
    i32 slots = 0;
    for (i32 i = 0; i < tokens * p.top_k; ++i) {
      const bool refused = std::count(tokens_refused.begin(), tokens_refused.end(), i / p.top_k) != 0;
      ASSERT_EQ(r.pick_slot[i] == kRefused, refused) << i;
      ASSERT_EQ(r.ids[i] == kRefused, refused) << i;
      if (refused) ASSERT_EQ(r.weights[i], 0.0f);
      slots += r.pick_slot[i] >= 0;
    }
    EXPECT_EQ(r.begin.back(), slots);
  }
}

TEST(DeviceRoute, RefusedLogits) {
  FOURMOE_NEEDS_DEVICE();
  for (const i32 tokens : {40, 1000}) {
    const Problem p = problem_of(64, 6, tokens);
    Input input = random_logits(p, tokens, 5);
    input.logits[38 * 64 + 63] = NAN;
    check_refused(p, input, tokens, {38});
    input.logits[31 * 64 + 40] = INFINITY;
    std::fill_n(input.logits.begin() + 33 * 64, 64, -INFINITY);
    check_refused(p, input, tokens, {31, 33, 38});
  }
}

TEST(DeviceRoute, RefusedIds) {
  FOURMOE_NEEDS_DEVICE();
  for (const i32 tokens : {40, 1000}) {
    const Problem p = problem_of(64, 6, tokens);
    Input input = random_ids(p, tokens, 5);
    input.ids[39 * 6 + 5] = 64;
    check_refused(p, input, tokens, {39});
    input.ids[20 * 6 + 4] = -2;
    input.ids[20 * 6 + 3] = (i64{1} << 32) + 5;  // 5 if it were cut to 32 bits
    check_refused(p, input, tokens, {20, 39});
  }
}

TEST(DeviceRoute, AFaultStaysUntilItIsCleared) {
  FOURMOE_NEEDS_DEVICE();
  const Problem p = problem_of(16, 2, 8);
  Input input = random_ids(p, 8, 5);
  const std::vector<i64> good = input.ids;
  input.ids[7] = 99;
  Routed device(p, input, 8);
  ASSERT_TRUE(route::launch_slots(device.args, nullptr).ok());
  const std::string sentence = device.read().status.detail;
  EXPECT_EQ(sentence, "topk_ids[3, 1] is 99, expected -1 to 15");
  device.given_ids.write(good);
  ASSERT_TRUE(route::launch_slots(device.args, nullptr).ok());
  EXPECT_EQ(device.read().status.detail, sentence);
  device.fault.write(std::vector<gpu::Fault>(1));
  ASSERT_TRUE(route::launch_slots(device.args, nullptr).ok());
  EXPECT_TRUE(device.read().status.ok());
}

TEST(DeviceRoute, SameBitsEveryTime) {
  FOURMOE_NEEDS_DEVICE();
  for (const i32 tokens : {64, 2000}) {
    Problem p = problem_of(256, 8, tokens);
    p.routing = forms()[2].routing;
    Routed device(p, random_logits(p, tokens, 1), tokens);
    ASSERT_TRUE(route::launch_slots(device.args, nullptr).ok());
    const Result first = device.read();
    for (i32 i = 0; i < 1000; ++i) {
      device.poison();
      ASSERT_TRUE(route::launch_slots(device.args, nullptr).ok());
      const Result again = device.read();
      ASSERT_EQ(again.ids, first.ids);
      ASSERT_EQ(again.begin, first.begin);
      ASSERT_EQ(again.slot_pick, first.slot_pick);
      ASSERT_EQ(again.pick_slot, first.pick_slot);
      ASSERT_EQ(0, std::memcmp(again.weights.data(), first.weights.data(), first.weights.size() * 4));
    }
  }
}

TEST(DeviceRoute, AGraphFollowsTheRouting) {
  FOURMOE_NEEDS_DEVICE();
  for (const i32 tokens : {20, 700}) {
    const Problem p = problem_of(128, 8, tokens);
    Routed device(p, random_logits(p, tokens, 0), tokens);
    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t executable;
    expect_cuda(cudaStreamCreate(&stream));
    expect_cuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    ASSERT_TRUE(route::launch_slots(device.args, stream).ok());
    expect_cuda(cudaStreamEndCapture(stream, &graph));
    expect_cuda(cudaGraphInstantiate(&executable, graph, 0));
    for (u64 seed = 1; seed <= 100; ++seed) {
      const Input input = random_logits(p, tokens, seed);
      device.logits.write(input.logits);
      device.poison();
      expect_cuda(cudaGraphLaunch(executable, stream));
      expect_same(device.read(), run_host(p, input, tokens), "replay " + std::to_string(seed));
    }
    expect_cuda(cudaGraphExecDestroy(executable));
    expect_cuda(cudaGraphDestroy(graph));
    expect_cuda(cudaStreamDestroy(stream));
  }
}

}  // namespace
}  // namespace fourmoe::gpu_tests
