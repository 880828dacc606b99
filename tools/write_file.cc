#include "write_file.h"

#include <fmt/format.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <string_view>

#include "status.h"
#include "temporary.h"

namespace fourmoe::tools {
namespace {

namespace fs = std::filesystem;

bool is_weights(const fs::path& file) { return file.extension() == ".safetensors" || file.extension() == ".gguf"; }

// The name of a checkpoint that is cut into files, without the number of the cut; empty for others.
std::string name_of_cut(const fs::path& file) {
  constexpr std::string_view kCut = "-00000-of-00000";  // as safetensors and GGUF number them
  const std::string stem = file.stem().string();
  if (stem.size() < kCut.size()) return "";
  std::string cut = stem.substr(stem.size() - kCut.size());
  for (char& c : cut) c = c >= '0' && c <= '9' ? '0' : c;
  return cut == kCut ? stem.substr(0, stem.size() - kCut.size()) + file.extension().string() : "";
}

// Whether `entry`, a file beside `file`, is of the same checkpoint: describes it, or is another cut of it.
bool goes_with(const fs::path& file, const fs::path& entry) {
  if (entry.extension() == ".json") return file.extension() == ".safetensors";
  return !name_of_cut(file).empty() && name_of_cut(entry) == name_of_cut(file);
}

// Whether `out` belongs to the checkpoint, under its name in there or under another: a link may lead to it.
bool is_part(const fs::path& checkpoint, const fs::path& out) {
  if (same_file(checkpoint, out)) return true;
  const bool folder = fs::is_directory(checkpoint);
  if (folder && same_file(checkpoint, out.parent_path())) return fs::exists(out) || is_weights(out);
  const fs::path place = folder ? checkpoint : fs::absolute(checkpoint).parent_path();
  std::error_code error;  // what cannot be listed cannot be read either, which is said later
  for (const auto& entry : fs::directory_iterator(place, error)) {
    if ((folder || goes_with(checkpoint, entry.path())) && same_file(entry.path(), out)) return true;
  }
  return false;
}

}  // namespace

bool same_file(const std::filesystem::path& a, const std::filesystem::path& b) {
  std::error_code error, unsettled;  // links that lead nowhere, or round in a circle
  if (fs::equivalent(a, b, error)) return true;
  const fs::path settled = fs::weakly_canonical(a, error);
  return !error && settled == fs::weakly_canonical(b, unsettled) && !unsettled;
}

void check_output(const std::string& output, const std::string& checkpoint) {
  const fs::path out = fs::absolute(output);
  if (!fs::is_directory(out.parent_path())) {
    throw Error(Reason::write_failed, fmt::format("output {}: its folder does not exist", output));
  }
  if (::access(out.parent_path().c_str(), W_OK | X_OK) != 0) {
    throw Error(Reason::write_failed, fmt::format("output {}: its folder: {}", output, std::strerror(errno)));
  }
  const fs::file_type type = fs::symlink_status(out).type();
  if (type == fs::file_type::symlink) {
    throw Error(Reason::file_exists,
                fmt::format("output {} is a link, which a file would replace; where it leads to would pass", output));
  }
  if (type != fs::file_type::not_found && type != fs::file_type::regular) {
    throw Error(Reason::file_exists, fmt::format("output {} is no file", output));
  }
  if (!checkpoint.empty() && is_part(checkpoint, out)) {
    throw Error(Reason::file_exists, fmt::format("output {} is a file of the checkpoint, or would be taken for one; "
                                                 "one in another folder would pass",
                                                 output));
  }
}

void write_file(const std::string& path, const std::string& text) {
  const fs::path temporary = temporary_beside(path, "partial");
  std::ofstream out(temporary, std::ios::binary);
  out << text;
  out.close();
  std::error_code error;
  if (out) fs::rename(temporary, path, error);
  if (out && !error) return;
  const std::string why = error ? error.message() : "the disk is full or the folder is read-only";
  fs::remove(temporary, error);
  throw Error(Reason::write_failed, fmt::format("{} cannot be written: {}", path, why));
}

}  // namespace fourmoe::tools
