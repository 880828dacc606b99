// Atom of the Hopper room, the part that host and device share: how the codes of one thread lie in its words, so that the
// kernel gets bf16 operands by masks and shifts alone.
//
// A wgmma m64k16 A operand is four bf16x2 registers a thread: rows g and g + 8, columns 2t, 2t+1 and 2t+8, 2t+9
// (PTX ISA, "wgmma.mma_async register fragments"). Two K steps, 16 weights, are 64 bits of codes: words w0 and w1.
// A code in place is sign at bit 15, magnitude at bits 8..6 of a half, kCodeMask: read as bf16 it is E2M1 * 2^-126,
// subnormals included. Three codes of each half of a word are one shift and one mask away; no fourth translate of the
// mask fits beside three (it does not tile 16 bits), but the bits left over in two words, laid into one, make exactly two
// more. Counted: 8 masks, 7 shifts and 1 select for 16 weights. Searched over all sets of shifts; this one has the fewest
// rotations (3), the others are plain left shifts.
#pragma once

#include <array>
#include <cstdint>

#if defined(__CUDACC__)
#include "gpu/isa/bits.cuh"
#define FOURMOE_HD __host__ __device__ __forceinline__
#else
#define FOURMOE_HD inline
#endif

namespace fourmoe::sm90 {

inline constexpr std::uint32_t kCodeMask = 0x81c081c0u;
inline constexpr std::uint32_t kSpareMask = 0x06030603u;  // what shifts 0, 4 and 10 of the code mask leave in w0

FOURMOE_HD std::uint32_t rotate_left(std::uint32_t word, int bits) {
#if defined(__CUDA_ARCH__)
  return __funnelshift_l(word, word, bits);
#else
  return word << bits | word >> (32 - bits);
#endif
}

// (a & mask) | high and: bits of a where mask is set, of b elsewhere. One instruction each on the device.
FOURMOE_HD std::uint32_t mask_or(std::uint32_t a, std::uint32_t mask, std::uint32_t high) {
#if defined(__CUDA_ARCH__)
  return gpu::isa::mask_or(a, mask, high);
#else
  return (a & mask) | high;
#endif
}

FOURMOE_HD std::uint32_t select(std::uint32_t a, std::uint32_t b, std::uint32_t mask) {
#if defined(__CUDA_ARCH__)
  return gpu::isa::select(a, b, mask);
#else
  return (a & mask) | (b & ~mask);
#endif
}

// Words of two K steps -> 8 registers of codes in place: a[0..3] of the first step, a[4..7] of the second.
FOURMOE_HD void split_codes(std::uint32_t w0, std::uint32_t w1, std::uint32_t* a) {
  a[0] = w0 & kCodeMask;
  a[1] = w0 << 4 & kCodeMask;
  a[2] = rotate_left(w0, 10) & kCodeMask;
  a[4] = w1 & kCodeMask;
  a[5] = w1 << 4 & kCodeMask;
  a[6] = rotate_left(w1, 10) & kCodeMask;
  const std::uint32_t spare = select(w0, w1 << 2, kSpareMask);
  a[3] = spare << 6 & kCodeMask;
  a[7] = rotate_left(spare, 12) & kCodeMask;
}

// Scales of a thread's two rows for two K steps share a word: as UE5M3 bytes b0 (row g), b1 (row g + 8) of the first step
// and b2, b3 of the second. In place, a byte's bits are exponent and mantissa of a bf16: byte * 2^80 with these high bits.
inline constexpr std::uint32_t kScaleMask = 0x0ff00ff0u;
inline constexpr std::uint32_t kScaleHigh = 0x60006000u;
inline constexpr int kProductExponent = -46;  // code 2^-126 times scale 2^80: what the accumulator lacks

FOURMOE_HD std::uint32_t scale_pair(std::uint32_t word, int step) {
  return mask_or(step == 0 ? word : rotate_left(word, 8), kScaleMask, kScaleHigh);
}

// The inverses, for packers and tests.

// Codes a[register][half] (4 bits each) -> the two words.
inline std::array<std::uint32_t, 2> join_codes(const std::array<std::array<std::uint8_t, 2>, 8>& a) {
  std::array<std::uint32_t, 2> words{};
  // Each bit of each word lands in one bit of one register: set one, look where it goes.
  for (int bit = 0; bit < 64; ++bit) {
    std::uint32_t out[8];
    split_codes(bit < 32 ? 1u << bit : 0u, bit < 32 ? 0u : 1u << (bit - 32), out);
    for (int r = 0; r < 8; ++r) {
      for (int half = 0; half < 2; ++half) {
        const std::uint32_t part = out[r] >> (16 * half) & 0xffffu;
        const std::uint32_t code = (part >> 12 & 8u) | (part >> 6 & 7u);
        if ((a[r][half] & code) != 0) words[bit / 32] |= 1u << (bit % 32);
      }
    }
  }
  return words;
}

// UE5M3 bytes of (row g, row g + 8) for two K steps -> the word that scale_pair reads.
inline std::uint32_t join_scales(std::uint8_t g0, std::uint8_t h0, std::uint8_t g1, std::uint8_t h1) {
  const std::uint32_t second = std::uint32_t{g1} << 4 | std::uint32_t{h1} << 20;
  return (std::uint32_t{g0} << 4 | std::uint32_t{h0} << 20) | (second >> 8 | second << 24);
}

}  // namespace fourmoe::sm90
