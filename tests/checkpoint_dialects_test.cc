// Spellings and orders that the fixtures do not have: prefixes, dense stacks, shared experts, odd scales.
#include <gtest/gtest.h>

#include <limits>

#include "checkpoint/checkpoint.h"
#include "model_files.h"
#include "status.h"

namespace fourmoe::checkpoint {
namespace {

using format::Encoding;
using format::Matrix;
using test::kExperts;
using test::kHidden;
using test::kInter;
using test::ModelFiles;
using test::Scratch;

Layer load(const ModelFiles& files, i32 layer = 0) {
  const Scratch scratch;
  files.write(scratch.path());
  return Checkpoint::open(scratch.path()).load(layer, tbb_executor(2));
}

Info inspect(const ModelFiles& files) {
  const Scratch scratch;
  files.write(scratch.path());
  return Checkpoint::open(scratch.path()).inspect();
}

void set_f32(ModelFiles* files, const std::string& name, i64 index, f32 value) {
  std::memcpy(files->tensors.at(name).bytes.data() + 4 * index, &value, 4);
}

// A dense f32 tensor whose element i is i.
void add_counting(ModelFiles* files, const std::string& name, const std::vector<i64>& shape) {
  files->add_f32(name, shape, 0.0f);
  const i64 count = static_cast<i64>(files->tensors[name].bytes.size()) / 4;
  for (i64 i = 0; i < count; ++i) set_f32(files, name, i, static_cast<f32>(i));
}

f32 at(const Matrix& m, i64 row, i64 col) { return static_cast<f32>(format::weight_at(m, row, col)); }

void rename_base(ModelFiles* files, const std::string& from, const std::string& to) {
  std::map<std::string, test::TensorBytes> renamed;
  for (auto& [name, tensor] : files->tensors) {
    const std::size_t place = name.find(from);
    renamed[place == std::string::npos ? name : name.substr(0, place) + to + name.substr(place + from.size())] = tensor;
  }
  files->tensors = std::move(renamed);
}

TEST(Dialects, prefixes_are_found) {
  for (const std::string base : {"layers.7.mlp.", "model.language_model.layers.7.block_sparse_moe.",
                                 "language_model.model.layers.7.mlp.", "backbone.layers.7.mixer.", "a.2.b.7.ffn."}) {
    ModelFiles files = test::make_qwen3({7});
    rename_base(&files, "model.layers.7.mlp.", base);
    const Info info = inspect(files);
    ASSERT_EQ(info.layers.size(), 1u) << base;
    EXPECT_EQ(info.layers[0].index, 7);
    EXPECT_EQ(info.layers[0].prefix + ".", base);
    EXPECT_TRUE(info.layers[0].router);
    EXPECT_EQ(info.dialect, "modelopt");
  }
}

TEST(Dialects, letters_for_projections) {
  ModelFiles files = test::make_qwen3();
  files.config = test::config_of("minimax_m2");
  files.add_f32("model.layers.0.mlp.e_score_correction_bias", {kExperts}, 0.5f);
  rename_base(&files, "model.layers.0.mlp.e", "model.layers.0.block_sparse_moe.e");
  ModelFiles renamed = files;
  renamed.tensors.clear();
  for (const auto& [name, tensor] : files.tensors) {
    std::string to = name;
    for (const auto& [from, letter] :
         {std::pair<std::string, std::string>{"gate_proj", "w1"}, {"up_proj", "w3"}, {"down_proj", "w2"}}) {
      const std::size_t place = to.find(from);
      if (place != std::string::npos) to.replace(place, from.size(), letter);
    }
    if (name.find("mlp.") != std::string::npos) {
      to.replace(to.find("mlp."), 4, "block_sparse_moe.");
    }
    renamed.tensors[to] = tensor;
  }
  renamed.add_f32("model.layers.0.block_sparse_moe.experts.2.w3.weight_scale_2", {}, 0.75f);
  const Layer layer = load(renamed);
  EXPECT_EQ(layer.experts[2].up.global, 0.75f);
  EXPECT_EQ(layer.selection_bias, std::vector<f32>(4, 0.5f));
  EXPECT_EQ(layer.router.rows, 4);
}

TEST(Dialects, ernies_selection_bias_is_a_row) {
  ModelFiles files = test::make_qwen3();
  files.config = test::config_of("ernie4_5_moe");
  add_counting(&files, "model.layers.0.mlp.moe_statics.e_score_correction_bias", {1, kExperts});
  EXPECT_EQ(load(files).selection_bias, (std::vector<f32>{0, 1, 2, 3}));
  add_counting(&files, "model.layers.0.mlp.moe_statics.e_score_correction_bias", {kExperts, 1});
  EXPECT_THROW(load(files), Error);
}

TEST(Dialects, layers_start_anywhere_and_heads_come_last) {
  ModelFiles files = test::make_qwen3({3, 4, 10});
  files.config = test::config_of("qwen3_next", R"(,"num_hidden_layers":12)");
  ModelFiles head = test::make_qwen3({0});
  rename_base(&head, "model.layers.0.", "mtp.layers.0.");
  files.tensors.merge(head.tensors);
  const Info info = inspect(files);
  std::vector<i32> found;
  for (const LayerInfo& layer : info.layers) found.push_back(layer.index);
  EXPECT_EQ(found, (std::vector<i32>{3, 4, 10, 12}));
  EXPECT_EQ(info.layers[3].prefix, "mtp.layers.0.mlp");
  const Layer layer = load(files, 12);
  ASSERT_FALSE(layer.notes.empty());
  EXPECT_NE(layer.notes.back().find("mtp.layers.0.mlp"), std::string::npos);
}

TEST(Dialects, fused_dense_stacks_are_views) {
  ModelFiles files;
  files.config = test::config_of("qwen3_moe");
  add_counting(&files, "model.layers.0.mlp.experts.gate_up_proj", {kExperts, 2 * kInter, kHidden});
  add_counting(&files, "model.layers.0.mlp.experts.down_proj", {kExperts, kHidden, kInter});
  // 2 * inter == hidden: both orientations fit, and the family decides.
  const Layer layer = load(files);
  EXPECT_EQ(layer.problem.encoding, Encoding::f32);
  EXPECT_EQ(at(layer.experts[1].gate, 2, 3), static_cast<f32>((1 * 32 + 2) * 32 + 3));
  EXPECT_EQ(at(layer.experts[1].up, 2, 3), static_cast<f32>((1 * 32 + 16 + 2) * 32 + 3));
  EXPECT_EQ(at(layer.experts[3].down, 5, 7), static_cast<f32>((3 * 32 + 5) * 16 + 7));
  EXPECT_EQ(inspect(files).layers[0].layout, "stacked");
  EXPECT_EQ(inspect(files).dialect, "dense");
}

TEST(Dialects, dense_stacks_of_llama4_are_transposed) {
  ModelFiles files;
  files.config = test::config_of("llama4");
  add_counting(&files, "model.layers.0.feed_forward.experts.gate_up_proj", {kExperts, kHidden, 2 * kInter});
  add_counting(&files, "model.layers.0.feed_forward.experts.down_proj", {kExperts, kInter, kHidden});
  const Layer layer = load(files);
  EXPECT_EQ(at(layer.experts[1].gate, 2, 3), static_cast<f32>((1 * 32 + 3) * 32 + 2));
  EXPECT_EQ(at(layer.experts[1].up, 2, 3), static_cast<f32>((1 * 32 + 3) * 32 + 16 + 2));
  EXPECT_EQ(at(layer.experts[3].down, 5, 7), static_cast<f32>((3 * 16 + 7) * 32 + 5));
}

TEST(Dialects, dense_gpt_oss_is_transposed_and_interleaved) {
  ModelFiles files;
  files.config = test::config_of("gpt_oss");
  add_counting(&files, "model.layers.0.mlp.experts.gate_up_proj", {kExperts, kHidden, 2 * kInter});
  add_counting(&files, "model.layers.0.mlp.experts.gate_up_proj_bias", {kExperts, 2 * kInter});
  add_counting(&files, "model.layers.0.mlp.experts.down_proj", {kExperts, kInter, kHidden});
  add_counting(&files, "model.layers.0.mlp.experts.down_proj_bias", {kExperts, kHidden});
  const Layer layer = load(files);
  EXPECT_EQ(at(layer.experts[1].gate, 2, 3), static_cast<f32>((1 * 32 + 3) * 32 + 4));
  EXPECT_EQ(at(layer.experts[1].up, 2, 3), static_cast<f32>((1 * 32 + 3) * 32 + 5));
  EXPECT_EQ(layer.experts[1].gate_bias[2], 32.0f + 4.0f);
  EXPECT_EQ(layer.experts[1].up_bias[2], 32.0f + 5.0f);
  EXPECT_EQ(layer.experts[1].down_bias[2], 32.0f + 2.0f);
}

TEST(Dialects, shapes_overrule_the_family) {
  ModelFiles files;  // Qwen3-VL's stacks are transposed; hidden 32, inter 16 would be ambiguous, so hidden is 48 here
  files.config = test::config_of("qwen3_vl_moe");
  files.config.replace(files.config.find(":32"), 3, ":48");
  add_counting(&files, "model.layers.0.mlp.experts.gate_up_proj", {kExperts, 48, 2 * kInter});
  add_counting(&files, "model.layers.0.mlp.experts.down_proj", {kExperts, kInter, 48});
  EXPECT_EQ(inspect(files).layers[0].layout, "transposed");
  EXPECT_EQ(at(load(files).experts[1].up, 2, 3), static_cast<f32>((1 * 48 + 3) * 32 + 16 + 2));
}

TEST(Dialects, a_projection_that_fits_one_way_decides_for_the_others) {
  ModelFiles square_gate_up;  // hidden is 2 * inter
  square_gate_up.config = test::config_of("qwen3_vl_moe");
  add_counting(&square_gate_up, "model.layers.0.mlp.experts.gate_up_proj", {kExperts, kHidden, 2 * kInter});
  add_counting(&square_gate_up, "model.layers.0.mlp.experts.down_proj", {kExperts, kInter, kHidden});
  const Layer transposed = load(square_gate_up);
  EXPECT_EQ(inspect(square_gate_up).layers[0].layout, "transposed");
  EXPECT_EQ(at(transposed.experts[1].up, 2, 3), static_cast<f32>((1 * 32 + 3) * 32 + 16 + 2));
  EXPECT_EQ(at(transposed.experts[3].down, 5, 7), static_cast<f32>((3 * 16 + 7) * 32 + 5));

  ModelFiles square_down;  // hidden is inter, as in gpt-oss
  square_down.config = test::config_of("gpt_oss");
  square_down.config.replace(square_down.config.find(":16"), 3, ":32");
  add_counting(&square_down, "model.layers.0.mlp.experts.gate_up_proj", {kExperts, 64, 32});
  add_counting(&square_down, "model.layers.0.mlp.experts.down_proj", {kExperts, 32, 32});
  const Layer normal = load(square_down);
  EXPECT_EQ(at(normal.experts[1].up, 2, 3), static_cast<f32>((1 * 64 + 5) * 32 + 3));
  EXPECT_EQ(at(normal.experts[3].down, 5, 7), static_cast<f32>((3 * 32 + 5) * 32 + 7));
}

TEST(Dialects, unknown_families_with_unknown_tensors_are_refused) {
  ModelFiles files = test::make_qwen3({3});
  files.config = test::config_of("new_moe", R"(,"norm_topk_prob":true)");
  for (const char* beside : {"self_attn.q_proj.bias", "input_layernorm.weight", "mlp.shared_expert_gate.weight",
                             "mlp.shared_expert.up_proj.input_scale"}) {
    files.add_f32(std::string("model.layers.3.") + beside, {kExperts}, 0.5f);
  }
  EXPECT_EQ(inspect(files).family, "new_moe");
  // Of Kolibri, LFM2, Laguna, Klear, Pangu and Gemma 4.
  for (const std::string tensor :
       {"moe.router.expert_bias", "mlp.expert_bias", "mlp.experts.e_score_correction_bias", "mlp.coefficient.weight",
        "mlp.router_scale", "router.per_expert_scale", "mlp.gate.bias", "mlp.gate.e_score_correction_bias"}) {
    ModelFiles odd = files;
    odd.add_f32("model.layers.3." + tensor, {kExperts}, 0.5f);
    try {
      inspect(odd);
      FAIL() << tensor;
    } catch (const Error& error) {
      EXPECT_EQ(error.reason(), Reason::family_unknown);
      EXPECT_NE(std::string(error.what()).find(tensor), std::string::npos) << error.what();
    }
    odd.config = test::config_of("qwen3_moe", R"(,"norm_topk_prob":true)");
    EXPECT_EQ(inspect(odd).family, "qwen3_moe");
  }
}

TEST(Dialects, nvfp4_stacks_with_dots) {
  ModelFiles files;
  files.config = test::config_of("qwen3_moe");
  const std::string base = "model.layers.0.mlp.experts.";
  files.add(base + "gate_up_proj.weight", "U8", {kExperts, 2 * kInter, kHidden / 2}, 0x21);
  files.add(base + "gate_up_proj.weight_scale", "F8_E4M3", {kExperts, 2 * kInter, kHidden / 16}, 0x38);
  add_counting(&files, base + "gate_up_proj.weight_scale_2", {kExperts, 2});
  set_f32(&files, base + "gate_up_proj.weight_scale_2", 0, 8.0f);
  files.add(base + "down_proj.weight", "U8", {kExperts, kHidden, kInter / 2}, 0x21);
  files.add(base + "down_proj.weight_scale", "F8_E4M3", {kExperts, kHidden, 1}, 0x38);
  files.add_f32(base + "down_proj.weight_scale_2", {kExperts}, 0.5f);
  const Layer layer = load(files);
  EXPECT_EQ(layer.experts[2].gate.global, 4.0f);
  EXPECT_EQ(layer.experts[2].up.global, 5.0f);
  EXPECT_EQ(layer.notes.size(), 3u);  // gate and up differ; no input scales; no router
  EXPECT_EQ(layer.experts[2].input_scale, 1.0f);
  EXPECT_EQ(layer.experts[2].inter_scale, 1.0f);
  files.tensors.at(base + "gate_up_proj.weight_scale").bytes[(1 * 32 + 16 + 3) * 2 + 1] = 0x7f;
  try {
    load(files);
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.reason(), Reason::scale_invalid);
    EXPECT_NE(std::string(error.what()).find("expert 1's up, row 3, block 1"), std::string::npos) << error.what();
  }
}

TEST(Dialects, input_scales_that_are_missing_or_zero) {
  ModelFiles files = test::make_qwen3();
  const std::string base = "model.layers.0.mlp.experts.";
  set_f32(&files, base + "0.gate_proj.input_scale", 0, 0.0f);
  set_f32(&files, base + "1.up_proj.input_scale", 0, 3.0f);
  set_f32(&files, base + "2.gate_proj.input_scale", 0, 0.0f);
  set_f32(&files, base + "2.up_proj.input_scale", 0, 0.0f);
  set_f32(&files, base + "2.down_proj.input_scale", 0, 7.0f);
  files.tensors.erase(base + "3.down_proj.input_scale");
  const Layer layer = load(files);
  EXPECT_EQ(layer.experts[0].input_scale, 0.25f);  // its up's
  EXPECT_EQ(layer.experts[1].input_scale, 3.0f);
  EXPECT_EQ(layer.experts[2].input_scale, 3.0f);  // neither: the layer's largest
  EXPECT_EQ(layer.experts[0].inter_scale, 0.25f);
  EXPECT_EQ(layer.experts[2].inter_scale, 7.0f);
  EXPECT_EQ(layer.experts[3].inter_scale, 7.0f);
  ASSERT_EQ(layer.notes.size(), 2u);
  const Oddities oddities = inspect(files).layers[0].oddities;
  EXPECT_EQ(oddities.inputs_missing, 1);
  EXPECT_EQ(oddities.inputs_zero, 3);
}

TEST(Dialects, inspect_counts_what_load_refuses) {
  ModelFiles files = test::make_qwen3();
  set_f32(&files, "model.layers.0.mlp.experts.1.up_proj.weight_scale_2", 0, 0.0f);
  const Oddities oddities = inspect(files).layers[0].oddities;
  EXPECT_EQ(oddities.globals_invalid, 1);
  EXPECT_EQ(oddities.gate_up_differ, 1);
}

TEST(Dialects, compressed_tensors_divisors) {
  ModelFiles files;
  files.config = test::config_of("qwen3_moe", R"(,"quantization_config":{"quant_method":"compressed-tensors",)"
                                              R"("format":"nvfp4-pack-quantized"})");
  for (i64 e = 0; e < kExperts; ++e) {
    for (const auto& [name, rows, cols] :
         {std::tuple<std::string, i64, i64>{"gate_proj", 16, 32}, {"up_proj", 16, 32}, {"down_proj", 32, 16}}) {
      const std::string prefix = "model.layers.0.mlp.experts." + std::to_string(e) + "." + name;
      files.add(prefix + ".weight_packed", "U8", {rows, cols / 2}, 0x21);
      files.add(prefix + ".weight_scale", "F8_E4M3", {rows, cols / 16}, 0x38);
      files.add_f32(prefix + ".weight_global_scale", {1}, 8.0f);
      files.add_f32(prefix + ".input_global_scale", {1}, 4.0f);
      files.add(prefix + ".weight_shape", "I64", {2}, 0);
    }
  }
  const Layer layer = load(files);
  EXPECT_EQ(layer.experts[0].gate.global, 0.125f);
  EXPECT_EQ(layer.experts[0].input_scale, 0.25f);
  EXPECT_EQ(layer.experts[0].inter_scale, 0.25f);
  for (const f32 bad : {0.0f, -1.0f, std::numeric_limits<f32>::infinity(), 1e-45f}) {
    ModelFiles damaged = files;
    set_f32(&damaged, "model.layers.0.mlp.experts.2.up_proj.weight_global_scale", 0, bad);
    EXPECT_THROW(load(damaged), Error) << bad;
  }
}

TEST(Dialects, mxfp4_by_expert) {
  ModelFiles files;
  files.config = test::config_of("deepseek_v4");
  files.config.replace(files.config.find(":16"), 3, ":32");
  for (i64 e = 0; e < kExperts; ++e) {
    for (const std::string name : {"w1", "w2", "w3"}) {
      const std::string prefix = "layers.0.ffn.experts." + std::to_string(e) + "." + name;
      files.add(prefix + ".weight", "I8", {32, 16}, 0x21);
      files.add(prefix + ".scale", "F8_E8M0", {32, 1}, 128);
    }
  }
  files.add("layers.0.ffn.gate.weight", "BF16", {kExperts, kHidden}, 0);
  files.add_f32("layers.0.ffn.gate.bias", {kExperts}, 0.5f);
  const Layer layer = load(files);
  EXPECT_EQ(layer.problem.encoding, Encoding::mxfp4);
  EXPECT_EQ(at(layer.experts[0].down, 0, 1), 2.0f);
  EXPECT_TRUE(layer.router_bias.empty());
  EXPECT_EQ(layer.selection_bias.size(), 4u);
  files.tensors.at("layers.0.ffn.experts.3.w2.scale").bytes[31] = '\xff';
  try {
    load(files);
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.reason(), Reason::scale_invalid);
    EXPECT_NE(std::string(error.what()).find("experts.3.w2.scale"), std::string::npos) << error.what();
  }
  files.tensors.at("layers.0.ffn.experts.3.w2.scale").bytes[31] = 1;
  files.add("layers.0.ffn.gate.tid2eid", "I64", {8, 2}, 0);
  const Layer hashed = load(files);
  EXPECT_TRUE(hashed.router.empty());
  EXPECT_TRUE(hashed.picked_by_token);
  EXPECT_NE(hashed.notes.back().find("token ids"), std::string::npos);
}

