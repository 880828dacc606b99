// Damaged checkpoints: each fault gets its reason and a message that names file and tensor.
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>
#include <tuple>

#include "checkpoint/checkpoint.h"
#include "checkpoint/folder.h"
#include "model_files.h"
#include "status.h"

namespace fourmoe::checkpoint {
namespace {

using test::ModelFiles;
using test::Scratch;

// Opens, inspects and loads layer 0; expects an Error with this reason whose message has all of `words`.
void expect_refused(const std::filesystem::path& path, Reason reason, const std::vector<std::string>& words) {
  try {
    Checkpoint::open(path).load(0, tbb_executor(2));
    FAIL() << "accepted; expected " << reason_name(reason);
  } catch (const Error& error) {
    const std::string what = error.what();
    EXPECT_EQ(reason_name(error.reason()), reason_name(reason)) << what;
    EXPECT_EQ(what.find('\n'), std::string::npos) << what;
    for (const std::string& word : words) EXPECT_NE(what.find(word), std::string::npos) << what << " | lacks " << word;
  }
}

struct Fault {
  std::string name;
  std::function<void(ModelFiles*)> damage;
  Reason reason;
  std::vector<std::string> words;
};

const std::string kExpert1 = "model.layers.0.mlp.experts.1.";

void set_f32(ModelFiles* files, const std::string& name, f32 value) {
  std::memcpy(files->tensors.at(name).bytes.data(), &value, 4);
}

constexpr f32 kInf = std::numeric_limits<f32>::infinity();
const f32 kNan = std::nanf("");

const std::vector<Fault> kFaults = {
    {"nan_scale",
     [](ModelFiles* f) { f->tensors.at(kExpert1 + "up_proj.weight_scale").bytes[5] = 0x7f; },
     Reason::scale_invalid,
     {"model.safetensors", kExpert1 + "up_proj.weight_scale", "offset", "expert 1", "row 2", "block 1", "NaN"}},
    {"negative_nan_scale",
     [](ModelFiles* f) { f->tensors.at(kExpert1 + "down_proj.weight_scale").bytes[0] = '\xff'; },
     Reason::scale_invalid,
     {kExpert1 + "down_proj.weight_scale", "0xff"}},
    {"negative_scale",
     [](ModelFiles* f) { f->tensors.at(kExpert1 + "gate_proj.weight_scale").bytes[31] = '\xb8'; },
     Reason::scale_invalid,
     {kExpert1 + "gate_proj.weight_scale", "0xb8", "negative", "row 15"}},
    {"zero_global",
     [](ModelFiles* f) { set_f32(f, kExpert1 + "up_proj.weight_scale_2", 0.0f); },
     Reason::global_invalid,
     {"model.safetensors", kExpert1 + "up_proj.weight_scale_2", "offset", "expert 1"}},
    {"nan_global",
     [](ModelFiles* f) { set_f32(f, kExpert1 + "gate_proj.weight_scale_2", kNan); },
     Reason::global_invalid,
     {kExpert1 + "gate_proj.weight_scale_2", "nan"}},
    {"infinite_global",
     [](ModelFiles* f) { set_f32(f, kExpert1 + "down_proj.weight_scale_2", kInf); },
     Reason::global_invalid,
     {kExpert1 + "down_proj.weight_scale_2", "inf"}},
    {"negative_global",
     [](ModelFiles* f) { set_f32(f, kExpert1 + "down_proj.weight_scale_2", -0.5f); },
     Reason::global_invalid,
     {kExpert1 + "down_proj.weight_scale_2", "-0.5"}},
    {"nan_input",
     [](ModelFiles* f) { set_f32(f, kExpert1 + "up_proj.input_scale", kNan); },
     Reason::global_invalid,
     {kExpert1 + "up_proj.input_scale", "expert 1", "nan"}},
    {"infinite_input",
     [](ModelFiles* f) { set_f32(f, kExpert1 + "down_proj.input_scale", kInf); },
     Reason::global_invalid,
     {kExpert1 + "down_proj.input_scale", "inf"}},
    {"negative_input",
     [](ModelFiles* f) { set_f32(f, kExpert1 + "down_proj.input_scale", -1.0f); },
     Reason::global_invalid,
     {kExpert1 + "down_proj.input_scale"}},
    {"missing_weight",
     [](ModelFiles* f) { f->tensors.erase(kExpert1 + "up_proj.weight"); },
     Reason::tensor_missing,
     {kExpert1 + "up_proj.weight"}},
    {"missing_projection",
     [](ModelFiles* f) {
       std::erase_if(f->tensors, [](const auto& t) { return t.first.starts_with(kExpert1 + "down_proj"); });
     },
     Reason::tensor_missing,
     {kExpert1 + "down_proj.weight"}},
    {"missing_scale",
     [](ModelFiles* f) { f->tensors.erase(kExpert1 + "up_proj.weight_scale"); },
     Reason::tensor_missing,
     {kExpert1 + "up_proj.weight_scale"}},
    {"missing_global",
     [](ModelFiles* f) { f->tensors.erase(kExpert1 + "up_proj.weight_scale_2"); },
     Reason::tensor_missing,
     {kExpert1 + "up_proj.weight_scale_2"}},
    {"missing_expert",
     [](ModelFiles* f) { std::erase_if(f->tensors, [](const auto& t) { return t.first.starts_with(kExpert1); }); },
     Reason::tensor_missing,
     {"expert 1", "3 experts", "num_experts", "says 4"}},
    {"fewer_experts",
     [](ModelFiles* f) {
       std::erase_if(f->tensors, [](const auto& t) { return t.first.find("experts.3.") != std::string::npos; });
     },
     Reason::tensor_mismatch,
     {"3 experts", "num_experts", "says 4"}},
    {"more_experts",
     [](ModelFiles* f) { f->add_nvfp4("model.layers.0.mlp.experts.4.up_proj", 16, 32); },
     Reason::tensor_mismatch,
     {"5 experts", "says 4"}},
    {"wrong_weight_shape",
     [](ModelFiles* f) {
       f->add(kExpert1 + "up_proj.weight", "U8", {16, 8}, 0);
     },
     Reason::tensor_mismatch,
     {kExpert1 + "up_proj.weight", "[16, 8]", "[16, 16]"}},
    {"wrong_scale_shape",
     [](ModelFiles* f) {
       f->add(kExpert1 + "up_proj.weight_scale", "F8_E4M3", {16, 4}, 0);
     },
     Reason::tensor_mismatch,
     {kExpert1 + "up_proj.weight_scale", "[16, 4]", "[16, 2]"}},
    {"wrong_scale_dtype",
     [](ModelFiles* f) {
       f->add(kExpert1 + "up_proj.weight_scale", "F16", {16, 2}, 0);
     },
     Reason::tensor_mismatch,
     {kExpert1 + "up_proj.weight_scale", "F16", "F8_E4M3"}},
    {"wrong_weight_dtype",
     [](ModelFiles* f) {
       f->add(kExpert1 + "up_proj.weight", "I32", {16, 16}, 0);
     },
     Reason::encoding_unsupported,
     {kExpert1 + "up_proj.weight", "I32", "would pass"}},
    {"mixed_encodings",
     [](ModelFiles* f) {
       std::erase_if(f->tensors, [](const auto& t) { return t.first.starts_with(kExpert1 + "up_proj"); });
       f->add(kExpert1 + "up_proj.weight", "BF16", {16, 32}, 0);
     },
     Reason::encoding_unsupported,
     {kExpert1 + "gate_proj.weight", "nvfp4", "bf16"}},
    {"wrong_global_shape",
     [](ModelFiles* f) { f->add_f32(kExpert1 + "up_proj.weight_scale_2", {3}, 1.0f); },
     Reason::tensor_mismatch,
     {kExpert1 + "up_proj.weight_scale_2", "[3]"}},
    {"wrong_global_dtype",
     [](ModelFiles* f) { f->add(kExpert1 + "up_proj.weight_scale_2", "I32", {}, 1); },
     Reason::tensor_mismatch,
     {kExpert1 + "up_proj.weight_scale_2", "I32", "F32"}},
    {"wrong_router_shape",
     [](ModelFiles* f) {
       f->add("model.layers.0.mlp.gate.weight", "BF16", {5, 32}, 0);
     },
     Reason::tensor_mismatch,
     {"model.layers.0.mlp.gate.weight", "[5, 32]", "[4, 32]"}},
    {"wrong_bias_length",
     [](ModelFiles* f) { f->add_f32("model.layers.0.mlp.gate.e_score_correction_bias", {3}, 0); },
     Reason::tensor_mismatch,
     {"e_score_correction_bias", "[3]", "[4]"}},
    {"nan_selection_bias",
     [](ModelFiles* f) { f->add_f32("model.layers.0.mlp.gate.e_score_correction_bias", {4}, kNan); },
     Reason::value_not_finite,
     {"e_score_correction_bias", "nan at [0]"}},
    {"nan_router",
     [](ModelFiles* f) {
       f->add("model.layers.0.mlp.gate.weight", "BF16", {4, 32}, 0xff);
     },
     Reason::value_not_finite,
     {"model.layers.0.mlp.gate.weight", "nan at [0, 0]"}},
    {"pre_quant_scale",
     [](ModelFiles* f) { f->add(kExpert1 + "up_proj.pre_quant_scale", "BF16", {32}, 0); },
     Reason::encoding_unsupported,
     {kExpert1 + "up_proj.pre_quant_scale"}},
    {"scaled_dense_weight",
     [](ModelFiles* f) {
       f->add(kExpert1 + "up_proj.weight", "BF16", {16, 32}, 0);
     },
     Reason::encoding_unsupported,
     {kExpert1 + "up_proj.weight_scale"}},
    {"stack_beside_experts",
     [](ModelFiles* f) {
       f->add("model.layers.0.mlp.experts.down_proj", "BF16", {4, 32, 16}, 0);
     },
     Reason::tensor_mismatch,
     {"model.layers.0.mlp.experts.down_proj"}},
    {"two_layers_of_one_number",
     [](ModelFiles* f) {
       f->add("model.layers.0.moe.experts.0.up_proj.weight", "BF16", {16, 32}, 0);
     },
     Reason::family_unknown,
     {"layer 0", "model.layers.0.mlp", "model.layers.0.moe"}},
    {"no_experts",
     [](ModelFiles* f) {
       f->tensors.clear();
       f->add("lm_head.weight", "BF16", {16, 32}, 0);
     },
     Reason::family_unknown,
     {"1 tensors", "qwen3_moe"}},
    {"unknown_family",
     [](ModelFiles* f) { f->config = test::config_of("wonder_moe"); },
     Reason::family_unknown,
     {"config.json", "wonder_moe", "qwen3_moe", "deepseek_v3"}},
    {"unknown_family_with_selection_bias",
     [](ModelFiles* f) {
       f->config = test::config_of("wonder_moe", R"(,"norm_topk_prob":true)");
       f->add_f32("model.layers.0.mlp.gate.e_score_correction_bias", {4}, 0);
     },
     Reason::family_unknown,
     {"config.json", "wonder_moe", "e_score_correction_bias"}},
    {"awq",
     [](ModelFiles* f) {
       f->config = test::config_of("qwen3_moe",
                                   R"(,"quantization_config":{"quant_method":"modelopt","quant_algo":"NVFP4_AWQ"})");
     },
     Reason::precision_unsupported,
     {"config.json", "NVFP4_AWQ", "would pass"}},
    {"int4",
     [](ModelFiles* f) {
       f->config = test::config_of(
           "qwen3_moe", R"(,"quantization_config":{"quant_method":"compressed-tensors","format":"pack-quantized"})");
     },
     Reason::precision_unsupported,
     {"pack-quantized"}},
    {"size_not_of_16",
     [](ModelFiles* f) {
       f->config = test::config_of("qwen3_moe", "");
       f->config.replace(f->config.find(":16"), 3, ":24");
     },
     Reason::shape_unsupported,
     {"24", "multiples of 16"}},
    {"relu2_with_gate",
     [](ModelFiles* f) { f->config = test::config_of("qwen3_moe", R"(,"mlp_hidden_act":"relu2")"); },
     Reason::activation_unsupported,
     {"gate_proj.weight", "relu2"}},
};

class Faults : public testing::TestWithParam<Fault> {};

TEST_P(Faults, are_refused_by_name) {
  const Scratch scratch;
  ModelFiles files = test::make_qwen3();
  GetParam().damage(&files);
  files.write(scratch.path());
  expect_refused(scratch.path(), GetParam().reason, GetParam().words);
}

INSTANTIATE_TEST_SUITE_P(Checkpoint, Faults, testing::ValuesIn(kFaults),
                         [](const auto& test) { return test.param.name; });

TEST(CheckpointFaults, a_good_one_is_accepted) {
  const Scratch scratch;
  test::make_qwen3().write(scratch.path());
  const Layer layer = Checkpoint::open(scratch.path()).load(0, tbb_executor(2));
  EXPECT_EQ(layer.experts.size(), 4u);
  EXPECT_TRUE(layer.notes.empty());
  EXPECT_EQ(layer.experts[3].down.global, 0.5f);
  EXPECT_EQ(layer.experts[3].input_scale, 0.25f);
  EXPECT_TRUE(layer.problem.routing.renormalise);
}

TEST(CheckpointFaults, experts_in_fp8_are_refused_but_inspected) {
  const Scratch scratch;
  ModelFiles files;
  files.config = test::config_of("qwen3_moe");
  for (const std::string expert : {"0", "1", "2", "3"}) {
    for (const auto& [name, rows, cols] :
         {std::tuple<std::string, i64, i64>{"gate_proj", 16, 32}, {"up_proj", 16, 32}, {"down_proj", 32, 16}}) {
      files.add("model.layers.0.mlp.experts." + expert + "." + name + ".weight", "F8_E4M3", {rows, cols}, 0x38);
      files.add_f32("model.layers.0.mlp.experts." + expert + "." + name + ".weight_scale", {}, 0.5f);
    }
  }
  files.write(scratch.path());
  EXPECT_EQ(Checkpoint::open(scratch.path()).inspect().layers[0].problem.encoding, format::Encoding::fp8);
  expect_refused(scratch.path(), Reason::encoding_unsupported, {"experts.0.up_proj.weight", "FP8", "nvfp4"});
}

TEST(CheckpointFaults, every_truncation_of_the_file_is_refused) {
  const Scratch scratch;
  test::make_qwen3().write(scratch.path());
  const std::string good = test::read_file(scratch / "model.safetensors");
  for (std::size_t size = 0; size < good.size(); size += 37) {
    test::write_file(scratch / "model.safetensors", good.substr(0, size));
    expect_refused(scratch.path(), Reason::file_malformed, {"model.safetensors"});
  }
}

TEST(CheckpointFaults, duplicate_keys_and_deep_nesting_in_configs) {
  const Scratch scratch;
  ModelFiles files = test::make_qwen3();
  files.config = test::config_of("qwen3_moe", R"(,"num_experts":4)");
  files.write(scratch.path());
  expect_refused(scratch.path(), Reason::file_malformed, {"config.json", "num_experts", "twice"});
  files.config = "{\"a\":" + std::string(1 << 20, '[');
  files.write(scratch.path());
  expect_refused(scratch.path(), Reason::file_malformed, {"config.json", "nested"});
  files.config = "{\"a\":1";
  files.write(scratch.path());
  expect_refused(scratch.path(), Reason::file_malformed, {"config.json"});
  files.config = "[]";
  files.write(scratch.path());
  expect_refused(scratch.path(), Reason::file_malformed, {"config.json", "not an object"});
}

// Its scales have the shape that 48 / 32 rounds to: only the sentence about blocks says what is wrong.
TEST(CheckpointFaults, rows_that_fill_no_blocks) {
  const Scratch scratch;
  ModelFiles files = test::make_qwen3();
  files.config = R"({"model_type":"qwen3_moe","hidden_size":48,"moe_intermediate_size":32,"num_experts":1,)"
                 R"("num_experts_per_tok":1,"hidden_act":"silu"})";
  files.tensors.clear();
  for (const auto& [name, rows, cols] :
       {std::tuple("gate_proj", 32, 48), std::tuple("up_proj", 32, 48), std::tuple("down_proj", 48, 32)}) {
    const std::string projection = std::string("model.layers.0.mlp.experts.0.") + name;
    files.add(projection + ".weight", "U8", {rows, cols / 2}, 0x21);
    files.add(projection + ".weight_scale", "U8", {rows, cols / 32}, 0x7f);
  }
  files.write(scratch.path());
  expect_refused(scratch.path(), Reason::shape_unsupported,
                 {"gate_proj.weight", "48 values", "blocks of 32", "64 would"});
}

TEST(CheckpointFaults, paths_that_are_no_checkpoint) {
  const Scratch scratch;
  expect_refused(scratch / "missing", Reason::file_unreadable, {"missing", "does not exist"});
  expect_refused(scratch.path(), Reason::file_unreadable, {"config.json"});
  test::write_file(scratch / "config.json", test::config_of("qwen3_moe"));
  expect_refused(scratch.path(), Reason::file_unreadable, {"0 *.safetensors files"});
  test::write_file(scratch / "x.txt", "");
  expect_refused(scratch / "x.txt", Reason::file_unreadable, {"x.txt"});
}

// Two shards: layer 0 and layer 1.
void write_sharded(const std::filesystem::path& folder, const std::string& second_name,
                   const std::string& extra_entry = "") {
  const ModelFiles first = test::make_qwen3({0}), second = test::make_qwen3({1});
  first.write(folder, "model-1.safetensors");
  second.write(folder, "model-2.safetensors");
  std::string map;
  for (const auto& [name, tensor] : first.tensors) map += ",\"" + name + "\":\"model-1.safetensors\"";
  for (const auto& [name, tensor] : second.tensors) map += ",\"" + name + "\":\"" + second_name + "\"";
  test::write_file(folder / "model.safetensors.index.json",
                   "{\"metadata\":{\"total_size\":1},\"weight_map\":{" + map.substr(1) + extra_entry + "}}");
}

TEST(CheckpointFaults, indices_are_checked) {
  const Scratch scratch;
  write_sharded(scratch.path(), "model-2.safetensors");
  EXPECT_EQ(Checkpoint::open(scratch.path()).layers(), (std::vector<i32>{0, 1}));
  EXPECT_EQ(Checkpoint::open(scratch.path()).inspect().files, 2);

  write_sharded(scratch.path(), "model-2.safetensors", R"(,"ghost.weight":"model-1.safetensors")");
  expect_refused(scratch.path(), Reason::tensor_missing, {"index.json", "ghost.weight", "model-1.safetensors"});
  write_sharded(scratch.path(), "model-1.safetensors");  // promised in the wrong shard
  expect_refused(scratch.path(), Reason::tensor_missing, {"index.json", "model.layers.1"});
  write_sharded(scratch.path(), "model-3.safetensors");
  expect_refused(scratch.path(), Reason::file_unreadable, {"index.json", "model-3.safetensors", "missing"});
  for (const std::string name : {"../model-2.safetensors", "/etc/passwd", "..", "a/b.safetensors", "", "a\\\\b"}) {
    write_sharded(scratch.path(), name);
    expect_refused(scratch.path(), Reason::file_malformed, {"index.json", "leaves the folder"});
  }
}

TEST(CheckpointFaults, index_contents) {
  for (const char* text :
       {"{}", "[]", "{\"weight_map\":[]}", "{\"weight_map\":{\"a\":1}}", "{\"weight_map\":{\"a\":{}}}",
        "{\"weight_map\":{},\"weight_map\":{}}", "{\"weight_map\":{\"a\":null}}", "", "{", "{\"weight_map\":\"x\"}"}) {
    EXPECT_THROW(list_shards(text, "i.json"), Error) << text;
  }
  EXPECT_THROW(list_shards(std::string(1 << 20, '['), "i.json"), Error);
  EXPECT_EQ(list_shards(R"({"weight_map":{"a":"x","b":"y","c":"x"},"z":[1,{"q":null}]})", "i.json"),
            (std::vector<std::string>{"x", "y"}));
}

TEST(CheckpointFaults, one_tensor_in_two_shards) {
  const Scratch scratch;
  write_sharded(scratch.path(), "model-2.safetensors");
  std::filesystem::copy_file(scratch / "model-1.safetensors", scratch / "model-2.safetensors",
                             std::filesystem::copy_options::overwrite_existing);
  expect_refused(scratch.path(), Reason::file_malformed, {"model-2.safetensors", "twice", "model-1.safetensors"});
}

}  // namespace
}  // namespace fourmoe::checkpoint
