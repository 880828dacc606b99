#include "checkpoint/quantize_plan.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <limits>
#include <optional>
#include <set>

#include "status.h"

namespace fourmoe::checkpoint {
namespace {

using format::Encoding;

enum class Role { gate, up, down };

struct Spelling {
  std::string_view word;
  Role role;
};

// Mixtral and MiniMax write w1 for gate, w3 for up, w2 for down.
constexpr Spelling kProjections[] = {{"gate_proj", Role::gate}, {"up_proj", Role::up}, {"down_proj", Role::down},
                                     {"w1", Role::gate},        {"w3", Role::up},      {"w2", Role::down}};

// "<prefix>.experts.<expert>.<projection>.weight"
struct ExpertName {
  std::string experts;  // up to and with ".experts"
  i32 expert = 0;
  Role role = Role::gate;
};

constexpr std::string_view kExperts = "experts.";

// Position after the last "experts." that is a whole word, or npos.
std::size_t after_experts(std::string_view name) {
  std::size_t at = name.rfind(kExperts);
  while (at != std::string_view::npos && at > 0 && name[at - 1] != '.') {
    at = at == 0 ? std::string_view::npos : name.rfind(kExperts, at - 1);
  }
  return at == std::string_view::npos ? at : at + kExperts.size();
}

std::optional<ExpertName> parse_expert_name(std::string_view name) {
  const std::size_t begin = after_experts(name);
  if (begin == std::string_view::npos) return std::nullopt;
  ExpertName found;
  const char* end = name.data() + name.size();
  const auto [rest, error] = std::from_chars(name.data() + begin, end, found.expert);
  if (error == std::errc::result_out_of_range) {
    throw Error(Reason::experts_unsupported, fmt::format("tensor {} numbers no expert from 0 to 1023", quote(name)));
  }
  if (error != std::errc() || rest == end || *rest != '.' || found.expert < 0) return std::nullopt;
  const std::string_view tail(rest + 1, static_cast<std::size_t>(end - rest - 1));
  for (const Spelling& spelling : kProjections) {
    if (tail != fmt::format("{}.weight", spelling.word)) continue;
    found.experts = name.substr(0, begin - 1);
    found.role = spelling.role;
    return found;
  }
  return std::nullopt;
}

// "<prefix>.experts.gate_up_proj" and its like: one stack for all experts.
std::optional<std::pair<std::string, std::string>> parse_stack_name(std::string_view name) {
  const std::size_t begin = after_experts(name);
  if (begin == std::string_view::npos) return std::nullopt;
  const std::string_view tail = name.substr(begin);
  if (tail != "gate_up_proj" && tail != "up_proj" && tail != "down_proj") return std::nullopt;
  return std::pair(std::string(name.substr(0, begin - 1)), std::string(tail));
}

Encoding encoding_of(const std::string& name, const StoredTensor& tensor) {
  if (tensor.dtype == "BF16") return Encoding::bf16;
  if (tensor.dtype == "F16") return Encoding::f16;
  if (tensor.dtype == "F32") return Encoding::f32;
  throw Error(Reason::dtype_unsupported,
              fmt::format("tensor {} is {}; quantize reads BF16, F16 and F32", quote(name), tensor.dtype));
}

format::Matrix matrix_of(const std::string& name, const StoredTensor& tensor, i64 rows, i64 cols, i64 first_row) {
  constexpr i64 kMost = std::numeric_limits<i32>::max();
  if (rows < 1 || cols < 1 || rows > kMost || cols > kMost) {
    throw Error(Reason::shape_unsupported,
                fmt::format("tensor {} is {}, expected a matrix", quote(name), shape_text(tensor.shape)));
  }
  if (cols % format::kNvfp4Block != 0) {
    throw Error(Reason::shape_unsupported, fmt::format("tensor {} has {} columns, not a multiple of 16; {} would pass",
                                                       quote(name), cols, (cols + 15) / 16 * 16));
  }
  format::Matrix matrix;
  matrix.encoding = encoding_of(name, tensor);
  matrix.rows = static_cast<i32>(rows);
  matrix.cols = static_cast<i32>(cols);
  matrix.data_stride = format::row_bytes(matrix.encoding, cols);
  matrix.data = tensor.file == nullptr ? nullptr : tensor.data() + first_row * matrix.data_stride;
  return matrix;
}

constexpr std::string_view kFullRecipe[] = {"qwen3_moe", "qwen2_moe", "mixtral", "deepseek_v3", "glm4_moe"};

// Layers outside the routed experts: modules that end in <block>.<word>. Layers of a module with the same letter read
// the same tensor, and modelopt gives them one global scale, that of the largest among them.
struct Linear {
  std::string_view word;
  char input;
};

constexpr Linear kAttention[] = {
    {"q_proj", 'x'},   {"k_proj", 'x'},    {"v_proj", 'x'}, {"q_a_proj", 'x'}, {"kv_a_proj_with_mqa", 'x'},
    {"q_b_proj", 'q'}, {"kv_b_proj", 'k'}, {"o_proj", 'o'}};
constexpr Linear kMlp[] = {{"gate_proj", 'x'}, {"up_proj", 'x'}, {"down_proj", 'y'}};

// What `module` shares its global with, as a key; empty for what is no such layer.
std::string input_of(std::string_view module) {
  const std::size_t dot = module.rfind('.');
  if (dot == std::string_view::npos) return "";
  const std::string_view block = module.substr(0, dot);
  const bool attention = block.ends_with(".self_attn");
  const bool mlp = block.ends_with(".mlp") || block.ends_with(".shared_expert") || block.ends_with(".shared_experts");
  if (!attention && !mlp) return "";
  for (const Linear& linear : attention ? std::span<const Linear>(kAttention) : std::span<const Linear>(kMlp)) {
    if (module.substr(dot + 1) == linear.word) return fmt::format("{} {}", block, linear.input);
  }
  return "";
}

// Where a target is: shard and position in it.
using Place = std::pair<std::size_t, std::size_t>;

class Planner {
 public:
  Planner(const std::vector<Shard>& shards, bool linears) : shards_(shards), linears_(linears) {}

