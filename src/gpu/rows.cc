#include "gpu/rows.h"

#include <fmt/format.h>

namespace fourmoe::gpu {

Status check_rows(std::string_view name, const format::Tensor& rows) {
  using format::Dtype;
  if (rows.dtype != Dtype::f32 && rows.dtype != Dtype::f16 && rows.dtype != Dtype::bf16) {
    return refuse(Reason::dtype_unsupported,
                  fmt::format("{} is {}, expected f32, f16 or bf16", name, format::dtype_name(rows.dtype)));
  }
  const auto begin = reinterpret_cast<std::uintptr_t>(rows.data);
  if (begin % kRowAlignment != 0) {
    return refuse(Reason::argument_invalid,
                  fmt::format("{} begins {} bytes after a multiple of {}", name, begin % kRowAlignment, kRowAlignment));
  }
  const i64 apart = rows.stride * format::dtype_bytes(rows.dtype);
  if (rows.rows > 1 && apart % kRowAlignment != 0) {
    return refuse(Reason::stride_unsupported,
                  fmt::format("{} has rows {} bytes apart, expected a multiple of {}", name, apart, kRowAlignment));
  }
  return {};
}

}  // namespace fourmoe::gpu
