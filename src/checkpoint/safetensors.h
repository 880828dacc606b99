// safetensors: a validated reader of one file, and writers that never leave a half-written file.
//
// Format: u64 little-endian header length, JSON header { name: { dtype, shape, data_offsets } }, then the data.
// Source: huggingface/safetensors README. Stricter than its readers: duplicate names and overlaps are refused.
#pragma once

#include <filesystem>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "checkpoint/mapped_file.h"
#include "format/number.h"

namespace fourmoe::checkpoint {

// A tensor in a file. `dtype` is the format's own name: F32, BF16, U8, F8_E4M3, ...
struct StoredTensor {
  std::string dtype;
  std::vector<i64> shape;
  i64 offset = 0;                          // of its first byte in the file
  i64 bytes = 0;                           // product of shape * dtype_bits / 8, inside the file
  std::shared_ptr<const MappedFile> file;  // null only when parsed from bytes

  const u8* data() const { return file->data() + offset; }  // [bytes] u8; owned by `file`
};

using TensorMap = std::map<std::string, StoredTensor, std::less<>>;
using Metadata = std::map<std::string, std::string>;

// Bits of one element; 0 for a dtype that the format does not know.
i64 dtype_bits(std::string_view dtype);

// "[2, 3]", for messages.
std::string shape_text(const std::vector<i64>& shape);

// Bytes of a tensor; -1 when a dimension is negative, the product overflows or does not fill whole bytes.
i64 tensor_bytes(std::string_view dtype, const std::vector<i64>& shape);

// Adds the file's tensors to *out, and to *metadata (may be null) the strings of "__metadata__". Reads the header
// alone. Throws Error(file_malformed) with file, tensor and offset.
void parse_safetensors(const std::shared_ptr<const MappedFile>& file, TensorMap* out, Metadata* metadata);

// The same for a file's bytes in memory, called `name` in messages; the tensors get no file.
void parse_safetensors(std::span<const u8> bytes, std::string_view name, TensorMap* out, Metadata* metadata);

// A tensor that a writer will be given.
struct TensorToDeclare {
  std::string name;
  std::string dtype;
  std::vector<i64> shape;
};

// Writes tensors one at a time: all are declared first, then their data comes in that order, in pieces of any size.
// Data go to a temporary name beside `path`, which finish() renames; an unfinished writer removes it. The header is
// padded with spaces to 8 bytes. Throws Error(write_failed) where the disk fails, argument_invalid on misuse.
class SafetensorsWriter {
 public:
  SafetensorsWriter(std::filesystem::path path, std::vector<TensorToDeclare> tensors, const Metadata& metadata);
  ~SafetensorsWriter();
  SafetensorsWriter(const SafetensorsWriter&) = delete;
  SafetensorsWriter& operator=(const SafetensorsWriter&) = delete;

  // The next piece of tensor `name`, data [bytes] u8, caller's. The tensor must be the one whose turn it is.
  void append(std::string_view name, const void* data, i64 bytes);
  void finish();                                  // throws when data are missing
  i64 data_bytes() const { return data_bytes_; }  // of all declared tensors

 private:
  void write_all(const void* data, i64 bytes);
  void skip_full();

  std::filesystem::path path_;
  std::filesystem::path temporary_;
  std::vector<TensorToDeclare> tensors_;
  std::size_t turn_ = 0;  // index of the tensor that comes next
  i64 missing_ = 0;       // bytes that it still lacks
  i64 data_bytes_ = 0;
  int descriptor_ = -1;
};

// One tensor to write; the data are the caller's until write_safetensors returns.
struct TensorToWrite {
  std::string name;
  std::string dtype;
  std::vector<i64> shape;
  const void* data = nullptr;  // [bytes] u8; may be null when bytes is 0
  i64 bytes = 0;
};

// All at once, in the order given; replaces what is at `path`. Throws Error(write_failed).
void write_safetensors(const std::filesystem::path& path, const std::vector<TensorToWrite>& tensors,
                       const Metadata& metadata);

}  // namespace fourmoe::checkpoint
