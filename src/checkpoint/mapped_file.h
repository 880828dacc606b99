// Mapped file: a whole file as read-only memory, and single reads that leave the mapping untouched.
#pragma once

#include <filesystem>
#include <memory>
#include <string>

#include "format/number.h"

namespace fourmoe::checkpoint {

// Read-only mapping of a whole regular file. Throws Error(file_unreadable). A file that somebody truncates while it
// is mapped raises SIGBUS in whoever reads the lost pages: no library can turn that into an error.
class MappedFile {
 public:
  static std::shared_ptr<const MappedFile> open(const std::filesystem::path& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const std::filesystem::path& path() const { return path_; }
  std::string name() const { return path_.filename().string(); }  // for messages
  const u8* data() const { return data_; }                        // [size] u8, null when empty; owned by this object
  i64 size() const { return size_; }
  // Copies `bytes` at `offset` to out [bytes] through pread(2), so that a few scalars do not fault in pages of the
  // mapping.
  void read(i64 offset, i64 bytes, void* out) const;

 private:
  MappedFile() = default;
  std::filesystem::path path_;
  const u8* data_ = nullptr;
  i64 size_ = 0;
  int descriptor_ = -1;
};

// A name from a file, fit for a one-line message: quoted, control characters as \xNN, cut after 200 bytes.
std::string quote(std::string_view name);

}  // namespace fourmoe::checkpoint
