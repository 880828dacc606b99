#include "checkpoint/gguf.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <optional>

#include "status.h"

namespace fourmoe::checkpoint {
namespace {

constexpr i64 kMostDimensions = 4;  // GGML_MAX_DIMS
constexpr u32 kLargestAlignment = 1 << 16;
constexpr i64 kDefaultAlignment = 32;

struct TypeSize {
  u32 type;
  i64 values;  // in a block
  i64 bytes;   // of a block
  std::string_view name;
};

constexpr std::array<TypeSize, 34> kTypes = {{
    {0, 1, 4, "F32"},         {1, 1, 2, "F16"},         {2, 32, 18, "Q4_0"},      {3, 32, 20, "Q4_1"},
    {6, 32, 22, "Q5_0"},      {7, 32, 24, "Q5_1"},      {8, 32, 34, "Q8_0"},      {9, 32, 40, "Q8_1"},
    {10, 256, 84, "Q2_K"},    {11, 256, 110, "Q3_K"},   {12, 256, 144, "Q4_K"},   {13, 256, 176, "Q5_K"},
    {14, 256, 210, "Q6_K"},   {15, 256, 292, "Q8_K"},   {16, 256, 66, "IQ2_XXS"}, {17, 256, 74, "IQ2_XS"},
    {18, 256, 98, "IQ3_XXS"}, {19, 256, 50, "IQ1_S"},   {20, 32, 18, "IQ4_NL"},   {21, 256, 110, "IQ3_S"},
    {22, 256, 82, "IQ2_S"},   {23, 256, 136, "IQ4_XS"}, {24, 1, 1, "I8"},         {25, 1, 2, "I16"},
    {26, 1, 4, "I32"},        {27, 1, 8, "I64"},        {28, 1, 8, "F64"},        {29, 256, 56, "IQ1_M"},
    {30, 1, 2, "BF16"},       {34, 256, 54, "TQ1_0"},   {35, 256, 66, "TQ2_0"},   {39, 32, 17, "MXFP4"},
    {40, 64, 36, "NVFP4"},    {41, 128, 18, "Q1_0"},
}};

const TypeSize* find_type(u32 type) {
  const auto found =
      std::find_if(kTypes.begin(), kTypes.end(), [&](const TypeSize& size) { return size.type == type; });
  return found == kTypes.end() ? nullptr : found;
}

enum ValueType : u32 { u8_ = 0, i8_, u16_, i16_, u32_, i32_, f32_, bool_, string_, array_, u64_, i64_, f64_ };

constexpr std::array<i64, 13> kValueBytes = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};  // 0: of no fixed size

// A cursor that refuses to leave the file.
class Reader {
 public:
  Reader(std::span<const u8> bytes, std::string_view name) : bytes_(bytes), name_(name) {}

  i64 offset() const { return offset_; }
  i64 left() const { return static_cast<i64>(bytes_.size()) - offset_; }
  void about(std::string subject) { subject_ = std::move(subject); }

  [[noreturn]] void refuse(const std::string& what) const {
    throw Error(Reason::file_malformed, fmt::format("{}: {} at offset {}: {}", name_, subject_, offset_, what));
  }

  const u8* skip(u64 count) {
    if (count > static_cast<u64>(left())) refuse(fmt::format("{} bytes are needed, {} are left", count, left()));
    const u8* at = bytes_.data() + offset_;
    offset_ += static_cast<i64>(count);
    return at;
  }

  template <class T>
  T take() {
    return format::load<T>(skip(sizeof(T)));
  }

  std::string_view take_string() {
    const u64 length = take<u64>();
    return {reinterpret_cast<const char*>(skip(length)), static_cast<std::size_t>(length)};
  }

