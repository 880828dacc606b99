// plan: what is accepted, what is refused and why, and which steps cover the layer.
#include "plan.h"

#include <gtest/gtest.h>

#include "backends/list.h"
#include "backends/sm90/whole.h"
#include "case.h"
#include "route/device.h"

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

// An H200, made up: plans for a GPU need none.
Machine with_h200(i32 device) {
  Machine m = machine();
  m.cuda = true;
  m.devices = {{0, "made-up H200", 9, 0, 132, i64{141} << 30, i64{60} << 20}};
  m.device = device;
  return m;
}

const Candidate& find(const Plan& plan, std::string_view room, std::string_view name) {
  for (const Candidate& c : plan.candidates) {
    if (c.step->room == room && c.step->name == name) return c;
  }
  throw Error(Reason::internal, "no such step");
}

TEST(DevicePlan, IsAllOnTheDevice) {
  for (const char* backend : {"auto", "sm90"}) {
    for (const Precision precision : {Precision::w4a16, Precision::w4a4}) {
      Problem p = usual();
      p.precision = precision;
      Plan plan;
      ASSERT_TRUE(make(p, with_h200(0), {backend, {}}, &plan).ok());
      EXPECT_EQ(steps(plan), "device.route sm90.gemm1 sm90.gemm2 device.combine");
      EXPECT_EQ(plan.backend, "sm90");
      EXPECT_EQ(plan.machine.device, 0);
      for (const Step* s : plan.steps) EXPECT_EQ(s->place, Place::device);
      const Candidate& host = find(plan, "cpu", "gemm1");
      EXPECT_EQ(host.verdict.reason, Reason::not_asked_for);
      EXPECT_NE(host.verdict.detail.find("device host would pass"), std::string::npos) << host.verdict.detail;
    }
  }
}

TEST(DevicePlan, RefusesInt8) {
  for (const char* backend : {"auto", "sm90"}) {
    for (const i32 tokens : {4, 1024}) {
      Problem p = usual();
      p.precision = Precision::w4a8_int8;
      p.max_tokens = tokens;
      Plan plan;
      const Status status = make(p, with_h200(0), {backend, {}}, &plan);
      EXPECT_EQ(status.reason, Reason::no_plan);
      EXPECT_NE(status.detail.find("w4a16 or w4a4, or device host, would pass"), std::string::npos) << status.detail;
      EXPECT_EQ(find(plan, "sm90", "gemm1").verdict.reason, Reason::precision_unsupported);
      EXPECT_EQ(find(plan, "sm90", "whole").verdict.reason, Reason::precision_unsupported);
    }
  }
}

// The rows between stages are those of w4a16: what becomes int8 is not kept.
TEST(Plan, Int8NeedsNoMoreMemoryThanW4a16) {
  Problem p = usual();
  Plan exact, int8;
  ASSERT_TRUE(make(p, machine(), {"reference", {}}, &exact).ok());
  p.precision = Precision::w4a8_int8;
  ASSERT_TRUE(make(p, machine(), {"reference", {}}, &int8).ok());
  EXPECT_EQ(int8.workspace_bytes, exact.workspace_bytes);
}

TEST(DevicePlan, FewTokensTakeOneStep) {
  Problem p = usual();
  p.experts = p.local_experts = 64;
  p.max_tokens = 64;
  Plan plan;
  ASSERT_TRUE(make(p, with_h200(0), {}, &plan).ok());
  EXPECT_EQ(steps(plan), "sm90.whole");
  p.max_tokens = 65;
  ASSERT_TRUE(make(p, with_h200(0), {}, &plan).ok());
  EXPECT_EQ(steps(plan), "device.route sm90.gemm1 sm90.gemm2 device.combine");
  EXPECT_NE(find(plan, "sm90", "whole").verdict.detail.find("up to 64 would pass"), std::string::npos);
  p.max_tokens = 48;
  p.top_k = 11;
  ASSERT_TRUE(make(p, with_h200(0), {}, &plan).ok());
  EXPECT_EQ(steps(plan), "device.route sm90.gemm1 sm90.gemm2 device.combine");
  EXPECT_NE(find(plan, "sm90", "whole").verdict.detail.find("up to 46 would pass"), std::string::npos);
}

