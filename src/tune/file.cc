// Books in files: read with distrust, written as a whole, merged under a lock.
#include <fcntl.h>
#include <fmt/format.h>
#include <sys/file.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <iterator>

#include "temporary.h"
#include "tune/book.h"

namespace fourmoe::tune {
namespace {

namespace fs = std::filesystem;

constexpr std::uintmax_t kMostBytes = 16 << 20;

[[noreturn]] void fail(const std::string& path, const std::string& what) {
  throw Error(Reason::write_failed, fmt::format("{} cannot be written: {}", path, what));
}

// Held by one process at a time, and by one thread of it; the lock's file stays.
class Lock {
 public:
  explicit Lock(const std::string& path) : file_(::open((path + ".lock").c_str(), O_CREAT | O_RDWR | O_CLOEXEC, 0644)) {
    if (file_ < 0 || ::flock(file_, LOCK_EX) != 0) {
      if (file_ >= 0) ::close(file_);
      fail(path, "its lock cannot be taken");
    }
  }
  ~Lock() { ::close(file_); }
  Lock(const Lock&) = delete;
  Lock& operator=(const Lock&) = delete;

 private:
  int file_;
};

void replace(const std::string& path, const std::string& text) {
  const fs::path temporary = temporary_beside(path, "partial");
  std::ofstream out(temporary, std::ios::binary);
  out << text;
  out.close();
  std::error_code error;
  if (out) fs::rename(temporary, path, error);
  if (out && !error) return;
  const std::string why = error ? error.message() : "the disk is full or the folder is read-only";
  fs::remove(temporary, error);
  fail(path, why);
}

}  // namespace

Book load(const std::string& path, std::vector<std::string>* notes) {
  std::error_code error;
  const fs::file_status status = fs::status(path, error);
  if (status.type() == fs::file_type::not_found) return {};
  const std::uintmax_t bytes = fs::is_regular_file(status) ? fs::file_size(path, error) : kMostBytes + 1;
  std::ifstream in;
  if (!error && bytes <= kMostBytes) in.open(path, std::ios::binary);
  if (!in.is_open() || error) {
    notes->push_back(fmt::format("{} is left out: not a readable file of at most {} bytes", path, kMostBytes));
    return {};
  }
  const std::string text{std::istreambuf_iterator<char>(in), {}};
  return text.empty() ? Book{} : parse(text, path, notes);
}

void store(const std::string& path, const Book& book) {
  std::error_code error;
  const fs::path folder = fs::absolute(path).parent_path();
  fs::create_directories(folder, error);
  if (!fs::is_directory(folder, error)) fail(path, "its folder cannot be made");
  if (fs::exists(path, error) && !fs::is_regular_file(path, error)) fail(path, "it is not a file");
  const Lock lock(path);
  std::vector<std::string> notes;
  Book all = load(path, &notes);
  if (all.empty() && !notes.empty()) fs::rename(path, path + ".invalid", error);
  merge(book, &all);
  replace(path, to_text(all));
}

}  // namespace fourmoe::tune
