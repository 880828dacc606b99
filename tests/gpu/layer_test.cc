// The layer on a GPU: every case against the reference, the promises of design.md section 3, refusals, graphs.
#include "layer.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <functional>
#include <thread>

#include "case.h"
#include "format/quantise.h"
#include "gpu/hopper.h"
#include "gpu/runtime.h"
#include "mirror.h"

namespace fourmoe {
namespace {

using cases::Routes;
using cases::spec;
using cases::Spec;
using format::Dtype;
using format::Encoding;

LayerOptions options(Precision precision, i32 device = 0) {
  LayerOptions o;
  o.precision = precision;
  o.device = device;
  o.max_tokens = 128;
  return o;
}

// Odd sizes, every activation, routing pattern and dtype of tokens, in both precisions.
std::vector<Spec> specs() {
  std::vector<Spec> all;
  for (const auto& [hidden, inter] :
       {std::pair{64, 80}, {80, 64}, {352, 16}, {16, 704}, {192, 352}, {2688, 1856}, {32, 1856}, {2880, 96}}) {
    all.push_back(spec(hidden, inter, 6, 2, 7));
  }
  for (const ActivationKind kind : {ActivationKind::swiglu, ActivationKind::swiglu_clamped, ActivationKind::geglu_erf,
                                    ActivationKind::geglu_tanh, ActivationKind::relu2}) {
    all.push_back(spec(96, 64, 5, 3, 9));
    all.back().problem.activation.kind = kind;
    all.back().biases = true;
  }
  for (const Routes routes : {Routes::skewed, Routes::one_expert, Routes::holes}) {
    all.push_back(spec(64, 48, 8, 4, 37));
    all.back().routes = routes;
  }
  all.push_back(spec(128, 64, 4, 2, 6));
  all.back().hidden = Dtype::f32;
  for (const f32 amplitude : {1e4f, 1e-6f}) {
    all.push_back(spec(64, 48, 4, 2, 6));
    all.back().amplitude = amplitude;
  }
  all.push_back(spec(64, 48, 4, 1, 6));
  all.back().problem.routing.weight_on_input = true;
  for (const i32 hidden : {2304, 4352}) {  // experts enough for the coarser tiles of the one launch: 256 rows, and 512
    all.push_back(spec(hidden, 80, 64, 8, 8));
    all.back().biases = true;
  }
  for (const i32 tokens : {0, 1, 7, 300}) all.push_back(spec(256, 128, 16, 4, tokens));  // 300: three passes
  all.push_back(spec(256, 128, 300, 8, 300));
  for (const auto& [hidden, inter] : {std::pair{32, 96}, {2880, 2880}, {96, 1056}}) {
    all.push_back(spec(hidden, inter, 4, 2, 9));
    all.back().problem.encoding = Encoding::mxfp4;
    all.back().problem.activation.kind = ActivationKind::swiglu_clamped;
    all.back().biases = true;
  }
  for (std::size_t i = 0, count = all.size(); i < count; ++i) {
    all.push_back(all[i]);
    all.back().problem.precision = Precision::w4a4;
  }
  for (std::size_t i = 0, count = all.size(); i < count; ++i) {
    all.push_back(all[i]);
    all.back().hidden = Dtype::f16;
    all.back().amplitude = std::clamp(all[i].amplitude, 1e-2f, 1e3f);  // beyond them f16 ends or all becomes 0
  }
  for (std::size_t i = 0, count = all.size(); i < count; i += 3) {
    if (all[i].problem.precision != Precision::w4a16) continue;
    all.push_back(all[i]);
    all.back().problem.encoding = Encoding::bf16;
  }
  for (std::size_t i = 0; i < all.size(); ++i) all[i].seed = i + 1;
  return all;
}

class EveryCase : public testing::TestWithParam<Spec> {};

TEST_P(EveryCase, IsWithinItsBoundOfTheReference) {
  FOURMOE_NEEDS_HOPPER();
  const Spec& s = GetParam();
  const Precision precision = s.problem.precision;
  const std::vector<f64> reference = cases::run(s, options(precision, -1));
  const std::vector<f64> output = cases::run(s, options(precision));
  const f64 found = cases::rel_l2(output, reference);
  EXPECT_LE(found, cases::bound(s.problem)) << cases::describe(s);
}

INSTANTIATE_TEST_SUITE_P(Device, EveryCase, testing::ValuesIn(specs()),
                         [](const auto& at) { return "case" + std::to_string(at.index); });

// What the promises are made for: the numerics, the weights' form and the tokens' type.
struct Kind {
  const char* name;
  Precision precision;
  Encoding encoding = Encoding::nvfp4;
  Dtype hidden = Dtype::bf16;
};

class EveryPrecision : public testing::TestWithParam<Kind> {
 protected:
  Spec usual(i32 tokens = 37) const {
    Spec s = spec(96, GetParam().encoding == Encoding::mxfp4 ? 64 : 80, 8, 3, tokens);
    s.problem.precision = GetParam().precision;
    s.problem.encoding = GetParam().encoding;
    s.hidden = GetParam().hidden;
    return s;
  }
  LayerOptions how(i32 device = 0) const { return options(GetParam().precision, device); }
  Layer layer(const Spec& s) const { return Layer(cases::random_layer(s.problem, s.seed, s.biases), how()); }
  static std::vector<u8> run(Layer* l, const LayerCall& call, std::vector<u8>* output) {
    throw_unless_ok(cases::run_mirrored(l, call));
    return *output;
  }
};

TEST_P(EveryPrecision, IsBitwiseEqualFromRunToRun) {
  FOURMOE_NEEDS_HOPPER();
  const Spec s = usual(300);
  const cases::Call call(s);
  Layer l = layer(s);
  std::vector<u8> output;
  const std::vector<u8> first = run(&l, call.view(&output, Dtype::bf16), &output);
  for (int repeat = 0; repeat < 50; ++repeat) {
    ASSERT_EQ(run(&l, call.view(&output, Dtype::bf16), &output), first) << repeat;
  }
}

TEST_P(EveryPrecision, ATokenDoesNotSeeItsBatch) {
  FOURMOE_NEEDS_HOPPER();
  const Spec s = usual(100);
  const cases::Call call(s);
  Layer l = layer(s);
  std::vector<u8> output;
  const std::vector<u8> batch = run(&l, call.view(&output, Dtype::f32), &output);
  const i64 row = s.problem.hidden * 4;
  for (const i64 token : {0, 11, 99}) {
    LayerCall one = call.view(&output, Dtype::f32);
    one.hidden.data = one.hidden.row(token);
    one.ids.data = one.ids.row(token);
    one.weights.data = one.weights.row(token);
    one.hidden.rows = one.ids.rows = one.weights.rows = one.output.rows = 1;
    const std::vector<u8> alone = run(&l, one, &output);
    EXPECT_TRUE(std::equal(alone.begin(), alone.begin() + row, batch.begin() + token * row)) << token;
  }
}

// Deep enough that the finest tiles would split K, were it allowed.
TEST_P(EveryPrecision, ABatchInvariantTokenDoesNotSeeItsBatch) {
  FOURMOE_NEEDS_HOPPER();
  Spec s = usual(100);
  s.problem.hidden = 2048;
  s.problem.inter = 1088;
  const cases::Call call(s);
  LayerOptions invariant = how();
  invariant.batch_invariant = true;
  Layer l(cases::random_layer(s.problem, s.seed, false), invariant);
  std::vector<u8> output;
  const std::vector<u8> batch = run(&l, call.view(&output, Dtype::f32), &output);
  const i64 row = s.problem.hidden * 4;
  for (const auto& [token, count] : {std::pair<i64, i64>{0, 1}, {11, 5}, {40, 30}}) {
    LayerCall some = call.view(&output, Dtype::f32);
    some.hidden.data = some.hidden.row(token);
    some.ids.data = some.ids.row(token);
    some.weights.data = some.weights.row(token);
    some.hidden.rows = some.ids.rows = some.weights.rows = some.output.rows = count;
    const std::vector<u8> alone = run(&l, some, &output);
    EXPECT_TRUE(std::equal(alone.begin(), alone.begin() + count * row, batch.begin() + token * row)) << token;
  }
}

TEST_P(EveryPrecision, RowsBeyondTheTokensAreUntouched) {
  FOURMOE_NEEDS_HOPPER();
  const Spec s = usual(5);
  const cases::Call call(s);
  Layer l = layer(s);
  const i64 stride = s.problem.hidden + 32;
  std::vector<f32> wide(8 * stride, -123.0f);
  std::vector<u8> unused;
  LayerCall strided = call.view(&unused, Dtype::f32);
  strided.output = {wide.data(), Dtype::f32, 8, s.problem.hidden, stride};
  throw_unless_ok(cases::run_mirrored(&l, strided));
  for (i64 t = 0; t < 8; ++t) {
    for (i64 h = 0; h < stride; ++h) {
      const bool used = t < 5 && h < s.problem.hidden;
      ASSERT_EQ(wide[t * stride + h] == -123.0f, !used) << t << ", " << h;
    }
  }
}

TEST_P(EveryPrecision, DuplicatePicksCountTwiceAndMissingOnesNot) {
  FOURMOE_NEEDS_HOPPER();
  Spec s = usual(4);
  cases::Call twice(s);
  cases::Call once(s);
  for (i32 t = 0; t < 4; ++t) {
    twice.ids[t * 3 + 1] = twice.ids[t * 3];
    twice.ids[t * 3 + 2] = once.ids[t * 3 + 1] = once.ids[t * 3 + 2] = -1;
    once.weights[t * 3] = twice.weights[t * 3] + twice.weights[t * 3 + 1];
  }
  for (i32 p = 0; p < 3; ++p) twice.ids[3 * 3 + p] = once.ids[3 * 3 + p] = -1;
  Layer l = layer(s);
  std::vector<u8> a, b;
  throw_unless_ok(cases::run_mirrored(&l, twice.view(&a, Dtype::f32)));
  throw_unless_ok(cases::run_mirrored(&l, once.view(&b, Dtype::f32)));
  for (i64 i = 0; i < 4 * s.problem.hidden; ++i) {
    const f32 expected = format::read(b.data(), Dtype::f32, i);
    EXPECT_NEAR(format::read(a.data(), Dtype::f32, i), expected, 1e-5f * (1.0f + std::fabs(expected)));
    if (i >= 3 * s.problem.hidden) {
      EXPECT_EQ(expected, 0.0f);
    }
  }
}

TEST_P(EveryPrecision, ShardsOfTheExpertsSumToTheLayer) {
  FOURMOE_NEEDS_HOPPER();
  const Spec s = usual(9);
  const cases::Call call(s);
  std::vector<f64> sum(9 * s.problem.hidden, 0.0);
  for (const auto& [first, count] : {std::pair{0, 3}, {3, 1}, {4, 4}}) {
    checkpoint::Layer all = cases::random_layer(s.problem, s.seed, s.biases);
    all.problem.first_expert = first;
    all.problem.local_experts = count;
    all.experts = {all.experts.begin() + first, all.experts.begin() + first + count};
    std::vector<u8> output;
    Layer shard(std::move(all), how());
    throw_unless_ok(cases::run_mirrored(&shard, call.view(&output, Dtype::f32)));
    for (std::size_t i = 0; i < sum.size(); ++i) sum[i] += format::read(output.data(), Dtype::f32, i);
  }
  EXPECT_LE(cases::rel_l2(sum, cases::run(s, how())), 1e-6);
}

// The shared expert's output is combine's addend; the router's logits come from the checkpoint.
void check_shared(const Spec& s, Encoding shared, const std::function<LayerOptions(i32)>& how) {
  checkpoint::Layer layer = cases::random_layer(s.problem, s.seed, false);
  Problem extra_problem = cases::problem(96, 48, 1, 1);
  extra_problem.encoding = shared;
  checkpoint::Layer extra = cases::random_layer(extra_problem, 77, false);
  layer.shared = checkpoint::Layer::Shared{};
  layer.shared->problem = extra.problem;
  layer.shared->problem.routing.score = Score::none;
  layer.shared->expert = extra.experts[0];
  std::mt19937_64 random(5);
  std::normal_distribution<f32> normal(0.0f, 0.1f);
  std::vector<u16> router(9 * 96);  // eight experts, and the gate of the shared one
  for (u16& value : router) value = format::to_bf16(normal(random));
  format::Matrix dense;
  dense.data = reinterpret_cast<const u8*>(router.data());
  dense.data_stride = 2 * 96;
  dense.rows = 8;
  dense.cols = 96;
  dense.encoding = format::Encoding::bf16;
  layer.router = dense;
  dense.data += 8 * dense.data_stride;
  dense.rows = 1;
  layer.shared->gate = dense;
  layer.router_bias.assign(8, 0.25f);
  layer.selection_bias = {0.1f, -0.1f, 0.3f, 0.0f, 0.0f, -0.3f, 0.2f, 0.0f};

  const cases::Call call(s);
  std::vector<f64> outputs[2];
  std::vector<i32> ids[2];
  for (const i32 device : {-1, 0}) {
    std::vector<u8> bytes;
    LayerCall routed = call.view(&bytes, Dtype::f32);
    routed.ids = routed.weights = {};
    ids[device + 1].resize(11 * 3);
    std::vector<f32> weights(11 * 3);
    routed.picked_ids = ids[device + 1].data();
    routed.picked_weights = weights.data();
    Layer l(layer, how(device));
    throw_unless_ok(cases::run_mirrored(&l, routed));
    for (std::size_t i = 0; i < bytes.size() / 4; ++i)
      outputs[device + 1].push_back(format::read(bytes.data(), Dtype::f32, i));
  }
  EXPECT_EQ(ids[1], ids[0]);
  EXPECT_LE(cases::rel_l2(outputs[1], outputs[0]), cases::bound(s.problem));
}

TEST_P(EveryPrecision, SharedExpertsAndTheCheckpointsRouterAgreeWithTheHost) {
  FOURMOE_NEEDS_HOPPER();
  for (const Encoding shared : {Encoding::nvfp4, Encoding::bf16}) {
    check_shared(usual(11), shared, [&](i32 device) { return how(device); });
  }
}

TEST_P(EveryPrecision, RefitsInPlace) {
  FOURMOE_NEEDS_HOPPER();
  const Spec s = usual(20);
  const cases::Call call(s);
  Layer l = layer(s);
  std::vector<u8> output;
  const std::vector<u8> before = run(&l, call.view(&output, Dtype::f32), &output);
  l.refit(cases::random_layer(s.problem, s.seed + 1, false));
  const std::vector<u8> after = run(&l, call.view(&output, Dtype::f32), &output);
  Layer fresh(cases::random_layer(s.problem, s.seed + 1, false), how());
  EXPECT_NE(after, before);
  EXPECT_EQ(after, run(&fresh, call.view(&output, Dtype::f32), &output));
}

// One capture, 100 routings: sizes are known on the device alone.
TEST_P(EveryPrecision, AGraphReplaysWithAnyRouting) {
  FOURMOE_NEEDS_HOPPER();
  Spec s = usual(40);
  cases::Call data(s);
  Layer l = layer(s);
  std::vector<u8> output;
  const LayerCall host = data.view(&output, Dtype::f32);
  gpu::OwnStream stream;
  gpu::Buffer workspace;
  throw_unless_ok(gpu::OwnStream::make(&stream));
  throw_unless_ok(gpu::Buffer::make(gpu::Kind::device, l.workspace_bytes(), "workspace", &workspace));
  cases::Mirror mirror(l, host);
  mirror.call().stream = stream.get();
  gpu::Graph graph;
  throw_unless_ok(gpu::Graph::capture(
      stream.get(),
      [&] {
        return l.run(mirror.call(), {workspace.data(), workspace.bytes()});
      },
      &graph));
  for (int round = 0; round < 100; ++round) {
    s.seed = 1000 + round;
    s.routes = static_cast<Routes>(round % 4);
    const cases::Call other(s);
    std::copy(other.ids.begin(), other.ids.end(), data.ids.begin());
    std::copy(other.weights.begin(), other.weights.end(), data.weights.begin());
    std::copy(other.hidden.begin(), other.hidden.end(), data.hidden.begin());
    std::fill(output.begin(), output.end(), 0xff);
    mirror.refresh();
    throw_unless_ok(graph.launch(stream.get()));
    throw_unless_ok(l.wait(stream.get()));
    mirror.fetch();
    const std::vector<u8> replayed = output;
    std::vector<u8> direct;
    throw_unless_ok(cases::run_mirrored(&l, other.view(&direct, Dtype::f32)));
    ASSERT_EQ(replayed, direct) << round;
  }
}

// Calls without a workspace share the layer's own: streams of several threads must not overlap in it.
TEST_P(EveryPrecision, ThreadsWithStreamsOfTheirOwnTakeTurns) {
  FOURMOE_NEEDS_HOPPER();
  Layer l = layer(usual(100));
  std::vector<std::thread> threads;
  std::atomic<int> wrong{0};
  for (u64 seed = 1; seed <= 4; ++seed) {
    threads.emplace_back([&, seed] {
      Spec s = usual(100);
      s.seed = seed;
      const cases::Call call(s);
      std::vector<u8> output;
      cases::Mirror mirror(l, call.view(&output, Dtype::f32));
      gpu::OwnStream stream;
      throw_unless_ok(gpu::OwnStream::make(&stream));
      mirror.call().stream = stream.get();
      std::vector<u8> first;
      for (int repeat = 0; repeat < 20; ++repeat) {
        for (int burst = 0; burst < 5; ++burst) throw_unless_ok(l.run(mirror.call()));
        throw_unless_ok(l.wait(stream.get()));
        mirror.fetch();
        if (first.empty()) first = output;
        wrong += output != first;
      }
      Layer fresh = layer(usual(100));  // the same weights, for this thread alone
      std::vector<u8> expected;
      throw_unless_ok(cases::run_mirrored(&fresh, call.view(&expected, Dtype::f32)));
      wrong += expected != first;
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
}

INSTANTIATE_TEST_SUITE_P(Device, EveryPrecision,
                         testing::Values(Kind{"w4a16", Precision::w4a16}, Kind{"w4a4", Precision::w4a4},
                                         Kind{"w4a16_mxfp4", Precision::w4a16, Encoding::mxfp4},
                                         Kind{"w4a16_bf16", Precision::w4a16, Encoding::bf16},
                                         Kind{"w4a16_f16", Precision::w4a16, Encoding::nvfp4, Dtype::f16}),
                         [](const auto& at) { return std::string(at.param.name); });

// Tokens quantised by the caller: one global for all experts, so that their codes are those that the layer would make.
class QuantisedTokens : public testing::Test {
 protected:
  static constexpr i32 kHidden = 96, kTokens = 150;  // two passes
  static constexpr f32 kGlobal = 0.002f;

  void SetUp() override {
    FOURMOE_NEEDS_HOPPER();
    spec_ = spec(kHidden, 80, 8, 3, kTokens);
    spec_.problem.precision = Precision::w4a4;
    call_ = std::make_unique<cases::Call>(spec_);
    std::vector<f32> x(kHidden);
    for (i32 t = 0; t < kTokens; ++t) {
      for (i32 h = 0; h < kHidden; ++h) x[h] = format::read(call_->hidden.data(), Dtype::bf16, i64{t} * kHidden + h);
      format::quantise_row(x.data(), kHidden, kGlobal, &codes_[t * kHidden / 2], &scales_[t * kHidden / 16]);
    }
  }
  Layer layer(i32 device) const {
    checkpoint::Layer weights = cases::random_layer(spec_.problem, 1, false);
    for (weights::Expert& expert : weights.experts) expert.input_scale = kGlobal;
    return Layer(std::move(weights), options(Precision::w4a4, device));
  }
  LayerCall quantised(std::vector<u8>* output) {
    LayerCall call = call_->view(output, Dtype::f32);
    call.hidden = {codes_.data(), Dtype::u8, kTokens, kHidden / 2, kHidden / 2};
    call.hidden_scales = {scales_.data(), Dtype::u8, kTokens, kHidden / 16, kHidden / 16};
    return call;
  }
  static std::vector<f64> floats(const std::vector<u8>& bytes) {
    std::vector<f64> values;
    for (std::size_t i = 0; i < bytes.size() / 4; ++i) values.push_back(format::read(bytes.data(), Dtype::f32, i));
    return values;
  }

  Spec spec_;
  std::unique_ptr<cases::Call> call_;
  std::vector<u8> codes_ = std::vector<u8>(kTokens * kHidden / 2);
  std::vector<u8> scales_ = std::vector<u8>(kTokens * kHidden / 16);
};

TEST_F(QuantisedTokens, GiveTheBitsOfTokensThatTheLayerQuantises) {
  Layer device = layer(0);
  std::vector<u8> values, codes;
  throw_unless_ok(cases::run_mirrored(&device, call_->view(&values, Dtype::f32)));
  throw_unless_ok(cases::run_mirrored(&device, quantised(&codes)));
  EXPECT_EQ(codes, values);
}

TEST_F(QuantisedTokens, ThatTheLayerWouldNotMakeAgreeWithTheHost) {
  std::mt19937_64 random(3);
  for (u8& byte : codes_) byte = static_cast<u8>(random());
  for (u8& byte : scales_) byte = static_cast<u8>(0x28 + random() % 32);
  Layer host = layer(-1), device = layer(0);
  std::vector<u8> want, found;
  throw_unless_ok(cases::run_mirrored(&host, quantised(&want)));
  throw_unless_ok(cases::run_mirrored(&device, quantised(&found)));
  EXPECT_LE(cases::rel_l2(floats(found), floats(want)), cases::bound(spec_.problem));
  scales_[5] ^= 0x08;  // one block of one token: 16 values, doubled or halved
  throw_unless_ok(cases::run_mirrored(&device, quantised(&want)));
  EXPECT_NE(found, want);
}

TEST_F(QuantisedTokens, ABadScaleIsReportedAndTheOtherTokensAreComputed) {
  Layer device = layer(0);
  std::vector<u8> good, bad;
  throw_unless_ok(cases::run_mirrored(&device, quantised(&good)));
  scales_[7 * kHidden / 16 + 2] = 0x80;
  cases::Mirror mirror(device, quantised(&bad));
  throw_unless_ok(device.run(mirror.call()));
  const Status status = device.wait();
  EXPECT_EQ(status.reason, Reason::scale_invalid);
  EXPECT_EQ(status.detail,
            "hidden_scales[7, 2] is 0x80: NaN or negative (counting from the first token of a pass of 128)");
  EXPECT_TRUE(device.wait().ok());
  mirror.fetch();
  const std::vector<f64> found = floats(bad), want = floats(good);
  for (i64 i = 0; i < kTokens * kHidden; ++i) {
    if (i / kHidden == 7) ASSERT_TRUE(std::isnan(found[i]));
    else ASSERT_EQ(found[i], want[i]) << i;
  }
}

TEST_F(QuantisedTokens, InHostMemoryAreNamed) {
  Layer device = layer(0);
  std::vector<u8> output;
  const LayerCall host = quantised(&output);
  const cases::Mirror mirror(device, host);
  LayerCall call = mirror.call();
  call.hidden_scales.data = host.hidden_scales.data;
  EXPECT_NE(device.run(call).detail.find("hidden_scales is in host memory, expected memory of cuda:0"),
            std::string::npos);
}

// Infinite f16 saturates, infinite bf16 does not, NaN stays: a token's own affair.
TEST(DeviceLayer, TokensThatAreNotFiniteComeOutAsTheReferenceGivesThem) {
  FOURMOE_NEEDS_HOPPER();
  for (const Dtype dtype : {Dtype::f16, Dtype::bf16}) {
    Spec s = spec(96, 80, 8, 3, 6);
    s.hidden = dtype;
    cases::Call call(s);
    const f32 values[] = {INFINITY, -INFINITY, NAN, 65504.0f};
    const auto bits = [&](f32 x) { return dtype == Dtype::f16 ? format::to_f16(x) : format::to_bf16(x); };
    for (int t = 0; t < 4; ++t) {
      const u16 value = bits(values[t]);
      std::memcpy(call.hidden.data() + (t * 96 + 17) * 2, &value, 2);
    }
    std::vector<u8> outputs[2];
    for (const i32 device : {-1, 0}) {
      LayerOptions o = options(Precision::w4a16, device);
      if (device < 0) o.backend = "reference";
      Layer l(cases::random_layer(s.problem, 3, false), o);
      throw_unless_ok(cases::run_mirrored(&l, call.view(&outputs[device + 1], Dtype::f32)));
    }
    for (i64 t = 0; t < 6; ++t) {
      std::vector<f64> found, wanted;
      for (i64 i = t * 96; i < (t + 1) * 96; ++i) {
        wanted.push_back(format::read(outputs[0].data(), Dtype::f32, i));
        found.push_back(format::read(outputs[1].data(), Dtype::f32, i));
        ASSERT_EQ(std::isnan(found.back()), std::isnan(wanted.back())) << format::dtype_name(dtype) << " " << t;
      }
      if (std::isnan(wanted[0])) continue;
      EXPECT_LE(cases::rel_l2(found, wanted), cases::bound(s.problem)) << t;
    }
  }
}

// Calls that must be refused, and what only kernels see.

class BadCall : public testing::Test {
 protected:
  void SetUp() override {
    FOURMOE_NEEDS_HOPPER();
    spec_ = spec(64, 48, 4, 2, 3);
    layer_ = std::make_unique<Layer>(cases::random_layer(spec_.problem, 1, false), options(Precision::w4a16));
    data_ = std::make_unique<cases::Call>(spec_);
  }
  void expect(const Status& status, Reason reason, const std::string& words) {
    EXPECT_EQ(status.reason, reason) << status.detail;
    EXPECT_NE(status.detail.find(words), std::string::npos) << status.detail;
  }
  Spec spec_;
  std::unique_ptr<Layer> layer_;
  std::unique_ptr<cases::Call> data_;
  std::vector<u8> output_;
};

TEST_F(BadCall, HostPointersAreNamed) {
  const LayerCall host = data_->view(&output_, Dtype::f32);
  const cases::Mirror mirror(*layer_, host);
  LayerCall call = mirror.call();
  call.hidden.data = host.hidden.data;
  expect(layer_->run(call), Reason::memory_misplaced, "hidden_states is in host memory, expected memory of cuda:0");
  call = mirror.call();
  call.output.data = host.output.data;
  expect(layer_->run(call), Reason::memory_misplaced, "output is in host memory");
  call = mirror.call();
  call.weights.data = host.weights.data;
  expect(layer_->run(call), Reason::memory_misplaced, "topk_weights is in host memory");
  const i64 bytes = layer_->workspace_bytes();
  std::vector<std::byte> memory(bytes + 64);
  void* aligned = memory.data();  // so that nothing else is wrong with it
  std::size_t room = memory.size();
  ASSERT_NE(std::align(64, bytes, aligned, room), nullptr);
  expect(layer_->run(mirror.call(), {static_cast<std::byte*>(aligned), bytes}), Reason::memory_misplaced, "workspace");
  EXPECT_TRUE(layer_->run(mirror.call()).ok());
  EXPECT_TRUE(layer_->wait().ok());
}

TEST_F(BadCall, AWorkspaceTooSmallOrMisaligned) {
  const cases::Mirror mirror(*layer_, data_->view(&output_, Dtype::f32));
  gpu::Buffer memory;
  const i64 bytes = layer_->workspace_bytes();
  throw_unless_ok(gpu::Buffer::make(gpu::Kind::device, bytes + 64, "workspace", &memory));
  expect(layer_->run(mirror.call(), {memory.data(), bytes - 1}), Reason::workspace_too_small, "needs");
  expect(layer_->run(mirror.call(), {memory.data() + 4, bytes}), Reason::argument_invalid, "aligned to 64");
  EXPECT_TRUE(layer_->run(mirror.call(), {memory.data() + 64, bytes}).ok());
  EXPECT_TRUE(layer_->wait().ok());
}

TEST_F(BadCall, MisalignedRows) {
  const cases::Mirror mirror(*layer_, data_->view(&output_, Dtype::f32));
  LayerCall call = mirror.call();
  call.hidden.data = static_cast<u8*>(call.hidden.data) + 2;
  expect(layer_->run(call), Reason::argument_invalid, "hidden_states begins 2 bytes after a multiple of 16");
}

TEST_F(BadCall, AnIdOutOfRangeIsReportedByWaitOrByTheNextCall) {
  data_->ids[4] = 4;
  {
    const cases::Mirror mirror(*layer_, data_->view(&output_, Dtype::f32));
    EXPECT_TRUE(layer_->run(mirror.call()).ok());
    expect(layer_->wait(), Reason::pick_out_of_range, "topk_ids[2, 0] is 4");
    EXPECT_TRUE(layer_->wait().ok());
    EXPECT_TRUE(layer_->run(mirror.call()).ok());
    throw_unless_ok(gpu::synchronise(nullptr));
    expect(layer_->run(mirror.call()), Reason::pick_out_of_range, "earlier call");
  }
  data_->ids[4] = 3;
  EXPECT_TRUE(cases::run_mirrored(layer_.get(), data_->view(&output_, Dtype::f32)).ok());
}

TEST_F(BadCall, AFaultOfALaterPassSaysWhatItCounts) {
  spec_.tokens = 300;
  cases::Call call(spec_);
  call.ids[130 * 2] = -7;
  expect(cases::run_mirrored(layer_.get(), call.view(&output_, Dtype::f32)), Reason::pick_out_of_range,
         "topk_ids[2, 0] is -7, expected -1 to 3 (counting from the first token of a pass of 128)");
}

TEST_F(BadCall, ACaptureWithoutAnyWorkspace) {
  cases::Mirror mirror(*layer_, data_->view(&output_, Dtype::f32));
  gpu::OwnStream stream;
  throw_unless_ok(gpu::OwnStream::make(&stream));
  mirror.call().stream = stream.get();
  gpu::Graph graph;
  const auto run = [&] { return layer_->run(mirror.call()); };
  expect(gpu::Graph::capture(stream.get(), run, &graph), Reason::workspace_too_small, "before the capture");
  throw_unless_ok(run());
  EXPECT_TRUE(gpu::Graph::capture(stream.get(), run, &graph).ok());
  EXPECT_TRUE(layer_->wait(stream.get()).ok());
}

TEST(DeviceLayer, DeviceAndBackendMustAgree) {
  FOURMOE_NEEDS_HOPPER();
  const Spec s = spec(64, 48, 4, 2, 3);
  const auto make = [&](i32 device, const char* backend, Encoding encoding) {
    LayerOptions o = options(Precision::w4a16, device);
    o.backend = backend;
    Spec changed = s;
    changed.problem.encoding = encoding;
    try {
      Layer(cases::random_layer(changed.problem, 1, false), o);
    } catch (const Error& error) {
      return std::string(reason_name(error.reason())) + ": " + error.what();
    }
    return std::string();
  };
  EXPECT_EQ(make(0, "sm90", format::Encoding::nvfp4), "");
  EXPECT_NE(make(0, "cpu", format::Encoding::nvfp4).find("device host"), std::string::npos);
  EXPECT_NE(make(-1, "sm90", format::Encoding::nvfp4).find("device cuda:0"), std::string::npos);
  EXPECT_NE(make(99, "auto", format::Encoding::nvfp4).find("device_missing"), std::string::npos);
  EXPECT_NE(make(0, "auto", Encoding::fp8).find("weights are fp8; nvfp4, mxfp4 or bf16 would pass"), std::string::npos);
}

TEST(DeviceLayer, SharedExpertsAndRoutersOf8BitsAreRefused) {
  FOURMOE_NEEDS_HOPPER();
  const auto make = [](const checkpoint::Layer& layer) {
    try {
      Layer(layer, options(Precision::w4a16));
    } catch (const Error& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  const Spec s = spec(64, 48, 4, 2, 3);
  checkpoint::Layer layer = cases::random_layer(s.problem, 1, false);
  Problem dense = cases::problem(64, 32, 1, 1);
  dense.encoding = Encoding::fp8;
  checkpoint::Layer extra = cases::random_layer(dense, 2, false);
  layer.shared = checkpoint::Layer::Shared{dense, extra.experts[0], {}};
  EXPECT_NE(make(layer).find("shared experts: "), std::string::npos) << make(layer);
  EXPECT_NE(make(layer).find("weights are fp8; nvfp4, mxfp4 or bf16 would pass"), std::string::npos) << make(layer);
  layer.shared.reset();
  EXPECT_EQ(make(layer), "");
  layer.router = extra.experts[0].up;
  layer.router.encoding = format::Encoding::fp8;
  EXPECT_NE(make(layer).find("router is fp8; on a GPU bf16, f16 or f32 would pass"), std::string::npos) << make(layer);
}

}  // namespace
}  // namespace fourmoe