TEST(DevicePlan, FewTokensTakeOneStepWherePicksWantRowsOfTheirOwn) {
  for (const bool weighted : {false, true}) {
    Problem p = usual();
    p.experts = p.local_experts = 64;
    p.max_tokens = 8;
    if (weighted) p.routing.weight_on_input = true, p.top_k = 1;
    else p.precision = Precision::w4a4;
    Plan own, usual_plan;
    ASSERT_TRUE(make(p, with_h200(0), {}, &own).ok());
    EXPECT_EQ(steps(own), "sm90.whole");
    p.precision = Precision::w4a16;
    p.routing.weight_on_input = false;
    ASSERT_TRUE(make(p, with_h200(0), {}, &usual_plan).ok());
    const i64 rows = i64{sm90::most_hits(p) * sm90::kHitTokens - p.max_tokens} * p.hidden * 2;
    EXPECT_NEAR(own.workspace_bytes - usual_plan.workspace_bytes, rows, 1024);
  }
}

// Rows of picks are worth it up to 3.1 an expert, where the usual rows are up to 4.2.
TEST(DevicePlan, RowsOfPicksEndSooner) {
  for (const i32 tokens : {48, 64}) {
    for (const Precision precision : {Precision::w4a16, Precision::w4a4}) {
      Problem p = cases::problem(4096, 1536, 64, 4);
      p.max_tokens = tokens;
      p.precision = precision;
      Plan plan;
      ASSERT_TRUE(make(p, with_h200(0), {}, &plan).ok());
      const bool whole = precision == Precision::w4a16 || tokens == 48;
      EXPECT_EQ(steps(plan) == "sm90.whole", whole) << tokens << " tokens, " << steps(plan);
    }
  }
}

// Where an expert would be multiplied again and again: the rule takes the split steps, a choice what it names.
TEST(DevicePlan, ManyTokensAnExpertTakeTheSplitSteps) {
  Problem p = usual();
  p.max_tokens = 16;  // 4 picks an expert
  Plan plan;
  ASSERT_TRUE(make(p, with_h200(0), {}, &plan).ok());
  EXPECT_EQ(steps(plan), "device.route sm90.gemm1 sm90.gemm2 device.combine");
  ASSERT_TRUE(make(p, with_h200(0), {"auto", {}, {"sm90.whole"}}, &plan).ok());
  EXPECT_EQ(steps(plan), "sm90.whole");
  p.max_tokens = 8;
  ASSERT_TRUE(make(p, with_h200(0), {}, &plan).ok());
  EXPECT_EQ(steps(plan), "sm90.whole");
  p = cases::problem(2048, 768, 128, 8);
  p.max_tokens = 64;  // 4 picks, too, but tiles enough
  ASSERT_TRUE(make(p, with_h200(0), {}, &plan).ok());
  EXPECT_EQ(steps(plan), "sm90.whole");
}

// What a step kept for a workspace is where it was after another choice, and of the same size.
TEST(DevicePlan, KeepsTheSameMemoryWhateverIsChosen) {
  Problem p = usual();
  i64 kept = 0;
  for (const i32 tokens : {1, 3, 8, 64}) {
    p.max_tokens = tokens;
    Plan whole, split;
    ASSERT_TRUE(make(p, with_h200(0), {"auto", {}, {"sm90.whole"}}, &whole).ok());
    ASSERT_TRUE(
        make(p, with_h200(0), {"auto", {}, {"device.route", "sm90.gemm1", "sm90.gemm2", "device.combine"}}, &split)
            .ok());
    EXPECT_GT(whole.kept_bytes, 0);
    EXPECT_EQ(split.kept_bytes, whole.kept_bytes);
    EXPECT_EQ(whole.kept, std::vector<i64>{0});
    EXPECT_EQ(split.kept, std::vector<i64>(4, -1));
    EXPECT_TRUE(whole.takes_shared());
    EXPECT_FALSE(split.takes_shared());
    if (tokens > 1) {
      EXPECT_EQ(whole.kept_bytes, kept);  // of every size: they share it
    }
    kept = whole.kept_bytes;
  }
  p.max_tokens = 65;
  Plan many;
  ASSERT_TRUE(make(p, with_h200(0), {}, &many).ok());
  EXPECT_EQ(many.kept_bytes, 0);
}

TEST(DevicePlan, APlanForTheHostListsTheDevicesSteps) {
  Plan plan;
  ASSERT_TRUE(make(usual(), with_h200(-1), {}, &plan).ok());
  EXPECT_EQ(plan.backend, "cpu");
  const Verdict& could = find(plan, "sm90", "gemm1").verdict;
  EXPECT_EQ(could.reason, Reason::not_asked_for);
  EXPECT_NE(could.detail.find("device cuda:0 would pass"), std::string::npos) << could.detail;

  Machine bare = with_h200(-1);
  bare.devices.clear();
  ASSERT_TRUE(make(usual(), bare, {}, &plan).ok());
  const Verdict& missing = find(plan, "sm90", "gemm1").verdict;
  EXPECT_EQ(missing.reason, Reason::device_missing);
  EXPECT_NE(missing.detail.find("9.0 would pass"), std::string::npos) << missing.detail;

  bare.cuda = false;
  ASSERT_TRUE(make(usual(), bare, {}, &plan).ok());
  EXPECT_EQ(find(plan, "device", "route").verdict.reason, Reason::not_built);
}

