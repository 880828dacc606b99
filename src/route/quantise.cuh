// quantise: values to NVFP4 in one thread, bit for bit format::quantise_row: eight without a division for each, or one.
#pragma once

#include <cuda_fp8.h>

#include "format/quantise.h"
#include "gpu/values.cuh"

namespace fourmoe::route {

struct Quantised {
  u32 codes;   // E2M1, the first value in the low nibble
  u8 scale;    // E4M3 of the block of 16 that two lanes share
  uint4 bf16;  // E2M1 * E4M3
};

// What the values of a block are divided by.
struct Step {
  f32 step;      // scale * global
  f32 scale;     // as a number
  f32 inverse;   // 1 / step, rounded
  f32 negative;  // largest x <= 0 for which x / step rounds to 0: the sign of anything below is kept
};

// Two values whose bf16 are their upper halves.
__device__ __forceinline__ u32 upper_halves(f32 low, f32 high) {
  return __byte_perm(__float_as_uint(low), __float_as_uint(high), 0x7632);
}

// Where divide() is a division: no operand or result of it leaves the normal numbers unless it is far below a code.
__device__ __forceinline__ bool is_ordinary(f32 step, f32 largest) {
  return step >= 0x1p-100f && step <= 0x1p100f && largest <= step * 0x1p20f;
}

// x / step, correctly rounded: x * (1 / step) corrected twice (Markstein's theorem asks for a quotient within one ulp
// and a correctly rounded inverse).
__device__ __forceinline__ f32 divide(f32 x, const Step& s) {
  f32 q = __fmul_rn(x, s.inverse);
  q = fmaf(fmaf(-q, s.step, x), s.inverse, q);
  return fmaf(fmaf(-q, s.step, x), s.inverse, q);
}

// E2M1 of a magnitude as code and number. Adding 2^22, 2^23, 2^24 leaves steps of 1/2, 1, 2 with ties to even; what is
// added beyond those makes the low bits the code.
__device__ __forceinline__ u32 round_e2m1(f32 magnitude, f32* value) {
  const f32 most = fminf(magnitude, 6.0f);
  const f32 shift = most < 2.0f ? 0x1p22f : most < 4.0f ? 0x1p23f + 2.0f : 0x1p24f + 8.0f;
  const f32 sum = __fadd_rn(most, shift);
  *value = __fadd_rn(sum, -shift);
  return __float_as_uint(sum) & 7u;
}

__device__ __forceinline__ u32 quantise_ordinary(f32 x, const Step& s, f32* value) {
  const u32 code = round_e2m1(divide(fabsf(x), s), value);
  const bool negative = x < s.negative;
  *value = (negative ? -*value : *value) * s.scale;
  return negative ? code | 8u : code;
}

__device__ __forceinline__ u32 quantise_any(f32 x, const Step& s, f32* value) {
  const u32 code = format::to_e2m1(x / s.step);
  *value = gpu::from_e2m1(code) * s.scale;
  return code;
}

// The bits of a magnitude: ordered like magnitudes, and a NaN's are the largest.
__device__ __forceinline__ u32 magnitude_of(f32 x) { return __float_as_uint(x) & 0x7fffffffu; }

// Of a block whose largest value has this magnitude: format::block_scale, by the machine's conversion.
__device__ __forceinline__ u8 block_scale(u32 largest, f32 global) {
  const f32 scale = __uint_as_float(largest) / (format::kE2m1Max * global);
  const f32 least = scale == 0.0f ? 1.0f : scale < 0x1p-9f ? 0x1p-9f : scale;
  return __nv_cvt_float_to_fp8(least, __NV_SATFINITE, __NV_E4M3);
}

// And what its values are divided by.
__device__ __forceinline__ Step step_of(u32 largest, f32 global, u8* scale_byte) {
  *scale_byte = block_scale(largest, global);
  const f32 scale = format::from_e4m3(*scale_byte);
  const f32 step = scale * global;
  return {step, scale, 1.0f / step, -__fmul_rd(__fmul_rd(step, 0x1p-75f), 0x1p-75f)};
}

// E2M1 * E4M3 of a value: what quantise_octet makes of it, in fewer instructions that take longer.
__device__ __forceinline__ f32 requantise(f32 x, f32 step, f32 scale) {
  const f32 quotient = x / step;
  f32 value;
  round_e2m1(fabsf(quotient), &value);
  if (isnan(quotient)) value = 0.0f;
  return (quotient < 0.0f ? -value : value) * scale;
}

template <bool kOrdinary>
__device__ __forceinline__ void quantise_values(const f32 (&x)[8], const Step& s, Quantised* out) {
  f32 value[8];
  out->codes = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const u32 code = kOrdinary ? quantise_ordinary(x[i], s, &value[i]) : quantise_any(x[i], s, &value[i]);
    out->codes |= code << 4 * i;
  }
  out->bf16 = {upper_halves(value[0], value[1]), upper_halves(value[2], value[3]), upper_halves(value[4], value[5]),
               upper_halves(value[6], value[7])};
}

// All lanes call it.
__device__ __forceinline__ Quantised quantise_octet(const f32 (&x)[8], f32 global) {
  u32 bits = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) bits = max(bits, magnitude_of(x[i]));
  bits = max(bits, __shfl_xor_sync(0xffffffffu, bits, 1));
  Quantised out;
  const Step s = step_of(bits, global, &out.scale);
  if (is_ordinary(s.step, __uint_as_float(bits))) quantise_values<true>(x, s, &out);
  else quantise_values<false>(x, s, &out);
  return out;
}

__device__ __forceinline__ uint4 decode_octet(u32 codes, u8 scale) {
  const f32 factor = format::from_e4m3(scale);
  f32 value[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) value[i] = gpu::from_e2m1(codes >> 4 * i) * factor;
  return {upper_halves(value[0], value[1]), upper_halves(value[2], value[3]), upper_halves(value[4], value[5]),
          upper_halves(value[6], value[7])};
}

}  // namespace fourmoe::route
