#include "checkpoint/gguf_config.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>
#include <string>

#include "status.h"

namespace fourmoe::checkpoint {
namespace {

// What llama.cpp's graph of an architecture does where the metadata is silent. Source: llama.cpp src/llama-model.cpp.
struct Architecture {
  std::string_view name;
  std::string_view family;
  Score score = Score::softmax;
  bool renormalise = true;
};

constexpr std::array<Architecture, 13> kArchitectures = {{
    {"llama", "mixtral"},
    {"deepseek2", "deepseek_v3", Score::softmax, false},
    {"glm4moe", "glm4_moe", Score::sigmoid, false},
    {"qwen2moe", "qwen2_moe", Score::softmax, false},
    {"qwen3moe", "qwen3_moe"},
    {"qwen3vlmoe", "qwen3_vl_moe"},
    {"qwen3next", "qwen3_next"},
    {"qwen35moe", "qwen3_5_moe"},
    {"olmoe", "olmoe", Score::softmax, false},
    {"minimax-m2", "minimax_m2", Score::sigmoid},
    {"nemotron_h_moe", "nemotron_h", Score::sigmoid, false},
    {"llama4", "llama4", Score::sigmoid, false},
    {"gpt-oss", "gpt_oss"},
}};

constexpr i32 kLargest = 1 << 24;

class Metadata {
 public:
  Metadata(const Gguf& gguf, std::string_view file) : gguf_(gguf), file_(file) {}

  std::string string(const std::string& key) const {
    const std::string* value = std::get_if<std::string>(&at(key));
    if (value == nullptr) refuse(key, "must be a string");
    return *value;
  }

  bool has(const std::string& key) const { return gguf_.metadata.find(key) != gguf_.metadata.end(); }

  i32 integer(const std::string& key, i32 lowest) const {
    const i64* value = std::get_if<i64>(&at(key));
    if (value == nullptr || *value < lowest || *value > kLargest) {
      refuse(key, fmt::format("must be an integer from {} to {}", lowest, kLargest));
    }
    return static_cast<i32>(*value);
  }

  f32 number(const std::string& key) const {
    const f64* value = std::get_if<f64>(&at(key));
    if (value == nullptr || !std::isfinite(static_cast<f32>(*value))) refuse(key, "must be a finite number");
    return static_cast<f32>(*value);
  }

  bool boolean(const std::string& key) const {
    const bool* value = std::get_if<bool>(&at(key));
    if (value == nullptr) refuse(key, "must be true or false");
    return *value;
  }

  [[noreturn]] void refuse(const std::string& key, const std::string& what) const {
    throw Error(Reason::file_malformed, fmt::format("{}: key {} {}", file_, quote(key), what));
  }

 private:
  const GgufValue& at(const std::string& key) const {
    const auto found = gguf_.metadata.find(key);
    if (found == gguf_.metadata.end()) refuse(key, "is missing");
    return found->second;
  }

  const Gguf& gguf_;
  std::string_view file_;
};

const Architecture& find_architecture(const std::string& name, std::string_view file) {
  const auto found = std::find_if(kArchitectures.begin(), kArchitectures.end(),
                                  [&](const Architecture& known) { return known.name == name; });
  if (found != kArchitectures.end()) return *found;
  std::string known;
  for (const Architecture& each : kArchitectures) known += fmt::format("{}{}", known.empty() ? "" : ", ", each.name);
  throw Error(Reason::family_unknown,
              fmt::format("{}: architecture {} is not known; known: {}", file, quote(name), known));
}

Score read_score(const Metadata& metadata, const std::string& key, Score otherwise) {
  if (!metadata.has(key)) return otherwise;
  switch (metadata.integer(key, 0)) {
    case 0: return otherwise;
    case 1: return Score::softmax;
    case 2: return Score::sigmoid;
    case 3: return Score::softmax;  // over the picks: softmax, then renormalised
    default: metadata.refuse(key, "is none of 1 (softmax), 2 (sigmoid), 3 (softmax of the picks)");
  }
}

// A selection bias beside scores that nothing names: DeepSeek-V2's softmax or the sigmoid of V3 and GLM-4.7-Flash,
// which share an architecture.
void refuse_unnamed_score(const Gguf& gguf, const Metadata& metadata, const std::string& gating, Score otherwise) {
  if (otherwise != Score::softmax || (metadata.has(gating) && metadata.integer(gating, 0) != 0)) return;
  for (const auto& [name, tensor] : gguf.tensors) {
    if (name.find("exp_probs_b") == name.npos) continue;
    metadata.refuse(gating,
                    fmt::format("is missing and {} is there; 1 (softmax) or 2 (sigmoid) would pass", quote(name)));
  }
}

Routing read_routing(const Metadata& metadata, const std::string& prefix, const Architecture& architecture,
                     const Family& row, i32 experts) {
  Routing out;
  const std::string gating = prefix + "expert_gating_func", norm = prefix + "expert_weights_norm";
  out.score = read_score(metadata, gating, architecture.score);
  out.renormalise = metadata.has(norm) ? metadata.boolean(norm) : architecture.renormalise;
  if (metadata.has(gating) && metadata.integer(gating, 0) == 3) out.renormalise = true;
  const std::string scale = prefix + "expert_weights_scale";
  if (metadata.has(scale) && metadata.number(scale) != 0.0f) out.scale = metadata.number(scale);  // 0: none
  out.group_best = row.group_best;
  out.weight_on_input = row.weight_on_input;
  const std::string groups = prefix + "expert_group_count", kept = prefix + "expert_group_used_count";
  if (metadata.has(groups)) out.groups = std::max(metadata.integer(groups, 0), 1);
  out.groups_kept = metadata.has(kept) ? std::max(metadata.integer(kept, 0), 1) : out.groups;
  if (experts % out.groups == 0 && out.groups_kept <= out.groups) return out;
  throw Error(Reason::routing_unsupported, fmt::format("{} experts in {} groups of which {} are kept contradict each "
                                                       "other",
                                                       experts, out.groups, out.groups_kept));
}

}  // namespace

Config read_gguf_config(const Gguf& gguf, std::string_view file) {
  const Metadata metadata(gguf, file);
  const std::string name = metadata.string("general.architecture");
  const Architecture& architecture = find_architecture(name, file);
  const std::string prefix = name + ".";
  const std::string inter = prefix + "expert_feed_forward_length";
  refuse_unnamed_score(gguf, metadata, prefix + "expert_gating_func", architecture.score);
  Config out;
  out.file = file;
  out.family = architecture.family;
  out.row = *find_family(architecture.family);
  out.experts_key = prefix + "expert_count";
  out.hidden = metadata.integer(prefix + "embedding_length", 1);
  out.experts = metadata.integer(out.experts_key, 1);
  out.top_k = metadata.integer(prefix + "expert_used_count", 1);
  out.inter = metadata.integer(metadata.has(inter) ? inter : prefix + "feed_forward_length", 1);
  if (metadata.has(prefix + "block_count")) out.layers = metadata.integer(prefix + "block_count", 0);
  const std::string latent = prefix + "moe_latent_size";
  if (metadata.has(latent)) out.latent = metadata.integer(latent, 0);
  out.activation.kind = out.row.activation;
  out.activation.alpha = out.row.alpha;
  out.activation.beta = out.row.beta;
  out.activation.limit = out.row.limit;
  out.routing = read_routing(metadata, prefix, architecture, out.row, out.experts);
  out.quantisation.method = "gguf";
  return out;
}

}  // namespace fourmoe::checkpoint
