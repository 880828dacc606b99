// Atom of the Hopper room, the device part: words of codes and scales to wgmma operands.
#pragma once

#include <cuda_bf16.h>

#include "backends/sm90/atom.h"
#include "format/number.h"

namespace fourmoe::sm90 {

// a * (low or high half of s), both halves of a; exact for codes in place and scales in place. The choice of the half
// is an operand selector of HMUL2, not an instruction.
template <int kHalf>
__device__ __forceinline__ u32 multiply_half(u32 a, u32 s) {
  const __nv_bfloat162 pair = *reinterpret_cast<const __nv_bfloat162*>(&s);
  const __nv_bfloat162 scale = kHalf == 0 ? __low2bfloat162(pair) : __high2bfloat162(pair);
  const __nv_bfloat162 product = __hmul2_rn(*reinterpret_cast<const __nv_bfloat162*>(&a), scale);
  return *reinterpret_cast<const u32*>(&product);
}

// Two K steps of one thread: words w0, w1 and the word of their four scales -> operands a[0] and a[1].
template <bool kPowers, class Shift = Shifts>
__device__ __forceinline__ void unpack(u32 w0, u32 w1, u32 scales, u32 (&a)[2][4], const Shift& shift = {}) {
  u32 codes[8];
  split_codes(w0, w1, codes, shift);
#pragma unroll
  for (int step = 0; step < 2; ++step) {
    const u32 pair = kPowers ? power_pair(scales, step) : scale_pair(scales, step);
    a[step][0] = multiply_half<0>(codes[4 * step], pair);
    a[step][1] = multiply_half<1>(codes[4 * step + 1], pair);
    a[step][2] = multiply_half<0>(codes[4 * step + 2], pair);
    a[step][3] = multiply_half<1>(codes[4 * step + 3], pair);
  }
}

}  // namespace fourmoe::sm90
