// safetensors: a mapped, validated reader of one file, and a writer that never leaves a half-written file.
//
// Format: u64 little-endian header length, JSON header { name: { dtype, shape, data_offsets } }, then the data.
#pragma once

#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "format/number.h"

namespace fourmoe::checkpoint {

// Read-only mapping of a whole file.
class MappedFile {
 public:
  static std::shared_ptr<const MappedFile> open(const std::filesystem::path& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const std::filesystem::path& path() const { return path_; }
  const u8* data() const { return data_; }
  i64 size() const { return size_; }
  // Copies `bytes` at `offset` through read(2), so that a few scalars do not fault in pages of the mapping.
  void read(i64 offset, i64 bytes, void* out) const;

 private:
  MappedFile() = default;
  std::filesystem::path path_;
  const u8* data_ = nullptr;
  i64 size_ = 0;
  int descriptor_ = -1;
};

// A tensor in a file. `dtype` is the format's own name: F32, BF16, U8, F8_E4M3, ...
struct StoredTensor {
  std::string dtype;
  std::vector<i64> shape;
  i64 offset = 0;  // of its first byte in the file
  i64 bytes = 0;
  std::shared_ptr<const MappedFile> file;

  const u8* data() const { return file->data() + offset; }
};

using TensorMap = std::map<std::string, StoredTensor, std::less<>>;

// Parses a header that starts at `data`; file_bytes is the size of the file it came from. Adds to *out, and to
// *metadata (may be null) the strings of "__metadata__". Throws Error(file_malformed).
void parse_safetensors(const std::shared_ptr<const MappedFile>& file, TensorMap* out,
                       std::map<std::string, std::string>* metadata);

// One tensor to write; the data is the caller's until write returns.
struct TensorToWrite {
  std::string name;
  std::string dtype;
  std::vector<i64> shape;
  const void* data = nullptr;
  i64 bytes = 0;
};

// Writes to a temporary name beside `path`, then renames. Throws Error(write_failed).
void write_safetensors(const std::filesystem::path& path, const std::vector<TensorToWrite>& tensors,
                       const std::map<std::string, std::string>& metadata);

}  // namespace fourmoe::checkpoint
