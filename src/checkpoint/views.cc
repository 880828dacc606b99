#include "checkpoint/views.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <optional>

#include "status.h"

namespace fourmoe::checkpoint {
namespace {

using format::Encoding;
using format::Matrix;
using Shape = std::vector<i64>;

constexpr Encoding kFp4[] = {Encoding::nvfp4, Encoding::mxfp4};

std::optional<Encoding> dense_encoding(std::string_view dtype) {
  if (dtype == "BF16") return Encoding::bf16;
  if (dtype == "F16") return Encoding::f16;
  if (dtype == "F32") return Encoding::f32;
  if (dtype == "F8_E4M3") return Encoding::fp8;
  return std::nullopt;
}

format::Dtype float_dtype(Named named) {
  const std::string& dtype = named->second.dtype;
  if (dtype == "F32") return format::Dtype::f32;
  if (dtype == "BF16") return format::Dtype::bf16;
  if (dtype == "F16") return format::Dtype::f16;
  throw Error(Reason::tensor_mismatch,
              fmt::format("{}: dtype is {}; F32, BF16 or F16 was expected", where(named), dtype));
}

bool is_packed(const Parts& parts) { return parts.weight->second.dtype == "U8" || parts.weight->second.dtype == "I8"; }

bool scale_fits(Encoding encoding, const Parts& parts) {
  const std::string& dtype = parts.scale->second.dtype;
  if (encoding == Encoding::nvfp4) return dtype == "F8_E4M3" || (dtype == "U8" && parts.global != nullptr);
  return dtype == "F8_E8M0" || (dtype == "U8" && parts.global == nullptr);
}

// Shape of a [all_rows, width] array, with the stack's size before it.
Shape stored_shape(const Source& source, i64 width, bool transposed) {
  Shape shape;
  if (source.experts > 0) shape.push_back(source.experts);
  shape.push_back(transposed ? width : source.all_rows());
  shape.push_back(transposed ? source.all_rows() : width);
  return shape;
}

// gpt-oss stores [..., blocks, 16 bytes]: the last two dimensions are one row.
Shape merged_shape(const StoredTensor& tensor, const Source& source) {
  Shape shape = tensor.shape;
  if (shape.size() == (source.experts > 0 ? 4u : 3u) && shape.back() == 16) {
    shape.pop_back();
    shape.back() *= 16;
  }
  return shape;
}

i64 weight_width(Encoding encoding, i64 cols) { return format::is_fp4(encoding) ? cols / 2 : cols; }

[[noreturn]] void refuse_shape(Named named, const Shape& expected, std::string_view dtypes) {
  throw Error(Reason::tensor_mismatch,
              fmt::format("{}: {} of shape {} was found, {} of shape {} was expected", where(named),
                          named->second.dtype, shape_text(named->second.shape), dtypes, shape_text(expected)));
}

void check_parts(const Source& source) {
  const Parts& parts = *source.parts;
  if (parts.foreign == nullptr) return;
  throw Error(Reason::encoding_unsupported,
              where(parts.foreign) + " changes the weights' values in a way that is not known here");
}

bool fits(const Source& source, Encoding encoding, bool transposed) {
  const Parts& parts = *source.parts;
  const Shape expected = stored_shape(source, weight_width(encoding, source.cols), transposed);
  if (merged_shape(parts.weight->second, source) != expected) return false;
  if (!format::is_fp4(encoding)) return true;
  if (source.cols % format::block_of(encoding) != 0) return false;
  const i64 blocks = source.cols / format::block_of(encoding);
  return scale_fits(encoding, parts) && parts.scale->second.shape == stored_shape(source, blocks, transposed);
}

// Why nothing fits: the weight, or else its scale.
[[noreturn]] void refuse_form(const Source& source, bool packed, bool prefer_transposed) {
  const Parts& parts = *source.parts;
  const i64 width = packed ? source.cols / 2 : source.cols;
  const Shape found = merged_shape(parts.weight->second, source);
  const bool normal = found == stored_shape(source, width, false);
  const bool other = source.experts > 0 && found == stored_shape(source, width, true);
  if (!packed || (!normal && !other)) {
    refuse_shape(parts.weight, stored_shape(source, width, prefer_transposed), parts.weight->second.dtype);
  }
  const Encoding guess = parts.global != nullptr ? Encoding::nvfp4 : Encoding::mxfp4;
  if (const i64 block = format::block_of(guess); source.cols % block != 0) {
    throw Error(Reason::shape_unsupported, fmt::format("{}: rows of {} values do not fill blocks of {} ({}); {} would "
                                                       "pass",
                                                       where(parts.weight), source.cols, block, encoding_name(guess),
                                                       (source.cols + block - 1) / block * block));
  }
  const bool transposed = normal && other ? prefer_transposed : other;
  refuse_shape(parts.scale, stored_shape(source, source.cols / format::block_of(guess), transposed),
               guess == Encoding::nvfp4 ? "F8_E4M3" : "U8");
}

Form examine_packed(const Source& source, std::initializer_list<bool> orientations) {
  const Parts& parts = *source.parts;
  if (parts.scale == nullptr) {
    throw Error(Reason::tensor_missing, fmt::format("{} has no block scales: {} is missing", where(parts.weight),
                                                    quote(sibling_name(parts.weight->first, "weight_scale"))));
  }
  for (const bool transposed : orientations) {
    for (const Encoding encoding : kFp4) {
      if (!fits(source, encoding, transposed)) continue;
      if (encoding == Encoding::nvfp4 && parts.global == nullptr) {
        throw Error(Reason::tensor_missing, fmt::format("{} has no global scale: {} is missing", where(parts.weight),
                                                        quote(sibling_name(parts.weight->first, "weight_scale_2"))));
      }
      return {encoding, transposed};
    }
  }
  refuse_form(source, true, *orientations.begin());
}

Form examine_dense(const Source& source, std::initializer_list<bool> orientations) {
  const Parts& parts = *source.parts;
  const auto encoding = dense_encoding(parts.weight->second.dtype);
  if (!encoding) {
    throw Error(Reason::encoding_unsupported,
                fmt::format("{}: dtype {} is not read; U8 with block scales, BF16, F16, F32 would pass",
                            where(parts.weight), parts.weight->second.dtype));
  }
  if (*encoding != Encoding::fp8 && (parts.scale != nullptr || parts.global != nullptr)) {
    throw Error(Reason::encoding_unsupported,
                fmt::format("{} is {}, but {} scales it", where(parts.weight), parts.weight->second.dtype,
                            where(parts.scale != nullptr ? parts.scale : parts.global)));
  }
  for (const bool transposed : orientations) {
    if (fits(source, *encoding, transposed)) return {*encoding, transposed};
  }
  refuse_form(source, false, *orientations.begin());
}

// out [cols, rows] of `size`-byte elements from in [rows, stride]; in tiles, so that both sides stay in cache.
void transpose(const u8* in, i64 stride, i64 rows, i64 cols, i64 step, i64 size, u8* out) {
  constexpr i64 kTile = 64;
  for (i64 r0 = 0; r0 < rows; r0 += kTile) {
    for (i64 c0 = 0; c0 < cols; c0 += kTile) {
      for (i64 c = c0; c < std::min(cols, c0 + kTile); ++c) {
        for (i64 r = r0; r < std::min(rows, r0 + kTile); ++r) {
          std::memcpy(out + (c * rows + r) * size, in + (r * stride + c * step) * size, static_cast<std::size_t>(size));
        }
      }
    }
  }
}

struct Rows {
  const u8* data;
  i64 stride;  // bytes
};

// Rows of `width` elements of `size` bytes each.
Rows view_rows(const Source& source, bool transposed, const StoredTensor& tensor, i64 width, i64 size, Owned* owned) {
  const u8* base = tensor.data() + source.expert * source.all_rows() * width * size;
  if (!transposed) return {base + source.first_row() * width * size, source.row_step() * width * size};
  u8* copy = owned->take_bytes(source.rows * width * size);
  transpose(base + source.first_row() * size, source.all_rows(), width, source.rows, source.row_step(), size, copy);
  return {copy, width * size};
}

// Which number of a tensor of scalars belongs to the source.
i64 scalar_index(Named named, const Source& source) {
  const Shape& shape = named->second.shape;
  i64 count = 1;
  for (const i64 size : shape) count *= size;
  if (count == 1) return 0;
  const bool stack = source.experts > 0 && !shape.empty() && shape[0] == source.experts;
  if (stack && count == source.experts) return source.expert;
  if (stack && source.halves == 2 && count == 2 * source.experts) return 2 * source.expert + source.half;
  refuse_shape(named, source.experts > 0 ? Shape{source.experts} : Shape{}, "F32");
}

Scalar read_scalar(Named named, bool divides, const Source& source) {
  Scalar out;
  if (named == nullptr) return out;
  const StoredTensor& tensor = named->second;
  const format::Dtype dtype = float_dtype(named);
  const i64 bytes = format::dtype_bytes(dtype);
  out.origin = {tensor.file->name(), named->first, tensor.offset + scalar_index(named, source) * bytes};
  u8 raw[4] = {};
  tensor.file->read(out.origin.offset, bytes, raw);
  out.value = format::read(raw, dtype, 0);
  out.present = true;
  if (divides && out.value != 0.0f) out.value = 1.0f / out.value;
  return out;
}

}  // namespace

void Owned::keep(const std::shared_ptr<const MappedFile>& file) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (std::find(files_.begin(), files_.end(), file) == files_.end()) files_.push_back(file);
}

