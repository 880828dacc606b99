#include "checkpoint/folder.h"

#include <fmt/format.h>

#include <algorithm>
#include <functional>
#include <nlohmann/json.hpp>
#include <set>
#include <utility>

#include "status.h"

namespace fourmoe::checkpoint {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr const char* kConfig = "config.json";
constexpr const char* kQuantConfig = "hf_quant_config.json";
constexpr const char* kSingle = "model.safetensors";
constexpr const char* kIndexEnding = ".safetensors.index.json";
constexpr i64 kLargestText = i64{256} << 20;  // an index of 180,000 tensors has 20 MB

std::string read_text(const fs::path& path) {
  const auto file = MappedFile::open(path);
  if (file->size() > kLargestText) {
    throw Error(Reason::file_malformed,
                fmt::format("{}: {} bytes are too large for a JSON file", path.string(), file->size()));
  }
  std::string text(static_cast<std::size_t>(file->size()), '\0');
  file->read(0, file->size(), text.data());
  return text;
}

// Calls `take` with each pair of "weight_map": an index may hold 180,000, so no document is built.
class IndexHandler final : public nlohmann::json_sax<json> {
 public:
  using Take = std::function<void(const std::string& tensor, const std::string& shard)>;
  IndexHandler(std::string_view file, Take take) : file_(file), take_(std::move(take)) {}

  bool null() override { return value(); }
  bool boolean(bool) override { return value(); }
  bool number_integer(number_integer_t) override { return value(); }
  bool number_unsigned(number_unsigned_t) override { return value(); }
  bool number_float(number_float_t, const string_t&) override { return value(); }
  bool binary(binary_t&) override { return value(); }

  bool string(string_t& text) override {
    if (in_map_ && depth_ == 2) take_(key_, text);
    return true;
  }

  bool start_object(std::size_t) override {
    if (in_map_) refuse("an object");
    if (depth_ == 1 && key_ == "weight_map") in_map_ = seen_ = true;
    return deeper();
  }

  bool start_array(std::size_t) override {
    if (in_map_) refuse("an array");
    return deeper();
  }

  bool end_object() override {
    if (--depth_ == 1) in_map_ = false;
    return true;
  }

  bool end_array() override {
    --depth_;
    return true;
  }

  bool key(string_t& text) override {
    key_ = text;
    if (depth_ == 1 && key_ == "weight_map" && seen_) refuse("a second weight_map");
    return true;
  }

  bool parse_error(std::size_t position, const std::string&, const nlohmann::detail::exception& error) override {
    throw Error(Reason::file_malformed,
                fmt::format("{}: not JSON at offset {}: {}", file_, position, quote(error.what())));
  }

  bool seen() const { return seen_; }

 private:
  bool value() {
    if (in_map_) refuse("a value that is no string");
    return true;
  }

  bool deeper() {
    constexpr i32 kDeepest = 64;
    if (++depth_ > kDeepest) refuse(fmt::format("nesting deeper than {}", kDeepest));
    return true;
  }

  [[noreturn]] void refuse(const std::string& what) {
    throw Error(Reason::file_malformed, fmt::format("{}: {} at key {}", file_, what, quote(key_)));
  }