  QuantizePlan make() {
    for (std::size_t s = 0; s < shards_.size(); ++s) {
      plan_.shards.push_back({shards_[s].file, shards_[s].metadata, {}, {}});
      for (const auto& [name, tensor] : shards_[s].tensors) take(s, name, tensor);
    }
    for (const auto& [experts, stack] : stacks_) split(experts, stack);
    share_globals();
    plan_.layers = static_cast<i64>(experts_.size());
    if (experts_.empty()) {
      throw Error(Reason::family_unknown,
                  "no tensors are called ...experts.N.gate_proj.weight (up_proj, down_proj; w1, w3, w2) or "
                  "...experts.gate_up_proj: there is nothing to quantise");
    }
    return std::move(plan_);
  }

 private:
  struct Stack {
    std::map<std::string, Place> parts;  // "gate_up_proj", ... -> shard and position in `kept`
  };
  using Expert = std::map<Role, Place>;

  void take(std::size_t shard, const std::string& name, const StoredTensor& tensor) {
    ShardPlan& plan = plan_.shards[shard];
    if (const auto parsed = parse_expert_name(name)) {
      if (tensor.shape.size() != 2) {
        throw Error(Reason::tensor_mismatch,
                    fmt::format("tensor {} is {}, expected [out, in]", quote(name), shape_text(tensor.shape)));
      }
      const format::Matrix dense = matrix_of(name, tensor, tensor.shape[0], tensor.shape[1], 0);
      add(shard, *parsed, name.substr(0, name.size() - std::string_view(".weight").size()), name, dense);
      return;
    }
    if (linears_ && take_linear(shard, name, tensor)) return;
    if (const auto parsed = parse_stack_name(name)) {
      stacks_[parsed->first].parts[parsed->second] = {shard, plan.kept.size()};
    }
    plan.kept.emplace_back(name, tensor);
  }

  bool take_linear(std::size_t shard, const std::string& name, const StoredTensor& tensor) {
    constexpr std::string_view kEnding = ".weight";
    if (!name.ends_with(kEnding) || tensor.shape.size() != 2) return false;
    const std::string module = name.substr(0, name.size() - kEnding.size());
    const std::string input = input_of(module);
    if (input.empty()) return false;
    std::vector<QuantizeTarget>& targets = plan_.shards[shard].targets;
    inputs_[input].emplace_back(shard, targets.size());
    targets.push_back({module, name, matrix_of(name, tensor, tensor.shape[0], tensor.shape[1], 0), 0});
    return true;
  }

