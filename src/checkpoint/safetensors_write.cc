#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <nlohmann/json.hpp>
#include <set>
#include <utility>

#include "checkpoint/safetensors.h"
#include "status.h"
#include "temporary.h"

namespace fourmoe::checkpoint {
namespace {

[[noreturn]] void failed(const std::filesystem::path& path, const std::string& what) {
  throw Error(Reason::write_failed, fmt::format("{}: {}", path.string(), what));
}

std::string json_string(const std::string& text, const std::filesystem::path& path) {
  try {
    return nlohmann::json(text).dump();
  } catch (const nlohmann::json::exception&) {
    failed(path, quote(text) + " is not UTF-8");
  }
}

std::string metadata_json(const Metadata& metadata, const std::filesystem::path& path) {
  std::string text;
  for (const auto& [key, value] : metadata) {
    text += fmt::format("{}{}:{}", text.empty() ? "" : ",", json_string(key, path), json_string(value, path));
  }
  return text;
}

// The whole file up to the first tensor: length, JSON, spaces up to a multiple of 8.
std::string build_header(const std::vector<TensorToDeclare>& tensors, const Metadata& metadata,
                         const std::filesystem::path& path, i64* data_bytes) {
  std::string text = "{";
  if (!metadata.empty()) text += fmt::format("\"__metadata__\":{{{}}}", metadata_json(metadata, path));
  std::set<std::string_view> names = {"__metadata__"};
  i64 offset = 0;
  for (const TensorToDeclare& tensor : tensors) {
    if (!names.insert(tensor.name).second) failed(path, "tensor " + quote(tensor.name) + " would be written twice");
    const i64 bytes = tensor_bytes(tensor.dtype, tensor.shape);
    if (dtype_bits(tensor.dtype) == 0 || bytes < 0) {
      failed(path, fmt::format("tensor {}: {} {} cannot be stored", quote(tensor.name), tensor.dtype,
                               shape_text(tensor.shape)));
    }
    text +=
        fmt::format(R"({}{}:{{"dtype":"{}","shape":[{}],"data_offsets":[{},{}]}})", text.size() > 1 ? "," : "",
                    json_string(tensor.name, path), tensor.dtype, fmt::join(tensor.shape, ","), offset, offset + bytes);
    offset += bytes;
  }
  text += "}";
  text.append((8 - text.size() % 8) % 8, ' ');
  *data_bytes = offset;
  const u64 length = text.size();
  return std::string(reinterpret_cast<const char*>(&length), 8) + text;
}

}  // namespace

SafetensorsWriter::SafetensorsWriter(std::filesystem::path path, std::vector<TensorToDeclare> tensors,
                                     const Metadata& metadata)
    : path_(std::move(path)), temporary_(temporary_beside(path_, "partial")), tensors_(std::move(tensors)) {
  const std::string header = build_header(tensors_, metadata, path_, &data_bytes_);
  descriptor_ = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
  if (descriptor_ < 0) failed(temporary_, std::string("cannot be created: ") + std::strerror(errno));
  try {
    write_all(header.data(), static_cast<i64>(header.size()));
  } catch (...) {
    ::close(descriptor_);
    ::unlink(temporary_.c_str());
    throw;
  }
  if (!tensors_.empty()) missing_ = tensor_bytes(tensors_[0].dtype, tensors_[0].shape);
  skip_full();
}

SafetensorsWriter::~SafetensorsWriter() {
  if (descriptor_ < 0) return;
  ::close(descriptor_);
  ::unlink(temporary_.c_str());
}

// Moves on to the next tensor that still needs data.
void SafetensorsWriter::skip_full() {
  while (missing_ == 0 && turn_ < tensors_.size()) {
    ++turn_;
    if (turn_ < tensors_.size()) missing_ = tensor_bytes(tensors_[turn_].dtype, tensors_[turn_].shape);
  }
}

void SafetensorsWriter::write_all(const void* data, i64 bytes) {
  const u8* from = static_cast<const u8*>(data);
  while (bytes > 0) {
    const ssize_t done = ::write(descriptor_, from, static_cast<std::size_t>(bytes));
    if (done < 0 && errno == EINTR) continue;
    if (done <= 0) failed(temporary_, std::string("cannot be written: ") + std::strerror(errno));
    from += done;
    bytes -= done;
  }
}

void SafetensorsWriter::append(std::string_view name, const void* data, i64 bytes) {
  if (bytes == 0) return;
  if (turn_ == tensors_.size() || tensors_[turn_].name != name || bytes < 0 || bytes > missing_) {
    throw Error(
        Reason::argument_invalid,
        fmt::format(
            "{}: {} bytes of tensor {} were given where {} were due", path_.string(), bytes, quote(name),
            turn_ == tensors_.size() ? "no more" : fmt::format("{} of {}", missing_, quote(tensors_[turn_].name))));
  }
  write_all(data, bytes);
  missing_ -= bytes;
  skip_full();
}

void SafetensorsWriter::finish() {
  if (turn_ < tensors_.size()) {
    throw Error(Reason::argument_invalid,
                fmt::format("{}: tensor {} lacks {} bytes", path_.string(), quote(tensors_[turn_].name), missing_));
  }
  const int closed = ::close(std::exchange(descriptor_, -1));
  if (closed != 0 || ::rename(temporary_.c_str(), path_.c_str()) != 0) {
    const int error = errno;
    ::unlink(temporary_.c_str());
    failed(path_, std::string("cannot be completed: ") + std::strerror(error));
  }
}

void write_safetensors(const std::filesystem::path& path, const std::vector<TensorToWrite>& tensors,
                       const Metadata& metadata) {
  std::vector<TensorToDeclare> declared;
  for (const TensorToWrite& tensor : tensors) declared.push_back({tensor.name, tensor.dtype, tensor.shape});
  SafetensorsWriter writer(path, std::move(declared), metadata);
  for (const TensorToWrite& tensor : tensors) {
    if (tensor.bytes != tensor_bytes(tensor.dtype, tensor.shape)) {
      failed(path, fmt::format("tensor {}: {} bytes were given for {} {}", quote(tensor.name), tensor.bytes,
                               tensor.dtype, shape_text(tensor.shape)));
    }
    writer.append(tensor.name, tensor.data, tensor.bytes);
  }
  writer.finish();
}

}  // namespace fourmoe::checkpoint
