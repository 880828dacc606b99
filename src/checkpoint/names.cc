#include "checkpoint/names.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <optional>
#include <utility>

#include "status.h"

namespace fourmoe::checkpoint {
namespace {

struct ProjectionName {
  std::string_view name;
  Projection projection;
};

// Longer spellings before those that they begin with. w13 (vLLM's stacks) is [gate; up].
constexpr std::array<ProjectionName, 8> kProjectionNames = {{
    {"gate_up_proj", Projection::gate_up},
    {"w13", Projection::gate_up},
    {"gate_proj", Projection::gate},
    {"up_proj", Projection::up},
    {"down_proj", Projection::down},
    {"w1", Projection::gate},
    {"w3", Projection::up},
    {"w2", Projection::down},
}};

struct AttributeName {
  std::string_view name;
  Named Parts::*place;
  bool divides = false;
};

constexpr std::array<AttributeName, 12> kAttributeNames = {{
    {"weight", &Parts::weight},
    {"", &Parts::weight},               // Llama-4's stacks
    {"weight_packed", &Parts::weight},  // compressed-tensors
    {"blocks", &Parts::weight},         // gpt-oss
    {"weight_scale", &Parts::scale},
    {"scales", &Parts::scale},  // gpt-oss
    {"scale", &Parts::scale},   // DeepSeek-V4
    {"weight_scale_2", &Parts::global},
    {"weight_global_scale", &Parts::global, true},  // compressed-tensors: 2688 / amax
    {"input_scale", &Parts::input},
    {"input_global_scale", &Parts::input, true},
    {"bias", &Parts::bias},
}};

// Facts that change no value.
constexpr std::array<std::string_view, 3> kIgnoredAttributes = {"weight_shape", "input_amax", "weight_amax"};

struct BesideName {
  std::string_view name;
  Named LayerTensors::*place;
};

// Names beside ".experts", in order of preference.
constexpr std::array<BesideName, 11> kBesideNames = {{
    {"gate.weight", &LayerTensors::router},
    {"router.weight", &LayerTensors::router},
    {"gate.wg.weight", &LayerTensors::router},  // Hunyuan
    {"router.bias", &LayerTensors::router_bias},
    {"gate.bias", &LayerTensors::router_bias},
    {"gate.e_score_correction_bias", &LayerTensors::selection_bias},
    {"e_score_correction_bias", &LayerTensors::selection_bias},              // MiniMax
    {"moe_statics.e_score_correction_bias", &LayerTensors::selection_bias},  // Ernie
    {"shared_expert_gate.weight", &LayerTensors::shared_gate},
    {"gate.tid2eid", &LayerTensors::hash_table},  // DeepSeek-V4
    {"router.tid2eid", &LayerTensors::hash_table},
}};

constexpr std::array<std::string_view, 3> kSharedNames = {".shared_experts.", ".shared_expert.", ".shared_mlp."};

constexpr i32 kLargestNumber = 1 << 20;  // of a layer or expert: beyond any model

std::optional<i32> parse_number(std::string_view text) {
  i32 value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  const bool whole = error == std::errc() && end == text.data() + text.size();
  if (text.empty() || text[0] == '-' || !whole || value > kLargestNumber) return std::nullopt;
  return value;
}

// Where the layer's number stands in a base: the last part that is a number.
struct Numbered {
  std::string_view before;  // "model.layers."
  i32 layer;
};

std::optional<Numbered> find_layer_number(std::string_view base) {
  std::size_t end = base.size();
  while (end > 0) {
    const std::size_t dot = base.rfind('.', end - 1);
    const std::size_t begin = dot == std::string_view::npos ? 0 : dot + 1;
    if (const auto number = parse_number(base.substr(begin, end - begin)))
      return Numbered{base.substr(0, begin), *number};
    if (dot == std::string_view::npos) break;
    end = dot;
  }
  return std::nullopt;
}

struct Leaf {
  Projection projection;
  std::string_view attribute;
};

// "gate_proj.weight_scale", "gate_up_proj_blocks", "w13_weight".
std::optional<Leaf> parse_leaf(std::string_view leaf) {
  for (const ProjectionName& known : kProjectionNames) {
    if (!leaf.starts_with(known.name)) continue;
    std::string_view rest = leaf.substr(known.name.size());
    if (!rest.empty() && rest[0] != '.' && rest[0] != '_') continue;
    if (!rest.empty()) rest.remove_prefix(1);
    return Leaf{known.projection, rest};
  }
  return std::nullopt;
}

void place(Named named, const Leaf& leaf, ProjectionParts* parts) {
  Parts& target = (*parts)[static_cast<std::size_t>(leaf.projection)];
  for (const AttributeName& known : kAttributeNames) {
    if (known.name != leaf.attribute) continue;
    Named& slot = target.*known.place;
    if (slot != nullptr) target.foreign = named;  // two spellings of one thing
    slot = named;
    if (known.place == &Parts::global) target.global_divides = known.divides;
    if (known.place == &Parts::input) target.input_divides = known.divides;
    return;
  }
  const auto& ignored = kIgnoredAttributes;
  if (std::find(ignored.begin(), ignored.end(), leaf.attribute) == ignored.end()) target.foreign = named;
}

constexpr std::string_view kExperts = ".experts.";

// Takes one tensor of the experts into its layer; tells whether it was one.
bool take_expert_tensor(Named named, std::map<std::string, LayerTensors, std::less<>>* layers) {
  const std::string_view name = named->first;
  const std::size_t dot = name.find(kExperts);
  if (dot == std::string_view::npos) return false;
  const std::string_view base = name.substr(0, dot);
  std::string_view tail = name.substr(dot + kExperts.size());
  const std::size_t end = tail.find('.');
  const i32 expert = end == std::string_view::npos ? -1 : parse_number(tail.substr(0, end)).value_or(-1);
  if (expert >= 0) tail.remove_prefix(end + 1);
  const auto leaf = parse_leaf(tail);
  if (!leaf) return false;
  auto found = layers->find(base);
  if (found == layers->end()) {
    const auto numbered = find_layer_number(base);
    if (!numbered) return false;
    found = layers->try_emplace(std::string(base)).first;
    found->second.base = base;
    found->second.index = numbered->layer;
  }
  place(named, *leaf, expert >= 0 ? &found->second.experts[expert] : &found->second.stacks);
  return true;
}

Named find(const TensorMap& tensors, const std::string& name) {
  const auto found = tensors.find(name);
  return found == tensors.end() ? nullptr : &*found;
}

void take_beside(const TensorMap& tensors, bool gate_bias_selects, LayerTensors* layer) {
  for (const BesideName& known : kBesideNames) {
    Named& slot = layer->*known.place;
    if (slot == nullptr) slot = find(tensors, layer->base + "." + std::string(known.name));
  }
  if (gate_bias_selects && layer->selection_bias == nullptr) std::swap(layer->selection_bias, layer->router_bias);
}

// Of a name after its base: whether it is one of the experts', of a shared expert's or one beside them.
bool is_known(std::string_view name) {
  for (const BesideName& known : kBesideNames) {
    if (name == known.name) return true;
  }
  for (const std::string_view shared : kSharedNames) {
    if (name.starts_with(shared.substr(1))) return parse_leaf(name.substr(shared.size() - 1)).has_value();
  }
  if (!name.starts_with(kExperts.substr(1))) return false;
  name.remove_prefix(kExperts.size() - 1);
  const std::size_t end = name.find('.');
  if (end != std::string_view::npos && parse_number(name.substr(0, end))) name.remove_prefix(end + 1);
  return parse_leaf(name).has_value();
}

bool names_routing(std::string_view name) {
  static constexpr std::array<std::string_view, 4> kWords = {"expert", "router", "moe", "score"};
  return std::any_of(kWords.begin(), kWords.end(), [&](std::string_view word) { return name.find(word) != name.npos; });
}

void take_shared(const TensorMap& tensors, LayerTensors* layer) {
  for (const std::string_view shared : kSharedNames) {
    const std::string prefix = layer->base + std::string(shared);
    for (auto at = tensors.lower_bound(prefix); at != tensors.end() && at->first.starts_with(prefix); ++at) {
      if (const auto leaf = parse_leaf(std::string_view(at->first).substr(prefix.size()))) {
        place(&*at, *leaf, &layer->shared);
      }
    }
  }
}

// Layers whose names begin otherwise than most (MTP heads) come after the ordinary ones.
void number_extra_layers(std::vector<LayerTensors>* found, i32 layers) {
  std::map<std::string_view, i32> runs;
  for (const LayerTensors& layer : *found) ++runs[find_layer_number(layer.base)->before];
  const auto longest =
      std::max_element(runs.begin(), runs.end(), [](const auto& a, const auto& b) { return a.second < b.second; });
  const std::string main(longest->first);
  i32 next = layers;
  for (LayerTensors& layer : *found) {
    layer.extra = find_layer_number(layer.base)->before != main;
    if (!layer.extra) next = std::max(next, layer.index + 1);
  }
  std::stable_sort(found->begin(), found->end(), [](const LayerTensors& a, const LayerTensors& b) {
    return std::pair(a.extra, a.index) < std::pair(b.extra, b.index);
  });
  for (LayerTensors& layer : *found) {
    if (layer.extra) layer.index = next++;
  }
}

void check_one_base_a_layer(const std::vector<LayerTensors>& found) {
  for (std::size_t i = 1; i < found.size(); ++i) {
    if (found[i - 1].index != found[i].index) continue;
    throw Error(Reason::family_unknown, fmt::format("layer {} has two sets of experts, {} and {}", found[i].index,
                                                    quote(found[i - 1].base), quote(found[i].base)));
  }
}

}  // namespace

std::vector<LayerTensors> find_layers(const TensorMap& tensors, bool gate_bias_selects, i32 layers) {
  std::map<std::string, LayerTensors, std::less<>> by_base;
  for (const auto& entry : tensors) take_expert_tensor(&entry, &by_base);
  std::vector<LayerTensors> found;
  for (auto& [base, layer] : by_base) {
    take_beside(tensors, gate_bias_selects, &layer);
    take_shared(tensors, &layer);
    found.push_back(std::move(layer));
  }
  if (found.empty()) return found;
  number_extra_layers(&found, layers);
  check_one_base_a_layer(found);
  return found;
}

Named find_unknown(const TensorMap& tensors, const LayerTensors& layer) {
  const std::string base = layer.base + ".";
  const std::string whole = base.substr(0, base.find('.', find_layer_number(layer.base)->before.size()) + 1);
  for (auto at = tensors.lower_bound(whole); at != tensors.end() && at->first.starts_with(whole); ++at) {
    const std::string_view name = at->first;
    const bool inside = base.size() > whole.size() && name.starts_with(base);
    if (!inside && !names_routing(name.substr(whole.size()))) continue;
    if (!name.starts_with(base) || !is_known(name.substr(base.size()))) return &*at;
  }
  return nullptr;
}

std::string sibling_name(std::string_view weight, std::string_view attribute) {
  std::string_view stem = weight;
  std::string_view separator = "_";
  for (const std::string_view ending : {".weight_packed", ".weight", "_weight", "_blocks"}) {
    if (!weight.ends_with(ending)) continue;
    stem = weight.substr(0, weight.size() - ending.size());
    separator = ending.substr(0, 1);
    break;
  }
  const bool blocks = weight.ends_with("_blocks") && attribute == "weight_scale";
  return fmt::format("{}{}{}", stem, separator, blocks ? "scales" : attribute);
}

std::string missing_weight_name(const LayerTensors& layer, i32 expert, Projection which) {
  // Of the two vocabularies, the one in which some other weight of the layer is spelled.
  static constexpr std::array<std::string_view, kProjections> kWords = {"gate_proj", "up_proj", "down_proj",
                                                                        "gate_up_proj"};
  static constexpr std::array<std::string_view, kProjections> kLetters = {"w1", "w3", "w2", "w13"};
  const ProjectionParts& known = layer.stacked() ? layer.stacks : layer.experts.begin()->second;
  std::string_view sample;
  for (const Parts& parts : known) {
    for (const Named named : {parts.weight, parts.scale, parts.global, parts.input, parts.bias, parts.foreign}) {
      if (sample.empty() && named != nullptr) sample = std::string_view(named->first).substr(layer.base.size());
    }
  }
  const bool letters = sample.find("_proj") == std::string_view::npos;
  const auto& words = letters ? kLetters : kWords;
  const std::string_view word = words[static_cast<std::size_t>(which)];
  if (layer.stacked()) return fmt::format("{}.experts.{}{}", layer.base, word, letters ? "_weight" : "");
  const std::string_view ending = sample.find("global_scale") != std::string_view::npos ? "_packed" : "";
  return fmt::format("{}.experts.{}.{}.weight{}", layer.base, expert, word, ending);
}

}  // namespace fourmoe::checkpoint