u8* Owned::take_bytes(i64 count) {
  std::unique_ptr<u8[]> memory(new u8[static_cast<std::size_t>(count)]);
  const std::lock_guard<std::mutex> lock(mutex_);
  return bytes_.emplace_back(std::move(memory)).get();
}

f32* Owned::take_floats(i64 count) {
  std::unique_ptr<f32[]> memory(new f32[static_cast<std::size_t>(count)]);
  const std::lock_guard<std::mutex> lock(mutex_);
  return floats_.emplace_back(std::move(memory)).get();
}

std::string where(Named named) { return fmt::format("{}: tensor {}", named->second.file->name(), quote(named->first)); }

Form examine(const Source& source, bool prefer_transposed) {
  check_parts(source);
  const bool prefer = prefer_transposed && source.experts > 0;
  const std::initializer_list<bool> both_ways = {prefer, !prefer};
  const std::initializer_list<bool> one_way = {false};
  const auto& orientations = source.experts > 0 ? both_ways : one_way;
  return is_packed(*source.parts) ? examine_packed(source, orientations) : examine_dense(source, orientations);
}

Matrix view(const Source& source, const Form& form, Owned* owned) {
  const Parts& parts = *source.parts;
  Matrix out;
  out.rows = source.rows;
  out.cols = source.cols;
  out.encoding = form.encoding;
  const i64 width = weight_width(form.encoding, source.cols);
  const i64 size = format::row_bytes(form.encoding, source.cols) / width;
  const Rows data = view_rows(source, form.transposed, parts.weight->second, width, size, owned);
  out.data = data.data;
  out.data_stride = data.stride;
  owned->keep(parts.weight->second.file);
  if (!format::is_fp4(form.encoding)) return out;
  const i64 blocks = source.cols / format::block_of(form.encoding);
  const Rows scales = view_rows(source, form.transposed, parts.scale->second, blocks, 1, owned);
  out.scales = scales.data;
  out.scales_stride = scales.stride;
  owned->keep(parts.scale->second.file);
  return out;
}