 private:
  std::span<const u8> bytes_;
  std::string_view name_;
  std::string subject_ = "the header";
  i64 offset_ = 0;
};

void skip_array(Reader* reader) {
  const u32 type = reader->take<u32>();
  const u64 count = reader->take<u64>();
  if (type >= kValueBytes.size() || type == array_) reader->refuse(fmt::format("array of unknown type {}", type));
  if (type == string_) {
    if (count > static_cast<u64>(reader->left()) / 8) reader->refuse(fmt::format("{} strings do not fit", count));
    for (u64 i = 0; i < count; ++i) reader->take_string();
    return;
  }
  u64 bytes = 0;
  if (__builtin_mul_overflow(count, static_cast<u64>(kValueBytes[type]), &bytes))
    reader->refuse("the array is too long");
  reader->skip(bytes);
}

std::optional<GgufValue> take_value(Reader* reader) {
  const u32 type = reader->take<u32>();
  switch (type) {
    case u8_: return i64{reader->take<u8>()};
    case i8_: return i64{static_cast<i64>(reader->take<signed char>())};
    case u16_: return i64{reader->take<u16>()};
    case i16_: return i64{reader->take<std::int16_t>()};
    case u32_: return i64{reader->take<u32>()};
    case i32_: return i64{reader->take<i32>()};
    case u64_: return static_cast<i64>(reader->take<u64>());
    case i64_: return reader->take<i64>();
    case f32_: return f64{reader->take<f32>()};
    case f64_: return reader->take<f64>();
    case bool_: return reader->take<u8>() != 0;
    case string_: return std::string(reader->take_string());
    case array_: skip_array(reader); return std::nullopt;
    default: reader->refuse(fmt::format("unknown value type {}", type));
  }
}

void read_metadata(Reader* reader, u64 count, Gguf* out) {
  for (u64 i = 0; i < count; ++i) {
    reader->about(fmt::format("key {} of {}", i, count));
    const std::string key(reader->take_string());
    reader->about("key " + quote(key));
    auto value = take_value(reader);
    const bool added = out->metadata.try_emplace(key, value ? std::move(*value) : GgufValue(std::string())).second;
    if (!added) reader->refuse("it occurs twice");
  }
}

i64 tensor_size(Reader* reader, const TypeSize& type, const std::vector<i64>& shape) {
  if (shape.back() % type.values != 0) {
    reader->refuse(
        fmt::format("rows of {} values do not fill blocks of {} ({})", shape.back(), type.values, type.name));
  }
  i64 bytes = type.bytes;
  for (std::size_t d = 0; d < shape.size(); ++d) {
    const i64 size = d + 1 == shape.size() ? shape[d] / type.values : shape[d];
    if (__builtin_mul_overflow(bytes, size, &bytes)) reader->refuse("the shape overflows");
  }
  return bytes;
}

GgufTensor read_tensor(Reader* reader, i64 alignment) {
  GgufTensor out;
  const u32 dimensions = reader->take<u32>();
  if (dimensions < 1 || dimensions > kMostDimensions) reader->refuse(fmt::format("{} dimensions", dimensions));
  for (u32 d = 0; d < dimensions; ++d) {
    const i64 size = reader->take<i64>();
    if (size <= 0) reader->refuse(fmt::format("a dimension of {}", size));
    out.shape.insert(out.shape.begin(), size);
  }
  out.type = reader->take<u32>();
  const TypeSize* type = find_type(out.type);
  if (type == nullptr) reader->refuse(fmt::format("unknown tensor type {}", out.type));
  out.bytes = tensor_size(reader, *type, out.shape);
  out.offset = reader->take<i64>();  // from the start of the data, until that is known
  if (out.offset < 0 || out.offset % alignment != 0) {
    reader->refuse(fmt::format("data offset {} is no multiple of the alignment {}", out.offset, alignment));
  }
  return out;
}

void read_tensors(Reader* reader, u64 count, i64 alignment, Gguf* out) {
  for (u64 i = 0; i < count; ++i) {
    reader->about(fmt::format("tensor {} of {}", i, count));
    const std::string name(reader->take_string());
    reader->about("tensor " + quote(name));
    if (!out->tensors.try_emplace(name, read_tensor(reader, alignment)).second) reader->refuse("it occurs twice");
  }
}

i64 read_alignment(const Gguf& file, Reader* reader) {
  const auto found = file.metadata.find("general.alignment");
  if (found == file.metadata.end()) return kDefaultAlignment;
  const i64* value = std::get_if<i64>(&found->second);
  if (value == nullptr || *value < 1 || *value > kLargestAlignment || (*value & (*value - 1)) != 0) {
    reader->refuse(fmt::format("general.alignment is no power of two up to {}", kLargestAlignment));
  }
  return *value;
}

// Makes offsets absolute and checks that tensors lie inside the file and apart.
void place_tensors(i64 data_begin, i64 file_bytes, std::string_view name, Gguf* out) {
  std::vector<std::pair<i64, std::string_view>> order;
  for (auto& [tensor_name, tensor] : out->tensors) {
    if (data_begin > file_bytes || tensor.bytes > file_bytes - data_begin ||
        tensor.offset > file_bytes - data_begin - tensor.bytes) {
      throw Error(Reason::file_malformed,
                  fmt::format("{}: tensor {}: {} bytes at offset {} of the data leave the file of {} bytes (data from "
                              "{})",
                              name, quote(tensor_name), tensor.bytes, tensor.offset, file_bytes, data_begin));
    }
    tensor.offset += data_begin;
    order.emplace_back(tensor.offset, tensor_name);
  }
  std::sort(order.begin(), order.end());
  for (std::size_t i = 1; i < order.size(); ++i) {
    const GgufTensor& before = out->tensors.find(order[i - 1].second)->second;
    if (before.offset + before.bytes <= order[i].first) continue;
    throw Error(Reason::file_malformed,
                fmt::format("{}: tensors {} and {} overlap at offset {}", name, quote(order[i - 1].second),
                            quote(order[i].second), order[i].first));
  }
}

// Byte j of a half-split group holds values j (low) and j + count (high); the result pairs values 2j and 2j + 1.
void pair_nibbles(const u8* in, i64 count, u8* out) {
  for (i64 j = 0; j < count / 2; ++j) {
    out[j] = static_cast<u8>((in[2 * j] & 15) | (in[2 * j + 1] & 15) << 4);
    out[count / 2 + j] = static_cast<u8>((in[2 * j] >> 4) | (in[2 * j + 1] & 0xf0));
  }
}

}  // namespace

