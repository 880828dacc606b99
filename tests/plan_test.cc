// plan: what is accepted, what is refused and why, and which steps cover the layer.
#include "plan.h"

#include <gtest/gtest.h>

#include "backends/list.h"
#include "case.h"

namespace fourmoe::plan {
namespace {

Problem usual() {
  Problem p = cases::problem(64, 48, 8, 2);
  p.max_tokens = 32;
  return p;
}

std::string steps(const Plan& plan) {
  std::string names;
  for (const Step* s : plan.steps)
    names += (names.empty() ? "" : " ") + std::string(s->room) + "." + std::string(s->name);
  return names;
}

TEST(Plan, AutoTakesTheFirstRoomOfTheList) {
  Plan plan;
  ASSERT_TRUE(make(usual(), machine(), {}, &plan).ok());
  EXPECT_EQ(steps(plan), "host.route cpu.gemm1 cpu.gemm2 host.combine");
  EXPECT_EQ(plan.backend, "cpu");
  EXPECT_GT(plan.workspace_bytes, 0);
}

TEST(Plan, TheReferenceIsOneStep) {
  Plan plan;
  ASSERT_TRUE(make(usual(), machine(), {"reference", {}}, &plan).ok());
  EXPECT_EQ(plan.backend, "reference");
  EXPECT_EQ(steps(plan), "reference.whole");
}

TEST(Plan, APinnedStepTakesItsStage) {
  const Step* pin = nullptr;
  for (const Step* s : backends::list()) {
    if (s->room == "reference" && s->name == "gemm2") pin = s;
  }
  Plan plan;
  ASSERT_TRUE(make(usual(), machine(), {"cpu", {pin}}, &plan).ok());
  EXPECT_EQ(steps(plan), "host.route cpu.gemm1 reference.gemm2 host.combine");
}

TEST(Plan, EveryCandidateIsListedWithItsVerdict) {
  Plan plan;
  ASSERT_TRUE(make(usual(), machine(), {"cpu", {}}, &plan).ok());
  ASSERT_EQ(plan.candidates.size(), backends::list().size());
  for (const Candidate& c : plan.candidates) {
    if (c.chosen) {
      EXPECT_TRUE(c.verdict.accepted());
    }
    if (!c.verdict.accepted()) {
      EXPECT_FALSE(c.verdict.detail.empty()) << c.step->room << c.step->name;
    }
    if (c.step->room == "reference") {
      EXPECT_EQ(c.verdict.reason, Reason::not_asked_for);
    }
  }
}

TEST(Plan, AnUnknownBackendIsRefusedWithTheKnownOnes) {
  Plan plan;
  const Status status = make(usual(), machine(), {"gpu", {}}, &plan);
  EXPECT_EQ(status.reason, Reason::argument_invalid);
  EXPECT_NE(status.detail.find("cpu"), std::string::npos) << status.detail;
  EXPECT_NE(status.detail.find("reference"), std::string::npos) << status.detail;
  EXPECT_FALSE(make(usual(), machine(), {"host", {}}, &plan).ok());
}

struct Bad {
  const char* name;
  void (*change)(Problem*);
  Reason reason;
  const char* words;
};

void PrintTo(const Bad& bad, std::ostream* out) { *out << bad.name; }

class BadProblem : public testing::TestWithParam<Bad> {};

TEST_P(BadProblem, IsRefusedWithWhatWouldPass) {
  Problem p = usual();
  GetParam().change(&p);
  Plan plan;
  const Status status = make(p, machine(), {}, &plan);
  EXPECT_EQ(status.reason, GetParam().reason);
  EXPECT_NE(status.detail.find(GetParam().words), std::string::npos) << status.detail;
}

INSTANTIATE_TEST_SUITE_P(
    Plan, BadProblem,
    testing::Values(
        Bad{"hidden", [](Problem* p) { p->hidden = 70; }, Reason::shape_unsupported, "80 would pass"},
        Bad{"inter", [](Problem* p) { p->inter = 232; }, Reason::shape_unsupported, "240 would pass"},
        Bad{"zero", [](Problem* p) { p->inter = 0; }, Reason::shape_unsupported, "intermediate"},
        Bad{"experts", [](Problem* p) { p->experts = p->local_experts = 1025; }, Reason::experts_unsupported,
            "1 to 1024"},
        Bad{"top_k", [](Problem* p) { p->top_k = 9; }, Reason::picks_unsupported, "1 to 8"},
        Bad{"locals", [](Problem* p) { p->first_expert = 4; }, Reason::experts_unsupported, "local experts 4 to 11"},
        Bad{"groups", [](Problem* p) { p->routing.groups = 3; }, Reason::routing_unsupported, "3 groups"},
        Bad{"kept",
            [](Problem* p) {
              p->routing.groups = 8;
              p->routing.groups_kept = 1;
            },
            Reason::routing_unsupported, "hold 1"},
        Bad{"input_weight", [](Problem* p) { p->routing.weight_on_input = true; }, Reason::routing_unsupported,
            "top-k 1"},
        Bad{"mxfp4", [](Problem* p) { p->encoding = format::Encoding::mxfp4; }, Reason::shape_unsupported, "32"},
        Bad{"dense_w4a4",
            [](Problem* p) {
              p->encoding = format::Encoding::bf16;
              p->precision = Precision::w4a4;
            },
            Reason::precision_unsupported, "w4a16 would pass"},
        Bad{"tokens", [](Problem* p) { p->max_tokens = -1; }, Reason::argument_invalid, "max_tokens"}),
    [](const auto& at) { return at.param.name; });

}  // namespace
}  // namespace fourmoe::plan
