// Checkpoints written by other libraries (tests/fixtures): every weight bit for bit as those libraries decode it.
#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <tuple>

#include "checkpoint/checkpoint.h"
#include "checkpoint/safetensors.h"
#include "status.h"

namespace fourmoe::checkpoint {
namespace {

using format::Encoding;
using format::Matrix;

const std::filesystem::path kFixtures = std::filesystem::path(FOURMOE_SOURCE_DIR) / "tests/fixtures";

TensorMap read_expected(const std::filesystem::path& path) {
  TensorMap out;
  parse_safetensors(MappedFile::open(path), &out, nullptr);
  return out;
}

f32 value_at(const StoredTensor& tensor, i64 index) {
  return format::read(tensor.data(), tensor.dtype == "F32" ? format::Dtype::f32 : format::Dtype::bf16, index);
}

f32 code_of(const Matrix& m, i64 row, i64 col) { return format::from_e2m1(format::code_at(m.row(row), col)); }

f32 scale_of(const Matrix& m, i64 row, i64 col) {
  return m.encoding == Encoding::nvfp4 ? format::from_e4m3(m.scale_row(row)[col / 16])
                                       : format::from_e8m0(m.scale_row(row)[col / 32]);
}

// The order of the f32 operations in which each library multiplies (tests/fixtures/README.md).
enum class Order { scale_times_global, scale_by_divisor, no_global };

f32 decode(const Matrix& m, i64 row, i64 col, Order order, f32 divisor) {
  const f32 code = code_of(m, row, col), scale = scale_of(m, row, col);
  switch (order) {
    case Order::scale_times_global: return code * (scale * m.global);
    case Order::scale_by_divisor: return code * (scale / divisor);
    case Order::no_global: return code * scale;
  }
  return 0.0f;
}

// `==`, so that the two zeros are equal.
void expect_equal(const Matrix& m, const StoredTensor& expected, const std::string& name, Order order, f32 divisor) {
  ASSERT_EQ(expected.shape, (std::vector<i64>{m.rows, m.cols})) << name;
  i64 different = 0;
  for (i64 r = 0; r < m.rows; ++r) {
    for (i64 c = 0; c < m.cols; ++c) {
      const f32 value = value_at(expected, r * m.cols + c);
      different += decode(m, r, c, order, divisor) != value;
      EXPECT_EQ(format::weight_at(m, r, c), f64{code_of(m, r, c)} * scale_of(m, r, c));
    }
  }
  EXPECT_EQ(different, 0) << name;
}

void expect_bias(const f32* bias, const TensorMap& expected, const std::string& name) {
  const auto found = expected.find(name);
  ASSERT_EQ(bias != nullptr, found != expected.end()) << name;
  if (bias == nullptr) return;
  for (i64 i = 0; i < found->second.shape[0]; ++i) EXPECT_EQ(bias[i], value_at(found->second, i)) << name << i;
}

struct Fixture {
  std::string checkpoint;
  std::string expected;
  std::string dialect;
  std::string layout;
  std::string family;
  std::vector<i32> layers;
  Encoding encoding;
  i32 experts;
  bool gated = true;
  bool biases = false;
  Order order = Order::scale_times_global;
  std::string suffix = "";  // of the expected names
};

const std::vector<Fixture> kAll = {
    {"modelopt-qwen3", "", "modelopt", "per-expert", "qwen3_moe", {0, 1}, Encoding::nvfp4, 3},
    {"modelopt-mixtral", "", "modelopt", "per-expert", "mixtral", {0}, Encoding::nvfp4, 2},
    {"modelopt-nemotron", "", "modelopt", "per-expert", "nemotron_h", {1}, Encoding::nvfp4, 3, false},
    {"modelopt-llama4", "", "modelopt", "transposed", "llama4", {0}, Encoding::nvfp4, 3},
    {"modelopt-gpt-oss", "", "modelopt", "transposed", "gpt_oss", {0}, Encoding::nvfp4, 3, true, true},
    {"modelopt-stacked", "", "modelopt", "stacked", "qwen3_moe", {0, 1}, Encoding::nvfp4, 3},
    {"ct-nvfp4",
     "",
     "compressed-tensors",
     "per-expert",
     "qwen3_moe",
     {0},
     Encoding::nvfp4,
     3,
     true,
     false,
     Order::scale_by_divisor},
    {"gpt-oss-mxfp4", "", "mxfp4", "interleaved", "gpt_oss", {0}, Encoding::mxfp4, 3, true, true, Order::no_global},
    {"gguf-nvfp4.gguf",
     "gguf-nvfp4.expected.safetensors",
     "gguf",
     "gguf",
     "qwen3_moe",
     {0},
     Encoding::nvfp4,
     2,
     true,
     false,
     Order::no_global,
     "_unscaled"},
    {"gguf-mxfp4.gguf",
     "gpt-oss-mxfp4/expected.safetensors",
     "gguf",
     "gguf",
     "gpt_oss",
     {0},
     Encoding::mxfp4,
     3,
     true,
     true,
     Order::no_global},
};

class Fixtures : public testing::TestWithParam<Fixture> {
 protected:
  TensorMap expected() const {
    const Fixture& f = GetParam();
    return read_expected(kFixtures / (f.expected.empty() ? f.checkpoint + "/expected.safetensors" : f.expected));
  }
};

// The divisor as stored: the loader's inverse must be its reciprocal.
f32 stored_divisor(const TensorMap& tensors, i32 layer, i32 expert, const std::string& projection) {
  const std::string name = "model.layers." + std::to_string(layer) + ".mlp.experts." + std::to_string(expert) + "." +
                           projection + "_proj.weight_global_scale";
  return value_at(tensors.at(name), 0);
}

TEST_P(Fixtures, decode_bit_for_bit) {
  const Fixture& f = GetParam();
  const TensorMap values = expected();
  const Checkpoint checkpoint = Checkpoint::open(kFixtures / f.checkpoint);
  ASSERT_EQ(checkpoint.layers(), f.layers);
  for (const i32 index : f.layers) {
    const Layer layer = checkpoint.load(index, tbb_executor(2));
    EXPECT_EQ(layer.problem.encoding, f.encoding);
    ASSERT_EQ(static_cast<i32>(layer.experts.size()), f.experts);
    for (i32 e = 0; e < f.experts; ++e) {
      const weights::Expert& expert = layer.experts[static_cast<std::size_t>(e)];
      const std::string prefix = "layers." + std::to_string(index) + ".experts." + std::to_string(e) + ".";
      EXPECT_EQ(expert.gate.empty(), !f.gated);
      const std::vector<std::tuple<std::string, const Matrix*, const f32*>> parts = {
          {"gate", &expert.gate, expert.gate_bias},
          {"up", &expert.up, expert.up_bias},
          {"down", &expert.down, expert.down_bias}};
      for (const auto& [name, matrix, bias] : parts) {
        if (matrix->empty()) continue;
        const bool divides = f.order == Order::scale_by_divisor;
        const f32 divisor = divides ? stored_divisor(checkpoint.tensors(), index, e, name) : 0.0f;
        if (divides) {
          EXPECT_EQ(matrix->global, 1.0f / divisor);
        }
        expect_equal(*matrix, values.at(prefix + name + f.suffix), prefix + name, f.order, divisor);
        expect_bias(bias, values, prefix + name + "_bias");
      }
    }
  }
}

TEST_P(Fixtures, inspect_agrees_with_load) {
  const Fixture& f = GetParam();
  const Checkpoint checkpoint = Checkpoint::open(kFixtures / f.checkpoint);
  const Info info = checkpoint.inspect();
  EXPECT_EQ(info.dialect, f.dialect);
  EXPECT_EQ(info.family, f.family);
  EXPECT_GT(info.tensors, 0);
  ASSERT_EQ(info.layers.size(), f.layers.size());
  for (std::size_t i = 0; i < f.layers.size(); ++i) {
    const LayerInfo& each = info.layers[i];
    const Layer layer = checkpoint.load(each.index, tbb_executor(1));
    EXPECT_EQ(each.index, f.layers[i]);
    EXPECT_EQ(each.layout, f.layout);
    EXPECT_EQ(each.biases, f.biases);
    EXPECT_TRUE(each.router);
    EXPECT_EQ(each.problem.encoding, f.encoding);
    EXPECT_EQ(each.problem.hidden, layer.problem.hidden);
    EXPECT_EQ(each.problem.inter, layer.problem.inter);
    EXPECT_EQ(each.problem.top_k, layer.problem.top_k);
    EXPECT_EQ(each.shared.has_value(), layer.shared.has_value());
    EXPECT_EQ(layer.problem.local_experts, f.experts);
    EXPECT_EQ(layer.problem.max_tokens, 0);
    EXPECT_EQ(layer.router.rows, f.experts);
    EXPECT_EQ(layer.router.cols, layer.problem.hidden);
    EXPECT_TRUE(check(layer.problem).accepted()) << check(layer.problem).detail;
  }
}

INSTANTIATE_TEST_SUITE_P(Dialects, Fixtures, testing::ValuesIn(kAll), [](const auto& test) {
  std::string name = test.param.checkpoint;
  for (char& c : name) {
    if (c == '-' || c == '.') c = '_';
  }
  return name;
});

TEST(FixtureFacts, gate_and_up_globals_stay_apart) {
  const Checkpoint checkpoint = Checkpoint::open(kFixtures / "modelopt-qwen3");
  const Info info = checkpoint.inspect();
  EXPECT_EQ(info.files, 2);
  EXPECT_EQ(info.algorithm, "NVFP4");
  EXPECT_EQ(info.producer, "modelopt 0.47.0");
  EXPECT_EQ(info.layers[0].oddities.gate_up_differ, 2);
  EXPECT_GT(info.layers[0].oddities.largest_ratio, 1.0f);
  EXPECT_EQ(info.layers[1].oddities.gate_up_differ, 0);
  const Layer layer = checkpoint.load(0, tbb_executor(1));
  EXPECT_NE(layer.experts[1].gate.global, layer.experts[1].up.global);
  ASSERT_FALSE(layer.notes.empty());
  EXPECT_NE(layer.notes[0].find("2 of 3 experts"), std::string::npos);
}

TEST(FixtureFacts, stacked_globals_of_two_columns) {
  const Layer layer = Checkpoint::open(kFixtures / "modelopt-stacked").load(0, tbb_executor(1));
  const TensorMap tensors = read_expected(kFixtures / "modelopt-stacked/model.safetensors");
  const StoredTensor& globals = tensors.at("model.layers.0.mlp.experts.w13_weight_scale_2");
  const StoredTensor& inputs = tensors.at("model.layers.0.mlp.experts.w13_input_scale");
  for (i32 e = 0; e < 3; ++e) {
    EXPECT_EQ(layer.experts[static_cast<std::size_t>(e)].gate.global, value_at(globals, 2 * e));
    EXPECT_EQ(layer.experts[static_cast<std::size_t>(e)].up.global, value_at(globals, 2 * e + 1));
    EXPECT_EQ(layer.experts[static_cast<std::size_t>(e)].input_scale,
              std::max(value_at(inputs, 2 * e), value_at(inputs, 2 * e + 1)));
  }
}

TEST(FixtureFacts, interleaved_rows_are_views) {
  const Layer layer = Checkpoint::open(kFixtures / "gpt-oss-mxfp4").load(0, tbb_executor(1));
  const weights::Expert& expert = layer.experts[1];
  EXPECT_EQ(expert.gate.data_stride, 64);  // twice a row of 64 / 2 bytes
  EXPECT_EQ(expert.up.data, expert.gate.data + 32);
  EXPECT_EQ(expert.up.scales, expert.gate.scales + 2);
  EXPECT_EQ(layer.router_bias.size(), 3u);
  EXPECT_TRUE(layer.selection_bias.empty());
}

TEST(FixtureFacts, gguf_globals_come_from_scale_tensors) {
  const Layer layer = Checkpoint::open(kFixtures / "gguf-nvfp4.gguf").load(0, tbb_executor(1));
  bool differ = false;
  for (const weights::Expert& expert : layer.experts) differ = differ || expert.gate.global != 1.0f;
  EXPECT_TRUE(differ);
  EXPECT_GT(layer.experts[0].input_scale, 0.0f);
}

TEST(FixtureFacts, shared_experts_are_loaded) {
  const Layer llama = Checkpoint::open(kFixtures / "modelopt-llama4").load(0, tbb_executor(1));
  ASSERT_TRUE(llama.shared.has_value());
  EXPECT_EQ(llama.shared->problem.encoding, Encoding::bf16);
  EXPECT_EQ(llama.shared->problem.experts, 1);
  EXPECT_EQ(llama.shared->problem.inter, 32);
  EXPECT_TRUE(llama.shared->gate.empty());
  EXPECT_TRUE(llama.problem.routing.weight_on_input);
  const Layer nemotron = Checkpoint::open(kFixtures / "modelopt-nemotron").load(1, tbb_executor(1));
  ASSERT_TRUE(nemotron.shared.has_value());
  EXPECT_EQ(nemotron.shared->problem.inter, 16);
  EXPECT_TRUE(nemotron.shared->expert.gate.empty());
  EXPECT_EQ(nemotron.selection_bias.size(), 3u);
  EXPECT_EQ(nemotron.problem.activation.kind, ActivationKind::relu2);
}

TEST(FixtureFacts, a_single_file_opens_with_the_config_beside_it) {
  const Checkpoint checkpoint = Checkpoint::open(kFixtures / "ct-nvfp4/model.safetensors");
  EXPECT_EQ(checkpoint.layers(), std::vector<i32>{0});
}

TEST(FixtureFacts, missing_layers_are_listed) {
  try {
    Checkpoint::open(kFixtures / "modelopt-qwen3").load(7, tbb_executor(1));
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.reason(), Reason::layer_missing);
    EXPECT_NE(std::string(error.what()).find("0-1"), std::string::npos) << error.what();
  }
}

}  // namespace
}  // namespace fourmoe::checkpoint
