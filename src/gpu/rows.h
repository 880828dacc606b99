// rows: what kernels demand of rows that they take several elements at a time.
#pragma once

#include <string_view>

#include "format/tensor.h"
#include "status.h"

namespace fourmoe::gpu {

inline constexpr i64 kRowAlignment = 16;  // bytes
inline constexpr i64 kCodeAlignment = 4;  // bytes: eight codes

// Refuses rows that do not begin at multiples of 16 bytes, or that hold no floats.
Status check_rows(std::string_view name, const format::Tensor& rows);

// Refuses rows of E2M1 pairs, u8, that do not begin at multiples of 4 bytes.
Status check_codes(std::string_view name, const format::Tensor& rows);

}  // namespace fourmoe::gpu
