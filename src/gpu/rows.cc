#include "gpu/rows.h"

#include <fmt/format.h>

namespace fourmoe::gpu {
namespace {

Status check_alignment(std::string_view name, const format::Tensor& rows, i64 alignment) {
  const auto begin = static_cast<i64>(reinterpret_cast<std::uintptr_t>(rows.data) % alignment);
  if (begin != 0) {
    return refuse(Reason::argument_invalid,
                  fmt::format("{} begins {} bytes after a multiple of {}", name, begin, alignment));
  }
  const i64 apart = rows.stride * format::dtype_bytes(rows.dtype);
  if (rows.rows > 1 && apart % alignment != 0) {
    return refuse(Reason::stride_unsupported,
                  fmt::format("{} has rows {} bytes apart, expected a multiple of {}", name, apart, alignment));
  }
  return {};
}

}  // namespace

Status check_rows(std::string_view name, const format::Tensor& rows) {
  using format::Dtype;
  if (rows.dtype != Dtype::f32 && rows.dtype != Dtype::f16 && rows.dtype != Dtype::bf16) {
    return refuse(Reason::dtype_unsupported,
                  fmt::format("{} is {}, expected f32, f16 or bf16", name, format::dtype_name(rows.dtype)));
  }
  return check_alignment(name, rows, kRowAlignment);
}

Status check_codes(std::string_view name, const format::Tensor& rows) {
  if (rows.dtype != format::Dtype::u8) {
    return refuse(Reason::dtype_unsupported,
                  fmt::format("{} is {}, expected u8", name, format::dtype_name(rows.dtype)));
  }
  return check_alignment(name, rows, kCodeAlignment);
}

}  // namespace fourmoe::gpu