  void add(std::size_t shard, const ExpertName& name, std::string module, const std::string& source,
           const format::Matrix& dense) {
    std::vector<QuantizeTarget>& targets = plan_.shards[shard].targets;
    const bool fresh = experts_[name.experts][name.expert].emplace(name.role, Place(shard, targets.size())).second;
    if (!fresh) {
      throw Error(Reason::tensor_mismatch, fmt::format("expert {} of {} has the projection of tensor {} twice",
                                                       name.expert, quote(name.experts), quote(source)));
    }
    targets.push_back({std::move(module), source, dense, 0});
  }

  const std::pair<std::string, StoredTensor>& part(const Place& place) const {
    return plan_.shards[place.first].kept[place.second];
  }

  // Slices of the stacks of one layer, an expert at a time. The stacks leave the list of kept tensors.
  void split(const std::string& experts, const Stack& stack) {
    const bool gated = stack.parts.contains("gate_up_proj");
    const char* first_word = gated ? "gate_up_proj" : "up_proj";
    for (const char* word : {first_word, "down_proj"}) {
      if (!stack.parts.contains(word)) {
        throw Error(Reason::tensor_missing,
                    fmt::format("{} has stacks of experts but no {}.{}", quote(experts), experts, word));
      }
    }
    const Place first = stack.parts.at(first_word);
    const Place down = stack.parts.at("down_proj");
    check_stacks(part(first), part(down), gated ? 2 : 1);
    const i64 count = part(first).second.shape[0];
    const i64 inter = part(down).second.shape[2];
    for (i64 e = 0; e < count; ++e) {
      if (gated) slice(experts, e, Role::gate, "gate_proj", first, 0, inter);
      slice(experts, e, Role::up, "up_proj", first, gated ? inter : 0, inter);
      slice(experts, e, Role::down, "down_proj", down, 0, part(down).second.shape[1]);
    }
    dropped_.insert(first);
    dropped_.insert(down);
  }

  void slice(const std::string& experts, i64 expert, Role role, const char* word, const Place& from, i64 first_row,
             i64 rows) {
    const auto& [name, tensor] = part(from);
    const format::Matrix dense = matrix_of(name, tensor, rows, tensor.shape[2], expert * tensor.shape[1] + first_row);
    add(from.first, {experts, static_cast<i32>(expert), role}, fmt::format("{}.{}.{}", experts, expert, word), name,
        dense);
  }

  static void check_stacks(const std::pair<std::string, StoredTensor>& first,
                           const std::pair<std::string, StoredTensor>& down, i64 halves) {
    const auto& a = first.second.shape;
    const auto& b = down.second.shape;
    const bool stacks = a.size() == 3 && b.size() == 3 && a[0] == b[0] && a[0] >= 1 && a[0] <= (1 << 20);
    if (stacks && a[1] == halves * b[2] && a[2] == b[1]) return;
    if (stacks && a[2] == halves * b[1] && a[1] == b[2]) {
      throw Error(Reason::tensor_mismatch,
                  fmt::format("tensor {} is {} with inputs before outputs (Llama-4, gpt-oss); quantize reads stacks "
                              "with outputs before inputs",
                              quote(first.first), shape_text(a)));
    }
    throw Error(
        Reason::tensor_mismatch,
        fmt::format("tensors {} {} and {} {} do not fit together; expected [experts, {}inter, hidden] and "
                    "[experts, hidden, inter]",
                    quote(first.first), shape_text(a), quote(down.first), shape_text(b), halves == 2 ? "2 * " : ""));
  }

  QuantizeTarget& target(const Place& place) { return plan_.shards[place.first].targets[place.second]; }

  void share(const std::vector<Place>& places) {
    for (const Place& place : places) target(place).global = plan_.globals.size();
    plan_.globals.push_back(places);
  }

  // Engines fuse gate and up into one matrix with one global, so modelopt gives both the larger of the two.
  void share_globals() {
    for (const auto& [prefix, experts] : experts_) {
      i32 next = 0;
      plan_.experts[prefix] = static_cast<i32>(experts.size());
      for (const auto& [index, expert] : experts) {
        if (index != next++) {
          throw Error(Reason::tensor_missing,
                      fmt::format("{} has expert {} but no expert {}", quote(prefix), index, next - 1));
        }
        check_expert(prefix, index, expert);
        if (expert.contains(Role::gate) != experts.begin()->second.contains(Role::gate)) {
          const bool lacks = experts.begin()->second.contains(Role::gate);
          throw Error(Reason::tensor_missing, fmt::format("expert {} of {} has no gate projection, expert {} has one",
                                                          lacks ? index : 0, quote(prefix), lacks ? 0 : index));
        }
        if (expert.contains(Role::gate)) share({expert.at(Role::gate), expert.at(Role::up)});
        else share({expert.at(Role::up)});
        share({expert.at(Role::down)});
      }
    }
    for (const auto& [input, places] : inputs_) share(places);
    for (std::size_t s = 0; s < plan_.shards.size(); ++s) drop(s);
  }

