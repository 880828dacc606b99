// quantize, against what nvidia-modelopt exported from the same weights (examples/tiny-moe), and its promises about
// files: nothing half written, nothing lost, every refusal before the first byte where that is possible.
#include <gtest/gtest.h>

#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>

#include "checkpoint/json.h"
#include "checkpoint/quantize.h"
#include "checkpoint/quantize_plan.h"
#include "checkpoint/safetensors.h"
#include "scratch.h"
#include "status.h"
#include "temporary.h"

namespace fourmoe {
namespace {

namespace fs = std::filesystem;
using checkpoint::QuantizeOptions;
using checkpoint::QuantizeResult;
using checkpoint::StoredTensor;
using checkpoint::TensorMap;
using nlohmann::json;
using test::read_file;
using test::Scratch;
using test::write_file;

const fs::path kTiny = fs::path(FOURMOE_SOURCE_DIR) / "examples/tiny-moe";

TensorMap read_tensors(const fs::path& file) {
  TensorMap tensors;
  checkpoint::parse_safetensors(checkpoint::MappedFile::open(file), &tensors, nullptr);
  return tensors;
}

std::string bytes_of(const StoredTensor& tensor) {
  return {reinterpret_cast<const char*>(tensor.data()), static_cast<std::size_t>(tensor.bytes)};
}

// A tensor with its own bytes, to build inputs from.
struct Owned {
  std::string name;
  std::string dtype;
  std::vector<i64> shape;
  std::string bytes;
};

void write_tensors(const fs::path& file, const std::vector<Owned>& tensors) {
  std::vector<checkpoint::TensorToWrite> list;
  for (const Owned& t : tensors) {
    list.push_back({t.name, t.dtype, t.shape, t.bytes.data(), static_cast<i64>(t.bytes.size())});
  }
  checkpoint::write_safetensors(file, list, {{"format", "pt"}});
}

QuantizeOptions options(bool force = false) {
  QuantizeOptions o;
  o.force = force;
  o.producer_version = "1.2.3";
  o.executor = &tbb_executor(2);
  return o;
}

// What modelopt wrote, without the input scales that only calibration gives.
void expect_modelopts_tensors(const TensorMap& found, const fs::path& file = kTiny / "nvfp4/model.safetensors") {
  const TensorMap expected = read_tensors(file);
  std::size_t compared = 0;
  for (const auto& [name, tensor] : expected) {
    if (name.ends_with(".input_scale")) continue;
    ASSERT_TRUE(found.contains(name)) << name;
    EXPECT_EQ(found.at(name).dtype, tensor.dtype) << name;
    EXPECT_EQ(found.at(name).shape, tensor.shape) << name;
    ASSERT_EQ(bytes_of(found.at(name)), bytes_of(tensor)) << name;
    ++compared;
  }
  EXPECT_EQ(found.size(), compared);
}

void expect_aligned(const TensorMap& tensors) {
  for (const auto& [name, tensor] : tensors)
    EXPECT_EQ(tensor.offset * 8 % checkpoint::dtype_bits(tensor.dtype), 0) << name;
}

TEST(QuantizeCheckpoint, GivesModeloptsBytesFromTheTrainedModel) {
  const Scratch scratch;
  const QuantizeResult result = checkpoint::quantize(kTiny / "bf16", scratch / "out", options());
  const TensorMap found = read_tensors(scratch / "out/model.safetensors");
  expect_modelopts_tensors(found);
  expect_aligned(found);
  EXPECT_EQ(result.layers, 4);
  EXPECT_EQ(result.matrices, 4 * 32 * 3);
  EXPECT_EQ(result.bytes_before, 4 * 32 * 3 * 128 * 64 * 2);
  EXPECT_EQ(result.bytes_after, 4 * 32 * 3 * (128 * 64 / 2 + 128 * 64 / 16 + 4));
}

TEST(QuantizeCheckpoint, DescribesItselfAsModeloptDoes) {
  const Scratch scratch;
  checkpoint::quantize(kTiny / "bf16", scratch / "out", options());
  const json config = json::parse(read_file(scratch / "out/config.json"));
  const json theirs = json::parse(read_file(kTiny / "nvfp4/config.json"));
  const json& ours = config["quantization_config"];
  EXPECT_EQ(ours["ignore"], theirs["quantization_config"]["ignore"]);
  EXPECT_EQ(ours["quant_method"], "modelopt");
  EXPECT_EQ(ours["quant_algo"], "W4A16_NVFP4");
  EXPECT_EQ(ours["producer"], json({{"name", "fourmoe"}, {"version", "1.2.3"}}));
  EXPECT_EQ(ours["config_groups"]["group_0"]["weights"],
            theirs["quantization_config"]["config_groups"]["group_0"]["weights"]);
  EXPECT_EQ(config["num_experts_per_tok"], 4);
  const json file = json::parse(read_file(scratch / "out/hf_quant_config.json"));
  EXPECT_EQ(file["quantization"]["exclude_modules"], ours["ignore"]);
  EXPECT_EQ(file["quantization"]["group_size"], 16);
  EXPECT_TRUE(file["quantization"]["kv_cache_quant_algo"].is_null());
}

class FullRecipe : public testing::TestWithParam<std::string_view> {};

TEST_P(FullRecipe, GivesModeloptsBytesInEveryLinearLayer) {
  const Scratch scratch;
  const fs::path base = fs::path(FOURMOE_SOURCE_DIR) / "tests/fixtures" / ("full-" + std::string(GetParam()));
  QuantizeOptions o = options();
  o.experts_only = false;
  checkpoint::quantize(base / "bf16", scratch / "out", o);
  expect_modelopts_tensors(read_tensors(scratch / "out/model.safetensors"), base / "nvfp4/model.safetensors");
  const json ours = json::parse(read_file(scratch / "out/hf_quant_config.json"));
  const json theirs = json::parse(read_file(base / "nvfp4/hf_quant_config.json"));
  EXPECT_EQ(ours["quantization"]["exclude_modules"], theirs["quantization"]["exclude_modules"]);
}

INSTANTIATE_TEST_SUITE_P(QuantizeCheckpoint, FullRecipe, testing::ValuesIn(checkpoint::full_recipe_families()),
                         [](const auto& family) { return std::string(family.param); });

// The trained model cut into shards such that gate and up of an expert lie apart.
void write_sharded(const fs::path& folder) {
  fs::create_directories(folder);
  fs::copy_file(kTiny / "bf16/config.json", folder / "config.json");
  std::vector<Owned> shards[2];
  json map;
  for (const auto& [name, tensor] : read_tensors(kTiny / "bf16/model.safetensors")) {
    const int shard = name.find("up_proj") != std::string::npos;
    shards[shard].push_back({name, tensor.dtype, tensor.shape, bytes_of(tensor)});
    map[name] = shard == 0 ? "model-00001-of-00002.safetensors" : "model-00002-of-00002.safetensors";
  }
  write_tensors(folder / "model-00001-of-00002.safetensors", shards[0]);
  write_tensors(folder / "model-00002-of-00002.safetensors", shards[1]);
  write_file(folder / "model.safetensors.index.json", json({{"metadata", {}}, {"weight_map", map}}).dump());
}

TEST(QuantizeCheckpoint, GateAndUpShareAGlobalAcrossShards) {
  const Scratch scratch;
  write_sharded(scratch / "in");
  checkpoint::quantize(scratch / "in", scratch / "out", options());
  TensorMap found;
  i64 bytes = 0;
  for (const char* name : {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}) {
    const TensorMap part = read_tensors(scratch / "out" / name);
    expect_aligned(part);
    found.insert(part.begin(), part.end());
  }
  expect_modelopts_tensors(found);
  const json index = json::parse(read_file(scratch / "out/model.safetensors.index.json"));
  EXPECT_EQ(index["weight_map"].size(), found.size());
  for (const auto& [name, tensor] : found) {
    EXPECT_EQ(index["weight_map"][name], tensor.file->path().filename().string());
    bytes += tensor.bytes;
  }
  EXPECT_EQ(index["metadata"]["total_size"], bytes);
}

// The trained model with one stack a layer, [experts, 2 * inter, hidden] and [experts, hidden, inter].
void write_fused(const fs::path& folder) {
  fs::create_directories(folder);
  fs::copy_file(kTiny / "bf16/config.json", folder / "config.json");
  const TensorMap tensors = read_tensors(kTiny / "bf16/model.safetensors");
  std::vector<Owned> fused;
  for (const auto& [name, tensor] : tensors) {
    if (name.find(".experts.") == std::string::npos) {
      fused.push_back({name, tensor.dtype, tensor.shape, bytes_of(tensor)});
    }
  }
  for (int layer = 0; layer < 4; ++layer) {
    const std::string experts = "model.layers." + std::to_string(layer) + ".mlp.experts.";
    Owned gate_up = {experts + "gate_up_proj", "BF16", {32, 128, 128}, ""};
    Owned down = {experts + "down_proj", "BF16", {32, 128, 64}, ""};
    for (int e = 0; e < 32; ++e) {
      const std::string expert = experts + std::to_string(e);
      gate_up.bytes +=
          bytes_of(tensors.at(expert + ".gate_proj.weight")) + bytes_of(tensors.at(expert + ".up_proj.weight"));
      down.bytes += bytes_of(tensors.at(expert + ".down_proj.weight"));
    }
    fused.push_back(gate_up);
    fused.push_back(down);
  }
  write_tensors(folder / "model.safetensors", fused);
}

TEST(QuantizeCheckpoint, FusedStacksAreSplitAnExpertAtATime) {
  const Scratch scratch;
  write_fused(scratch / "in");
  checkpoint::quantize(scratch / "in", scratch / "out", options());
  expect_modelopts_tensors(read_tensors(scratch / "out/model.safetensors"));
}

// One expert or more under chosen names: [32, 48] gate and up, [48, 32] down, f32.
std::vector<Owned> small(const std::string& experts, const std::vector<std::string>& words, int count = 1) {
  std::vector<Owned> tensors;
  for (int e = 0; e < count; ++e) {
    for (const std::string& word : words) {
      const bool down = word == "w2" || word == "down_proj";
      std::vector<f32> values(32 * 48);
      for (std::size_t i = 0; i < values.size(); ++i)
        values[i] = static_cast<f32>(i % 13) - 6.0f + static_cast<f32>(word.back());
      std::string bytes(reinterpret_cast<const char*>(values.data()), values.size() * 4);
      std::vector<i64> shape = down ? std::vector<i64>{48, 32} : std::vector<i64>{32, 48};
      tensors.push_back({experts + "." + std::to_string(e) + "." + word + ".weight", "F32", shape, bytes});
    }
  }
  return tensors;
}

void write_small(const fs::path& folder, const std::vector<Owned>& tensors) {
  fs::create_directories(folder);
  write_file(folder / "config.json", R"({"model_type": "x"})");
  write_tensors(folder / "model.safetensors", tensors);
}

f32 global_of(const TensorMap& tensors, const std::string& module) {
  return format::load<f32>(tensors.at(module + ".weight_scale_2").data());
}

TEST(QuantizeCheckpoint, OtherFamiliesNamesStay) {
  const Scratch scratch;
  write_small(scratch / "mixtral", small("model.layers.0.block_sparse_moe.experts", {"w1", "w2", "w3"}, 2));
  checkpoint::quantize(scratch / "mixtral", scratch / "mixtral-out", options());
  TensorMap found = read_tensors(scratch / "mixtral-out/model.safetensors");
  const std::string expert = "model.layers.0.block_sparse_moe.experts.1.";
  EXPECT_EQ(global_of(found, expert + "w1"), global_of(found, expert + "w3"));
  EXPECT_NE(global_of(found, expert + "w1"), global_of(found, expert + "w2"));
  EXPECT_EQ(found.size(), 2u * 3 * 3);

  write_small(scratch / "nemotron", small("backbone.layers.7.mixer.experts", {"up_proj", "down_proj"}));
  checkpoint::quantize(scratch / "nemotron", scratch / "nemotron-out", options());
  found = read_tensors(scratch / "nemotron-out/model.safetensors");
  EXPECT_EQ(found.at("backbone.layers.7.mixer.experts.0.up_proj.weight").shape, (std::vector<i64>{32, 24}));
  EXPECT_EQ(found.at("backbone.layers.7.mixer.experts.0.up_proj.weight_scale").shape, (std::vector<i64>{32, 3}));
}

TEST(QuantizeCheckpoint, OtherFilesGoAlongAndOtherWeightsAreNamed) {
  const Scratch scratch;
  write_small(scratch / "in", small("experts", {"gate_proj", "up_proj", "down_proj"}));
  fs::create_directories(scratch / "in/extra/.cache");
  for (const char* name : {"tokenizer.json", "extra/chat.txt", "extra/.cache/x", ".hidden", "model.gguf"}) {
    write_file(scratch / "in" / name, name);
  }
  const QuantizeResult result = checkpoint::quantize(scratch / "in", scratch / "out", options());
  EXPECT_EQ(read_file(scratch / "out/tokenizer.json"), "tokenizer.json");
  EXPECT_EQ(read_file(scratch / "out/extra/chat.txt"), "extra/chat.txt");
  EXPECT_FALSE(fs::exists(scratch / "out/extra/.cache"));
  EXPECT_FALSE(fs::exists(scratch / "out/.hidden"));
  EXPECT_FALSE(fs::exists(scratch / "out/model.gguf"));
  ASSERT_EQ(result.notes.size(), 1u);
  EXPECT_NE(result.notes[0].find("model.gguf"), std::string::npos);
}

TEST(QuantizeCheckpoint, ProgressGrowsToItsTotal) {
  const Scratch scratch;
  QuantizeOptions o = options();
  i64 last = 0;
  i64 total = 0;
  o.progress = [&](const checkpoint::QuantizeProgress& progress) {
    EXPECT_GT(progress.done, last);
    EXPECT_EQ(progress.what, "model.safetensors");
    last = progress.done;
    total = progress.total;
  };
  checkpoint::quantize(kTiny / "bf16", scratch / "out", o);
  EXPECT_EQ(last, total);
  EXPECT_GT(total, 0);
}

// Refusals. Whatever happens, the folder above the output holds what it held before.

std::vector<std::string> names_in(const fs::path& folder) {
  std::vector<std::string> names;
  for (const auto& entry : fs::recursive_directory_iterator(folder)) names.push_back(entry.path().string());
  std::sort(names.begin(), names.end());
  return names;
}

void expect_refusal(const fs::path& in, const fs::path& out, const QuantizeOptions& o, Reason reason,
                    const std::string& words) {
  const std::vector<std::string> before = names_in(out.parent_path());
  try {
    checkpoint::quantize(in, out, o);
    ADD_FAILURE() << "expected: " << words;
  } catch (const Error& error) {
    EXPECT_EQ(error.reason(), reason) << error.what();
    EXPECT_NE(std::string(error.what()).find(words), std::string::npos) << error.what();
  }
  EXPECT_EQ(names_in(out.parent_path()), before);
}

const std::vector<std::string> kGated = {"gate_proj", "up_proj", "down_proj"};

TEST(QuantizeCheckpoint, NamesTheWeightThatIsNotFinite) {
  const Scratch scratch;
  std::vector<Owned> tensors = small("experts", kGated);
  const f32 nan = std::numeric_limits<f32>::quiet_NaN();
  std::memcpy(tensors[1].bytes.data() + 4 * (3 * 48 + 5), &nan, 4);
  write_small(scratch / "in", tensors);
  expect_refusal(scratch / "in", scratch / "out", options(), Reason::value_not_finite,
                 "tensor 'experts.0.up_proj.weight' has nan at [3, 5]");
}

TEST(QuantizeCheckpoint, RefusesShapesThatNvfp4CannotHold) {
  const Scratch scratch;
  std::vector<Owned> tensors = small("experts", kGated);
  for (Owned& t : tensors) std::swap(t.shape[0], t.shape[1]);
  tensors[0].shape = tensors[1].shape = {64, 24};
  tensors[2].shape = {24, 64};
  write_small(scratch / "in", tensors);
  expect_refusal(scratch / "in", scratch / "out", options(), Reason::shape_unsupported,
                 "has 24 columns, not a multiple of 16; 32 would pass");
}

TEST(QuantizeCheckpoint, RefusesIncompleteExperts) {
  const Scratch scratch;
  write_small(scratch / "no_down", small("experts", {"gate_proj", "up_proj"}));
  expect_refusal(scratch / "no_down", scratch / "out", options(), Reason::tensor_missing, "no down projection");
  std::vector<Owned> two = small("experts", kGated, 2);
  two.erase(two.begin(), two.begin() + 3);
  write_small(scratch / "no_first", two);
  expect_refusal(scratch / "no_first", scratch / "out", options(), Reason::tensor_missing, "no expert 0");
  two = small("experts", kGated, 2);
  std::erase_if(two, [](const Owned& tensor) { return tensor.name.find("1.gate_proj") != std::string::npos; });
  write_small(scratch / "no_gate", two);
  expect_refusal(scratch / "no_gate", scratch / "out", options(), Reason::tensor_missing,
                 "has no gate projection, expert 0 has one");
  write_small(scratch / "fewer", small("experts", kGated, 2));
  write_file(scratch / "fewer" / "config.json",
             R"({"model_type":"qwen3_moe","hidden_size":64,"moe_intermediate_size":32,"num_experts":3,)"
             R"("num_experts_per_tok":2,"hidden_act":"silu"})");
  expect_refusal(scratch / "fewer", scratch / "out", options(), Reason::tensor_missing, "2 experts, num_experts of");
  std::vector<Owned> misfit = small("experts", kGated);
  misfit[1].shape = {48, 32};
  write_small(scratch / "misfit", misfit);
  expect_refusal(scratch / "misfit", scratch / "out", options(), Reason::tensor_mismatch, "do not fit");
}

TEST(QuantizeCheckpoint, SaysWhichSideCannotBeReached) {
  const Scratch scratch;
  write_small(scratch / "in", small("experts", kGated));
  fs::create_symlink("loop", scratch / "loop");
  for (const bool writes : {false, true}) {
    try {
      checkpoint::quantize(writes ? scratch / "in" : scratch / "loop/in", scratch / (writes ? "loop/out" : "out"),
                           options());
      ADD_FAILURE();
    } catch (const Error& error) {
      EXPECT_EQ(error.reason(), writes ? Reason::write_failed : Reason::file_unreadable) << error.what();
      EXPECT_NE(std::string(error.what()).find(writes ? "loop/out: Too many" : "loop/in: Too many"), std::string::npos)
          << error.what();
    }
  }
}

// What a killed process left, here or in another container with the same numbers, is in nobody's way.
TEST(Temporary, NamesAreHiddenAndNobodyHasThem) {
  const fs::path one = temporary_beside("folder/model", "partial"), two = temporary_beside("folder/model", "partial");
  EXPECT_NE(one, two);
  EXPECT_EQ(one.parent_path(), "folder");
  EXPECT_TRUE(one.filename().string().starts_with(".model.")) << one;
  EXPECT_TRUE(one.filename().string().ends_with(".partial")) << one;
  EXPECT_LE(temporary_beside(std::string(255, 'x'), "partial").string().size(), 255u);
}

TEST(QuantizeCheckpoint, RefusesTransposedStacks) {
  const Scratch scratch;
  const std::string bytes(2 * 48 * 64 * 4, '\0');
  write_small(scratch / "in", {{"m.experts.gate_up_proj", "F32", {2, 48, 64}, bytes},
                               {"m.experts.down_proj", "F32", {2, 32, 48}, bytes.substr(0, 2 * 32 * 48 * 4)}});
  expect_refusal(scratch / "in", scratch / "out", options(), Reason::tensor_mismatch, "inputs before outputs");
}

TEST(QuantizeCheckpoint, RefusesWhatIsNoDenseMoe) {
  const Scratch scratch;
  write_small(scratch / "dense", {{"model.layers.0.mlp.gate_proj.weight", "F32", {1}, std::string(4, '\0')}});
  expect_refusal(scratch / "dense", scratch / "out", options(), Reason::family_unknown, "nothing to quantise");
  expect_refusal(kTiny / "nvfp4", scratch / "out", options(), Reason::dtype_unsupported, "quantised already");
  expect_refusal(scratch / "absent", scratch / "out", options(), Reason::file_unreadable, "is not a folder");
  QuantizeOptions all = options();
  all.experts_only = false;
  write_small(scratch / "other", small("experts", kGated));
  expect_refusal(scratch / "other", scratch / "out", all, Reason::family_unknown, "--experts-only would pass");
  std::vector<Owned> eight_bit = small("experts", kGated);
  eight_bit[2].dtype = "F8_E4M3";
  eight_bit[2].bytes.resize(48 * 32);
  write_small(scratch / "eight", eight_bit);
  expect_refusal(scratch / "eight", scratch / "out", options(), Reason::dtype_unsupported, "F8_E4M3");
}

TEST(QuantizeCheckpoint, KeepsWhatIsThere) {
  const Scratch scratch;
  write_small(scratch / "in", small("experts", kGated));
  fs::create_directories(scratch / "out");
  write_file(scratch / "out/thesis.txt", "years of work");
  expect_refusal(scratch / "in", scratch / "out", options(), Reason::file_exists, "--force");
  expect_refusal(scratch / "in", scratch / "out", options(true), Reason::file_exists, "not written by quantize");
  expect_refusal(scratch / "in", scratch / "in", options(true), Reason::argument_invalid, "must be apart");
  expect_refusal(scratch / "in", scratch / "in/out", options(), Reason::argument_invalid, "must be apart");
  write_small(scratch / "a/in", small("experts", kGated));
  expect_refusal(scratch / "a/in", scratch / "a", options(true), Reason::argument_invalid, "must be apart");
  EXPECT_EQ(read_file(scratch / "out/thesis.txt"), "years of work");
}

TEST(QuantizeCheckpoint, ForceReplacesAnEarlierCheckpoint) {
  const Scratch scratch;
  write_small(scratch / "in", small("experts", kGated));
  checkpoint::quantize(scratch / "in", scratch / "out", options());
  const std::vector<std::string> before = names_in(scratch.path());
  write_file(scratch / "out/model.safetensors", "stale");
  checkpoint::quantize(scratch / "in", scratch / "out", options(true));
  EXPECT_EQ(names_in(scratch.path()), before);
  EXPECT_EQ(read_tensors(scratch / "out/model.safetensors").size(), 9u);
}

TEST(QuantizeCheckpoint, WhatTheOutputGainsMeanwhileIsKept) {
  const Scratch scratch;
  write_small(scratch / "in", small("experts", kGated));
  checkpoint::quantize(scratch / "in", scratch / "out", options());
  write_file(scratch / "out/thesis.txt", "years");
  const std::vector<std::string> before = names_in(scratch.path());
  fs::remove(scratch / "out/thesis.txt");
  QuantizeOptions o = options(true);
  o.progress = [&](const checkpoint::QuantizeProgress&) { write_file(scratch / "out/thesis.txt", "years of work"); };
  try {
    checkpoint::quantize(scratch / "in", scratch / "out", o);
    ADD_FAILURE() << "the output was replaced";
  } catch (const Error& error) {
    EXPECT_EQ(error.reason(), Reason::file_exists) << error.what();
  }
  EXPECT_EQ(names_in(scratch.path()), before);
  EXPECT_EQ(read_file(scratch / "out/thesis.txt"), "years of work");
}

TEST(QuantizeCheckpoint, GivingUpHalfwayLeavesNothing) {
  const Scratch scratch;
  QuantizeOptions o = options();
  o.progress = [](const checkpoint::QuantizeProgress& progress) {
    if (progress.done * 2 > progress.total) throw Error(Reason::internal, "enough");
  };
  expect_refusal(kTiny / "bf16", scratch / "out", o, Reason::internal, "enough");
}

TEST(QuantizeCheckpoint, AnIndexMayNotLeaveItsFolder) {
  const Scratch scratch;
  write_small(scratch / "in", small("experts", kGated));
  for (const char* name : {"../model.safetensors", "", ".", "a/b.safetensors"}) {
    write_file(scratch / "in/model.safetensors.index.json", json({{"weight_map", {{"a", name}}}}).dump());
    expect_refusal(scratch / "in", scratch / "out", options(), Reason::file_malformed, "leaves the folder");
  }
}

// Nemotron's config has Infinity, which JSON has not; rewriting the document would lose it.
TEST(QuantizeCheckpoint, TheConfigKeepsItsText) {
  const Scratch scratch;
  write_small(scratch / "in", small("experts", kGated));
  for (const char* text : {"{\"limit\": [0.0, Infinity],\n  \"x\": 1e-06 }\n", "{}", "{ \n}"}) {
    write_file(scratch / "in/config.json", text);
    checkpoint::quantize(scratch / "in", scratch / "out", options(true));
    const std::string found = read_file(scratch / "out/config.json");
    const std::string kept = std::string(text).substr(0, std::string(text).find_last_not_of(" \n}") + 1);
    EXPECT_EQ(found.substr(0, kept.size()), kept);
    const json parsed = checkpoint::parse_json(found, "config.json");
    EXPECT_EQ(parsed["quantization_config"]["quant_algo"], "W4A16_NVFP4") << found;
  }
}

TEST(QuantizeCheckpoint, ANullConfigOfQuantisationIsNone) {
  const Scratch scratch;
  write_small(scratch / "in", small("experts", kGated));
  for (const char* text : {R"({"a": {"quantization_config": null}, "s": "\"quantization_config\": null", )"
                           R"("quantization_config" : null , "compression_config": null})",
                           R"({"quantization_config":null})"}) {
    write_file(scratch / "in/config.json", text);
    checkpoint::quantize(scratch / "in", scratch / "out", options(true));
    const json parsed = checkpoint::parse_json(read_file(scratch / "out/config.json"), "config.json");
    EXPECT_EQ(parsed["quantization_config"]["quant_algo"], "W4A16_NVFP4");
    if (parsed.contains("a")) {
      EXPECT_TRUE(parsed["a"]["quantization_config"].is_null());
    }
  }
}

TEST(ExcludedModules, AreSummarisedAsModeloptDoes) {
  const std::vector<std::string> quantised = {"model.layers.10.mlp.experts.0.up_proj",
                                              "model.layers.2.mlp.experts.0.up_proj"};
  const std::vector<std::string> kept = {"lm_head",
                                         "model.embed_tokens",
                                         "model.layers.0.mlp.gate_proj",
                                         "model.layers.1.self_attn.q_proj",
                                         "model.layers.2.mlp.gate",
                                         "model.layers.2.mlp.experts_bias",
                                         "model.layers.2.self_attn.q_proj",
                                         "model.layers.2.self_attn.k_proj",
                                         "visual.blocks.0.qkv"};
  EXPECT_EQ(checkpoint::summarise_excluded(kept, quantised),
            (std::vector<std::string>{"lm_head", "model.embed_tokens", "model.layers.0*", "model.layers.1.*",
                                      "model.layers.2.mlp.experts_bias", "model.layers.2.mlp.gate",
                                      "model.layers.2.self_attn*", "visual*"}));
}

}  // namespace
}  // namespace fourmoe
