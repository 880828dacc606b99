#include "write_file.h"

#include <fmt/format.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

#include "status.h"

namespace fourmoe::tools {

void write_file(const std::string& path, const std::string& text) {
  const std::string temporary = fmt::format("{}.{}.partial", path, ::getpid());
  std::ofstream out(temporary, std::ios::binary);
  out << text;
  out.close();
  std::error_code error;
  if (out) std::filesystem::rename(temporary, path, error);
  if (out && !error) return;
  std::filesystem::remove(temporary, error);
  throw Error(Reason::write_failed, fmt::format("{} cannot be written", path));
}

}  // namespace fourmoe::tools
