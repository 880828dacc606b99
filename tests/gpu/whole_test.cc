// The one launch for few tokens beside the split steps: the same bits for every form of routing, with and without a
// shared expert; workspaces in any number; and a wait that is given up.
#include "backends/sm90/whole.h"

#include <cmath>
#include <random>

#include "case.h"
#include "gpu/hopper.h"
#include "gpu/memory.h"
#include "gpu/whole_call.h"
#include "mirror.h"

namespace fourmoe {
namespace {

using cases::Spec;
using format::Dtype;
using testing::DeviceVector;

const plan::Choice kSplit = {"device.route", "sm90.gemm1", "sm90.gemm2", "device.combine"};
const plan::Choice kWhole = {"sm90.whole"};

// With sums in one order, so that plans can be compared bit by bit.
LayerOptions options() {
  LayerOptions how;
  how.device = 0;
  how.max_tokens = sm90::kFewTokens;
  how.batch_invariant = true;
  how.tuning = "";
  return how;
}

// Logits of a call, with ties and infinities.
std::vector<f32> random_logits(const Problem& p, i32 tokens, u64 seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<f32> normal(0.0f, 2.0f);
  std::vector<f32> logits(i64{tokens} * p.experts);
  for (std::size_t i = 0; i < logits.size(); ++i) {
    logits[i] = i > 8 && random() % 8 == 0 ? logits[i - 1 - random() % 8] : normal(random);
    if (random() % 64 == 0) logits[i] = -INFINITY;
  }
  for (i32 t = 0; t < tokens; ++t) logits[i64{t} * p.experts] = 1.0f;  // never all -infinity
  return logits;
}

// All that a call gives.
struct Result {
  Status status;
  std::vector<u8> output;
  std::vector<i32> ids;
  std::vector<f32> weights;

