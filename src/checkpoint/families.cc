#include "checkpoint/families.h"

#include <array>

namespace fourmoe::checkpoint {
namespace {

using enum ActivationKind;

constexpr Family glm_form(std::string_view name, f32 scale) {
  return {.name = name,
          .score = Score::sigmoid,
          .renormalise_key = true,
          .groups_key = true,
          .scale_key = true,
          .scale = scale};
}

constexpr Family deepseek_v3_form(std::string_view name) {
  Family family = glm_form(name, 2.5f);
  family.groups = 8;
  family.groups_kept = 4;
  family.gate_bias_selects = true;
  return family;
}

// Sources: each model's modeling and configuration files in huggingface/transformers 5.24. "Top-k, then softmax"
// (Mixtral, gpt-oss) equals softmax with renormalise.
constexpr std::array<Family, 26> kFamilies = {{
    {.name = "deepseek_v2",
     .renormalise = false,
     .renormalise_key = true,
     .renormalise_disputed = true,
     .groups_key = true,
     .group_best = 1,
     .method = "greedy",
     .scale_key = true},
    deepseek_v3_form("deepseek_v3"),
    deepseek_v3_form("deepseek_v32"),
    {.name = "deepseek_v4",
     .score = Score::sqrt_softplus,
     .scale_key = true,
     .scale = 1.5f,
     .activation = swiglu_clamped,
     .activation_key = false,
     .silu_alone = true,
     .alpha = 1.0f,
     .beta = 0.0f,
     .limit = 10.0f,
     .gate_bias_selects = true},
    deepseek_v3_form("kimi_k2"),
    glm_form("glm4_moe", 1.0f),
    glm_form("glm4v_moe", 1.0f),
    glm_form("glm4_moe_lite", 1.8f),
    glm_form("glm_moe_dsa", 2.5f),
    {.name = "dots1",
     .score = Score::sigmoid,
     .renormalise = false,
     .renormalise_key = true,
     .groups_key = true,
     .scale_key = true},
    {.name = "mistral4", .renormalise_key = true, .groups_key = true, .scale_key = true},
    {.name = "qwen2_moe", .renormalise = false, .renormalise_key = true},
    {.name = "qwen3_moe", .renormalise = false, .renormalise_key = true},
    {.name = "qwen3_vl_moe"},
    {.name = "qwen3_next", .renormalise_key = true},
    {.name = "qwen3_5_moe"},
    {.name = "olmoe", .renormalise = false, .renormalise_key = true},
    {.name = "mixtral"},
    {.name = "minimax"},
    {.name = "minimax_text_01"},
    {.name = "minimax_m2", .score = Score::sigmoid},
    {.name = "minimax_m3_vl",
     .score = Score::sigmoid,
     .scale_key = true,
     .scale = 2.0f,
     .activation = swiglu_clamped,
     .activation_key = false},
    {.name = "nemotron_h",
     .score = Score::sigmoid,
     .renormalise_key = true,
     .groups_key = true,
     .scale_key = true,
     .activation = relu2},
    {.name = "llama4", .score = Score::sigmoid, .renormalise = false, .weight_on_input = true, .transposed = true},
    {.name = "gpt_oss", .activation = swiglu_clamped, .activation_key = false, .transposed = true, .interleaved = true},
    {.name = "ernie4_5_moe"},
}};

}  // namespace

std::span<const Family> families() { return kFamilies; }

const Family* find_family(std::string_view name) {
  for (const Family& family : kFamilies) {
    if (family.name == name) return &family;
  }
  return nullptr;
}

std::string family_names() {
  std::string text;
  for (const Family& family : kFamilies) {
    if (!text.empty()) text += ", ";
    text += family.name;
  }
  return text;
}

}  // namespace fourmoe::checkpoint
