// mma: products of small matrices in f64 on the tensor core, rounded once a product and sum.
#pragma once

#include "format/number.h"

namespace fourmoe::gpu::isa {

// sum [8, 8] += a [8, 4] * b [8, 4]^T. Lane 4r + k holds a[r][k] and b[r][k], and sum[r][2k] and sum[r][2k + 1].
__device__ __forceinline__ void multiply_add(f64 a, f64 b, f64 (&sum)[2]) {
  asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
               : "+d"(sum[0]), "+d"(sum[1])
               : "d"(a), "d"(b));
}

}  // namespace fourmoe::gpu::isa
