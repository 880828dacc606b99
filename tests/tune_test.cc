// Measured choices: which plan a size takes and why, the race that finds them, and the sizes of a layer's plans.
#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "backends/sm90/tiles.h"
#include "backends/sm90/whole.h"
#include "case.h"
#include "scratch.h"
#include "tune/race.h"
#include "tune/sizes.h"

namespace fourmoe::tune {
namespace {

// An H200, made up: plans for a GPU need none.
Machine with_h200() {
  Machine m = machine();
  m.cuda = true;
  m.devices = {{0, "made-up H200", 9, 0, 132, i64{141} << 30, i64{60} << 20}};
  m.device = 0;
  return m;
}

Problem usual(i32 max_tokens) {
  Problem p = cases::problem(2048, 768, 128, 8);
  p.max_tokens = max_tokens;
  return p;
}

const plan::Choice kSplit = {"device.route", "sm90.gemm1", "sm90.gemm2", "device.combine"};
const plan::Choice kWhole = {"sm90.whole"};

Sizes sizes(const Problem& problem, const std::string& path, const plan::Request& request = {}) {
  Known known(path);
  Sizes made;
  throw_unless_ok(Sizes::make(problem, with_h200(), request, &known, &made));
  return made;
}

// A file with one layer's choices.
class Stored {
 public:
  explicit Stored(const Problem& problem, const std::map<i32, plan::Choice>& choices) {
    Book book;
    Section& section = book[key_of(problem, with_h200())];
    section.copy_bytes_per_second = 4e12;
    for (const auto& [bucket, choice] : choices) section.buckets[bucket] = {choice, 1e-5, 2e-5};
    store(path(), book);
  }
  std::string path() const { return (scratch_ / "tuning.json").string(); }

