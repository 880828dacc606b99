#include "checkpoint/quantize_output.h"

#include <fmt/format.h>

#include <algorithm>
#include <fstream>
#include <nlohmann/json.hpp>
#include <set>

#include "checkpoint/folder.h"
#include "checkpoint/mapped_file.h"
#include "format/number.h"
#include "status.h"
#include "temporary.h"

namespace fourmoe::checkpoint {
namespace {

namespace fs = std::filesystem;

constexpr i64 kLargestSideFile = i64{1} << 30;  // tokenizers have tens of MB; what is larger holds weights
constexpr std::string_view kIndexEnding = ".safetensors.index.json";

bool holds_weights(const fs::path& file) {
  const std::string extension = file.extension().string();
  static const std::set<std::string> kWeights = {".safetensors", ".bin",     ".pt",   ".pth",    ".gguf",
                                                 ".h5",          ".msgpack", ".onnx", ".partial"};
  return kWeights.contains(extension) || file.filename().string().ends_with(".index.json");
}

// Written by quantize itself.
bool is_own(const fs::path& file) { return file == "config.json" || file == "hf_quant_config.json"; }

// Whether quantize wrote the folder: its hf_quant_config.json names it as the producer.
bool is_earlier_output(const fs::path& out) {
  const fs::path config = out / "hf_quant_config.json";
  if (!fs::is_regular_file(config)) return false;
  const nlohmann::json parsed = nlohmann::json::parse(read_text(config), nullptr, false);
  const nlohmann::json::json_pointer producer("/producer/name");
  return !parsed.is_discarded() && parsed.contains(producer) && parsed.at(producer) == "fourmoe";
}

// Weights and index of an earlier output, by its own index where it has one. Other weights beside them are the user's.
std::set<fs::path> list_weights(const fs::path& out) {
  std::set<fs::path> names, loose;
  for (const auto& entry : fs::directory_iterator(out)) {
    const fs::path name = entry.path().filename();
    if (name.extension() == ".safetensors") loose.insert(name);
    if (!name.string().ends_with(kIndexEnding)) continue;
    names.insert(name);
    for (const std::string& shard : list_shards(read_text(entry.path()), entry.path().string())) names.insert(shard);
  }
  if (names.empty() && loose.size() == 1) return loose;
  if (names.empty()) names.insert("model.safetensors");
  return names;
}

// An existing output may be replaced when it is empty, or an earlier output that has gained no file since.
void check_replaceable(const fs::path& out, const fs::path& in) {
  if (fs::is_empty(out)) return;
  if (!is_earlier_output(out)) {
    throw Error(Reason::file_exists, fmt::format("{} was not written by quantize; it would be lost", out.string()));
  }
  const std::set<fs::path> weights = list_weights(out);
  for (const auto& entry : fs::recursive_directory_iterator(out)) {
    const fs::path name = entry.path().lexically_relative(out);
    if (entry.is_directory() || is_own(name) || weights.contains(name) || fs::exists(in / name)) continue;
    throw Error(Reason::file_exists, fmt::format("{} holds {}, which is no part of a checkpoint; it would be lost",
                                                 out.string(), quote(name.string())));
  }
}

bool is_inside(const fs::path& inner, const fs::path& outer) {
  return std::mismatch(outer.begin(), outer.end(), inner.begin(), inner.end()).first == outer.end();
}

}  // namespace

std::string read_text(const fs::path& path) {
  const auto file = MappedFile::open(path);
  std::string text(static_cast<std::size_t>(file->size()), '\0');
  file->read(0, file->size(), text.data());
  return text;
}

void write_text(const fs::path& path, const std::string& text) {
  std::ofstream out(path, std::ios::binary);
  out << text;
  out.close();
  if (!out) throw Error(Reason::write_failed, fmt::format("{} cannot be written", path.string()));
}

fs::path settle(const fs::path& path) {
  if (path.empty()) throw Error(Reason::argument_invalid, "the path of the input or the output is empty");
  const fs::path absolute = fs::weakly_canonical(fs::absolute(path));
  return absolute.has_filename() ? absolute : absolute.parent_path();
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

Publication::Publication(const fs::path& out) : out_(out) {
  folder_ = temporary_beside(out_, "partial");
  replaced_ = temporary_beside(out_, "replaced");
  std::error_code error;
  if (!fs::create_directory(folder_, error) || error) {
    throw Error(Reason::write_failed, fmt::format("{} cannot be created: {}", folder_.string(),
                                                  error ? error.message() : "it is there already"));
  }
}

Publication::~Publication() {
  std::error_code ignored;
  if (!published_) fs::remove_all(folder_, ignored);
}

void Publication::publish(bool force) {
  std::error_code error;
  const bool replace = fs::exists(out_);
  if (replace && !force) throw Error(Reason::file_exists, fmt::format("{} has appeared", out_.string()));
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

}  // namespace fourmoe::checkpoint
