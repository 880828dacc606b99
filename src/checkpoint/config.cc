#include "checkpoint/config.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <span>

#include "checkpoint/json.h"
#include "checkpoint/mapped_file.h"
#include "status.h"

namespace fourmoe::checkpoint {
namespace {

constexpr i32 kLargestSize = 1 << 24;  // of any dimension
constexpr i32 kMostExperts = 1 << 16;  // of any config; what runs is decided by check()
constexpr std::array kTextConfigs = {"text_config", "language_config", "llm_config", "thinker_config"};

using Keys = std::span<const std::string_view>;
using Names = std::array<std::string_view, 10>;  // unused places stay empty
constexpr Names kExperts = {"num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"};
constexpr Names kTopK = {
    "num_experts_per_tok", "experts_per_token", "num_experts_per_token", "top_k_experts", "moe_k", "moe_topk"};
constexpr Names kInter = {"moe_intermediate_size", "intermediate_size"};
constexpr Names kHidden = {"hidden_size"};
constexpr Names kActivation = {"mlp_hidden_act", "hidden_activation", "hidden_act"};
// Of a model_type that is not known: parts of keys that may be about routing, keys that are and change nothing in it
// beyond what is read, and parts of keys about training, about which layers have experts, and about shared experts'
// sizes.
constexpr std::array<std::string_view, 8> kRoutingParts = {"expert", "moe",    "rout",    "topk",
                                                           "scor",   "gating", "n_group", "swiglu_"};
constexpr std::array<std::string_view, 5> kPlainKeys = {
    "norm_topk_prob", "routed_scaling_factor", "output_router_logits", "n_shared_experts", "num_shared_experts"};
constexpr std::array<std::string_view, 5> kPlainParts = {"loss", "jitter", "layer", "intermediate_size", "index_topk"};

Keys used(const Names& names) { return {names.begin(), std::find(names.begin(), names.end(), std::string_view())}; }

// The first of the keys that is there; empty when none is.
std::string_view first_of(const Object& object, const Names& names) {
  const Keys keys = used(names);
  const auto place = std::find_if(keys.begin(), keys.end(), [&](std::string_view key) { return object.has(key); });
  return place == keys.end() ? std::string_view() : *place;
}

i32 read_size(const Object& object, const Names& keys, i32 highest, std::string* found_key = nullptr) {
  const std::string_view key = first_of(object, keys);
  if (key.empty()) {
    throw Error(Reason::file_malformed,
                fmt::format("{}: none of the keys \"{}\" is there", object.file, fmt::join(used(keys), "\", \"")));
  }
  if (found_key != nullptr) *found_key = key;
  return object.integer(key, 1, highest);
}

// Synonyms may stand side by side, but must agree.
void check_agreement(const Object& object, const Names& keys, std::string_view key, i32 value) {
  for (const std::string_view other : used(keys)) {
    if (!object.has(other) || object.integer(other, 0, kMostExperts) == value) continue;
    throw Error(Reason::file_malformed, fmt::format("{}: \"{}\" is {} but \"{}\" is {}", object.file, key, value, other,
                                                    object.integer(other, 0, kMostExperts)));
  }
}

// The object that describes the language model: the file itself, or a part of a multimodal wrapper.
Object find_text_config(const Object& root) {
  for (const char* key : kTextConfigs) {
    if (!root.has(key)) continue;
    const Object inner = root.object(key);
    if (!first_of(inner, kExperts).empty() || inner.has("text_config")) return find_text_config(inner);
  }
  return root;
}

std::string read_family(const Object& root, const Object& text) {
  std::string name = text.has("model_type")   ? text.string("model_type")
                     : root.has("model_type") ? root.string("model_type")
                                              : std::string();
  if (name.ends_with("_text")) name.resize(name.size() - 5);
  return name;
}

template <class Parts>
bool has_part(std::string_view key, const Parts& parts) {
  return std::any_of(parts.begin(), parts.end(), [&](std::string_view part) { return key.find(part) != key.npos; });
}

template <class Keys>
bool is_one_of(std::string_view key, const Keys& keys) {
  return std::find(keys.begin(), keys.end(), key) != keys.end();
}

// A key that may change how the model routes, or how it adds its experts; empty when there is none.
std::string find_special_key(const Object& text) {
  for (const auto& [key, value] : text.json->items()) {
    if (value.is_null() || value == false || !has_part(key, kRoutingParts) || has_part(key, kPlainParts)) continue;
    if (is_one_of(key, kExperts) || is_one_of(key, kTopK) || is_one_of(key, kPlainKeys)) continue;
    return key;
  }
  return {};
}

// Softmax routing is safe to assume only when the config is explicit about all else.
Family generic_family(const Object& text, const std::string& name) {
  if (name.empty() || !text.has("norm_topk_prob") || first_of(text, kActivation).empty()) {
    throw Error(Reason::family_unknown,
                fmt::format("{}: model_type {} is not known and the config does not say how it routes (norm_topk_prob, "
                            "hidden_act); known: {}",
                            text.file, quote(name), family_names()));
  }
  if (const std::string key = find_special_key(text); !key.empty()) {
    throw Error(Reason::family_unknown,
                fmt::format("{}: model_type {} is not known and {} may change how it routes; known: {}", text.file,
                            quote(name), quote(key), family_names()));
  }
  return {.renormalise_key = true, .scale_key = true, .generic = true};
}

ActivationKind read_activation_kind(const Object& text, const Family& row) {
  const std::string_view key = row.activation_key || row.silu_alone ? first_of(text, kActivation) : std::string_view();
  if (key.empty()) return row.activation;
  static constexpr std::array<std::pair<std::string_view, ActivationKind>, 7> kNames = {{
      {"silu", ActivationKind::swiglu},
      {"swish", ActivationKind::swiglu},
      {"gelu", ActivationKind::geglu_erf},
      {"gelu_pytorch_tanh", ActivationKind::geglu_tanh},
      {"gelu_new", ActivationKind::geglu_tanh},
      {"relu2", ActivationKind::relu2},
      {"swigluoai", ActivationKind::swiglu_clamped},
  }};
  const std::string name = text.string(key);
  for (const auto& [known, kind] : kNames) {
    if (name == known && row.activation_key) return kind;
    if (name == known && kind == ActivationKind::swiglu) return row.activation;
  }
  throw Error(Reason::activation_unsupported,
              fmt::format("{}: \"{}\" is {}; {} would pass", text.file, key, quote(name),
                          row.activation_key ? "silu, gelu, gelu_pytorch_tanh, relu2" : "silu"));
}

Activation read_activation(const Object& text, const Family& row) {
  Activation activation;
  activation.kind = read_activation_kind(text, row);
  activation.alpha = text.has("swiglu_alpha") ? text.number("swiglu_alpha") : row.alpha;
  activation.beta = row.beta;
  activation.limit = text.has("swiglu_limit") ? text.number("swiglu_limit") : row.limit;
  if (activation.kind == ActivationKind::swiglu_clamped && !(activation.limit > 0.0f)) {
    throw Error(Reason::file_malformed, text.file + ": \"swiglu_limit\" must be positive");
  }
  return activation;
}

Score read_score(const Object& text, const Family& row) {
  if (!text.has("scoring_func")) return row.score;
  const std::string name = text.string("scoring_func");
  if (name == "softmax") return Score::softmax;
  if (name == "sigmoid") return Score::sigmoid;
  if (name == "sqrtsoftplus") return Score::sqrt_softplus;
  throw Error(
      Reason::routing_unsupported,
      fmt::format("{}: \"scoring_func\" is {}; softmax, sigmoid, sqrtsoftplus would pass", text.file, quote(name)));
}

std::string read_method(const Object& text, const Family& row) {
  std::string method = text.has("topk_method") ? text.string("topk_method") : std::string(row.method);
  if (!method.empty() && method != "noaux_tc" && method != "group_limited_greedy" && method != "greedy") {
    throw Error(Reason::routing_unsupported,
                fmt::format("{}: \"topk_method\" is {}; noaux_tc, group_limited_greedy, greedy would pass", text.file,
                            quote(method)));
  }
  return method;
}

void read_groups(const Object& text, const Family& row, const std::string& method, i32 experts, Routing* routing) {
  const bool by_method = !row.method.empty();
  if (!row.groups_key || (by_method && method == "greedy")) return;
  if (method == "group_limited_greedy") routing->group_best = 1;
  if (method == "noaux_tc") routing->group_best = 2;
  routing->groups = text.has("n_group") ? std::max(text.integer("n_group", 0, experts), 1) : row.groups;
  const i32 kept = routing->groups > 1 ? row.groups_kept : 1;
  routing->groups_kept = text.has("topk_group") ? std::max(text.integer("topk_group", 0, experts), 1) : kept;
  if (!by_method && !method.empty() && method != "noaux_tc" && routing->groups > 1) {
    throw Error(Reason::routing_unsupported,
                fmt::format("{}: \"topk_method\" is {} with {} groups (\"n_group\"), which "
                            "the family's code does not have; noaux_tc would pass",
                            text.file, quote(method), routing->groups));
  }
  if (experts % routing->groups != 0 || routing->groups_kept > routing->groups) {
    throw Error(
        Reason::routing_unsupported,
        fmt::format("{}: {} experts in {} groups (\"n_group\") of which {} are kept (\"topk_group\") contradict "
                    "each other",
                    text.file, experts, routing->groups, routing->groups_kept));
  }
}

bool read_renormalise(const Object& text, const Family& row, const std::string& method) {
  const bool renormalise =
      row.renormalise_key && text.has("norm_topk_prob") ? text.boolean("norm_topk_prob") : row.renormalise;
  if (renormalise && row.renormalise_disputed && method != "noaux_tc") {
    throw Error(Reason::routing_unsupported,
                fmt::format("{}: \"norm_topk_prob\" is true with \"topk_method\" {}, for which DeepSeek-V2's own code "
                            "leaves out the scale and transformers the renormalisation; false or noaux_tc would pass",
                            text.file, quote(method)));
  }
  return renormalise;
}

Routing read_routing(const Object& text, const Family& row, i32 experts) {
  Routing routing;
  routing.score = read_score(text, row);
  routing.group_best = row.group_best;
  const std::string method = read_method(text, row);
  read_groups(text, row, method, experts, &routing);
  routing.renormalise = read_renormalise(text, row, method);
  routing.scale = row.scale;
  if (row.scale_key && text.has("routed_scaling_factor")) routing.scale = text.number("routed_scaling_factor");
  routing.weight_on_input = row.weight_on_input;
  return routing;
}

std::string read_producer(const Object& object) {
  if (!object.has("producer")) return object.has("version") ? object.string("version") : std::string();
  const Object producer = object.object("producer");
  const std::string name = producer.has("name") ? producer.string("name") : std::string();
  return producer.has("version") ? name + " " + producer.string("version") : name;
}

// compressed-tensors states its format for the whole model or for each group.
std::string read_format(const Object& object) {
  std::string format = object.has("format") ? object.string("format") : std::string();
  if (format != "mixed-precision" || !object.has("config_groups")) return format;
  const Object groups = object.object("config_groups");
  for (const auto& [name, group] : groups.json->items()) {
    if (!group.is_object()) continue;
    const Object inner{&group, object.file};
    if (inner.has("format") && inner.string("format").find("fp4") != std::string::npos) return inner.string("format");
  }
  return format;
}

Quantisation read_quantisation(const Object& object) {
  Quantisation out;
  if (object.has("quant_method")) out.method = object.string("quant_method");
  out.algorithm = object.has("quant_algo") ? object.string("quant_algo") : read_format(object);
  out.producer = read_producer(object);
  if (out.method == "compressed-tensors" && !out.producer.empty()) out.producer = "compressed-tensors " + out.producer;
  return out;
}

// hf_quant_config.json: fills what config.json left open.
void read_quant_file(std::string_view text, std::string_view file, Quantisation* out) {
  if (text.empty()) return;
  const nlohmann::json document = parse_json(text, file);
  const Object root{&document, std::string(file)};
  if (out->method.empty()) out->method = "modelopt";
  if (root.has("quantization") && out->algorithm.empty()) {
    const Object inner = root.object("quantization");
    if (inner.has("quant_algo")) out->algorithm = inner.string("quant_algo");
  }
  if (out->producer.empty()) out->producer = read_producer(root);
}

}  // namespace

Config parse_config(std::string_view text, std::string_view file, std::string_view quant_text,
                    std::string_view quant_file) {
  const nlohmann::json document = parse_json(text, file);
  const Object root{&document, std::string(file)};
  const Object inner = find_text_config(root);
  Config config;
  config.file = file;
  config.family = read_family(root, inner);
  const Family* known = find_family(config.family);
  config.row = known != nullptr ? *known : generic_family(inner, config.family);
  config.hidden = read_size(inner, kHidden, kLargestSize);
  config.experts = read_size(inner, kExperts, kMostExperts, &config.experts_key);
  check_agreement(inner, kExperts, config.experts_key, config.experts);
  config.top_k = read_size(inner, kTopK, kMostExperts);
  config.inter = read_size(inner, kInter, kLargestSize);
  if (inner.has("num_hidden_layers")) config.layers = inner.integer("num_hidden_layers", 0, kLargestSize);
  if (inner.has("moe_latent_size")) config.latent = inner.integer("moe_latent_size", 1, kLargestSize);
  config.activation = read_activation(inner, config.row);
  config.routing = read_routing(inner, config.row, config.experts);
  const Object& quantised = inner.has("quantization_config") ? inner : root;
  if (quantised.has("quantization_config")) {
    config.quantisation = read_quantisation(quantised.object("quantization_config"));
  }
  read_quant_file(quant_text, quant_file, &config.quantisation);
  return config;
}

Problem make_problem(const Config& config, format::Encoding encoding) {
  Problem out;
  out.hidden = config.latent > 0 ? config.latent : config.hidden;
  out.inter = config.inter;
  out.experts = config.experts;
  out.top_k = config.top_k;
  out.activation = config.activation;
  out.routing = config.routing;
  out.encoding = encoding;
  out.local_experts = config.experts;
  return out;
}

Problem make_shared_problem(const Config& config, format::Encoding encoding, i32 inter) {
  Problem out = make_problem(config, encoding);
  out.inter = inter;
  out.experts = out.top_k = out.local_experts = 1;
  out.routing = {};
  out.routing.score = Score::none;
  out.routing.renormalise = false;
  return out;
}

std::optional<std::string> find_unreadable_algorithm(const Quantisation& quantisation) {
  // Whether a layer's experts can then be read is decided by their tensors: FP8 and MIXED_PRECISION say little.
  static constexpr std::array<std::string_view, 12> kReadable = {
      "",      "NVFP4",           "W4A16_NVFP4",          "NVFP4_FOUR_OVER_SIX",  "MIXED_PRECISION", "FP8",
      "dense", "mixed-precision", "nvfp4-pack-quantized", "mxfp4-pack-quantized", "MXFP4",           "W4A16_MXFP4"};
  const auto& name = quantisation.algorithm;
  if (std::find(kReadable.begin(), kReadable.end(), name) != kReadable.end()) return std::nullopt;
  return fmt::format(
      "weights were quantised with {} ({}); NVFP4, W4A16_NVFP4, MIXED_PRECISION, nvfp4-pack-quantized, "
      "mxfp4-pack-quantized would pass",
      quote(name), quantisation.method.empty() ? "no method given" : quantisation.method);
}

}  // namespace fourmoe::checkpoint
