// Number: the scalar types of the project and the conversions between f32 and the small floats.
//
// Rounding is to nearest, ties to even, everywhere. Conversions work on bits, so they give the same result
// on every compiler and at every instruction level.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

// Functions that run on host and device alike.
#if defined(__CUDACC__)
#define FOURMOE_HD __host__ __device__ __forceinline__
#else
#define FOURMOE_HD inline
#endif

namespace fourmoe {

using u8 = std::uint8_t;
using i8 = std::int8_t;
using u16 = std::uint16_t;
using u32 = std::uint32_t;
using u64 = std::uint64_t;
using i32 = std::int32_t;
using i64 = std::int64_t;
using f32 = float;
using f64 = double;

namespace format {

// bf16: the upper half of an f32.
FOURMOE_HD f32 from_bf16(u16 bits) { return std::bit_cast<f32>(u32{bits} << 16); }

FOURMOE_HD u16 to_bf16(f32 value) {
  const u32 bits = std::bit_cast<u32>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<u16>((bits >> 16) | 0x40u);  // NaN stays NaN
  return static_cast<u16>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// f16: 1 sign, 5 exponent (bias 15), 10 mantissa bits.
FOURMOE_HD f32 from_f16(u16 bits) {
  const u32 sign = u32{bits & 0x8000u} << 16;
  const u32 magnitude = bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return std::bit_cast<f32>(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // Placing the bits 13 higher leaves the exponent short by 127 - 15; the product restores it and subnormals.
  const f32 scaled = std::bit_cast<f32>(magnitude << 13) * 0x1p112f;
  return std::bit_cast<f32>(sign | std::bit_cast<u32>(scaled));
}

// Overflow gives infinity, as IEEE 754 demands; to_f16_saturated stops at 65504.
FOURMOE_HD u16 to_f16(f32 value) {
  const u32 bits = std::bit_cast<u32>(value);
  const u32 sign = (bits >> 16) & 0x8000u;
  const u32 magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<u16>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<u16>(sign | 0x7c00u);  // 65520 and above
  if (magnitude < 0x38800000u) {                                          // below 2^-14: subnormal in f16
    const f32 shifted = std::bit_cast<f32>(magnitude) + 0.5f;             // ulp of 0.5f is 2^-24, f16's too
    return static_cast<u16>(sign | (std::bit_cast<u32>(shifted) - 0x3f000000u));
  }
  const u32 rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return static_cast<u16>(sign | ((rounded - 0x38000000u) >> 13));
}

FOURMOE_HD u16 to_f16_saturated(f32 value) {
  if (value > 65504.0f) return 0x7bffu;
  if (value < -65504.0f) return 0xfbffu;
  return to_f16(value);
}

// An infinity as the largest f16, as to_f16_saturated would have stored it.
FOURMOE_HD f32 from_f16_saturated(u16 half) {
  if ((half & 0x7fffu) == 0x7c00u) return (half & 0x8000u) != 0 ? -65504.0f : 65504.0f;
  return from_f16(half);
}

// E4M3 ("fn": no infinities): 1 sign, 4 exponent (bias 7), 3 mantissa bits; 0x7f and 0xff are NaN; largest 448.
FOURMOE_HD f32 from_e4m3(u8 byte) {
  const u32 magnitude = byte & 0x7fu;
  const f32 sign = (byte & 0x80u) != 0 ? -1.0f : 1.0f;
  if (magnitude == 0x7fu) return sign * std::bit_cast<f32>(0x7fc00000u);
  // Bits 20 higher leave the exponent short by 127 - 7; the product restores it and makes subnormals normal.
  return sign * std::bit_cast<f32>(magnitude << 20) * 0x1p120f;
}

// Saturates at 448; NaN gives 0x7f.
FOURMOE_HD u8 to_e4m3(f32 value) {
  const u32 bits = std::bit_cast<u32>(value);
  const u32 sign = (bits >> 24) & 0x80u;
  const u32 magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<u8>(sign | 0x7fu);
  if (magnitude >= 0x43e00000u) return static_cast<u8>(sign | 0x7eu);  // 448 and above
  if (magnitude < 0x3c800000u) {                                       // below 2^-6: subnormal in E4M3
    const f32 shifted = std::bit_cast<f32>(magnitude) + 0x1p14f;       // ulp of 0x1p14f is 2^-9, E4M3's too
    return static_cast<u8>(sign | (std::bit_cast<u32>(shifted) - 0x46800000u));
  }
  const u32 rounded = magnitude + 0x7ffffu + ((magnitude >> 20) & 1u);
  return static_cast<u8>(sign | ((rounded - 0x3c000000u) >> 20));
}

// UE5M3: an E4M3 scale without its sign as 5 exponent (bias 15) and 3 mantissa bits. The f32 with bits byte << 20,
// times 2^112, is its value: subnormals of E4M3 become normal, so kernels decode by shifts alone. Lossless; NaN has no
// image.
inline u8 to_ue5m3(u8 e4m3) {
  return static_cast<u8>(std::bit_cast<u32>(from_e4m3(static_cast<u8>(e4m3 & 0x7fu)) * 0x1p-112f) >> 20);
}

inline u8 from_ue5m3(u8 ue5m3) { return to_e4m3(std::bit_cast<f32>(u32{ue5m3} << 20) * 0x1p112f); }

// E8M0: 2^(byte - 127); 255 is NaN.
inline f32 from_e8m0(u8 byte) {
  if (byte == 255) return std::bit_cast<f32>(0x7fc00000u);
  return byte == 0 ? 0x1p-127f : std::bit_cast<f32>(u32{byte} << 23);
}

// A scalar read from memory of any alignment.
template <class T>
T load(const void* address) {
  T value;
  std::memcpy(&value, address, sizeof value);
  return value;
}

}  // namespace format
}  // namespace fourmoe
