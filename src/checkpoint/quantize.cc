#include "checkpoint/quantize.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <nlohmann/json.hpp>
#include <set>

#include "checkpoint/folder.h"
#include "checkpoint/json.h"
#include "checkpoint/quantize_plan.h"
#include "status.h"
#include "weights/quantise.h"

namespace fourmoe::checkpoint {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

constexpr i64 kPiece = i64{8} << 20;            // bytes copied between two reports of progress
constexpr i64 kLargestSideFile = i64{1} << 30;  // tokenizers have tens of MB; what is larger holds weights
constexpr std::string_view kIndexEnding = ".safetensors.index.json";

void write_text(const fs::path& path, const std::string& text) {
  std::ofstream out(path, std::ios::binary);
  out << text;
  out.close();
  if (!out) throw Error(Reason::write_failed, fmt::format("{} cannot be written", path.string()));
}

struct Source {
  fs::path folder;
  std::string config;  // text of config.json
  std::string family;  // its model_type
  std::vector<Shard> shards;
  std::string index;  // file name; empty when one file needs none
};

std::string read_text(const fs::path& path) {
  const auto file = MappedFile::open(path);
  std::string text(static_cast<std::size_t>(file->size()), '\0');
  file->read(0, file->size(), text.data());
  return text;
}

void refuse_quantised(const nlohmann::json& parsed, const std::string& path) {
  for (const char* key : {"quantization_config", "compression_config"}) {
    if (!parsed.contains(key)) continue;
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

// The user's text stays as it is, to the byte: a key is added before its last brace.
std::string with_key(const std::string& object, std::string_view key, const Json& value) {
  const std::size_t brace = object.rfind('}');
  const std::size_t last = object.find_last_not_of(" \t\r\n", brace - 1);
  std::string text = value.dump(2);
  for (std::size_t at = text.find('\n'); at != std::string::npos; at = text.find('\n', at + 3))
    text.insert(at + 1, "  ");
  return fmt::format("{}{}\n  \"{}\": {}\n{}", object.substr(0, last + 1), object[last] == '{' ? "" : ",", key, text,
                     object.substr(brace));
}

i64 codes_bytes(const format::Matrix& dense) { return i64{dense.rows} * dense.cols / 2; }
i64 scales_bytes(const format::Matrix& dense) { return i64{dense.rows} * dense.cols / format::kNvfp4Block; }
i64 dense_bytes(const format::Matrix& dense) { return dense.rows * format::row_bytes(dense.encoding, dense.cols); }

// The output, hidden until it is whole.
class Publication {
 public:
  explicit Publication(const fs::path& out) : out_(out) {
    const std::string name = out_.filename().string();
    folder_ = out_.parent_path() / fmt::format(".{}.{}.partial", name, ::getpid());
    replaced_ = out_.parent_path() / fmt::format(".{}.{}.replaced", name, ::getpid());
    std::error_code error;
    if (!fs::create_directory(folder_, error) || error) {
      throw Error(Reason::write_failed, fmt::format("{} cannot be created: {}", folder_.string(),
                                                    error ? error.message() : "it is there already"));
    }
  }
  ~Publication() {
    std::error_code ignored;
    if (!published_) fs::remove_all(folder_, ignored);
  }
  Publication(const Publication&) = delete;
  Publication& operator=(const Publication&) = delete;

  const fs::path& folder() const { return folder_; }

  // The old output steps aside first and comes back when the new one cannot take its place.
  void publish(const QuantizeOptions& options) {
    std::error_code error;
    const bool replace = fs::exists(out_);
    if (replace && !options.force) throw Error(Reason::file_exists, fmt::format("{} has appeared", out_.string()));
    if (replace) fs::rename(out_, replaced_, error);
    if (!error) fs::rename(folder_, out_, error);
    if (error) {
      std::error_code ignored;
      if (replace && !fs::exists(out_)) fs::rename(replaced_, out_, ignored);
      throw Error(Reason::write_failed, fmt::format("{} cannot be renamed: {}", out_.string(), error.message()));
    }
    published_ = true;
    if (replace) fs::remove_all(replaced_, error);
  }

 private:
  fs::path out_;
  fs::path folder_;
  fs::path replaced_;
  bool published_ = false;
};

bool holds_weights(const fs::path& file) {
  const std::string extension = file.extension().string();
  static const std::set<std::string> kWeights = {".safetensors", ".bin",     ".pt",   ".pth",    ".gguf",
                                                 ".h5",          ".msgpack", ".onnx", ".partial"};
  return kWeights.contains(extension) || file.filename().string().ends_with(".index.json");
}

// Written by quantize itself.
bool is_own(const fs::path& file) { return file == "config.json" || file == "hf_quant_config.json"; }

// Files beside the weights that go along, relative to the folder.
std::vector<fs::path> list_side_files(const fs::path& folder, std::vector<std::string>* notes) {
  std::vector<fs::path> files;
  for (auto entry = fs::recursive_directory_iterator(folder); entry != fs::recursive_directory_iterator(); ++entry) {
    const fs::path name = entry->path().lexically_relative(folder);  // links stay where they lie
    if (entry->path().filename().string().starts_with(".")) {
      entry.disable_recursion_pending();
      continue;
    }
    if (!entry->is_regular_file() || is_own(name)) continue;
    if (holds_weights(name) || entry->file_size() > static_cast<std::uintmax_t>(kLargestSideFile)) {
      if (entry->path().extension() != ".safetensors" && !name.string().ends_with(".index.json")) {
        notes->push_back(fmt::format("{} was not copied: it holds weights of another form", name.string()));
      }
      continue;
    }
    files.push_back(name);
  }
  std::sort(files.begin(), files.end());
  return files;
}

// Whether quantize wrote the folder: its hf_quant_config.json names it as the producer.
bool is_earlier_output(const fs::path& out) {
  const fs::path config = out / "hf_quant_config.json";
  if (!fs::is_regular_file(config)) return false;
  const nlohmann::json parsed = nlohmann::json::parse(read_text(config), nullptr, false);
  const nlohmann::json::json_pointer producer("/producer/name");
  return !parsed.is_discarded() && parsed.contains(producer) && parsed.at(producer) == "fourmoe";
}

bool is_output_file(const fs::path& name, const fs::path& in) {
  const bool top = !name.has_parent_path();
  const bool shard = name.extension() == ".safetensors" || name.filename().string().ends_with(kIndexEnding);
  return is_own(name) || (top && shard) || fs::exists(in / name);
}

// An existing output may be replaced when it is empty, or an earlier output that has gained no file since.
void check_replaceable(const fs::path& out, const fs::path& in) {
  if (fs::is_empty(out)) return;
  if (!is_earlier_output(out)) {
    throw Error(Reason::file_exists, fmt::format("{} was not written by quantize; it would be lost", out.string()));
  }
  for (const auto& entry : fs::recursive_directory_iterator(out)) {
    const fs::path name = entry.path().lexically_relative(out);
    if (entry.is_directory() || is_output_file(name, in)) continue;
    throw Error(Reason::file_exists, fmt::format("{} holds {}, which is no part of a checkpoint; it would be lost",
                                                 out.string(), quote(name.string())));
  }
}

bool is_inside(const fs::path& inner, const fs::path& outer) {
  return std::mismatch(outer.begin(), outer.end(), inner.begin(), inner.end()).first == outer.end();
}

void check_output(const fs::path& in, const fs::path& out, bool force) {
  if (is_inside(in, out) || is_inside(out, in)) {
    throw Error(Reason::argument_invalid,
                fmt::format("output {} and input {} must be apart", out.string(), in.string()));
  }
  if (!fs::is_directory(out.parent_path())) {
    throw Error(Reason::write_failed, fmt::format("{} is not a folder", out.parent_path().string()));
  }
  if (!fs::exists(fs::symlink_status(out))) return;
  if (!force) throw Error(Reason::file_exists, fmt::format("{} exists; --force replaces it", out.string()));
  if (!fs::is_directory(fs::symlink_status(out))) {
    throw Error(Reason::file_exists, fmt::format("{} is not a folder", out.string()));
  }
  check_replaceable(out, in);
}

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
    check_space(out.parent_path());
    Publication publication(out);
    result_.layers = plan_.layers;
    for (std::size_t s = 0; s < plan_.shards.size(); ++s) write_shard(s, publication.folder());
    write_index(publication.folder());
    write_configs(publication.folder());
    copy_side_files(publication.folder());
    publication.publish(options_);
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

  void check_space(const fs::path& folder) const {
    i64 needed = 0;
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

  void copy_side_files(const fs::path& folder) {
    for (const fs::path& name : list_side_files(source_.folder, &result_.notes)) {
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

// Absolute, with the links of its folder resolved, and without a trailing slash.
fs::path settle(const fs::path& path) {
  if (path.empty()) throw Error(Reason::argument_invalid, "the path of the input or the output is empty");
  const fs::path absolute = fs::weakly_canonical(fs::absolute(path));
  return absolute.has_filename() ? absolute : absolute.parent_path();
}

}  // namespace

QuantizeResult quantize(const fs::path& in, const fs::path& out, const QuantizeOptions& options) {
  try {
    const Source source = read_source(settle(in));
    const fs::path target = settle(out);
    check_output(source.folder, target, options.force);
    if (!options.experts_only) check_full_recipe(source.family);
    return Job(source, plan_quantisation(source.shards, !options.experts_only), options).run(target);
  } catch (const fs::filesystem_error& error) {
    throw Error(Reason::write_failed, error.what());
  }
}

}  // namespace fourmoe::checkpoint
