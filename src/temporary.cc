#include "temporary.h"

#include <fmt/format.h>

#include <random>
#include <string>

#include "format/number.h"

namespace fourmoe {

std::filesystem::path temporary_beside(const std::filesystem::path& path, std::string_view ending) {
  constexpr std::size_t kMostOfName = 200;  // file systems allow 255 bytes
  std::random_device random;
  const u64 number = u64{random()} << 32 | random();
  const std::string name = path.filename().string().substr(0, kMostOfName);
  return path.parent_path() / fmt::format(".{}.{:016x}.{}", name, number, ending);
}

}  // namespace fourmoe