i64 scale_offset(const Source& source, const Form& form, i64 row, i64 block) {
  const i64 blocks = source.cols / format::block_of(form.encoding);
  const i64 stored_row = source.first_row() + row * source.row_step();
  const i64 place = form.transposed ? block * source.all_rows() + stored_row : stored_row * blocks + block;
  return source.parts->scale->second.offset + source.expert * source.all_rows() * blocks + place;
}

ProjectionScales read_scales(const Source& source) {
  const Parts& parts = *source.parts;
  const bool fp8 = parts.weight->second.dtype == "F8_E4M3";  // its one scale is a global
  return {read_scalar(fp8 ? parts.scale : parts.global, !fp8 && parts.global_divides, source),
          read_scalar(parts.input, parts.input_divides, source)};
}

const f32* read_bias(const Source& source, Owned* owned) {
  const Named named = source.parts->bias;
  if (named == nullptr) return nullptr;
  Shape expected{source.all_rows()};
  if (source.experts > 0) expected.insert(expected.begin(), source.experts);
  if (named->second.shape != expected) refuse_shape(named, expected, "BF16, F16 or F32");
  const format::Dtype dtype = float_dtype(named);
  const i64 first = source.expert * source.all_rows() + source.first_row();
  f32* out = owned->take_floats(source.rows);
  for (i64 r = 0; r < source.rows; ++r) {
    out[r] = format::read(named->second.data(), dtype, first + r * source.row_step());
  }
  return out;
}

Matrix copy_dense(const Matrix& dense, const std::string& name, Owned* owned) {
  check_finite(dense, name);
  u8* bytes = owned->take_bytes(dense.rows * dense.data_stride);
  std::memcpy(bytes, dense.data, static_cast<std::size_t>(dense.rows * dense.data_stride));
  Matrix copy = dense;
  copy.data = bytes;
  return copy;
}

Matrix read_dense(Named named, i64 rows, i64 cols, Owned* owned) {
  float_dtype(named);
  if (named->second.shape != Shape{rows, cols}) refuse_shape(named, {rows, cols}, "BF16, F16 or F32");
  Matrix out;
  out.encoding = *dense_encoding(named->second.dtype);
  out.data = named->second.data();
  out.rows = static_cast<i32>(rows);
  out.cols = static_cast<i32>(cols);
  out.data_stride = format::row_bytes(out.encoding, cols);
  return copy_dense(out, where(named), owned);
}

std::vector<f32> read_vector(Named named, i64 count) {
  const format::Dtype dtype = float_dtype(named);
  const Shape& shape = named->second.shape;
  if (shape != Shape{count} && shape != Shape{1, count}) refuse_shape(named, {count}, "BF16, F16 or F32");
  std::vector<f32> out(static_cast<std::size_t>(count));
  for (i64 i = 0; i < count; ++i) out[static_cast<std::size_t>(i)] = format::read(named->second.data(), dtype, i);
  return out;
}

void check_finite(const std::vector<f32>& values, const std::string& name) {
  const auto odd = std::find_if(values.begin(), values.end(), [](f32 value) { return !std::isfinite(value); });
  if (odd == values.end()) return;
  throw Error(Reason::value_not_finite, fmt::format("{} has {} at [{}]", name, *odd, odd - values.begin()));
}

void check_finite(const Matrix& dense, const std::string& name) {
  for (i64 row = 0; row < dense.rows; ++row) {
    for (i64 col = 0; col < dense.cols; ++col) {
      const f64 value = format::weight_at(dense, row, col);
      if (std::isfinite(value)) continue;
      throw Error(Reason::value_not_finite, fmt::format("{} has {} at [{}, {}]", name, value, row, col));
    }
  }
}

}  // namespace fourmoe::checkpoint
