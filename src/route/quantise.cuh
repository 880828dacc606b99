// quantise: values to the numbers of NVFP4, those of format::quantise_row's codes and scales, in one thread: eight
// without a division for each, or one.
#pragma once

#include <cuda_fp8.h>

#include "format/quantise.h"
#include "gpu/values.cuh"

namespace fourmoe::route {

// What the values of a block are divided by.
struct Step {
  f32 step;     // scale * global
  f32 scale;    // as a number
  f32 inverse;  // 1 / step, rounded
};

// Two values whose bf16 are their upper halves.
__device__ __forceinline__ u32 upper_halves(f32 low, f32 high) {
  return __byte_perm(__float_as_uint(low), __float_as_uint(high), 0x7632);
}

// Where quantise_ordinary() is right: no operand or result of divide() leaves the normal numbers unless it is far below
// a code, and no quotient is beyond what rounds to 6. Of a scale that is neither subnormal nor 448 they are 6.4 at
// most.
__device__ __forceinline__ bool is_ordinary(f32 step, f32 largest) {
  return step >= 0x1p-100f && step <= 0x1p100f && largest <= step * 6.5f;
}

// x / step for round_e2m1(): x * (1 / step), corrected once. Correctly rounded within three ulps of every tie of E2M1,
// for every step (DeviceRows.TiesOfEveryStep); elsewhere an ulp more or less makes no other code.
__device__ __forceinline__ f32 divide(f32 x, const Step& s) {
  const f32 q = __fmul_rn(x, s.inverse);
  return fmaf(fmaf(-q, s.step, x), s.inverse, q);
}

// The nearest E2M1 of a quotient below 7 in magnitude, ties to even codes; zeros are positive. Beside 1.5 * 2^22 times
// the quotient's power of two, from 1 on, an f32 has steps of half that power: what E2M1 has there.
__device__ __forceinline__ f32 round_e2m1(f32 quotient) {
  const f32 power = __uint_as_float(__float_as_uint(fmaxf(fabsf(quotient), 1.0f)) & 0x7f800000u);
  return fmaf(power, -0x1.8p22f, fmaf(power, 0x1.8p22f, quotient));
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
__device__ __forceinline__ Step step_of(u8 scale_byte, f32 global) {
  const f32 scale = format::from_e4m3(scale_byte), step = scale * global;
  return {step, scale, 1.0f / step};
}

// E2M1 * E4M3 of a value: what quantise_octet makes of it, in fewer instructions that take longer.
__device__ __forceinline__ f32 requantise(f32 x, f32 step, f32 scale) {
  const f32 quotient = x / step;  // 0 / 0 and inf / inf are code 0; a NaN in the block shows by its scale
  return round_e2m1(isnan(quotient) ? 0.0f : fminf(fmaxf(quotient, -6.0f), 6.0f)) * scale;
}

// The magnitude, as magnitude_of, of the block's largest value. All lanes call it.
__device__ __forceinline__ u32 largest_of(const f32 (&x)[8]) {
  u32 bits = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) bits = max(bits, magnitude_of(x[i]));
  return max(bits, __shfl_xor_sync(0xffffffffu, bits, 1));
}

__device__ __forceinline__ uint4 quantise_ordinary(const f32 (&x)[8], const Step& s) {
  const u32 factor = upper_halves(s.scale, s.scale);
  u32 pairs[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const f32 low = round_e2m1(divide(x[2 * i], s)), high = round_e2m1(divide(x[2 * i + 1], s));
    pairs[i] = gpu::multiply_bf16(upper_halves(low, high), factor);
  }
  return {pairs[0], pairs[1], pairs[2], pairs[3]};
}

__device__ __forceinline__ uint4 quantise_any(const f32 (&x)[8], const Step& s) {
  f32 value[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) value[i] = gpu::from_e2m1(format::to_e2m1(x[i] / s.step)) * s.scale + 0.0f;
  return {upper_halves(value[0], value[1]), upper_halves(value[2], value[3]), upper_halves(value[4], value[5]),
          upper_halves(value[6], value[7])};
}

// E2M1 * E4M3 in bf16, by the step of a block whose largest value has this magnitude. Zeros are positive.
__device__ __forceinline__ uint4 quantise_octet(const f32 (&x)[8], u32 largest, const Step& s) {
  if (is_ordinary(s.step, __uint_as_float(largest))) return quantise_ordinary(x, s);
  return quantise_any(x, s);
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
