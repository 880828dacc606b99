// Every choice that can be measured gives the layer's result, and those for batch_invariant give the same bits.
#include <set>

#include "case.h"
#include "gpu/hopper.h"
#include "mirror.h"

namespace fourmoe {
namespace {

using cases::spec;
using cases::Spec;
using format::Dtype;

struct Setting {
  Spec spec;
  bool batch_invariant = false;
  Dtype hidden = Dtype::bf16;
};

// Few and many slots an expert, so that the list of shapes worth trying changes; odd sizes; forms with one shape.
std::vector<Setting> settings() {
  std::vector<Setting> all;
  for (const i32 tokens : {1, 3, 8, 24, 100}) all.push_back({spec(704, 352, 16, 4, tokens)});
  for (const i32 inter : {704, 1088, 2112}) all.push_back({spec(256, inter, 8, 2, 1)});  // y in several pieces
  all.push_back({spec(2304, 80, 64, 8, 8)});
  all.push_back({spec(96, 80, 4, 2, 700)});
  all.push_back({spec(256, 1088, 8, 2, 5), true});
  all.push_back({spec(256, 1088, 8, 2, 20), true});
  all.push_back({spec(256, 1088, 8, 2, 60), true});
  all.push_back({spec(192, 64, 8, 2, 12)});
  all.back().spec.problem.encoding = format::Encoding::mxfp4;
  all.push_back({spec(192, 64, 8, 2, 6)});
  all.back().spec.problem.encoding = format::Encoding::bf16;
  all.push_back({spec(192, 64, 8, 2, 6)});
  all.back().spec.problem.precision = Precision::w4a4;
  all.push_back({spec(160, 96, 8, 2, 8)});
  all.back().spec.problem.activation.kind = ActivationKind::relu2;
  all.back().spec.biases = true;
  return all;
}

LayerOptions options(const Setting& setting, i32 device) {
  LayerOptions how;
  how.precision = setting.spec.problem.precision;
  how.batch_invariant = setting.batch_invariant;
  how.max_tokens = 1024;
  how.device = device;
  how.tuning = "";
  return how;
}

std::vector<f64> values_of(const std::vector<u8>& bytes) {
  std::vector<f64> values(bytes.size() / 4);
  for (std::size_t i = 0; i < values.size(); ++i) values[i] = format::read(bytes.data(), Dtype::f32, i);
  return values;
}

class EveryChoice : public testing::TestWithParam<Setting> {};

TEST_P(EveryChoice, GivesTheLayersResult) {
  FOURMOE_NEEDS_HOPPER();
  const Setting& setting = GetParam();
  const Spec& s = setting.spec;
  const std::vector<f64> reference = cases::run(s, options(setting, -1));
  Layer layer(cases::random_layer(s.problem, s.seed, s.biases), options(setting, 0));
  const plan::Plan& rule = layer.plan(s.tokens);
  const auto choices = plan::alternatives(rule.problem, rule.machine, {});
  ASSERT_FALSE(choices.empty());
  const cases::Call call(s);
  std::set<std::vector<u8>> results;
  for (const plan::Choice& choice : choices) {
    std::string words;
    for (const std::string& step : choice) words += step + "; ";
    ASSERT_TRUE(layer.choose(s.tokens, choice).ok()) << words;
    std::vector<u8> output;
    throw_unless_ok(cases::run_mirrored(&layer, call.view(&output, Dtype::f32)));
    EXPECT_LE(cases::rel_l2(values_of(output), reference), cases::bound(s.problem)) << words;
    results.insert(output);
  }
  if (setting.batch_invariant) {
    EXPECT_EQ(results.size(), 1u) << cases::describe(s);
  }
}

INSTANTIATE_TEST_SUITE_P(Device, EveryChoice, testing::ValuesIn(settings()),
                         [](const auto& at) { return "case" + std::to_string(at.index); });

// A choice that needs more scratch than the layer's own workspace had at first.
TEST(Choice, TheLayersOwnWorkspaceGrowsWithIt) {
  FOURMOE_NEEDS_HOPPER();
  Setting setting{spec(2304, 80, 64, 8, 8)};
  LayerOptions how = options(setting, 0);
  how.max_tokens = 8;
  Layer layer(cases::random_layer(setting.spec.problem, 1, false), how);
  const cases::Call call(setting.spec);
  const plan::Choice split = {"device.route", "sm90.gemm1", "sm90.gemm2", "device.combine"};
  const plan::Choice whole = {"sm90.whole"};
  std::vector<u8> first, second;
  for (const i32 tokens : {1, 2, 4, 8}) ASSERT_TRUE(layer.choose(tokens, split).ok());
  const i64 small = layer.workspace_bytes();
  throw_unless_ok(cases::run_mirrored(&layer, call.view(&first, Dtype::bf16)));
  for (const i32 tokens : {1, 2, 4, 8}) ASSERT_TRUE(layer.choose(tokens, whole).ok());
  EXPECT_NE(layer.workspace_bytes(), small);
  throw_unless_ok(cases::run_mirrored(&layer, call.view(&second, Dtype::bf16)));
  EXPECT_EQ(first.size(), second.size());
}

}  // namespace
}  // namespace fourmoe
