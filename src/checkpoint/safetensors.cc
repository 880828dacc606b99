#include "checkpoint/safetensors.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <limits>
#include <nlohmann/json.hpp>
#include <utility>

#include "status.h"

namespace fourmoe::checkpoint {
namespace {

using nlohmann::json;

// Far above any real header (a 180,000-tensor checkpoint in one file needs 30 MB); huggingface/safetensors stops at
// 100 MB.
constexpr i64 kLargestHeader = i64{256} << 20;
constexpr std::size_t kMostDimensions = 16;

constexpr std::array<std::pair<std::string_view, i64>, 21> kDtypes = {{
    {"BOOL", 8}, {"U8", 8},   {"I8", 8},    {"F8_E4M3", 8}, {"F8_E5M2", 8}, {"F8_E8M0", 8}, {"I16", 16},
    {"U16", 16}, {"F16", 16}, {"BF16", 16}, {"I32", 32},    {"U32", 32},    {"F32", 32},    {"C64", 64},
    {"F64", 64}, {"I64", 64}, {"U64", 64},  {"F4", 4},      {"F6_E2M3", 6}, {"F6_E3M2", 6}, {"F8_E4M3FNUZ", 8},
}};

[[noreturn]] void malformed(std::string_view file, const std::string& what) {
  throw Error(Reason::file_malformed, fmt::format("{}: {}", file, what));
}

// Fills a TensorMap from the header's events: depth 1 is the list of tensors, depth 2 one tensor, depth 3 an array of
// one. No document is built, so a hostile header costs no more memory than its own size.
class HeaderHandler final : public nlohmann::json_sax<json> {
 public:
  HeaderHandler(std::string_view file, i64 data_begin, i64 file_bytes, const std::shared_ptr<const MappedFile>& owner,
                TensorMap* out, Metadata* metadata)
      : file_(file), data_begin_(data_begin), file_bytes_(file_bytes), owner_(owner), out_(out), metadata_(metadata) {}

  bool null() override { return unexpected("null"); }
  bool boolean(bool) override { return unexpected("a boolean"); }
  bool number_float(number_float_t, const string_t&) override { return unexpected("a fraction"); }
  bool binary(binary_t&) override { return unexpected("binary"); }

  bool number_integer(number_integer_t value) override { return unexpected(fmt::format("{}", value)); }

  bool number_unsigned(number_unsigned_t value) override {
    if (depth_ != 3 || numbers_ == nullptr) return unexpected(fmt::format("the number {}", value));
    if (value > static_cast<u64>(std::numeric_limits<i64>::max())) {
      return unexpected(fmt::format("the number {}", value));
    }
    if (numbers_->size() >= kMostDimensions) return unexpected(fmt::format("more than {} numbers", kMostDimensions));
    numbers_->push_back(static_cast<i64>(value));
    return true;
  }

  bool string(string_t& value) override {
    if (depth_ == 2 && in_metadata_) {
      if (metadata_ != nullptr) metadata_->insert_or_assign(key_, value);
      return true;
    }
    if (depth_ != 2 || key_ != "dtype") return unexpected("a string");
    dtype_ = value;
    return true;
  }

  bool start_object(std::size_t) override {
    if (depth_ >= 2) return unexpected("an object");
    ++depth_;
    if (depth_ == 2) begin_tensor();
    return true;
  }

  bool end_object() override {
    if (depth_ == 2 && !in_metadata_) end_tensor();
    in_metadata_ = false;
    --depth_;
    return true;
  }

  bool key(string_t& value) override {
    if (depth_ == 1) name_ = value;
    else if (!in_metadata_) begin_field(value);
    key_ = value;
    return true;
  }

  bool start_array(std::size_t) override {
    if (depth_ != 2 || numbers_ == nullptr) return unexpected("an array");
    ++depth_;
    return true;
  }

  bool end_array() override {
    --depth_;
    return true;
  }

  bool parse_error(std::size_t position, const std::string&, const nlohmann::detail::exception& error) override {
    malformed(file_, fmt::format("the header is not JSON at offset {}: {}", position + 8, quote(error.what())));
  }

 private:
  std::string at() const { return name_.empty() ? "the header" : "tensor " + quote(name_); }

  bool unexpected(const std::string& what) {
    malformed(file_, fmt::format("{}: {} where the header must not have it (key {})", at(), what, quote(key_)));
  }

  void begin_tensor() {
    in_metadata_ = name_ == "__metadata__";
    dtype_.clear();
    shape_.clear();
    offsets_.clear();
    seen_ = {};
    numbers_ = nullptr;
    if (in_metadata_ && std::exchange(metadata_seen_, true)) malformed(file_, "__metadata__ occurs twice");
  }

  void begin_field(const std::string& field) {
    const std::size_t which = field == "dtype" ? 0 : field == "shape" ? 1 : field == "data_offsets" ? 2 : 3;
    if (which == 3) malformed(file_, fmt::format("{}: unknown key {}", at(), quote(field)));
    if (std::exchange(seen_[which], true)) malformed(file_, fmt::format("{}: {} occurs twice", at(), field));
    numbers_ = which == 1 ? &shape_ : which == 2 ? &offsets_ : nullptr;
  }

