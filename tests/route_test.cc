// route: picks by formula, slots by expert.
#include "route/route.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "case.h"

namespace fourmoe::route {
namespace {

using format::Dtype;

struct Buffers {
  Buffers(const Problem& p, i32 tokens)
      : ids(tokens * p.top_k, -7),
        weights(tokens * p.top_k, NAN),
        begin(p.local_experts + 1),
        slot(tokens * p.top_k, -7),
        pick(tokens * p.top_k, -7) {
    out.ids = ids.data();
    out.weights = weights.data();
    out.expert_begin = begin.data();
    out.slot_pick = slot.data();
    out.pick_slot = pick.data();
  }
  std::vector<i32> ids;
  std::vector<f32> weights;
  std::vector<i32> begin, slot, pick;
  Out out;
};

Status pick_logits(const Problem& p, std::vector<f32> logits, const f32* bias, Buffers* b) {
  const i32 tokens = static_cast<i32>(logits.size()) / p.experts;
  In in;
  in.logits = {logits.data(), Dtype::f32, tokens, p.experts, p.experts};
  in.bias = bias;
  return pick(p, in, tokens, tbb_executor(2), b->out);
}

TEST(Route, SoftmaxTopKRenormalised) {
  const Problem p = cases::problem(16, 16, 4, 2);
  Buffers b(p, 1);
  ASSERT_TRUE(pick_logits(p, {std::log(1.0f), std::log(4.0f), std::log(2.0f), std::log(3.0f)}, nullptr, &b).ok());
  EXPECT_EQ(b.ids, (std::vector<i32>{1, 3}));
  EXPECT_NEAR(b.weights[0], 4.0 / 7.0, 1e-6);
  EXPECT_NEAR(b.weights[1], 3.0 / 7.0, 1e-6);
}

TEST(Route, SoftmaxWithoutRenormalisingKeepsShares) {
  Problem p = cases::problem(16, 16, 4, 2);
  p.routing.renormalise = false;
  p.routing.scale = 2.5f;
  Buffers b(p, 1);
  ASSERT_TRUE(pick_logits(p, {std::log(1.0f), std::log(4.0f), std::log(2.0f), std::log(3.0f)}, nullptr, &b).ok());
  EXPECT_NEAR(b.weights[0], 2.5 * 0.4, 1e-6);
  EXPECT_NEAR(b.weights[1], 2.5 * 0.3, 1e-6);
}

TEST(Route, BiasSelectsAndDoesNotWeigh) {
  Problem p = cases::problem(16, 16, 3, 1);
  p.routing.score = Score::sigmoid;
  p.routing.renormalise = false;
  const std::vector<f32> bias = {0.0f, 10.0f, 0.0f};
  Buffers b(p, 1);
  ASSERT_TRUE(pick_logits(p, {2.0f, 0.0f, 1.0f}, bias.data(), &b).ok());
  EXPECT_EQ(b.ids[0], 1);
  EXPECT_NEAR(b.weights[0], 0.5, 1e-6);
}

TEST(Route, SqrtSoftplus) {
  Problem p = cases::problem(16, 16, 2, 1);
  p.routing.score = Score::sqrt_softplus;
  p.routing.renormalise = false;
  Buffers b(p, 2);
  ASSERT_TRUE(pick_logits(p, {1.5f, -3.0f, 800.0f, 2.0f}, nullptr, &b).ok());
  EXPECT_NEAR(b.weights[0], std::sqrt(std::log1p(std::exp(1.5))), 1e-6);
  EXPECT_NEAR(b.weights[1], std::sqrt(800.0), 1e-4);
}

// Masking with 0 instead of -infinity would pick expert 4 or 5 here, since every choice value in the kept group is < 0.
TEST(Route, GroupsAreMaskedWithMinusInfinity) {
  Problem p = cases::problem(16, 16, 6, 2);
  p.routing.score = Score::sigmoid;
  p.routing.groups = 3;
  p.routing.groups_kept = 1;
  const std::vector<f32> bias(6, -2.0f);
  Buffers b(p, 1);
  ASSERT_TRUE(pick_logits(p, {0.0f, 0.1f, 3.0f, 2.0f, -1.0f, -2.0f}, bias.data(), &b).ok());
  EXPECT_EQ(b.ids, (std::vector<i32>{2, 3}));
  EXPECT_NEAR(b.weights[0] + b.weights[1], 1.0, 1e-6);
}

// Best single expert sits in group 0, best pair in group 1: group_best decides.
TEST(Route, GroupScoreSumsItsBest) {
  Problem p = cases::problem(16, 16, 4, 1);
  p.routing.score = Score::none;
  p.routing.groups = 2;
  p.routing.groups_kept = 1;
  Buffers two(p, 1);
  ASSERT_TRUE(pick_logits(p, {5.0f, 0.0f, 4.0f, 3.0f}, nullptr, &two).ok());
  EXPECT_EQ(two.ids[0], 2);
  p.routing.group_best = 1;
  Buffers one(p, 1);
  ASSERT_TRUE(pick_logits(p, {5.0f, 0.0f, 4.0f, 3.0f}, nullptr, &one).ok());
  EXPECT_EQ(one.ids[0], 0);
}

TEST(Route, TiesGoToTheLowerExpert) {
  const Problem p = cases::problem(16, 16, 64, 8);
  Buffers b(p, 3);
  ASSERT_TRUE(pick_logits(p, std::vector<f32>(3 * 64, 0.25f), nullptr, &b).ok());
  for (i32 i = 0; i < 24; ++i) EXPECT_EQ(b.ids[i], i % 8);
}

TEST(Route, RefusesLogitsThatAreNotNumbersAndNamesTheFirstToken) {
  const Problem p = cases::problem(16, 16, 4, 2);
  std::vector<f32> logits(4 * 100, 0.5f);
  logits[4 * 61 + 2] = NAN;
  logits[4 * 83] = INFINITY;
  Buffers b(p, 100);
  const Status status = pick_logits(p, logits, nullptr, &b);
  EXPECT_EQ(status.reason, Reason::value_not_finite);
  EXPECT_NE(status.detail.find("token 61 "), std::string::npos) << status.detail;
}

TEST(Route, MinusInfinityMasksAnExpert) {
  const Problem p = cases::problem(16, 16, 3, 2);
  Buffers b(p, 1);
  ASSERT_TRUE(pick_logits(p, {-INFINITY, 1.0f, 0.0f}, nullptr, &b).ok());
  EXPECT_EQ(b.ids, (std::vector<i32>{1, 2}));
}

TEST(Route, CopiesTheCallersPicksOfEitherWidth) {
  const Problem p = cases::problem(16, 16, 8, 2);
  std::vector<i64> ids = {7, -1, 3, 3};
  std::vector<u16> weights = {format::to_bf16(0.5f), format::to_bf16(NAN), format::to_bf16(1.0f),
                              format::to_bf16(2.0f)};
  In in;
  in.ids = {ids.data(), Dtype::i64, 2, 2, 2};
  in.weights = {weights.data(), Dtype::bf16, 2, 2, 2};
  Buffers b(p, 2);
  ASSERT_TRUE(pick(p, in, 2, tbb_executor(1), b.out).ok());
  EXPECT_EQ(b.ids, (std::vector<i32>{7, -1, 3, 3}));
  EXPECT_EQ(b.weights, (std::vector<f32>{0.5f, 0.0f, 1.0f, 2.0f}));
}

TEST(Route, RefusesIdsOutOfRange) {
  const Problem p = cases::problem(16, 16, 8, 1);
  for (const i64 bad : {i64{8}, i64{-2}, i64{1} << 40}) {
    std::vector<i64> ids = {0, bad};
    std::vector<f32> weights = {1.0f, 1.0f};
    In in;
    in.ids = {ids.data(), Dtype::i64, 2, 1, 1};
    in.weights = {weights.data(), Dtype::f32, 2, 1, 1};
    Buffers b(p, 2);
    const Status status = pick(p, in, 2, tbb_executor(1), b.out);
    EXPECT_EQ(status.reason, Reason::pick_out_of_range);
    EXPECT_NE(status.detail.find("[1, 0]"), std::string::npos) << status.detail;
  }
}

TEST(Route, SlotsAreSortedByExpertThenByPick) {
  Problem p = cases::problem(16, 16, 6, 3);
  p.first_expert = 2;
  p.local_experts = 3;
  const std::vector<i32> ids = {4, 0, 2, -1, 2, 2, 5, 3, 4};
  Buffers b(p, 3);
  b.ids = ids;
  b.out.ids = b.ids.data();
  sort(p, 3, b.out);
  EXPECT_EQ(b.begin, (std::vector<i32>{0, 3, 4, 6}));
  EXPECT_EQ(std::vector<i32>(b.slot.begin(), b.slot.begin() + 6), (std::vector<i32>{2, 4, 5, 7, 0, 8}));
  EXPECT_EQ(b.pick, (std::vector<i32>{4, -1, 0, -1, 1, 2, -1, 3, 5}));
}

TEST(Route, LogitsAreExactProducts) {
  std::mt19937 random(3);
  std::normal_distribution<f32> normal;
  const i64 tokens = 5, hidden = 48, experts = 19;
  std::vector<u16> x(tokens * hidden), w(experts * hidden);
  std::vector<f32> bias(experts), out(tokens * experts, NAN);
  for (u16& v : x) v = format::to_bf16(normal(random));
  for (u16& v : w) v = format::to_bf16(normal(random));
  for (f32& v : bias) v = normal(random);
  format::Matrix router;
  router.data = reinterpret_cast<const u8*>(w.data());
  router.data_stride = 2 * hidden;
  router.rows = experts;
  router.cols = hidden;
  router.encoding = format::Encoding::bf16;
  logits({x.data(), Dtype::bf16, tokens, hidden, hidden}, router, bias.data(), tbb_executor(2), out.data());
  for (i64 t = 0; t < tokens; ++t) {
    for (i64 e = 0; e < experts; ++e) {
      f64 sum = bias[e];
      for (i64 k = 0; k < hidden; ++k)
        sum += f64{format::from_bf16(x[t * hidden + k])} * format::from_bf16(w[e * hidden + k]);
      EXPECT_NEAR(out[t * experts + e], sum, 1e-6);
    }
  }
}

}  // namespace
}  // namespace fourmoe::route
