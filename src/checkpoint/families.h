// Families: what a model_type says about its MoE layers, one row each.
#pragma once

#include <span>
#include <string>
#include <string_view>

#include "flow.h"

namespace fourmoe::checkpoint {

// Keys of config.json override a row's defaults where the row says so; the rest is how that family's code computes.
struct Family {
  std::string_view name{};  // model_type, without a "_text" ending
  Score score = Score::softmax;
  bool renormalise = true;            // norm_topk_prob where the key is absent
  bool renormalise_key = false;       // norm_topk_prob decides
  bool renormalise_disputed = false;  // implementations compute different weights where norm_topk_prob is true
  bool groups_key = false;            // n_group and topk_group decide
  i32 groups = 1;                     // n_group where the key is absent
  i32 groups_kept = 1;                // topk_group where the key is absent
  i32 group_best = 2;                 // sum of a group's best experts
  std::string_view method{};          // topk_method where it decides and is absent; empty: it is noaux_tc
  bool scale_key = false;             // routed_scaling_factor decides
  f32 scale = 1.0f;                   // where the key is absent
  ActivationKind activation = ActivationKind::swiglu;
  bool activation_key = true;      // hidden_act (or its synonyms) decides
  bool silu_alone = false;         // the clamped form is of hidden_act silu: another is refused
  f32 alpha = 1.702f;              // of swiglu_clamped, where swiglu_alpha is absent
  f32 beta = 1.0f;                 // of swiglu_clamped
  f32 limit = 7.0f;                // of swiglu_clamped, where swiglu_limit is absent
  bool weight_on_input = false;    // the routing weight multiplies the token
  bool transposed = false;         // stacks are [E, in, out]; decides where shapes fit both ways
  bool interleaved = false;        // gate and up alternate in fused stacks
  bool gate_bias_selects = false;  // a bias of the router selects and does not weigh (DeepSeek's own names)
  bool generic = false;  // a model_type that no row knows, whose config is explicit about plain softmax routing
};

// All rows; the order has no meaning.
std::span<const Family> families();

// By model_type; null when unknown.
const Family* find_family(std::string_view name);

// "deepseek_v2, deepseek_v3, ...", for messages.
std::string family_names();

}  // namespace fourmoe::checkpoint