  void end_tensor() {
    if (!seen_[0] || dtype_.empty()) malformed(file_, at() + ": dtype is missing");
    if (!seen_[1]) malformed(file_, at() + ": shape is missing");
    if (!seen_[2] || offsets_.size() != 2) malformed(file_, at() + ": data_offsets must be two numbers");
    if (dtype_bits(dtype_) == 0) malformed(file_, fmt::format("{}: unknown dtype {}", at(), quote(dtype_)));
    const i64 bytes = tensor_bytes(dtype_, shape_);
    if (bytes < 0) {
      malformed(file_, fmt::format("{}: shape {} of {} is too large or fills no whole number of bytes", at(),
                                   shape_text(shape_), dtype_));
    }
    const i64 begin = offsets_[0], end = offsets_[1], room = file_bytes_ - data_begin_;
    if (begin > end || end > room) {
      malformed(file_, fmt::format("{}: data_offsets [{}, {}] leave the file, whose data are {} bytes from offset {}",
                                   at(), begin, end, room, data_begin_));
    }
    if (end - begin != bytes) {
      malformed(file_, fmt::format("{}: {} {} needs {} bytes, data_offsets [{}, {}] hold {}", at(), dtype_,
                                   shape_text(shape_), bytes, begin, end, end - begin));
    }
    const auto [place, added] = out_->try_emplace(name_);
    if (!added) {
      const auto& first = place->second.file;
      malformed(file_, fmt::format("{} occurs twice{}", at(),
                                   first && first != owner_ ? ", first in " + first->name() : std::string()));
    }
    place->second = {dtype_, shape_, data_begin_ + begin, bytes, owner_};
    ranges_.push_back({place->second.offset, bytes, &place->first});
  }

 public:
  struct Range {
    i64 offset, bytes;
    const std::string* name;
  };

  void check_overlap() {
    std::erase_if(ranges_, [](const Range& range) { return range.bytes == 0; });
    std::sort(ranges_.begin(), ranges_.end(), [](const Range& a, const Range& b) { return a.offset < b.offset; });
    for (std::size_t i = 1; i < ranges_.size(); ++i) {
      const Range &a = ranges_[i - 1], &b = ranges_[i];
      if (a.offset + a.bytes > b.offset) {
        malformed(file_,
                  fmt::format("tensors {} and {} overlap at offset {}", quote(*a.name), quote(*b.name), b.offset));
      }
    }
  }

 private:
  std::string_view file_;
  i64 data_begin_;
  i64 file_bytes_;
  const std::shared_ptr<const MappedFile>& owner_;
  TensorMap* out_;
  Metadata* metadata_;
  i32 depth_ = 0;
  bool in_metadata_ = false, metadata_seen_ = false;
  std::string name_, key_, dtype_;
  std::vector<i64> shape_, offsets_;
  std::vector<i64>* numbers_ = nullptr;  // the array that is being filled
  std::array<bool, 3> seen_{};           // dtype, shape, data_offsets
  std::vector<Range> ranges_;
};

// Length of the JSON header, checked against the size of the file.
i64 header_bytes(u64 length, i64 file_bytes, std::string_view name) {
  if (length > static_cast<u64>(kLargestHeader) || static_cast<i64>(length) > file_bytes - 8) {
    malformed(name, fmt::format("header length {} at offset 0 exceeds the file of {} bytes or the limit of {}", length,
                                file_bytes, kLargestHeader));
  }
  return static_cast<i64>(length);
}

void parse_header(std::span<const u8> header, i64 file_bytes, std::string_view name,
                  const std::shared_ptr<const MappedFile>& owner, TensorMap* out, Metadata* metadata) {
  if (header.empty() || header[0] != '{') malformed(name, "the header at offset 8 does not begin with '{'");
  HeaderHandler handler(name, 8 + static_cast<i64>(header.size()), file_bytes, owner, out, metadata);
  json::sax_parse(header.begin(), header.end(), &handler);
  handler.check_overlap();
}

}  // namespace

i64 dtype_bits(std::string_view dtype) {
  for (const auto& [name, bits] : kDtypes) {
    if (name == dtype) return bits;
  }
  return 0;
}

std::string shape_text(const std::vector<i64>& shape) { return fmt::format("[{}]", fmt::join(shape, ", ")); }

i64 tensor_bytes(std::string_view dtype, const std::vector<i64>& shape) {
  i64 bits = dtype_bits(dtype);
  for (const i64 size : shape) {
    if (size < 0 || __builtin_mul_overflow(bits, size, &bits)) return -1;
  }
  return bits % 8 == 0 ? bits / 8 : -1;
}

void parse_safetensors(const std::shared_ptr<const MappedFile>& file, TensorMap* out, Metadata* metadata) {
  const std::string name = file->path().string();
  if (file->size() < 8) malformed(name, fmt::format("{} bytes are too short for a header length", file->size()));
  u64 length = 0;
  file->read(0, 8, &length);
  std::vector<u8> header(static_cast<std::size_t>(header_bytes(length, file->size(), name)));
  file->read(8, static_cast<i64>(header.size()), header.data());
  parse_header(header, file->size(), name, file, out, metadata);
}

void parse_safetensors(std::span<const u8> bytes, std::string_view name, TensorMap* out, Metadata* metadata) {
  const i64 size = static_cast<i64>(bytes.size());
  if (size < 8) malformed(name, fmt::format("{} bytes are too short for a header length", size));
  const i64 length = header_bytes(format::load<u64>(bytes.data()), size, name);
  parse_header(bytes.subspan(8, static_cast<std::size_t>(length)), size, name, nullptr, out, metadata);
}

}  // namespace fourmoe::checkpoint
