// quantise: dense weights to NVFP4, bit for bit as nvidia-modelopt exports them.
//
// The recipe, its order of operations and its source are in tests/fixtures/README.md; format/quantise.h has the part
// that a row needs, this file the global scale and the walk over a matrix.
#pragma once

#include <string_view>

#include "executor.h"
#include "format/tensor.h"

namespace fourmoe::weights {

// Largest magnitude of a dense matrix (bf16, f16 or f32), in any number of threads. Throws Error(value_not_finite) with
// `name`, row and column of the first NaN or infinity, dtype_unsupported for other encodings.
f32 find_amax(const format::Matrix& dense, std::string_view name, Executor& executor);

// weight_scale_2 = amax / 2688, finite and positive: 1 for a matrix of zeros, which modelopt leaves undefined (0/0),
// and the smallest f32 where the quotient would vanish.
f32 global_of(f32 amax);

// [rows, cols] dense to codes [rows, cols/2] u8, E2M1 pairs, low nibble first, and scales [rows, cols/16] u8, E4M3;
// both caller's. cols is a multiple of 16. Rows are independent, so the result does not depend on the executor.
void quantise(const format::Matrix& dense, f32 global, Executor& executor, u8* codes, u8* scales);

}  // namespace fourmoe::weights
