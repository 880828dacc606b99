#include "checkpoint/quantize.h"

#include <fmt/format.h>

#include <algorithm>
#include <fstream>
#include <nlohmann/json.hpp>

#include "checkpoint/config.h"
#include "checkpoint/folder.h"
#include "checkpoint/json.h"
#include "checkpoint/quantize_output.h"
#include "checkpoint/quantize_plan.h"
#include "status.h"
#include "weights/quantise.h"

namespace fourmoe::checkpoint {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

constexpr i64 kPiece = i64{8} << 20;  // bytes copied between two reports of progress

struct Source {
  fs::path folder;
  std::string config;  // text of config.json
  std::string family;  // its model_type
  std::vector<Shard> shards;
  std::string index;  // file name; empty when one file needs none
};

void refuse_quantised(const nlohmann::json& parsed, const std::string& path) {
  for (const char* key : {"quantization_config", "compression_config"}) {
    if (!Object{&parsed, path}.has(key)) continue;  // null is none
    throw Error(
        Reason::dtype_unsupported,
        fmt::format("{} has a {}: the checkpoint is quantised already; quantize reads bf16, f16 and f32", path, key));
  }
}

Shard read_shard(const fs::path& path) {
  Shard shard;
  shard.file = path.filename().string();
  parse_safetensors(MappedFile::open(path), &shard.tensors, &shard.metadata);
  return shard;
}

void refuse_repeated(const std::vector<Shard>& shards) {
  std::map<std::string_view, std::string_view> files;
  for (const Shard& shard : shards) {
    for (const auto& [name, tensor] : shard.tensors) {
      const auto [first, fresh] = files.emplace(name, shard.file);
      if (fresh) continue;
      throw Error(Reason::file_malformed,
                  fmt::format("tensor {} is in {} and in {}", quote(name), first->second, shard.file));
    }
  }
}

Source read_source(const fs::path& folder) {
  if (!fs::is_directory(folder)) {
    throw Error(Reason::file_unreadable,
                fmt::format("{} is not a folder; quantize reads a folder with config.json and safetensors files",
                            folder.string()));
  }
  Source source;
  source.folder = folder;
  const std::string config = (folder / "config.json").string();
  source.config = read_text(config);
  const nlohmann::json parsed = parse_json(source.config, config);
  refuse_quantised(parsed, config);
  if (const Object object = {&parsed, config}; object.has("model_type")) source.family = object.string("model_type");
  const FolderFiles files = find_files(folder);
  TensorMap all;
  for (const fs::path& shard : files.shards) {
    source.shards.push_back(read_shard(shard));
    all.insert(source.shards.back().tensors.begin(), source.shards.back().tensors.end());
  }
  if (!files.index.empty()) {
    source.index = files.index.filename().string();
    check_promises(files.index, all);
  }
  refuse_repeated(source.shards);
  return source;
}

constexpr const char* kSpaces = " \t\r\n";

// Where the value of the outermost object's `key` begins, npos when it has no such key. `object` has been parsed.
std::size_t find_value(std::string_view object, std::string_view key) {
  i32 depth = 0;
  for (std::size_t at = 0; at < object.size(); ++at) {
    if (object[at] == '{' || object[at] == '[') ++depth;
    if (object[at] == '}' || object[at] == ']') --depth;
    if (object[at] != '"') continue;
    const std::size_t begin = at + 1;
    for (++at; object[at] != '"'; ++at) at += object[at] == '\\';
    const std::size_t colon = object.find_first_not_of(kSpaces, at + 1);
    if (depth != 1 || object[colon] != ':' || object.substr(begin, at - begin) != key) continue;
    return object.find_first_not_of(kSpaces, colon + 1);
  }
  return std::string_view::npos;
}

// The user's text stays as it is, to the byte: a key is added before its last brace, or takes the place of its null.
std::string with_key(const std::string& object, std::string_view key, const Json& value) {
  const std::size_t brace = object.rfind('}');
  const std::size_t last = object.find_last_not_of(kSpaces, brace - 1);
  std::string text = value.dump(2);
  for (std::size_t at = text.find('\n'); at != std::string::npos; at = text.find('\n', at + 3))
    text.insert(at + 1, "  ");
  if (const std::size_t null = find_value(object, key); null != std::string::npos) {
    return object.substr(0, null) + text + object.substr(object.find_first_of(",} \t\r\n", null));
  }
  return fmt::format("{}{}\n  \"{}\": {}\n{}", object.substr(0, last + 1), object[last] == '{' ? "" : ",", key, text,
                     object.substr(brace));
}

i64 codes_bytes(const format::Matrix& dense) { return i64{dense.rows} * dense.cols / 2; }
i64 scales_bytes(const format::Matrix& dense) { return i64{dense.rows} * dense.cols / format::kNvfp4Block; }
i64 dense_bytes(const format::Matrix& dense) { return dense.rows * format::row_bytes(dense.encoding, dense.cols); }

class Job {
 public:
  Job(const Source& source, QuantizePlan plan, const QuantizeOptions& options)
      : source_(source),
        plan_(std::move(plan)),
        options_(options),
        executor_(options.executor != nullptr ? *options.executor : tbb_executor()) {
    progress_.total = count_work();
  }

