// fourmoe inspect: what a checkpoint holds.
#include <fmt/format.h>

#include <memory>

#include "checkpoint/checkpoint.h"
#include "command.h"
#include "describe.h"
#include "quantity.h"
#include "table.h"

namespace fourmoe::tools {
namespace {

using checkpoint::Info;
using checkpoint::LayerInfo;

struct Options {
  std::string path;
  bool json = false;
};

std::string shared_words(const LayerInfo& layer) {
  if (!layer.shared) return "-";
  return fmt::format("{} {}{}", layer.shared->inter, format::encoding_name(layer.shared->encoding),
                     layer.shared->gated ? " gated" : "");
}

std::string oddity_words(const LayerInfo& layer) {
  std::string words;
  const auto add = [&](const std::string& text) { words += (words.empty() ? "" : "; ") + text; };
  const checkpoint::Oddities& odd = layer.oddities;
  if (odd.gate_up_differ > 0) {
    add(fmt::format("gate and up globals differ in {} experts (up to {:.3g}x)", odd.gate_up_differ, odd.largest_ratio));
  }
  if (odd.globals_invalid > 0)
    add(fmt::format("{} global scales not finite and positive: it cannot run", odd.globals_invalid));
  if (odd.inputs_missing > 0) add(fmt::format("{} input scales missing", odd.inputs_missing));
  if (odd.inputs_zero > 0) add(fmt::format("{} input scales zero", odd.inputs_zero));
  if (!layer.router) add("no router");
  return words;
}

// "0-3,5": layers that look alike are one row.
std::string range_words(const std::vector<i32>& layers) {
  std::string words;
  for (std::size_t i = 0; i < layers.size();) {
    std::size_t last = i;
    while (last + 1 < layers.size() && layers[last + 1] == layers[last] + 1) ++last;
    words +=
        fmt::format("{}{}{}", words.empty() ? "" : ",", layers[i], last > i ? fmt::format("-{}", layers[last]) : "");
    i = last + 1;
  }
  return words;
}

std::vector<std::string> cells(const LayerInfo& layer) {
  const Problem& p = layer.problem;
  return {std::to_string(p.hidden),
          std::to_string(p.inter),
          std::to_string(p.experts),
          std::to_string(p.top_k),
          std::string(format::encoding_name(p.encoding)),
          layer.layout,
          activation_words(p.activation) + (layer.biases ? ", biases" : ""),
          routing_words(p.routing),
          shared_words(layer),
          bytes_text(layer.bytes)};
}

// Runs of layers for which `words` says the same.
template <class Words>
std::vector<std::pair<Words, std::string>> group(const Info& info, Words (*words)(const LayerInfo&)) {
  std::vector<std::pair<Words, std::vector<i32>>> groups;
  for (const LayerInfo& layer : info.layers) {
    Words said = words(layer);
    if (groups.empty() || groups.back().first != said) groups.push_back({std::move(said), {}});
    groups.back().second.push_back(layer.index);
  }
  std::vector<std::pair<Words, std::string>> named;
  for (auto& [said, layers] : groups) named.emplace_back(std::move(said), range_words(layers));
  return named;
}

Table tabulate(const Info& info) {
  Table table({"layers", ">hidden", ">inter", ">experts", ">top-k", "weights", "layout", "activation", "routing",
               "shared", ">bytes a layer"});
  for (auto& [row, layers] : group(info, cells)) {
    std::vector<std::string> line = row;
    line.insert(line.begin(), layers);
    table.add(line);
  }
  return table;
}

void print_text(const Info& info) {
  i64 expert_bytes = 0;
  for (const LayerInfo& layer : info.layers) expert_bytes += layer.bytes;
  Facts facts;
  facts.add("checkpoint", info.path);
  facts.add("family", info.family);
  facts.add("dialect", info.algorithm.empty() ? info.dialect : fmt::format("{}, {}", info.dialect, info.algorithm));
  if (!info.producer.empty()) facts.add("producer", info.producer);
  facts.add("size", fmt::format("{} in {} tensors of {} file{}", bytes_text(info.bytes), info.tensors, info.files,
                                info.files == 1 ? "" : "s"));
  facts.add("experts", fmt::format("{} in {} MoE layer{}", bytes_text(expert_bytes), info.layers.size(),
                                   info.layers.size() == 1 ? "" : "s"));
  fmt::print("{}", facts.text());
  if (!info.layers.empty()) fmt::print("\n{}", tabulate(info).text());
  Facts odd;
  for (const auto& [words, layers] : group(info, oddity_words)) {
    if (!words.empty()) odd.add(fmt::format("layers {}", layers), words);
  }
  if (!odd.text().empty()) fmt::print("\noddities\n{}", odd.text());
}

Json layer_json(const LayerInfo& layer) {
  Json json = {{"index", layer.index},
               {"prefix", layer.prefix},
               {"layout", layer.layout},
               {"problem", problem_json(layer.problem)},
               {"router", layer.router},
               {"biases", layer.biases},
               {"bytes", layer.bytes},
               {"oddities",
                {{"gate_up_differ", layer.oddities.gate_up_differ},
                 {"largest_ratio", layer.oddities.largest_ratio},
                 {"inputs_missing", layer.oddities.inputs_missing},
                 {"inputs_zero", layer.oddities.inputs_zero},
                 {"globals_invalid", layer.oddities.globals_invalid}}},
               {"shared", nullptr}};
  if (layer.shared) {
    json["shared"] = {{"inter", layer.shared->inter},
                      {"encoding", format::encoding_name(layer.shared->encoding)},
                      {"gated", layer.shared->gated}};
  }
  return json;
}

Json info_json(const Info& info) {
  Json layers = Json::array();
  for (const LayerInfo& layer : info.layers) layers.push_back(layer_json(layer));
  return {{"path", info.path},           {"family", info.family},     {"dialect", info.dialect},
          {"algorithm", info.algorithm}, {"producer", info.producer}, {"files", info.files},
          {"tensors", info.tensors},     {"bytes", info.bytes},       {"layers", layers}};
}

int run(const Options& options) {
  const Info info = checkpoint::Checkpoint::open(options.path).inspect();
  if (options.json) print_json(info_json(info));
  else print_text(info);
  return kSuccess;
}

}  // namespace

Command add_inspect(CLI::App& app) {
  auto options = std::make_shared<Options>();
  CLI::App* sub = app.add_subcommand("inspect", "say what a checkpoint holds; reads headers and scales only");
  sub->add_option("path", options->path, "checkpoint folder, .safetensors or .gguf file")
      ->required()
      ->type_name("PATH");
  sub->add_flag("--json", options->json, "print one JSON object");
  sub->footer("Examples:\n  fourmoe inspect examples/tiny-moe/nvfp4\n  fourmoe inspect model.gguf --json");
  return {sub, [options] { return run(*options); }};
}

}  // namespace fourmoe::tools