  bool operator==(const Result& other) const {
    return output == other.output && ids == other.ids && weights == other.weights &&
           status.detail == other.status.detail;
  }
};

Result run(Layer* layer, const plan::Choice& choice, const cases::Call& call, std::vector<f32>* logits) {
  const Spec& s = call.spec;
  throw_unless_ok(layer->choose(s.tokens, choice, s.hidden));
  Result result;
  result.ids.assign(i64{s.tokens} * s.problem.top_k, -7);
  result.weights.assign(i64{s.tokens} * s.problem.top_k, -7.0f);
  LayerCall view = call.view(&result.output, Dtype::f32);
  view.picked_ids = result.ids.data();
  view.picked_weights = result.weights.data();
  if (logits != nullptr) {
    view.ids = view.weights = {};
    view.logits = {logits->data(), Dtype::f32, s.tokens, s.problem.experts, s.problem.experts};
  }
  result.status = cases::run_mirrored(layer, view);
  return result;
}

// The same bits, which are returned.
Result expect_same(Layer* layer, const cases::Call& call, std::vector<f32>* logits) {
  Result split = run(layer, kSplit, call, logits);
  EXPECT_TRUE(split.status.ok()) << split.status.detail;
  EXPECT_EQ(run(layer, kWhole, call, logits), split);
  return split;
}

// Within the bound of a layer.
void expect_near(const Result& a, const Result& b, const Problem& problem) {
  std::vector<f64> values[2];
  for (const Result* result : {&a, &b}) {
    EXPECT_TRUE(result->status.ok()) << result->status.detail;
    for (std::size_t i = 0; i < result->output.size() / 4; ++i)
      values[result == &b].push_back(format::read(result->output.data(), Dtype::f32, i));
  }
  EXPECT_LE(cases::rel_l2(values[0], values[1]), cases::bound(problem));
}

// As columns; as hits of one expert, up to eight, the last full or not.
std::vector<i32> token_counts(i32 top_k) {
  std::vector<i32> all = {1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 31, 32, 40, 63, 64};
  std::erase_if(all, [&](i32 tokens) { return plan::bucket_of(tokens) * top_k > sm90::kFewPicks; });
  return all;
}

struct Form {
  const char* name;
  i32 experts;
  i32 top_k;
  Routing routing = {};
  bool bias = false;
  i32 first = 0;  // local experts are [first, first + local)
  i32 local = 0;  // 0: all
};

std::vector<Form> forms() {
  std::vector<Form> all = {
      {"few", 8, 2},     {"odd", 40, 3},      {"usual", 128, 8}, {"many", 512, 10},
      {"most", 1024, 4}, {"widest", 256, 32}, {"one", 1, 1},     {"shard", 64, 6, {}, false, 16, 32}};
  all.push_back({"sums", 128, 8});
  all.back().routing.renormalise = false;
  all.back().routing.scale = 2.5f;
  all.push_back({"deepseek", 256, 8, {}, true});
  all.back().routing = {Score::sigmoid, 8, 4, 2, true, 2.5f, false};
  all.push_back({"groups", 96, 5});
  all.back().routing = {Score::softmax, 6, 2, 1, true, 1.0f, false};
  all.push_back({"softplus", 256, 6, {}, true});
  all.back().routing.score = Score::sqrt_softplus;
  all.push_back({"weighted", 32, 1});
  all.back().routing = {Score::sigmoid, 1, 1, 2, false, 1.0f, true};
  all.push_back({"plain", 64, 4});
  all.back().routing = {Score::none, 1, 1, 2, false, 1.0f, false};
  return all;
}

class EveryForm : public ::testing::TestWithParam<Form> {
 protected:
  checkpoint::Layer weights() const {
    const Form& form = GetParam();
    Problem problem = cases::problem(192, 80, form.experts, form.top_k);
    problem.routing = form.routing;
    if (form.local > 0) problem.first_expert = form.first, problem.local_experts = form.local;
    checkpoint::Layer layer = cases::random_layer(problem, 3, true);
    std::mt19937_64 random(4);
    std::normal_distribution<f32> normal(0.0f, 0.3f);
    for (i32 e = 0; form.bias && e < form.experts; ++e) layer.selection_bias.push_back(normal(random));
    return layer;
  }
  static Spec spec(const Layer& layer, i32 tokens) {
    Spec s;
    s.problem = layer.problem();
    s.tokens = tokens;
    s.seed = 9 + tokens;
    return s;
  }
};

TEST_P(EveryForm, GivesTheBitsOfTheSplitSteps) {
  FOURMOE_NEEDS_HOPPER();
  Layer layer(weights(), options());
  for (const i32 tokens : token_counts(layer.problem().top_k)) {
    const cases::Call call(spec(layer, tokens));
    for (int turn = 0; turn < (tokens <= 8 ? 4 : 2); ++turn) {
      std::vector<f32> logits = random_logits(layer.problem(), tokens, 100 * tokens + turn);
      SCOPED_TRACE(std::to_string(tokens) + " tokens, turn " + std::to_string(turn));
      expect_same(&layer, call, turn == 0 ? nullptr : &logits);
    }
  }
}

TEST_P(EveryForm, RefusesTheSameTokens) {
  FOURMOE_NEEDS_HOPPER();
  Layer layer(weights(), options());
  for (const i32 tokens : {5, 1, 20, 50}) {
    if (plan::bucket_of(tokens) * layer.problem().top_k > sm90::kFewPicks) continue;
    const cases::Call call(spec(layer, tokens));
    std::vector<f32> logits = random_logits(layer.problem(), tokens, 7);
    logits[i64{tokens / 2} * layer.problem().experts] = NAN;
    const Result split = run(&layer, kSplit, call, &logits);
    EXPECT_EQ(split.status.reason, Reason::value_not_finite);
    EXPECT_EQ(run(&layer, kWhole, call, &logits), split) << tokens << " tokens";
  }
}

INSTANTIATE_TEST_SUITE_P(Device, EveryForm, ::testing::ValuesIn(forms()),
                         [](const auto& at) { return std::string(at.param.name); });

struct SharedForm {
  const char* name;
  bool gated;
  i32 inter;         // that of the routed experts is 96: others have a table and a plan of their own
  i32 experts = 32;  // an odd number has none in one table either
};

class SharedExpert : public ::testing::TestWithParam<SharedForm> {};

TEST_P(SharedExpert, GivesTheSameBitsInEveryPlan) {
  FOURMOE_NEEDS_HOPPER();
  const auto [name, gated, inter, experts] = GetParam();
  Spec s;
  s.problem = cases::problem(320, 96, experts, 4);
  checkpoint::Layer weights = cases::random_layer(s.problem, 1, true);
  const checkpoint::Layer extra = cases::random_layer(cases::problem(320, inter, 1, 1), 77, true);
  std::vector<u16> gate(320);
  std::mt19937_64 random(5);
  std::normal_distribution<f32> normal(0.0f, 0.1f);
  for (u16& value : gate) value = format::to_bf16(normal(random));
  weights.shared = checkpoint::Layer::Shared{extra.problem, extra.experts[0], {}};
  weights.shared->problem.routing.score = Score::none;
  if (gated) {
    weights.shared->gate.data = reinterpret_cast<const u8*>(gate.data());
    weights.shared->gate.data_stride = 2 * 320;
    weights.shared->gate.rows = 1;
    weights.shared->gate.cols = 320;
    weights.shared->gate.encoding = format::Encoding::bf16;
  }
  Layer layer(weights, options());
  ASSERT_TRUE(layer.plan(1).takes_shared());
  for (const i32 tokens : token_counts(s.problem.top_k)) {
    s.tokens = tokens;
    s.routes = tokens % 3 == 0 ? cases::Routes::holes : cases::Routes::random;
    const cases::Call call(s);
    const Result split = run(&layer, kSplit, call, nullptr);
    EXPECT_TRUE(split.status.ok()) << split.status.detail;
    EXPECT_EQ(run(&layer, kWhole, call, nullptr), split) << tokens;
    EXPECT_EQ(run(&layer, kSplit, call, nullptr), split) << tokens;  // of a shared expert apart: beside what whole kept
    EXPECT_EQ(run(&layer, kWhole, call, nullptr), split) << tokens;
  }
  LayerOptions host = options();
  host.device = -1;
  Layer reference(weights, host);
  const cases::Call call(s);
  std::vector<u8> here, there;
  throw_unless_ok(cases::run_mirrored(&layer, call.view(&here, Dtype::f32)));
  throw_unless_ok(cases::run_mirrored(&reference, call.view(&there, Dtype::f32)));
  std::vector<f64> a, b;
  for (std::size_t i = 0; i < here.size() / 4; ++i) {
    a.push_back(format::read(here.data(), Dtype::f32, i));
    b.push_back(format::read(there.data(), Dtype::f32, i));
  }
  EXPECT_LE(cases::rel_l2(a, b), cases::bound(s.problem));
}

INSTANTIATE_TEST_SUITE_P(Device, SharedExpert,
                         ::testing::Values(SharedForm{"plain", false, 96}, SharedForm{"gated", true, 96},
                                           SharedForm{"narrower", true, 64}, SharedForm{"odd", true, 96, 33}),
                         [](const auto& at) { return std::string(at.param.name); });

// For the sanitizers: a token alone, few by columns, more by hits; picked for by one warp each and by several; tiles
// that split K; picks with rows of their own; two planes; experts that are not quantised.
TEST(OneLaunch, SmallIsNearTheSplitSteps) {
  FOURMOE_NEEDS_HOPPER();
  const struct {
    i32 experts;
    Precision precision = Precision::w4a16;
    Dtype hidden = Dtype::bf16;
    format::Encoding encoding = format::Encoding::nvfp4;
    bool splits_k = true;  // has shapes that do
  } kinds[] = {{8},
               {512},
               {8, Precision::w4a4},
               {8, Precision::w4a16, Dtype::f16, format::Encoding::nvfp4, false},
               {8, Precision::w4a16, Dtype::bf16, format::Encoding::bf16, false}};
  for (const auto& kind : kinds) {
    Spec s;
    s.problem = cases::problem(320, 80, kind.experts, 3);
    s.problem.precision = kind.precision;
    s.problem.encoding = kind.encoding;
    s.hidden = kind.hidden;
    LayerOptions how = options();
    how.precision = kind.precision;
    const checkpoint::Layer weights = cases::random_layer(s.problem, 3, true);
    for (const bool invariant : {true, false}) {
      if (!invariant && !kind.splits_k) continue;
      how.batch_invariant = invariant;
      Layer layer(weights, how);
      for (const i32 tokens : {1, 3, 11}) {
        SCOPED_TRACE(std::to_string(&kind - kinds) + ". kind, " + std::to_string(tokens) + " tokens");
        s.tokens = tokens;
        const cases::Call call(s);
        std::vector<f32> logits = random_logits(layer.problem(), tokens, tokens);
        const Result split = run(&layer, kSplit, call, &logits), whole = run(&layer, kWhole, call, &logits);
        EXPECT_EQ(whole.ids, split.ids);
        expect_near(whole, split, layer.problem());
      }
    }
  }
}

// Each has counters of its own; a graph may capture a workspace that has none, and then clears some.
TEST(OneLaunch, WorkspacesComeInAnyNumber) {
  FOURMOE_NEEDS_HOPPER();
  Spec s;
  s.problem = cases::problem(256, 96, 16, 4);
  s.tokens = 4;
  Layer layer(cases::random_layer(s.problem, 1, false), options());
  throw_unless_ok(layer.choose(s.tokens, kWhole));
  const cases::Call call(s);
  std::vector<u8> first;
  throw_unless_ok(cases::run_mirrored(&layer, call.view(&first, Dtype::f32)));
  constexpr i64 kMore = 40;
  const i64 bytes = (layer.workspace_bytes() + 255) / 256 * 256;
  const DeviceVector<std::byte> memory(kMore * bytes);  // poisoned
  for (i64 i = 0; i < 3 * kMore; ++i) {
    std::vector<u8> output;
    const Workspace workspace = {memory.data() + i % kMore * bytes, bytes};
    throw_unless_ok(cases::run_mirrored(&layer, call.view(&output, Dtype::f32), workspace));
    ASSERT_EQ(output, first) << i;
  }
  gpu::OwnStream stream;
  throw_unless_ok(gpu::OwnStream::make(&stream));
  const DeviceVector<std::byte> fresh(kMore * bytes);
  std::vector<u8> output;
  const LayerCall view = call.view(&output, Dtype::f32);
  cases::Mirror mirror(layer, view);
  mirror.call().stream = stream.get();
  for (i64 i = 0; i < kMore; ++i) {
    gpu::Graph graph;
    const Workspace workspace = {fresh.data() + i * bytes, bytes};
    throw_unless_ok(gpu::Graph::capture(
        stream.get(), [&] { return layer.run(mirror.call(), workspace); }, &graph));
    for (int replay = 0; replay < 3; ++replay) throw_unless_ok(graph.launch(stream.get()));
    throw_unless_ok(layer.wait(stream.get()));
    mirror.fetch();
    ASSERT_EQ(output, first) << i;
    std::fill(output.begin(), output.end(), u8{0xff});
    mirror.refresh();
  }
}

// What is not a number stays so, and in its own token. A single token's is polled, and is never taken for none.
TEST(OneLaunch, NotANumberComesThrough) {
  FOURMOE_NEEDS_HOPPER();
  const u16 values[] = {0x7fc0, 0xffff, 0x7f80, 0xff80};  // two NaN, two infinities
  for (const ActivationKind kind : {ActivationKind::swiglu, ActivationKind::relu2}) {
    Spec s;
    s.problem = cases::problem(256, 96, 16, 4);
    s.problem.activation.kind = kind;
    s.tokens = 6;
    Layer layer(cases::random_layer(s.problem, 1, false), options());
    cases::Call call(s);
    u16* hidden = reinterpret_cast<u16*>(call.hidden.data());
    for (i32 t = 1; t < 5; ++t) hidden[t * s.problem.hidden + 7 * t] = values[t - 1];
    const Result split = expect_same(&layer, call, nullptr);
    const f32* output = reinterpret_cast<const f32*>(split.output.data());
    for (const i32 t : {0, 5}) EXPECT_TRUE(std::isfinite(output[t * s.problem.hidden])) << t;
    for (const i32 t : {1, 2}) EXPECT_TRUE(std::isnan(output[t * s.problem.hidden])) << t;
    for (i32 t = 3; t < 5 && kind == ActivationKind::swiglu; ++t) {
      EXPECT_FALSE(std::isfinite(output[t * s.problem.hidden])) << t;
    }
    s.tokens = 1;
    for (const u16 value : values) {
      cases::Call single(s);
      reinterpret_cast<u16*>(single.hidden.data())[7] = value;
      expect_same(&layer, single, nullptr);
    }
  }
}

// As gpt-oss stores its experts, and not quantised at all.
TEST(OneLaunch, OfOtherEncodingsGivesTheBitsOfTheSplitSteps) {
  FOURMOE_NEEDS_HOPPER();
  for (const format::Encoding encoding : {format::Encoding::mxfp4, format::Encoding::bf16}) {
    Spec s;
    s.problem = cases::problem(192, 96, 32, 4);
    s.problem.encoding = encoding;
    s.problem.activation.kind = ActivationKind::swiglu_clamped;
    s.problem.activation.alpha = 1.702f;
    s.problem.activation.limit = 7.0f;
    Layer layer(cases::random_layer(s.problem, 3, true), options());
    for (const i32 tokens : token_counts(s.problem.top_k)) {
      s.tokens = tokens;
      const cases::Call call(s);
      std::vector<f32> logits = random_logits(layer.problem(), s.tokens, s.tokens);
      SCOPED_TRACE(std::string(format::encoding_name(encoding)) + ", tokens " + std::to_string(tokens));
      expect_same(&layer, call, &logits);
    }
  }
}

// f16 tokens are two planes of bf16 each, and so is what gemm1 hands on.
TEST(OneLaunch, OfF16GivesTheBitsOfTheSplitSteps) {
  FOURMOE_NEEDS_HOPPER();
  for (const format::Encoding encoding : {format::Encoding::nvfp4, format::Encoding::mxfp4, format::Encoding::bf16}) {
    for (const i32 inter : {96, 1088}) {  // a single token's y in one piece, and in several
      Spec s;
      s.problem = cases::problem(192, inter, 32, 4);
      s.problem.encoding = encoding;
      s.hidden = Dtype::f16;
      Layer layer(cases::random_layer(s.problem, 3, true), options());
      for (const i32 tokens : token_counts(s.problem.top_k)) {
        s.tokens = tokens;
        std::vector<f32> logits = random_logits(layer.problem(), tokens, tokens);
        SCOPED_TRACE(std::to_string(tokens) + " tokens, inter " + std::to_string(inter));
        expect_same(&layer, cases::Call(s), &logits);
      }
    }
  }
}

// Picks of a token that want rows of their own.
struct OwnRows {
  const char* name;
  Precision precision;
  bool weighted;
  ActivationKind activation;
  Dtype hidden;
  bool shared;
  i32 inter = 96;
  format::Encoding encoding = format::Encoding::nvfp4;
};

class PickRows : public ::testing::TestWithParam<OwnRows> {};

Spec spec_of(const OwnRows& own) {
  Spec s;
  s.problem = cases::problem(608, own.inter, 24, own.weighted ? 1 : 5);  // the last piece of a row is not full
  s.problem.precision = own.precision;
  s.problem.encoding = own.encoding;
  s.problem.activation.kind = own.activation;
  s.problem.routing.weight_on_input = own.weighted;
  s.problem.routing.renormalise = !own.weighted;
  s.hidden = own.hidden;
  return s;
}

TEST_P(PickRows, GiveTheBitsOfTheSplitSteps) {
  FOURMOE_NEEDS_HOPPER();
  const OwnRows& own = GetParam();
  Spec s = spec_of(own);
  checkpoint::Layer weights = cases::random_layer(s.problem, 3, true);
  Problem one = s.problem;
  one.experts = one.local_experts = one.top_k = 1;
  one.routing = {};
  one.routing.score = Score::none;
  const checkpoint::Layer extra = cases::random_layer(one, 77, true);
  if (own.shared) weights.shared = checkpoint::Layer::Shared{extra.problem, extra.experts[0], {}};
  LayerOptions how = options();
  how.precision = own.precision;
  Layer layer(weights, how);
  for (const i32 tokens : token_counts(s.problem.top_k)) {
    s.tokens = tokens;
    SCOPED_TRACE(tokens);
    std::vector<f32> logits = random_logits(layer.problem(), tokens, tokens);
    expect_same(&layer, cases::Call(s), &logits);
    s.routes = tokens % 2 == 0 ? cases::Routes::one_expert : cases::Routes::holes;
    expect_same(&layer, cases::Call(s), nullptr);
  }
}

// Shapes that split K, which few tokens take by default, add in another order.
TEST_P(PickRows, AreNearTheSplitStepsWhereSumsAreSplit) {
  FOURMOE_NEEDS_HOPPER();
  const OwnRows& own = GetParam();
  const bool planes = own.precision == Precision::w4a16 && own.hidden == Dtype::f16;
  if (planes || !format::is_fp4(own.encoding)) GTEST_SKIP() << "no shape that splits K";
  Spec s = spec_of(own);
  LayerOptions how = options();
  how.precision = own.precision;
  how.batch_invariant = false;
  Layer layer(cases::random_layer(s.problem, 3, true), how);
  for (const i32 tokens : {1, 2, 8}) {
    s.tokens = tokens;
    SCOPED_TRACE(tokens);
    const cases::Call call(s);
    expect_near(run(&layer, kWhole, call, nullptr), run(&layer, kSplit, call, nullptr), layer.problem());
  }
}

INSTANTIATE_TEST_SUITE_P(
    Device, PickRows,
    ::testing::Values(OwnRows{"w4a4", Precision::w4a4, false, ActivationKind::swiglu, Dtype::bf16, false},
                      OwnRows{"w4a4_long", Precision::w4a4, false, ActivationKind::swiglu, Dtype::bf16, false, 1104},
                      OwnRows{"w4a4_wide", Precision::w4a4, false, ActivationKind::geglu_tanh, Dtype::f32, true},
                      OwnRows{"w4a4_square", Precision::w4a4, false, ActivationKind::relu2, Dtype::f16, true, 80},
                      OwnRows{"w4a4_weighted", Precision::w4a4, true, ActivationKind::swiglu, Dtype::bf16, true},
                      OwnRows{"weighted", Precision::w4a16, true, ActivationKind::swiglu, Dtype::bf16, true},
                      OwnRows{"weighted_wide", Precision::w4a16, true, ActivationKind::swiglu, Dtype::f32, false},
                      OwnRows{"weighted_f16", Precision::w4a16, true, ActivationKind::swiglu, Dtype::f16, true},
                      OwnRows{"weighted_bf16", Precision::w4a16, true, ActivationKind::swiglu, Dtype::bf16, true, 96,
                              format::Encoding::bf16},
                      OwnRows{"w4a4_mxfp4", Precision::w4a4, false, ActivationKind::swiglu, Dtype::bf16, false, 96,
                              format::Encoding::mxfp4},
                      // none of its own, but f16 without a gate, beside a shared expert
                      OwnRows{"square_f16", Precision::w4a16, false, ActivationKind::relu2, Dtype::f16, true}),
    [](const auto& at) { return std::string(at.param.name); });

// Tokens that come as codes are the same for all picks; one with a bad scale is refused.
TEST(OneLaunch, OfCodesGivesTheBitsOfTheSplitSteps) {
  FOURMOE_NEEDS_HOPPER();
  Spec s;
  s.problem = cases::problem(592, 96, 24, 5);
  s.problem.precision = Precision::w4a4;
  LayerOptions how = options();
  how.precision = s.problem.precision;
  Layer layer(cases::random_layer(s.problem, 3, true), how);
  std::mt19937_64 random(8);
  for (const i32 tokens : {1, 3, 8, 21, 64}) {
    for (const i32 bad : {-1, tokens / 2}) {
      s.tokens = tokens;
      const cases::Call call(s);
      std::vector<u8> codes(i64{tokens} * 296), scales(i64{tokens} * 37);
      for (u8& byte : codes) byte = static_cast<u8>(random());
      for (u8& byte : scales) byte = static_cast<u8>(0x30 + random() % 16);
      if (bad >= 0) scales[i64{bad} * 37 + 36] = 0xff;
      Result results[2];
      for (const bool whole : {false, true}) {
        throw_unless_ok(layer.choose(tokens, whole ? kWhole : kSplit, s.hidden));
        Result& result = results[whole];
        LayerCall view = call.view(&result.output, Dtype::f32);
        view.hidden = {codes.data(), Dtype::u8, tokens, 296, 296};
        view.hidden_scales = {scales.data(), Dtype::u8, tokens, 37, 37};
        result.status = cases::run_mirrored(&layer, view);
      }
      SCOPED_TRACE(std::to_string(tokens) + " tokens, bad " + std::to_string(bad));
      EXPECT_EQ(results[0].status.ok(), bad < 0) << results[0].status.detail;
      EXPECT_EQ(results[1], results[0]) << results[1].status.detail;
    }
  }
}

// A caller's ids may name an expert more than once, and more often than the layer has experts.
TEST(OneLaunch, SameExpertTwice) {
  FOURMOE_NEEDS_HOPPER();
  for (const i32 local : {16, 1}) {
    Spec s;
    s.problem = cases::problem(192, 96, 16, 4);
    s.problem.local_experts = local;
    s.routes = cases::Routes::one_expert;
    Layer layer(cases::random_layer(s.problem, 1, false), options());
    for (const i32 tokens : {1, 2, 3, 8, 9, 25, 64}) {
      s.tokens = tokens;
      SCOPED_TRACE(std::to_string(s.tokens) + " tokens, " + std::to_string(local) + " experts");
      expect_same(&layer, cases::Call(s), nullptr);
    }
  }
}

// A wait that never ends, forced by counters of the set that the next launch uses. There are three row tiles of gemm1
// and four of gemm2 for each hit. Blocks may give up different waits; the lowest key is kept, which is that of gemm1 of
// expert 0, whom the first token picks.
struct Lost {
  const char* awaited;
  i32 tokens;
  i32 first, count;  // words of the set
  i32 value;
  Precision precision = Precision::w4a16;
};

class EveryWait : public ::testing::TestWithParam<Lost> {};

TEST_P(EveryWait, IsAFaultOfThatCallAlone) {
  FOURMOE_NEEDS_HOPPER();
  const Lost& lost = GetParam();
  testing::WholeCall call(lost.tokens, lost.precision);
  const std::vector<f32> right = call.run(), again = call.run();
  EXPECT_EQ(right, again);
  EXPECT_TRUE(call.fault().ok()) << call.fault().detail;
  std::vector<i32> words = call.queue().download();
  for (i32 i = 0; i < lost.count; ++i) words[gpu::QueueShape::kLine + lost.first + i] = lost.value;
  call.queue().upload(words);
  const std::vector<f32> wrong = call.run();
  EXPECT_EQ(call.fault().reason, Reason::device_failed);
  EXPECT_NE(call.fault().detail.find(lost.awaited), std::string::npos) << call.fault().detail;
  for (const f32 value : wrong) EXPECT_TRUE(std::isnan(value));
  call.forget_fault();
  for (int i = 0; i < 4; ++i) EXPECT_EQ(call.run(), right) << i;
  EXPECT_TRUE(call.fault().ok()) << call.fault().detail;
}

constexpr i32 kEmptied = 3 * gpu::QueueShape::kLine, kMade = 5 * gpu::QueueShape::kLine;
INSTANTIATE_TEST_SUITE_P(Device, EveryWait,
                         ::testing::Values(Lost{"a wait for memory to be emptied", 3, kEmptied, 1, -1000},
                                           Lost{"a wait for memory to be emptied", 1, kEmptied, 1, -1000},
                                           Lost{"the tokens' rows", 1, kMade, 1, -100000, Precision::w4a4},
                                           Lost{"the tokens' rows", 12, kMade, 1, -100000, Precision::w4a4},
                                           Lost{"gemm1 of local expert", 3, gpu::QueueShape::kHits, 12, -1000},
                                           Lost{"gemm1 of local expert", 12, gpu::QueueShape::kHits, 20, -1000},
                                           Lost{"gemm1 of local expert", 1, 0, 1, 4 * 3},  // whose tiles are all taken
                                           Lost{"gemm2 of token", 3, 0, 1, 1 << 20},       // likewise
                                           Lost{"gemm2 of token", 1, 0, 1, 1 << 20}));

}  // namespace
}  // namespace fourmoe