std::string ggml_type_name(u32 type) {
  const TypeSize* found = find_type(type);
  return found != nullptr ? std::string(found->name) : fmt::format("type {}", type);
}

Gguf parse_gguf(std::span<const u8> bytes, std::string_view name) {
  Reader reader(bytes, name);
  if (reader.take<u32>() != 0x46554747u) reader.refuse("the file does not begin with GGUF");
  const u32 version = reader.take<u32>();
  if (version != 2 && version != 3) reader.refuse(fmt::format("version {}; 2 and 3 are read", version));
  const u64 tensors = reader.take<u64>(), pairs = reader.take<u64>();
  Gguf out;
  read_metadata(&reader, pairs, &out);
  reader.about("the header");
  const i64 alignment = read_alignment(out, &reader);
  read_tensors(&reader, tensors, alignment, &out);
  const i64 data_begin = (reader.offset() + alignment - 1) / alignment * alignment;
  place_tensors(data_begin, static_cast<i64>(bytes.size()), name, &out);
  return out;
}

i64 unpack_nvfp4_row(const u8* row, i64 cols, u8* codes, u8* scales) {
  i64 bad = -1;
  for (i64 group = 0; group < cols / 16; ++group) {
    const u8* block = row + group / 4 * 36;
    const u8 scale = block[group % 4];
    if (scale >= 0x80 && bad < 0) bad = group;
    scales[group] = scale == 0x7f ? 0 : scale;
    pair_nibbles(block + 4 + group % 4 * 8, 8, codes + group * 8);
  }
  return bad;
}

i64 unpack_mxfp4_row(const u8* row, i64 cols, u8* codes, u8* scales) {
  i64 bad = -1;
  for (i64 group = 0; group < cols / 32; ++group) {
    const u8* block = row + group * 17;
    if (block[0] == 0xff && bad < 0) bad = group;
    scales[group] = block[0];
    pair_nibbles(block + 1, 16, codes + group * 16);
  }
  return bad;
}

}  // namespace fourmoe::checkpoint
