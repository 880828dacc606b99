// rows: what kernels demand of rows that they take 16 bytes at a time.
#pragma once

#include <string_view>

#include "format/tensor.h"
#include "status.h"

namespace fourmoe::gpu {

inline constexpr i64 kRowAlignment = 16;  // bytes

// Refuses rows that do not begin at multiples of 16 bytes, or that hold no floats.
Status check_rows(std::string_view name, const format::Tensor& rows);

}  // namespace fourmoe::gpu