  QuantizeResult run(const fs::path& out) {
    const std::vector<fs::path> side_files = list_side_files(source_.folder, &result_.notes);
    check_space(out.parent_path(), side_files);
    Publication publication(out);
    result_.layers = plan_.layers;
    for (std::size_t s = 0; s < plan_.shards.size(); ++s) write_shard(s, publication.folder());
    write_index(publication.folder());
    write_configs(publication.folder());
    copy_side_files(side_files, publication.folder());
    check_output(source_.folder, out, options_.force);  // it may have gained a file in the meantime
    publication.publish(options_.force);
    return std::move(result_);
  }

 private:
  // A target is read twice: for its largest value, and to be quantised.
  i64 count_work() const {
    i64 bytes = 0;
    for (const ShardPlan& shard : plan_.shards) {
      for (const QuantizeTarget& target : shard.targets) bytes += 2 * dense_bytes(target.dense);
      for (const auto& [name, tensor] : shard.kept) bytes += tensor.bytes;
    }
    return bytes;
  }

  void check_space(const fs::path& folder, const std::vector<fs::path>& side_files) const {
    i64 needed = 0;
    for (const fs::path& name : side_files) needed += static_cast<i64>(fs::file_size(source_.folder / name));
    for (const ShardPlan& shard : plan_.shards) {
      for (const QuantizeTarget& t : shard.targets) needed += codes_bytes(t.dense) + scales_bytes(t.dense) + 4;
      for (const auto& [name, tensor] : shard.kept) needed += tensor.bytes;
    }
    std::error_code error;
    const fs::space_info space = fs::space(folder, error);
    if (error || space.available >= static_cast<std::uintmax_t>(needed)) return;
    throw Error(Reason::write_failed,
                fmt::format("{} has {} bytes free, the output needs {}", folder.string(), space.available, needed));
  }

  void advance(i64 bytes) {
    progress_.done += bytes;
    if (options_.progress) options_.progress(progress_);
  }

  // The global scale of a target's group, found when the first of its shards is written.
  f32 global(std::size_t index) {
    globals_.resize(plan_.globals.size(), 0.0f);
    if (globals_[index] != 0.0f) return globals_[index];
    f32 amax = 0.0f;
    for (const auto& [shard, at] : plan_.globals[index]) {
      const QuantizeTarget& target = plan_.shards[shard].targets[at];
      amax = std::max(amax, weights::find_amax(target.dense, target.source, executor_));
      advance(dense_bytes(target.dense));
    }
    if (amax == 0.0f) {
      const auto& [shard, at] = plan_.globals[index].front();
      result_.notes.push_back(fmt::format("{} is all zeros", plan_.shards[shard].targets[at].module));
    }
    return globals_[index] = weights::global_of(amax);
  }