TEST(DevicePlan, RefusesWhatTheRoomCannot) {
  const auto refused = [](Machine m, void (*change)(Problem*), const char* backend = "auto") {
    Problem p = usual();
    change(&p);
    Plan plan;
    const Status status = make(p, m, {backend, {}}, &plan);
    return std::string(reason_name(status.reason)) + ": " + status.detail;
  };
  const auto nothing = [](Problem*) {};
  const auto expect = [](const std::string& found, const char* words) {
    EXPECT_NE(found.find(words), std::string::npos) << found;
  };
  expect(refused(with_h200(0), [](Problem* p) { p->encoding = format::Encoding::f16; }),
         "weights are f16; nvfp4, mxfp4 or bf16 would pass");
  expect(refused(with_h200(0), [](Problem* p) { p->encoding = format::Encoding::fp8; }), "weights are fp8");
  expect(refused(with_h200(0), nothing, "cpu"), "device host it would pass");
  expect(refused(with_h200(-1), nothing, "sm90"), "device cuda:0 it would pass");
  expect(refused(with_h200(1), nothing), "device_missing: device cuda:1 was asked for, this machine has 1 GPUs");
  Machine older = with_h200(0);
  older.devices[0].major = 8;
  expect(refused(older, nothing), "has compute capability 8.0; 9.0 would pass");
  Machine unbuilt = with_h200(0);
  unbuilt.cuda = false;
  unbuilt.devices.clear();
  expect(refused(unbuilt, nothing), "not_built: device cuda:0 was asked for");
}

// What passes between a GPU's stages are rows of bf16, in w4a4 too; the host passes codes.
TEST(DevicePlan, TheWorkspaceGrowsWithTheTokens) {
  Problem p = usual();
  p.max_tokens = 1024;
  Plan host, device;
  ASSERT_TRUE(make(p, with_h200(-1), {"cpu", {}}, &host).ok());
  ASSERT_TRUE(make(p, with_h200(0), {}, &device).ok());
  const i64 slots = i64{p.max_tokens} * p.top_k;
  EXPECT_GE(device.workspace_bytes, slots * (2 * p.hidden + 2 * p.inter + 4 * p.hidden));
  const i64 w4a16 = device.workspace_bytes;
  p.precision = Precision::w4a4;
  ASSERT_TRUE(make(p, with_h200(0), {}, &device).ok());
  // Beside them f32 of gemm1 before they are quantised, where w4a16 has nothing but the counts of the sort.
  EXPECT_GE(device.workspace_bytes, w4a16 + slots * 4 * p.inter - route::sort_scratch_bytes(p));
  EXPECT_LE(device.workspace_bytes, w4a16 + slots * 4 * p.inter);
  // Two planes: those of the tokens lie where gemm2's result comes later.
  p.precision = Precision::w4a16;
  p.activations = format::Dtype::f16;
  ASSERT_TRUE(make(p, with_h200(0), {}, &device).ok());
  EXPECT_GE(device.workspace_bytes, slots * (4 * p.hidden + 4 * p.inter));
  EXPECT_LE(device.workspace_bytes, w4a16 + slots * (2 * p.inter - 2 * p.hidden));
}

TEST(Machine, DevicesHaveNames) {
  EXPECT_EQ(parse_device("host"), -1);
  EXPECT_EQ(parse_device("cuda"), 0);
  EXPECT_EQ(parse_device("cuda:3"), 3);
  EXPECT_EQ(parse_device("2"), 2);
  for (const char* word : {"", "gpu", "cuda:", "cuda:-1", "-1", "cuda:1x", "cuda:99999999999", "host:0"}) {
    EXPECT_THROW(parse_device(word), Error) << word;
  }
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
        Bad{"dense_w4a8_int8",
            [](Problem* p) {
              p->encoding = format::Encoding::bf16;
              p->precision = Precision::w4a8_int8;
            },
            Reason::precision_unsupported, "w4a8_int8 needs 4-bit weights, these are bf16; w4a16 would pass"},
        Bad{"tokens", [](Problem* p) { p->max_tokens = -1; }, Reason::argument_invalid, "max_tokens"}),
    [](const auto& at) { return at.param.name; });

}  // namespace
}  // namespace fourmoe::plan