TEST(Dialects, shared_experts_in_fp8_and_nvfp4) {
  ModelFiles files = test::make_qwen3();
  const std::string base = "model.layers.0.mlp.";
  for (const auto& [name, rows, cols] :
       {std::tuple<std::string, i64, i64>{"gate_proj", 48, 32}, {"up_proj", 48, 32}, {"down_proj", 32, 48}}) {
    files.add(base + "shared_expert." + name + ".weight", "F8_E4M3", {rows, cols}, 0x38);
    files.add_f32(base + "shared_expert." + name + ".weight_scale", {}, 0.5f);
    files.add_f32(base + "shared_expert." + name + ".input_scale", {}, 0.5f);
  }
  files.add(base + "shared_expert_gate.weight", "BF16", {1, kHidden}, 0);
  const Layer layer = load(files);
  ASSERT_TRUE(layer.shared.has_value());
  EXPECT_EQ(layer.shared->problem.encoding, Encoding::fp8);
  EXPECT_EQ(layer.shared->problem.inter, 48);
  EXPECT_EQ(layer.shared->problem.top_k, 1);
  EXPECT_EQ(layer.shared->problem.routing.score, Score::none);
  EXPECT_EQ(layer.shared->expert.down.global, 0.5f);
  EXPECT_EQ(layer.shared->gate.rows, 1);
  EXPECT_TRUE(inspect(files).layers[0].shared->gated);

  ModelFiles blocked = files;
  blocked.add_f32(base + "shared_expert.up_proj.weight_scale", {48, 1}, 0.5f);
  EXPECT_THROW(load(blocked), Error);
  ModelFiles inverse = files;
  inverse.tensors.erase(base + "shared_expert.up_proj.weight_scale");
  inverse.add_f32(base + "shared_expert.up_proj.weight_scale_inv", {1, 1}, 0.5f);
  EXPECT_THROW(load(inverse), Error);
  ModelFiles lacking = files;
  lacking.tensors.erase(base + "shared_expert.down_proj.weight");
  EXPECT_THROW(load(lacking), Error);

  ModelFiles fp4 = test::make_qwen3();
  fp4.add_nvfp4(base + "shared_experts.gate_proj", 64, 32, 0.5f, 2.0f);
  fp4.add_nvfp4(base + "shared_experts.up_proj", 64, 32, 0.25f, 2.0f);
  fp4.add_nvfp4(base + "shared_experts.down_proj", 32, 64, 0.125f, 3.0f);
  const Layer with = load(fp4);
  EXPECT_EQ(with.shared->problem.encoding, Encoding::nvfp4);
  EXPECT_EQ(with.shared->expert.up.global, 0.25f);
  EXPECT_EQ(with.shared->expert.input_scale, 2.0f);
  EXPECT_EQ(with.shared->expert.inter_scale, 3.0f);
  EXPECT_EQ(with.experts[0].input_scale, 0.25f);
}

TEST(Dialects, latent_experts_leave_router_and_shared_expert_out) {
  ModelFiles files = test::make_qwen3();
  files.config = test::config_of("nemotron_h", R"(,"moe_latent_size":32,"mlp_hidden_act":"silu")");
  files.config.replace(files.config.find(":32"), 3, ":64");
  files.add("model.layers.0.mlp.gate.weight", "BF16", {kExperts, 64}, 0);
  const Layer layer = load(files);
  EXPECT_EQ(layer.problem.hidden, 32);
  EXPECT_TRUE(layer.router.empty());
  EXPECT_NE(layer.notes.back().find("latent of 32 of 64"), std::string::npos);
}

TEST(Dialects, a_layer_outlives_its_checkpoint) {
  const Scratch scratch;
  test::make_qwen3().write(scratch.path());
  Layer layer;
  {
    layer = Checkpoint::open(scratch.path()).load(0, tbb_executor(1));
    std::filesystem::remove(scratch / "model.safetensors");
  }
  EXPECT_EQ(at(layer.experts[3].up, 15, 31), 1.0f);
}

}  // namespace
}  // namespace fourmoe::checkpoint
