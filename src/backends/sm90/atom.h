// Atom of the Hopper room, the part that host and device share: how the codes of one thread lie in its words, so that
// the kernel gets bf16 operands by masks and shifts alone.
//
// A wgmma m64k16 A operand is four bf16x2 registers a thread: rows g and g + 8, columns 2t, 2t+1 and 2t+8, 2t+9
// (PTX ISA, "wgmma.mma_async register fragments"). Two K steps, 16 weights, are 64 bits of codes: words w0 and w1.
// A code in place is sign at bit 15, magnitude at bits 8..6 of a half, kCodeMask: read as bf16 it is E2M1 * 2^-126,
// subnormals included. Three codes of each half of a word are one shift and one mask away; no fourth translate of the
// mask fits beside three (it does not tile 16 bits), but the bits left over in two words, laid into one, make exactly
// two more. Counted: 8 masks, 7 shifts and 1 select for 16 weights. Searched over all sets of shifts; this one has the
// fewest rotations (3), the others are plain left shifts.
#pragma once

#include <array>

#include "format/number.h"

#if defined(__CUDACC__)
#include "gpu/isa/bits.cuh"
#endif

namespace fourmoe::sm90 {

inline constexpr u32 kCodeMask = 0x81c081c0u;
inline constexpr u32 kSpareMask = 0x06030603u;  // what shifts 0, 4 and 10 of the code mask leave in w0

FOURMOE_HD u32 rotate_left(u32 word, int bits) {
#if defined(__CUDA_ARCH__)
  return __funnelshift_l(word, word, bits);
#else
  return word << bits | word >> (32 - bits);
#endif
}

// (a & mask) | high and: bits of a where mask is set, of b elsewhere. One instruction each on the device.
FOURMOE_HD u32 mask_or(u32 a, u32 mask, u32 high) {
#if defined(__CUDA_ARCH__)
  return gpu::isa::mask_or(a, mask, high);
#else
  return (a & mask) | high;
#endif
}

FOURMOE_HD u32 select(u32 a, u32 b, u32 mask) {
#if defined(__CUDA_ARCH__)
  return gpu::isa::select(a, b, mask);
#else
  return (a & mask) | (b & ~mask);
#endif
}

// Left shifts of codes: as such, or as products with factors that nvcc does not know, such as a kernel's parameters.
// Logic and shifts have one pipe, which a loop of both keeps busy; products have another.
struct Shifts {
  template <int kBits>
  FOURMOE_HD u32 left(u32 word) const {
    return word << kBits;
  }
};

struct Products {
  u32 factors[4] = {1, 4, 16, 64};