 private:
  test::Scratch scratch_;
};

TEST(Buckets, ArePowersOfTwoAndHalfWayBetween) {
  const std::vector<i32> known = {1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96};
  std::size_t at = 0;
  for (i32 tokens = 1; tokens <= 96; ++tokens) {
    if (tokens > known[at]) ++at;
    EXPECT_EQ(plan::bucket_of(tokens), known[at]) << tokens;
  }
  EXPECT_EQ(plan::bucket_of(0), 1);
  EXPECT_EQ(plan::bucket_of(32768), 32768);
  EXPECT_EQ(plan::bucket_of(i64{1} << 40), 1 << 30);
}

TEST(Sizes, WithoutMeasurementsTheRuleDecides) {
  const Sizes made = sizes(usual(100), "");
  ASSERT_EQ(made.all().size(), 14u);  // 1, 2, 3, 4, 6, ... 96, 100
  EXPECT_EQ(made.most().problem.max_tokens, 100);
  EXPECT_FALSE(made.most().candidates.empty());
  for (const Sized& size : made.all()) {
    EXPECT_EQ(size.source, Source::rule);
    EXPECT_FALSE(size.measured);
    EXPECT_LE(size.plan.workspace_bytes, made.workspace_bytes());
  }
  EXPECT_EQ(plan::choice_of(made.at(64).plan), kWhole);
  EXPECT_EQ(plan::choice_of(made.at(65).plan), kSplit);
  EXPECT_EQ(made.at(33).plan.problem.max_tokens, 48);
  EXPECT_EQ(made.at(97).plan.problem.max_tokens, 100);
}

TEST(Sizes, OfTheHostAreOne) {
  Known known("");
  Sizes made;
  throw_unless_ok(Sizes::make(usual(100), machine(), {}, &known, &made));
  EXPECT_EQ(made.all().size(), 1u);
  EXPECT_EQ(made.at(1).plan.problem.max_tokens, 100);
}

TEST(Sizes, FollowWhatWasMeasured) {
  const Problem p = usual(96);
  const std::string tile = "sm90.gemm1 4x2x5:24,16,8";
  const Stored stored(p, {{4, kSplit}, {96, {"device.route", tile, "sm90.gemm2", "device.combine"}}});
  const Sizes made = sizes(p, stored.path());
  EXPECT_EQ(made.at(3).source, Source::rule);
  EXPECT_EQ(made.at(4).source, Source::tuned);
  EXPECT_EQ(plan::choice_of(made.at(4).plan), kSplit);
  EXPECT_EQ(made.at(4).measured->seconds, 1e-5);
  EXPECT_EQ(plan::choice_of(made.at(8).plan), kWhole);
  EXPECT_EQ(made.at(8).source, Source::rule);
  const plan::Plan& named = made.at(96).plan;
  EXPECT_EQ(plan::choice_of(named)[1], tile);
  EXPECT_EQ(sm90::name_of(sm90::kTileShapes[named.variants[1].number]), "4x2x5:24,16,8");
  EXPECT_EQ(named.variants[2].number, -1);
}

// A choice of another machine, shape, precision, encoding or revision is none; neither is one that pins overrule.
TEST(Sizes, LeaveWhatWasMeasuredForSomethingElse) {
  const Problem p = usual(4);
  const Stored stored(p, {{4, kSplit}});
  ASSERT_EQ(sizes(p, stored.path()).at(4).source, Source::tuned);
  const auto source = [&](void (*change)(Problem*)) {
    Problem other = p;
    change(&other);
    return sizes(other, stored.path()).at(4).source;
  };
  EXPECT_EQ(source([](Problem* q) { q->hidden = 4096; }), Source::rule);
  EXPECT_EQ(source([](Problem* q) { q->top_k = 4; }), Source::rule);
  EXPECT_EQ(source([](Problem* q) { q->local_experts = 64; }), Source::rule);
  EXPECT_EQ(source([](Problem* q) { q->precision = Precision::w4a4; }), Source::rule);
  EXPECT_EQ(source([](Problem* q) { q->encoding = format::Encoding::mxfp4; }), Source::rule);
  EXPECT_EQ(source([](Problem* q) { q->activation.kind = ActivationKind::relu2; }), Source::rule);
  EXPECT_EQ(source([](Problem* q) { q->activations = format::Dtype::f16; }), Source::rule);
  EXPECT_EQ(source([](Problem* q) { q->activation.kind = ActivationKind::geglu_tanh; }), Source::tuned);
  Problem weighted = p;
  weighted.routing.weight_on_input = true;
  EXPECT_NE(key_of(weighted, with_h200()).layer, key_of(p, with_h200()).layer);

  Machine smaller = with_h200();
  smaller.devices[0].sms = 66;
  EXPECT_NE(key_of(p, smaller).machine, key_of(p, with_h200()).machine);
  Book book = load(stored.path(), nullptr);
  Key key = book.begin()->first;
  EXPECT_NE(key.version.find("sm90.gemm1 "), std::string::npos);
  key.version += "0";
  Book revised = {{key, book.begin()->second}};
  test::Scratch scratch;
  store((scratch / "other").string(), revised);
  EXPECT_EQ(sizes(p, (scratch / "other").string()).at(4).source, Source::rule);
}

TEST(Sizes, AChoiceThatCannotBeFollowedIsNone) {
  const Problem p = usual(96);
  const std::vector<plan::Choice> bad = {
      {"sm90.gemm1"},
      {"device.route", "sm90.gemm1", "sm90.gemm2"},
      {"device.route", "sm90.gemm1 9x9x9:8", "sm90.gemm2", "device.combine"},
      {"device.route", "sm90.gemm1 ", "sm90.gemm2", "device.combine"},
      {"sm90.whole"},  // not for 96 tokens
      {"sm90.whole", "sm90.whole"},
      {"reference.whole"},
      {"device.route", "sm100.gemm1", "sm90.gemm2", "device.combine"},
      {"device.route", "sm90.gemm1", "sm90.gemm2", "host.combine"},
      {"", "", "", ""},
  };
  for (const plan::Choice& choice : bad) {
    const Stored stored(p, {{96, choice}});
    const Sizes made = sizes(p, stored.path());
    EXPECT_EQ(made.at(96).source, Source::rule) << choice.front();
    EXPECT_EQ(plan::choice_of(made.at(96).plan), kSplit);
    EXPECT_FALSE(made.at(96).measured);
  }
}

TEST(Sizes, BatchInvariantOnesLeaveOutSplitSums) {
  Problem p = usual(2);
  const Stored stored(p, {{1, {"sm90.whole 4x1x7s:8,8+h3"}}, {2, {"sm90.whole 4x1x4:8,8+h3+d4"}}});
  ASSERT_EQ(sizes(p, stored.path()).at(1).source, Source::tuned);
  p.batch_invariant = true;
  const Sizes made = sizes(p, stored.path());
  EXPECT_EQ(made.at(1).source, Source::rule);
  EXPECT_EQ(made.at(2).source, Source::tuned);  // measured without the demand, and meets it
  for (const i32 tokens : {1, 2}) {
    p.max_tokens = tokens;
    for (const plan::Choice& choice : plan::alternatives(p, with_h200(), {})) {
      for (const std::string& words : choice) EXPECT_EQ(words.find("s:"), std::string::npos) << words;
    }
  }
}

TEST(Sizes, CanBeChosen) {
  Sizes made = sizes(usual(96), "");
  ASSERT_TRUE(made.choose(7, kSplit).ok());
  EXPECT_EQ(plan::choice_of(made.at(8).plan), kSplit);
  EXPECT_EQ(plan::choice_of(made.at(4).plan), kWhole);
  const Status refused = made.choose(96, kWhole);
  EXPECT_EQ(refused.reason, Reason::no_plan);
  EXPECT_NE(refused.detail.find("sm90.whole"), std::string::npos);
  EXPECT_EQ(plan::choice_of(made.at(96).plan), kSplit);
  ASSERT_TRUE(made.choose(8, {}).ok());
  EXPECT_EQ(plan::choice_of(made.at(8).plan), kWhole);
}

TEST(Alternatives, AreEveryCoverWithEveryVariant) {
  Problem p = usual(8);
  const auto all = plan::alternatives(p, with_h200(), {});
  EXPECT_TRUE(all.front().front().starts_with("sm90.whole "));  // the rule's
  std::set<plan::Choice> distinct(all.begin(), all.end());
  EXPECT_EQ(distinct.size(), all.size());
  const auto count = [&](std::size_t steps) {
    return std::count_if(all.begin(), all.end(), [&](const plan::Choice& c) { return c.size() == steps; });
  };
  EXPECT_GE(count(1), 2);
  EXPECT_GE(count(4), 9);
  for (const plan::Choice& choice : all) {
    plan::Plan made;
    ASSERT_TRUE(plan::make(p, with_h200(), {"auto", {}, choice}, &made).ok());
    EXPECT_EQ(plan::choice_of(made), choice);
  }
  p.encoding = format::Encoding::bf16;
  EXPECT_EQ(plan::alternatives(p, with_h200(), {}).size(), 2u);  // one launch, and not
  EXPECT_EQ(plan::alternatives(usual(8), machine(), {}).size(), 1u);
}

// Whatever the rule or a measurement names for picks that want rows of their own.
TEST(Variants, OfPicksRowsAreBuilt) {
  for (const i32 experts : {1, 16, 128, 512}) {
    for (const i32 tokens : {1, 2, 8, 9, 64}) {
      for (const i32 inter : {64, 768, 2048}) {
        for (const format::Encoding encoding : {format::Encoding::nvfp4, format::Encoding::bf16}) {
          Problem p = cases::problem(2048, inter, experts, 1);
          p.encoding = encoding;
          p.max_tokens = tokens;
          p.routing.weight_on_input = true;
          const auto variants = sm90::whole_variants(sm90::load_of(p, tokens), 132);
          EXPECT_FALSE(variants.empty());
          for (const Variant& one : variants) {
            EXPECT_TRUE(sm90::takes_pick_rows(one.number)) << one.name;
            EXPECT_EQ(sm90::kTileShapes[one.number].form.dense, encoding == format::Encoding::bf16) << one.name;
          }
        }
      }
    }
  }
}

TEST(Variants, HaveNamesOfTheirOwn) {
  std::set<std::string> names;
  for (int tile = 0; tile < sm90::kAllTileShapes; ++tile) {
    const std::string name = sm90::name_of(sm90::kTileShapes[tile]);
    EXPECT_TRUE(names.insert(name).second) << name;
    EXPECT_EQ(name.find(' '), std::string::npos) << name;
  }
  EXPECT_TRUE(names.contains("4x1x4:24,16,8+f3+d4"));
}

// What is shipped must be followed by the build that ships it; after a change of revision it waits to be measured anew.
TEST(Shipped, IsFollowed) {
  Machine h200 = with_h200();
  h200.devices[0].name = "NVIDIA H200";
  std::vector<std::string> notes;
  const std::string text = test::read_file(std::string(FOURMOE_SOURCE_DIR) + "/src/tune/shipped.json");
  const Book book = parse(text, "shipped.json", &notes);
  ASSERT_TRUE(notes.empty()) << notes.front();
  ASSERT_FALSE(book.empty());
  EXPECT_EQ(book, shipped());
  EXPECT_EQ(to_text(book), text) << "fourmoe tune --output src/tune/shipped.json writes it";
  Problem gpt_oss = cases::problem(2880, 2880, 128, 4);
  gpt_oss.encoding = format::Encoding::mxfp4;
  gpt_oss.activation.kind = ActivationKind::swiglu_clamped;
  for (const Problem& p : {cases::problem(7168, 2048, 256, 8), cases::problem(4096, 1536, 128, 8),
                           cases::problem(4096, 2048, 256, 6), cases::problem(2048, 768, 128, 8), gpt_oss}) {
    const Key key = key_of(p, h200);
    const auto stale = [&](const auto& entry) { return entry.first.version != key.version; };
    if (std::all_of(book.begin(), book.end(), stale)) GTEST_SKIP() << "measured with other steps than " << key.version;
    ASSERT_TRUE(book.contains(key)) << key.layer;
    EXPECT_GT(book.at(key).copy_bytes_per_second, 1e12);
    for (const auto& [bucket, measured] : book.at(key).buckets) {
      Problem sized = p;
      sized.max_tokens = bucket;
      plan::Plan made;
      const Status status = plan::make(sized, h200, {"auto", {}, measured.choice}, &made);
      EXPECT_TRUE(status.ok()) << status.detail;
      EXPECT_LE(measured.seconds, 1.02 * measured.default_seconds) << key.layer << " " << bucket;
    }
  }
}

// Where a table's choice of the one launch's tiles was faster by more than cards differ, the rule for layers without a
// table takes the same.
TEST(Shipped, TeachesTheRuleOfOneLaunch) {
  Problem nemotron = cases::problem(2688, 1856, 128, 6);
  nemotron.activation.kind = ActivationKind::relu2;
  Machine h200 = with_h200();
  h200.devices[0].name = "NVIDIA H200";
  Problem gpt_oss = cases::problem(2880, 2880, 32, 4);
  gpt_oss.encoding = format::Encoding::mxfp4;
  gpt_oss.activation.kind = ActivationKind::swiglu_clamped;
  int seen = 0;
  for (const Problem& p :
       {cases::problem(2048, 512, 256, 8), cases::problem(2048, 512, 512, 10), cases::problem(2048, 768, 128, 8),
        nemotron, gpt_oss, cases::problem(4096, 1536, 128, 8), cases::problem(4096, 2048, 256, 6)}) {
    const auto section = shipped().find(key_of(p, h200));
    if (section == shipped().end()) GTEST_SKIP() << "measured with other steps";
    for (const auto& [tokens, measured] : section->second.buckets) {
      const std::string& step = measured.choice.front();
      seen += step.starts_with("sm90.whole");
      if (!step.starts_with("sm90.whole ") || measured.default_seconds < 1.05 * measured.seconds) continue;
      const auto variants = sm90::whole_variants(sm90::load_of(p, tokens), 132);
      EXPECT_EQ("sm90.whole " + variants.front().name, step) << key_of(p, h200).layer << " " << tokens;
    }
  }
  EXPECT_GE(seen, 60);  // of 84 that are of up to 64 tokens
}

TEST(Floor, CountsTheExpertsThatAreHit) {
  const Problem p = usual(1);
  const f64 expert = cases::expert_bytes(p);
  EXPECT_NEAR(expected_bytes(p, 1), 8 * expert, 1.0);
  EXPECT_NEAR(expected_bytes(p, 1 << 20), 128 * expert, 1.0);
  EXPECT_GT(expected_bytes(p, 8), 40 * expert);
  EXPECT_LT(expected_bytes(p, 8), 64 * expert);
  const Stored stored(p, {{1, kWhole}});
  Known known(stored.path());
  EXPECT_EQ(copy_bytes_per_second(usual(8), with_h200(), &known), 4e12);
}

// The race. Each fake has candidates with true times and noise; what a tuner picks is judged by the true times.

struct Fake {
  std::vector<f64> truth;  // seconds
  f64 noise = 0.0;         // relative, uniform
  u64 seed = 1;
};

Timer timer_of(const Fake& fake) {
  auto random = std::make_shared<std::mt19937_64>(fake.seed);
  return [fake, random](std::size_t candidate) {
    std::uniform_real_distribution<f64> noise(1.0 - fake.noise, 1.0 + fake.noise);
    return fake.truth[candidate] * noise(*random);
  };
}

using Tuner = std::size_t (*)(const Fake&);

std::size_t careful(const Fake& fake) { return race(fake.truth.size(), 15, timer_of(fake)).winner; }

// A mutant: it takes the fastest of the others without asking how fast the default is.
std::size_t careless(const Fake& fake) {
  const Timer timer = timer_of(fake);
  std::vector<f64> best(fake.truth.size(), INFINITY);
  for (int round = 0; round < 15; ++round) {
    for (std::size_t c = 0; c < best.size(); ++c) best[c] = std::min(best[c], timer(c));
  }
  return static_cast<std::size_t>(std::min_element(best.begin() + 1, best.end()) - best.begin());
}

// In how many of 500 rooms with noise of a tenth and the default near the best the tuner takes something that is more
// than a hundredth slower.
int times_slower(Tuner tuner) {
  int slower = 0;
  for (u64 seed = 0; seed < 500; ++seed) {
    std::mt19937_64 random(seed);
    std::uniform_real_distribution<f64> spread(0.995, 1.3);
    Fake fake = {{1e-5}, 0.1, seed};
    for (int c = 0; c < 19; ++c) fake.truth.push_back(1e-5 * spread(random));
    slower += fake.truth[tuner(fake)] > 1.01 * fake.truth[0] ? 1 : 0;
  }
  return slower;
}

TEST(Race, NeverTakesSomethingSlowerThanTheDefault) {
  EXPECT_EQ(times_slower(careful), 0);
  EXPECT_GE(times_slower(careless), 100) << "the test must see a tuner that ignores the default";
}

TEST(Race, TakesWhatIsFaster) {
  for (u64 seed = 0; seed < 50; ++seed) {
    EXPECT_EQ(careful({{1e-5, 1.1e-5, 0.9e-5, 2e-5}, 0.03, seed}), 2u) << seed;
  }
  EXPECT_EQ(careful({{1e-5}}), 0u);
  EXPECT_EQ(careful({{1e-5, 0.995e-5}}), 1u);  // little, but without noise
}

TEST(Race, LuckAloneDoesNotWin) {  // fast until it is confirmed
  int calls = 0;
  const auto lucky = [&](std::size_t candidate) { return candidate == 0 ? 1e-5 : calls++ < 15 ? 0.5e-5 : 1.1e-5; };
  EXPECT_EQ(race(2, 15, lucky).winner, 0u);
}

TEST(Race, LeavesOutWhatHasNoTime) {
  for (const f64 bad : std::vector<f64>{NAN, INFINITY, 0.0, -1.0}) {
    EXPECT_EQ(careful({{1e-5, bad, 0.5e-5}}), 2u) << bad;
    EXPECT_EQ(careful({{bad, 1e-5, 0.5e-5}}), 0u) << bad;  // a default that cannot be timed is not replaced
    const Placing placing = race(2, 5, timer_of({{1e-5, bad}}));
    EXPECT_EQ(placing.winner, 0u);
    EXPECT_EQ(placing.seconds, (std::vector<f64>{1e-5, 0.0}));
  }
}

TEST(Race, GivesUpTheSlowEarly) {
  std::vector<int> runs(3, 0);
  const std::vector<f64> truth = {1e-5, 5e-5, 1.1e-5};
  const auto count = [&](std::size_t c) {
    ++runs[c];
    return truth[c];
  };
  const Placing placing = race(3, 20, count);
  EXPECT_EQ(runs, (std::vector<int>{20, 3, 20}));
  EXPECT_EQ(placing.seconds, truth);
}

}  // namespace
}  // namespace fourmoe::tune