  std::string_view file_;
  Take take_;
  std::string key_;
  i32 depth_ = 0;
  bool in_map_ = false, seen_ = false;
};

void read_index(std::string_view index, std::string_view file, const IndexHandler::Take& take) {
  IndexHandler handler(file, take);
  json::sax_parse(index.begin(), index.end(), &handler);
  if (!handler.seen()) throw Error(Reason::file_malformed, fmt::format("{}: \"weight_map\" is missing", file));
}

void check_shard_name(const std::string& name, std::string_view file) {
  const bool plain = !name.empty() && name != "." && name != ".." && name.find_first_of("/\\") == std::string::npos &&
                     name.find('\0') == std::string::npos;
  if (plain) return;
  throw Error(Reason::file_malformed, fmt::format("{}: the file name {} leaves the folder", file, quote(name)));
}

std::vector<fs::path> find_ending(const fs::path& folder, std::string_view ending) {
  std::vector<fs::path> found;
  std::error_code error;
  for (fs::directory_iterator at(folder, error), end; !error && at != end; at.increment(error)) {
    if (at->path().filename().string().ends_with(ending)) found.push_back(at->path());
  }
  if (error) throw Error(Reason::file_unreadable, fmt::format("{}: {}", folder.string(), error.message()));
  std::sort(found.begin(), found.end());
  return found;
}

// A link may point anywhere (the hub's cache is made of links into a folder of blobs); a name may not.
std::vector<fs::path> find_shards(const fs::path& index) {
  std::vector<fs::path> found;
  for (const std::string& name : list_shards(read_text(index), index.string())) {
    found.push_back(index.parent_path() / name);
    if (fs::exists(found.back())) continue;
    throw Error(Reason::file_unreadable, fmt::format("{}: shard {} is missing", index.string(), quote(name)));
  }
  return found;
}

void read_tensors(const fs::path& folder, Folder* out) {
  const FolderFiles files = find_files(folder);
  for (const fs::path& shard : files.shards) parse_safetensors(MappedFile::open(shard), &out->tensors, nullptr);
  out->files = static_cast<i64>(files.shards.size());
  if (!files.index.empty()) check_promises(files.index, out->tensors);
}

void read_single(const fs::path& path, Folder* out) {
  parse_safetensors(MappedFile::open(path), &out->tensors, nullptr);
  out->files = 1;
}

Config read_config(const fs::path& folder) {
  const fs::path config = folder / kConfig, quant = folder / kQuantConfig;
  if (!fs::exists(config)) throw Error(Reason::file_unreadable, config.string() + ": is missing");
  return parse_config(read_text(config), config.string(), fs::exists(quant) ? read_text(quant) : std::string(),
                      quant.string());
}

}  // namespace

FolderFiles find_files(const fs::path& folder) {
  const std::vector<fs::path> indices = find_ending(folder, kIndexEnding);
  if (indices.size() == 1) return {indices[0], find_shards(indices[0])};
  if (fs::exists(folder / kSingle)) return {{}, {folder / kSingle}};
  const std::vector<fs::path> files = find_ending(folder, ".safetensors");
  if (indices.empty() && files.size() == 1) return {{}, files};
  throw Error(Reason::file_unreadable,
              fmt::format("{}: {} indices (*{}) and {} *.safetensors files; one index, {} or a single file is needed",
                          folder.string(), indices.size(), kIndexEnding, files.size(), kSingle));
}

void check_promises(const fs::path& index, const TensorMap& tensors) {
  read_index(read_text(index), index.string(), [&](const std::string& tensor, const std::string& shard) {
    const auto found = tensors.find(tensor);
    if (found != tensors.end() && found->second.file->path().filename() == shard) return;
    throw Error(Reason::tensor_missing, fmt::format("{}: tensor {} is promised in {} and absent from it",
                                                    index.string(), quote(tensor), quote(shard)));
  });
}

std::vector<std::string> list_shards(std::string_view index, std::string_view file) {
  std::vector<std::string> shards;
  std::set<std::string, std::less<>> seen;
  read_index(index, file, [&](const std::string&, const std::string& shard) {
    if (seen.find(shard) != seen.end()) return;
    check_shard_name(shard, file);
    seen.insert(shard);
    shards.push_back(shard);
  });
  return shards;
}

Folder open_folder(const fs::path& path) {
  Folder out;
  out.path = path;
  const bool is_folder = fs::is_directory(path);
  out.config = read_config(is_folder ? path : path.parent_path());
  if (is_folder) read_tensors(path, &out);
  else read_single(path, &out);
  return out;
}

}  // namespace fourmoe::checkpoint
