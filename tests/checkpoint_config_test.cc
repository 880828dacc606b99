// config.json of each family, and what is refused.
#include <gtest/gtest.h>

#include "checkpoint/config.h"
#include "checkpoint/json.h"
#include "status.h"

namespace fourmoe::checkpoint {
namespace {

const std::string kSizes = R"("hidden_size":64,"moe_intermediate_size":32,"num_experts":8,"num_experts_per_tok":2)";

Config parse(const std::string& text) { return parse_config(text, "config.json"); }

Config family(const std::string& name, const std::string& more = "", const std::string& sizes = kSizes) {
  return parse("{\"model_type\":\"" + name + "\"," + sizes + (more.empty() ? "" : "," + more) + "}");
}

void expect_refused(const std::string& text, Reason reason, const std::vector<std::string>& words) {
  try {
    parse(text);
    FAIL() << "accepted: " << text;
  } catch (const Error& error) {
    const std::string what = error.what();
    EXPECT_EQ(reason_name(error.reason()), reason_name(reason)) << what;
    EXPECT_NE(what.find("config.json"), std::string::npos) << what;
    for (const std::string& word : words) EXPECT_NE(what.find(word), std::string::npos) << what << " | lacks " << word;
  }
}

// A model's list of modules, six times DeepSeek-V3's: minutes where a parser looks at all of it for every part.
TEST(Json, TakesATimeThatGrowsWithTheText) {
  std::string modules;
  for (int i = 0; i < 300'000; ++i) modules += (i == 0 ? "\"m" : ",\"m") + std::to_string(i) + "\":{}";
  EXPECT_EQ(parse_json("{\"modules\":{" + modules + "}}", "config.json").at("modules").size(), 300'000u);
  EXPECT_THROW(parse_json("{\"modules\":{" + modules + ",\"m7\":{}}}", "config.json"), Error);
}

TEST(Json, IsNestedSoDeepAndNoDeeper) {
  const auto nested = [](int depth) {
    return "{\"a\":" + std::string(depth - 1, '[') + std::string(depth - 1, ']') + "}";
  };
  EXPECT_NO_THROW(parse_json(nested(64), "config.json"));
  EXPECT_THROW(parse_json(nested(65), "config.json"), Error);
  EXPECT_THROW(parse_json(nested(1 << 20), "config.json"), Error);
}

TEST(Config, deepseek_v3) {
  const Config c = family("deepseek_v3",
                          R"("n_group":4,"topk_group":2,"topk_method":"noaux_tc","scoring_func":"sigmoid",)"
                          R"("routed_scaling_factor":2.5,"norm_topk_prob":true,"hidden_act":"silu")",
                          R"("hidden_size":64,"intermediate_size":999,"moe_intermediate_size":32,"n_routed_experts":8,)"
                          R"("num_experts_per_tok":2)");
  EXPECT_EQ(c.experts, 8);
  EXPECT_EQ(c.experts_key, "n_routed_experts");
  EXPECT_EQ(c.inter, 32);
  EXPECT_EQ(c.routing.score, Score::sigmoid);
  EXPECT_EQ(c.routing.groups, 4);
  EXPECT_EQ(c.routing.groups_kept, 2);
  EXPECT_EQ(c.routing.group_best, 2);
  EXPECT_TRUE(c.routing.renormalise);
  EXPECT_EQ(c.routing.scale, 2.5f);
}

TEST(Config, deepseek_v2_scores_a_group_by_its_best_expert) {
  const Config greedy = family("deepseek_v2", R"("topk_method":"greedy","n_group":1,"topk_group":1)");
  EXPECT_EQ(greedy.routing.score, Score::softmax);
  EXPECT_FALSE(greedy.routing.renormalise);
  EXPECT_EQ(greedy.routing.groups, 1);
  const Config limited = family("deepseek_v2", R"("topk_method":"group_limited_greedy","n_group":4,"topk_group":3,)"
                                               R"("routed_scaling_factor":16.0)");
  EXPECT_EQ(limited.routing.groups, 4);
  EXPECT_EQ(limited.routing.group_best, 1);
  EXPECT_EQ(limited.routing.scale, 16.0f);
}

TEST(Config, deepseek_v2_is_greedy_where_it_does_not_say) {
  const Config c = family("deepseek_v2", R"("n_group":4,"topk_group":2)");
  EXPECT_EQ(c.routing.groups, 1);
  EXPECT_EQ(c.routing.groups_kept, 1);
  EXPECT_FALSE(c.routing.renormalise);
}

TEST(Config, deepseek_v2_that_renormalises_is_refused) {
  const std::string text = "{\"model_type\":\"deepseek_v2\"," + kSizes + R"(,"norm_topk_prob":true)";
  expect_refused(text + "}", Reason::routing_unsupported, {"norm_topk_prob", "greedy"});
  expect_refused(text + R"(,"topk_method":"group_limited_greedy","n_group":4,"topk_group":2})",
                 Reason::routing_unsupported, {"norm_topk_prob", "group_limited_greedy"});
  const Config vl2 = parse(text + R"(,"topk_method":"noaux_tc","scoring_func":"sigmoid","n_group":1,"topk_group":1,)"
                                  R"("routed_scaling_factor":2.0})");  // DeepSeek-VL2's, whose code does both
  EXPECT_TRUE(vl2.routing.renormalise);
  EXPECT_EQ(vl2.routing.scale, 2.0f);
}

TEST(Config, a_method_that_a_family_lacks_is_refused_where_it_matters) {
  for (const std::string method : {"greedy", "group_limited_greedy"}) {
    const std::string key = "\"topk_method\":\"" + method + "\"";
    EXPECT_EQ(family("glm4_moe", key).routing.groups, 1);
    expect_refused("{\"model_type\":\"glm4_moe\",\"n_group\":4,\"topk_group\":2," + kSizes + "," + key + "}",
                   Reason::routing_unsupported, {"topk_method", method, "4 groups", "noaux_tc"});
  }
}

TEST(Config, families_route_as_their_code_does) {
  EXPECT_FALSE(family("qwen3_moe").routing.renormalise);
  EXPECT_TRUE(family("qwen3_moe", R"("norm_topk_prob":true)").routing.renormalise);
  EXPECT_FALSE(family("qwen2_moe").routing.renormalise);
  EXPECT_TRUE(family("qwen3_next").routing.renormalise);
  EXPECT_TRUE(family("qwen3_5_moe").routing.renormalise);
  EXPECT_TRUE(family("mixtral").routing.renormalise);
  EXPECT_EQ(family("glm4_moe").routing.score, Score::sigmoid);
  EXPECT_EQ(family("kimi_k2", R"("routed_scaling_factor":2.827)").routing.scale, 2.827f);
  EXPECT_EQ(family("minimax_m2", R"("scoring_func":"sigmoid")").routing.score, Score::sigmoid);
  EXPECT_TRUE(family("minimax_m2").routing.renormalise);
  EXPECT_EQ(family("deepseek_v4", R"("scoring_func":"sqrtsoftplus")").routing.score, Score::sqrt_softplus);
  const Config llama = family("llama4_text");
  EXPECT_EQ(llama.family, "llama4");
  EXPECT_TRUE(llama.routing.weight_on_input);
  EXPECT_FALSE(llama.routing.renormalise);
  EXPECT_EQ(llama.routing.score, Score::sigmoid);
}

TEST(Config, absent_groups_and_scale_are_the_familys) {
  const auto expect = [](const Config& c, i32 groups, i32 kept, f32 scale) {
    EXPECT_EQ(c.routing.groups, groups) << c.family;
    EXPECT_EQ(c.routing.groups_kept, kept) << c.family;
    EXPECT_EQ(c.routing.scale, scale) << c.family;
  };
  for (const char* name : {"deepseek_v3", "deepseek_v32", "kimi_k2"}) {
    expect(family(name), 8, 4, 2.5f);
    expect(family(name, R"("n_group":null,"topk_group":null,"routed_scaling_factor":null)"), 8, 4, 2.5f);
    expect(family(name, R"("n_group":1)"), 1, 1, 2.5f);
    expect(family(name, R"("topk_group":2)"), 8, 2, 2.5f);
  }
  expect_refused("{\"model_type\":\"deepseek_v3\"," + kSizes + R"(,"n_group":2})", Reason::routing_unsupported,
                 {"2 groups", "4 are kept"});
  for (const char* name : {"glm4_moe", "glm4v_moe", "dots1", "mistral4", "nemotron_h"}) {
    expect(family(name), 1, 1, 1.0f);
    expect(family(name, R"("n_group":4)"), 4, 1, 1.0f);
  }
  expect(family("glm4_moe_lite"), 1, 1, 1.8f);
  expect(family("glm_moe_dsa"), 1, 1, 2.5f);
}

TEST(Config, keys_that_the_familys_code_does_not_read_change_nothing) {
  const std::string keys = R"("n_group":4,"topk_group":2,"routed_scaling_factor":3.0)";
  for (const char* name : {"qwen2_moe", "qwen3_moe", "qwen3_vl_moe", "qwen3_next", "qwen3_5_moe", "olmoe", "mixtral",
                           "minimax", "minimax_m2", "llama4", "gpt_oss", "ernie4_5_moe"}) {
    const Config c = family(name, keys);
    EXPECT_EQ(c.routing.groups, 1) << name;
    EXPECT_EQ(c.routing.scale, 1.0f) << name;
  }
  for (const char* name : {"deepseek_v4", "minimax_m3_vl"}) {
    const Config c = family(name, keys);
    EXPECT_EQ(c.routing.groups, 1) << name;
    EXPECT_EQ(c.routing.scale, 3.0f) << name;
  }
}

TEST(Config, activations) {
  EXPECT_EQ(family("nemotron_h", R"("mlp_hidden_act":"relu2")").activation.kind, ActivationKind::relu2);
  EXPECT_EQ(family("qwen3_moe", R"("hidden_act":"gelu_pytorch_tanh")").activation.kind, ActivationKind::geglu_tanh);
  EXPECT_EQ(family("qwen3_moe", R"("hidden_act":"gelu")").activation.kind, ActivationKind::geglu_erf);
  const Activation oss = family("gpt_oss", R"("hidden_act":"silu","swiglu_limit":5.0)").activation;
  EXPECT_EQ(oss.kind, ActivationKind::swiglu_clamped);
  EXPECT_EQ(oss.alpha, 1.702f);
  EXPECT_EQ(oss.beta, 1.0f);
  EXPECT_EQ(oss.limit, 5.0f);
  EXPECT_EQ(family("gpt_oss").activation.limit, 7.0f);
  const Activation v4 = family("deepseek_v4", R"("swiglu_limit":10.0)").activation;
  EXPECT_EQ(v4.alpha, 1.0f);
  EXPECT_EQ(v4.beta, 0.0f);
  EXPECT_EQ(family("deepseek_v4", R"("hidden_act":"silu")").activation.kind, ActivationKind::swiglu_clamped);
  expect_refused("{\"model_type\":\"deepseek_v4\"," + kSizes + R"(,"hidden_act":"gelu"})",
                 Reason::activation_unsupported, {"hidden_act", "gelu", "silu would pass"});
  expect_refused("{\"model_type\":\"qwen3_moe\"," + kSizes + R"(,"hidden_act":"tanh"})", Reason::activation_unsupported,
                 {"hidden_act", "tanh", "silu"});
}

TEST(Config, multimodal_wrappers) {
  const Config c = parse(R"({"model_type":"qwen3_5_moe","text_config":{"model_type":"qwen3_5_moe_text",)" + kSizes +
                         R"(},"vision_config":{"hidden_size":1,"num_experts":3},"quantization_config":{"quant_method":)"
                         R"("modelopt","quant_algo":"MIXED_PRECISION"}})");
  EXPECT_EQ(c.family, "qwen3_5_moe");
  EXPECT_EQ(c.hidden, 64);
  EXPECT_EQ(c.quantisation.algorithm, "MIXED_PRECISION");
  EXPECT_FALSE(find_unreadable_algorithm(c.quantisation).has_value());
  EXPECT_EQ(parse(R"({"model_type":"kimi_k25","text_config":{"model_type":"kimi_k2",)" + kSizes + "}}").family,
            "kimi_k2");
}

TEST(Config, unknown_families_must_be_explicit) {
  const std::string known = R"({"model_type":"new_moe",)" + kSizes;
  const Config c = parse(known + R"(,"norm_topk_prob":true,"hidden_act":"silu"})");
  EXPECT_EQ(c.family, "new_moe");
  EXPECT_EQ(c.routing.score, Score::softmax);
  EXPECT_TRUE(c.routing.renormalise);
  expect_refused(known + "}", Reason::family_unknown, {"new_moe", "known:", "deepseek_v3"});
  expect_refused(known + R"(,"norm_topk_prob":true,"hidden_act":"silu","scoring_func":"sigmoid"})",
                 Reason::family_unknown, {"new_moe"});
  expect_refused("{" + kSizes + R"(,"norm_topk_prob":true,"hidden_act":"silu"})", Reason::family_unknown, {"known:"});
  // Of Cohere's, Ling's, LFM2's and LongCat's, and one of nobody's.
  for (const std::string key :
       {R"("expert_selection_fn":"sigmoid")", R"("shared_expert_combination_strategy":"average")",
        R"("moe_router_enable_expert_bias":true)", R"("use_expert_bias":true)", R"("zero_expert_num":4)",
        R"("n_group":4)", R"("num_expert_group":4)", R"("topk_method":"greedy")", R"("moe_latent_size":16)",
        R"("score_func":"softmax")", R"("routing_temperature":2.0)"}) {
    expect_refused(known + R"(,"norm_topk_prob":true,"hidden_act":"silu",)" + key + "}", Reason::family_unknown,
                   {"new_moe", key.substr(0, key.find(':'))});
  }
  EXPECT_EQ(parse(known + R"(,"norm_topk_prob":false,"hidden_act":"silu","router_aux_loss_coef":0.1,)"
                          R"("output_router_logits":false,"moe_layer_freq":2,"first_k_dense_replace":1,)"
                          R"("shared_expert_intermediate_size":8,"use_expert_bias":false,"n_group":null})")
                .family,
            "new_moe");
}

TEST(Config, quantisation_facts) {
  const Config file = parse_config("{\"model_type\":\"qwen3_moe\"," + kSizes + "}", "config.json",
                                   R"({"producer":{"name":"modelopt","version":"0.9"},"quantization":{"quant_algo":)"
                                   R"("W4A16_NVFP4"}})",
                                   "hf_quant_config.json");
  EXPECT_EQ(file.quantisation.method, "modelopt");
  EXPECT_EQ(file.quantisation.algorithm, "W4A16_NVFP4");
  EXPECT_EQ(file.quantisation.producer, "modelopt 0.9");
  const Config ct =
      family("qwen3_moe", R"("quantization_config":{"quant_method":"compressed-tensors","version":"0.20.0","format":)"
                          R"("mixed-precision","config_groups":{"a":{"format":"float-quantized"},"b":{"format":)"
                          R"("nvfp4-pack-quantized"}}})");
  EXPECT_EQ(ct.quantisation.algorithm, "nvfp4-pack-quantized");
  EXPECT_EQ(ct.quantisation.producer, "compressed-tensors 0.20.0");
  for (const char* bad : {"NVFP4_AWQ", "NVFP4_SVD", "W4A8_NVFP4_FP8", "W4A8_MXFP4_FP8", "MXFP8", "INT4_AWQ"}) {
    const auto why = find_unreadable_algorithm({"modelopt", bad, ""});
    ASSERT_TRUE(why.has_value()) << bad;
    EXPECT_NE(why->find(bad), std::string::npos);
  }
}

TEST(Config, python_constants_are_accepted) {
  EXPECT_EQ(
      family("nemotron_h", R"("time_step_limit":[0.0,Infinity],"x":-Infinity,"y":NaN,"z":"NaN \" Infinity")").hidden,
      64);
}

TEST(Config, keys_are_named) {
  const auto with = [](const std::string& key, const std::string& value) {
    const std::map<std::string, std::string> keys = {
        {"hidden_size", "64"}, {"moe_intermediate_size", "32"}, {"num_experts", "8"}, {"num_experts_per_tok", "2"}};
    std::string text = "{\"model_type\":\"deepseek_v3\"";
    for (const auto& [name, usual] : keys) text += ",\"" + name + "\":" + (name == key ? value : usual);
    if (keys.find(key) == keys.end()) text += ",\"" + key + "\":" + value;
    return text + "}";
  };
  for (const char* key : {"hidden_size", "moe_intermediate_size", "num_experts", "num_experts_per_tok"}) {
    for (const char* value : {"-1", "0", "1.5", "\"8\"", "[8]", "{}", "99999999999", "1e300", "true"}) {
      expect_refused(with(key, value), Reason::file_malformed, {key});
    }
    expect_refused(with(key, "null"), Reason::file_malformed, {key});
  }
  for (const char* value : {"\"a\"", "[]", "1e999", "null1"}) {
    expect_refused(with("routed_scaling_factor", value), Reason::file_malformed, {});
  }
  expect_refused(with("norm_topk_prob", "1"), Reason::file_malformed, {"norm_topk_prob"});
  expect_refused(with("model_type2", "1,\"model_type\":1"), Reason::file_malformed, {"model_type"});
  expect_refused(with("n_group", "3"), Reason::routing_unsupported, {"n_group", "3 groups"});
  expect_refused(with("n_group", "2,\"topk_group\":4"), Reason::routing_unsupported, {"topk_group"});
  expect_refused(with("topk_method", "\"dice\""), Reason::routing_unsupported, {"dice"});
  expect_refused(with("scoring_func", "\"dice\""), Reason::routing_unsupported, {"dice"});
  expect_refused(with("n_routed_experts", "9"), Reason::file_malformed, {"num_experts", "n_routed_experts"});
  expect_refused(with("quantization_config", "[]"), Reason::file_malformed, {"quantization_config"});
  expect_refused(with("quantization_config", "{\"quant_algo\":1}"), Reason::file_malformed, {"quant_algo"});
}

}  // namespace
}  // namespace fourmoe::checkpoint