  // Wider elements come first, so that every tensor is aligned: readers view the file's bytes in place.
  void write_shard(std::size_t index, const fs::path& folder) {
    ShardPlan& shard = plan_.shards[index];
    progress_.what = shard.file;
    std::stable_sort(shard.kept.begin(), shard.kept.end(), [](const auto& a, const auto& b) {
      return dtype_bits(a.second.dtype) > dtype_bits(b.second.dtype);
    });
    const auto narrow = std::find_if(shard.kept.begin(), shard.kept.end(),
                                     [](const auto& kept) { return dtype_bits(kept.second.dtype) < 32; });
    SafetensorsWriter writer(folder / shard.file, declare(shard, narrow - shard.kept.begin()), shard.metadata);
    for (auto kept = shard.kept.begin(); kept != narrow; ++kept) copy(*kept, &writer);
    for (const QuantizeTarget& target : shard.targets) {
      const f32 scale = global(target.global);
      writer.append(target.module + ".weight_scale_2", &scale, sizeof scale);
    }
    for (auto kept = narrow; kept != shard.kept.end(); ++kept) copy(*kept, &writer);
    for (const QuantizeTarget& target : shard.targets) quantise(target, &writer);
    writer.finish();
    result_.files += 1;
    result_.bytes_written += writer.data_bytes();
  }

  static std::vector<TensorToDeclare> declare(const ShardPlan& shard, std::ptrdiff_t wide) {
    std::vector<TensorToDeclare> declared;
    const auto declare_kept = [&](std::ptrdiff_t from, std::ptrdiff_t to) {
      for (std::ptrdiff_t i = from; i < to; ++i) {
        declared.push_back({shard.kept[i].first, shard.kept[i].second.dtype, shard.kept[i].second.shape});
      }
    };
    declare_kept(0, wide);
    for (const QuantizeTarget& target : shard.targets)
      declared.push_back({target.module + ".weight_scale_2", "F32", {}});
    declare_kept(wide, static_cast<std::ptrdiff_t>(shard.kept.size()));
    for (const QuantizeTarget& target : shard.targets) {
      const i64 rows = target.dense.rows;
      const i64 cols = target.dense.cols;
      declared.push_back({target.module + ".weight", "U8", {rows, cols / 2}});
      declared.push_back({target.module + ".weight_scale", "F8_E4M3", {rows, cols / format::kNvfp4Block}});
    }
    return declared;
  }

  void copy(const std::pair<std::string, StoredTensor>& kept, SafetensorsWriter* writer) {
    const auto& [name, tensor] = kept;
    for (i64 at = 0; at < tensor.bytes; at += kPiece) {
      const i64 bytes = std::min(kPiece, tensor.bytes - at);
      writer->append(name, tensor.data() + at, bytes);
      advance(bytes);
    }
    result_.tensors_kept += 1;
  }

  void quantise(const QuantizeTarget& target, SafetensorsWriter* writer) {
    codes_.resize(codes_bytes(target.dense));
    scales_.resize(scales_bytes(target.dense));
    weights::quantise(target.dense, global(target.global), executor_, codes_.data(), scales_.data());
    writer->append(target.module + ".weight", codes_.data(), static_cast<i64>(codes_.size()));
    writer->append(target.module + ".weight_scale", scales_.data(), static_cast<i64>(scales_.size()));
    result_.matrices += 1;
    result_.weights += i64{target.dense.rows} * target.dense.cols;
    result_.bytes_before += dense_bytes(target.dense);
    result_.bytes_after += static_cast<i64>(codes_.size() + scales_.size() + sizeof(f32));
    advance(dense_bytes(target.dense));
  }

  void write_index(const fs::path& folder) {
    if (source_.index.empty()) return;
    std::map<std::string, std::string> map;
    for (const ShardPlan& shard : plan_.shards) {
      for (const auto& [name, tensor] : shard.kept) map[name] = shard.file;
      for (const QuantizeTarget& target : shard.targets) {
        for (const char* part : {".weight", ".weight_scale", ".weight_scale_2"}) map[target.module + part] = shard.file;
      }
    }
    const Json index = {{"metadata", {{"total_size", result_.bytes_written}}}, {"weight_map", map}};
    write_text(folder / source_.index, index.dump(2) + "\n");
    result_.files += 1;
  }