  void check_expert(const std::string& prefix, i32 index, const Expert& expert) {
    for (const auto& [role, word] : {std::pair(Role::up, "up"), std::pair(Role::down, "down")}) {
      if (expert.contains(role)) continue;
      throw Error(Reason::tensor_missing,
                  fmt::format("expert {} of {} has no {} projection", index, quote(prefix), word));
    }
    const format::Matrix& up = target(expert.at(Role::up)).dense;
    const format::Matrix& down = target(expert.at(Role::down)).dense;
    const format::Matrix& gate = expert.contains(Role::gate) ? target(expert.at(Role::gate)).dense : up;
    if (gate.rows == up.rows && gate.cols == up.cols && down.rows == up.cols && down.cols == up.rows) return;
    throw Error(Reason::tensor_mismatch,
                fmt::format("expert {} of {} has gate [{}, {}], up [{}, {}] and down [{}, {}], which do not fit "
                            "together",
                            index, quote(prefix), gate.rows, gate.cols, up.rows, up.cols, down.rows, down.cols));
  }

  void drop(std::size_t shard) {
    auto& kept = plan_.shards[shard].kept;
    std::vector<std::pair<std::string, StoredTensor>> rest;
    for (std::size_t i = 0; i < kept.size(); ++i) {
      if (!dropped_.contains({shard, i})) rest.push_back(std::move(kept[i]));
    }
    kept = std::move(rest);
  }

  const std::vector<Shard>& shards_;
  bool linears_;
  QuantizePlan plan_;
  std::map<std::string, std::map<i32, Expert>> experts_;
  std::map<std::string, Stack> stacks_;
  std::map<std::string, std::vector<Place>> inputs_;  // layers outside the experts, by what they read
  std::set<Place> dropped_;
};

// Whether a name in the sorted list starts with `prefix`.
bool any_starts_with(const std::vector<std::string>& sorted, std::string_view prefix) {
  const auto at = std::lower_bound(sorted.begin(), sorted.end(), prefix);
  return at != sorted.end() && at->starts_with(prefix);
}

}  // namespace

std::span<const std::string_view> full_recipe_families() { return kFullRecipe; }

QuantizePlan plan_quantisation(const std::vector<Shard>& shards, bool linears) {
  return Planner(shards, linears).make();
}

std::vector<std::string> summarise_excluded(const std::vector<std::string>& kept,
                                            const std::vector<std::string>& quantised) {
  std::vector<std::string> sorted = quantised;
  std::sort(sorted.begin(), sorted.end());
  std::set<std::string> summary;
  for (const std::string& name : kept) {
    std::string pattern = name;
    for (std::size_t dot = name.find('.'); dot != std::string::npos; dot = name.find('.', dot + 1)) {
      const std::string prefix = name.substr(0, dot);
      if (!any_starts_with(sorted, prefix)) {
        pattern = prefix + "*";
        break;
      }
      // `prefix*` would cover quantised modules (layer 1 beside layer 10); `prefix.*` alone may not.
      if (!any_starts_with(sorted, prefix + ".") && !std::binary_search(sorted.begin(), sorted.end(), prefix)) {
        pattern = prefix + ".*";
        break;
      }
    }
    summary.insert(pattern);
  }
  return {summary.begin(), summary.end()};
}

std::vector<std::string> excluded_modules(const QuantizePlan& plan) {
  std::vector<std::string> kept = {"lm_head"};
  std::vector<std::string> quantised;
  for (const ShardPlan& shard : plan.shards) {
    for (const auto& [name, tensor] : shard.kept) {
      if (tensor.shape.size() == 2 && name.ends_with(".weight")) kept.push_back(name.substr(0, name.size() - 7));
    }
    for (const QuantizeTarget& target : shard.targets) quantised.push_back(target.module);
  }
  return summarise_excluded(kept, quantised);
}

}  // namespace fourmoe::checkpoint