  template <int kBits>
  FOURMOE_HD u32 left(u32 word) const {
    return word * factors[kBits / 2];
  }
};

// Words of two K steps -> 8 registers of codes in place: a[0..3] of the first step, a[4..7] of the second.
template <class Shift = Shifts>
FOURMOE_HD void split_codes(u32 w0, u32 w1, u32* a, const Shift& shift = {}) {
  a[0] = w0 & kCodeMask;
  a[1] = shift.template left<4>(w0) & kCodeMask;
  a[2] = rotate_left(w0, 10) & kCodeMask;
  a[4] = w1 & kCodeMask;
  a[5] = shift.template left<4>(w1) & kCodeMask;
  a[6] = rotate_left(w1, 10) & kCodeMask;
  const u32 spare = select(w0, shift.template left<2>(w1), kSpareMask);
  a[3] = shift.template left<6>(spare) & kCodeMask;
  a[7] = rotate_left(spare, 12) & kCodeMask;
}

// Scales of a thread's two rows for two K steps share a word: as UE5M3 bytes b0 (row g), b1 (row g + 8) of the first
// step and b2, b3 of the second. In place, a byte's bits are exponent and mantissa of a bf16: byte * 2^80 with these
// high bits.
inline constexpr u32 kScaleMask = 0x0ff00ff0u;
inline constexpr u32 kScaleHigh = 0x60006000u;
inline constexpr int kProductExponent = -46;  // code 2^-126 times scale 2^80: what the accumulator lacks

FOURMOE_HD u32 scale_pair(u32 word, int step) {
  return mask_or(step == 0 ? word : rotate_left(word, 8), kScaleMask, kScaleHigh);
}

// MXFP4's scales are powers of two: 7 bits are the low bits of a bf16's exponent, whose high bit is set: 2^(1 + bits).
// All 127 of them times the least code are normal numbers.
inline constexpr u32 kPowerMask = 0x3f803f80u;
inline constexpr u32 kPowerHigh = 0x40004000u;
inline constexpr int kPowerExponent = -125;  // code 2^-126 times the power of bits 0

FOURMOE_HD u32 power_pair(u32 word, int step) {
  return mask_or(step == 0 ? word : rotate_left(word, 8), kPowerMask, kPowerHigh);
}

// The inverses, for packers and tests.

// A byte of two codes, the low nibble first, in place: both halves of a register.
FOURMOE_HD u32 place_codes(u32 pair) {
  return (pair & 0x08u) << 12 | (pair & 0x07u) << 6 | (pair & 0x80u) << 24 | (pair & 0x70u) << 18;
}

// Registers of codes in place, as split_codes makes them -> the words of two K steps.
FOURMOE_HD void merge_codes(const u32* a, u32* w0, u32* w1) {
  const u32 spare = a[3] >> 6 | rotate_left(a[7], 20);
  *w0 = a[0] | a[1] >> 4 | rotate_left(a[2], 22) | (spare & kSpareMask);
  *w1 = a[4] | a[5] >> 4 | rotate_left(a[6], 22) | (spare & ~kSpareMask) >> 2;
}

// What each value of each code contributes to the two words (w1 : w0): [register][half][code].
using CodeTable = std::array<std::array<std::array<u64, 16>, 2>, 8>;

inline CodeTable make_code_table() {
  CodeTable table{};
  for (int bit = 0; bit < 64; ++bit) {  // set one, look where it goes
    u32 out[8];
    split_codes(bit < 32 ? 1u << bit : 0u, bit < 32 ? 0u : 1u << (bit - 32), out);
    for (int place = 0; place < 16; ++place) {
      const u32 part = out[place / 2] >> (16 * (place % 2)) & 0xffffu;
      const u32 code = (part >> 12 & 8u) | (part >> 6 & 7u);
      for (u32 value = 0; value < 16; ++value) {
        if ((value & code) != 0) table[place / 2][place % 2][value] |= u64{1} << bit;
      }
    }
  }
  return table;
}

// Codes a[register][half] (4 bits each) -> the two words.
inline std::array<u32, 2> join_codes(const std::array<std::array<u8, 2>, 8>& a) {
  static const CodeTable table = make_code_table();
  u64 words = 0;
  for (int r = 0; r < 8; ++r) words |= table[r][0][a[r][0] & 15] | table[r][1][a[r][1] & 15];
  return {static_cast<u32>(words), static_cast<u32>(words >> 32)};
}

// UE5M3 bytes of (row g, row g + 8) for two K steps -> the word that scale_pair reads.
FOURMOE_HD u32 join_scales(u8 g0, u8 h0, u8 g1, u8 h1) {
  const u32 second = u32{g1} << 4 | u32{h1} << 20;
  return (u32{g0} << 4 | u32{h0} << 20) | (second >> 8 | second << 24);
}

// Powers likewise -> the word that power_pair reads.
FOURMOE_HD u32 join_powers(u8 g0, u8 h0, u8 g1, u8 h1) {
  const u32 second = u32{g1} << 7 | u32{h1} << 23;
  return (u32{g0} << 7 | u32{h0} << 23) | (second >> 8 | second << 24);
}

}  // namespace fourmoe::sm90