  // Both places where readers look: modelopt's own file and, in its later form, config.json.
  void write_configs(const fs::path& folder) {
    constexpr const char* kAlgorithm = "W4A16_NVFP4";  // weights only: nothing was calibrated
    const Json producer = {{"name", "fourmoe"}, {"version", options_.producer_version}};
    const std::vector<std::string> excluded = excluded_modules(plan_);
    const Json own = {{"producer", producer},
                      {"quantization",
                       {{"quant_algo", kAlgorithm},
                        {"kv_cache_quant_algo", nullptr},
                        {"group_size", format::kNvfp4Block},
                        {"exclude_modules", excluded}}}};
    const Json weights = {{"dynamic", false}, {"num_bits", 4}, {"type", "float"}, {"group_size", format::kNvfp4Block}};
    const Json targets = Json::array({"Linear"});
    const Json entry = {{"config_groups", {{"group_0", {{"weights", weights}, {"targets", targets}}}}},
                        {"ignore", excluded},
                        {"quant_algo", kAlgorithm},
                        {"producer", producer},
                        {"quant_method", "modelopt"}};
    write_text(folder / "hf_quant_config.json", own.dump(4) + "\n");
    write_text(folder / "config.json", with_key(source_.config, "quantization_config", entry));
    result_.files += 2;
  }

  void copy_side_files(const std::vector<fs::path>& names, const fs::path& folder) {
    for (const fs::path& name : names) {
      std::error_code error;
      fs::create_directories((folder / name).parent_path(), error);
      fs::copy_file(source_.folder / name, folder / name, error);
      if (error) {
        throw Error(Reason::write_failed, fmt::format("{} cannot be copied: {}", name.string(), error.message()));
      }
      result_.files += 1;
    }
  }

  const Source& source_;
  QuantizePlan plan_;
  const QuantizeOptions& options_;
  Executor& executor_;
  QuantizeProgress progress_;
  QuantizeResult result_;
  std::vector<f32> globals_;  // 0 while unknown
  std::vector<u8> codes_;     // of the matrix at work
  std::vector<u8> scales_;
};

void check_full_recipe(const std::string& family) {
  std::string known;
  for (const std::string_view name : full_recipe_families()) {
    if (name == family) return;
    known += fmt::format("{}{}", known.empty() ? "" : ", ", name);
  }
  throw Error(Reason::family_unknown,
              fmt::format("layers outside the routed experts are quantised for {}, and not for model_type {}; "
                          "--experts-only would pass",
                          known, quote(family)));
}

// What the configuration says of the experts, where it is of a family and form that layers are read of.
void check_experts(const Source& source, const QuantizePlan& plan) {
  Config config;
  try {
    config = parse_config(source.config, "config.json");
  } catch (const Error&) {
    return;
  }
  for (const auto& [prefix, count] : plan.experts) {
    if (count == config.experts) continue;
    throw Error(Reason::tensor_missing, fmt::format("{} has {} experts, {} of config.json says {}", quote(prefix),
                                                    count, config.experts_key, config.experts));
  }
}

}  // namespace

QuantizeResult quantize(const fs::path& in, const fs::path& out, const QuantizeOptions& options) {
  try {
    const Source source = read_source(settle(in));
    const fs::path target = settle(out);
    check_output(source.folder, target, options.force);
    if (!options.experts_only) check_full_recipe(source.family);
    QuantizePlan plan = plan_quantisation(source.shards, !options.experts_only);
    check_experts(source, plan);
    return Job(source, std::move(plan), options).run(target);
  } catch (const fs::filesystem_error& error) {
    const fs::path at = error.path1().empty() ? in : error.path1();  // the input's iterator names none
    const fs::path output = fs::absolute(out);
    const bool writes = at == output.parent_path() || at.string().starts_with(output.string());
    throw Error(writes ? Reason::write_failed : Reason::file_unreadable,
                fmt::format("{}: {}", at.string(), error.code().message()));
  }
}

}  // namespace fourmoe::checkpoint
