#include "write_file.h"

#include <fmt/format.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

#include "status.h"

namespace fourmoe::tools {
namespace {

namespace fs = std::filesystem;

// Whether `out`, which exists, belongs to the checkpoint: it lies in its folder, or is its file or describes it.
bool is_part(const fs::path& checkpoint, const fs::path& out) {
  if (same_file(checkpoint, out)) return true;
  if (fs::is_directory(checkpoint)) return same_file(checkpoint, out.parent_path());
  return checkpoint.extension() == ".safetensors" && out.extension() == ".json" &&
         same_file(fs::absolute(checkpoint).parent_path(), out.parent_path());
}

}  // namespace

bool same_file(const std::filesystem::path& a, const std::filesystem::path& b) {
  std::error_code error;
  return fs::equivalent(a, b, error) || fs::weakly_canonical(a) == fs::weakly_canonical(b);
}

void check_output(const std::string& output, const std::string& checkpoint) {
  const fs::path out = fs::absolute(output);
  if (!fs::is_directory(out.parent_path())) {
    throw Error(Reason::write_failed, fmt::format("output {}: its folder does not exist", output));
  }
  if (!fs::exists(out)) return;
  if (!fs::is_regular_file(out)) throw Error(Reason::file_exists, fmt::format("output {} is no file", output));
  if (!checkpoint.empty() && is_part(checkpoint, out)) {
    throw Error(Reason::file_exists, fmt::format("output {} is a file of the checkpoint", output));
  }
}

void write_file(const std::string& path, const std::string& text) {
  const std::string temporary = fmt::format("{}.{}.partial", path, ::getpid());
  std::ofstream out(temporary, std::ios::binary);
  out << text;
  out.close();
  std::error_code error;
  if (out) fs::rename(temporary, path, error);
  if (out && !error) return;
  fs::remove(temporary, error);
  throw Error(Reason::write_failed, fmt::format("{} cannot be written", path));
}

}  // namespace fourmoe::tools
