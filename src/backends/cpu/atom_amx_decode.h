// Panels to tiles of bf16: what atom_amx.cc multiplies. One struct a panel format:
//   Scales spread(group's scale bytes, block)   the block's 16 scales, twice each, as decode_half takes them
//   decode_half(codes, scales, out)             eight columns of 16 rows: a word of `codes` is a row, its nibble j
//                                               column j; writes columns (0, 4), (1, 5), (2, 6) and (3, 7) as pairs of
//                                               bf16, a row of a tile each
//   Watch                                       notes of a group's scales what decoding cannot hold
// Included once, after <immintrin.h>; everything is unnamed, as in atom_kernel.h.
#pragma once

#include "backends/cpu/atom.h"
#include "backends/cpu/atom_inline.h"

namespace fourmoe::cpu {
namespace {

constexpr int kStepBytes = 64;               // 32 bf16: a row of a tile
constexpr int kBlockBytes = 9 * kPanelRows;  // codes and scales
constexpr int kGroupBlocks = 4;
constexpr int kGroupBytes = kGroupBlocks * kBlockBytes;
constexpr int kDecodedBlock = 16 * kPanelRows * 2;  // bytes
constexpr int kDecodedStep = 2 * kDecodedBlock;     // a tile
constexpr __mmask64 kUpperBytes = 0xaaaaaaaaaaaaaaaaull;

// For each block of a group, the byte of its scales that each byte of a vector takes: 16 rows, four times each.
struct alignas(64) Spread {
  unsigned char at[kGroupBlocks][64];

  constexpr Spread() : at() {
    for (int i = 0; i < kGroupBlocks * 64; ++i) at[i / 64][i % 64] = static_cast<unsigned char>(i / 4);
  }
};
constexpr Spread kSpread;

// Scale bytes of a block's rows, each in the upper bytes of its row's two words.
FOURMOE_INLINE __m512i upper_bytes(__m512i scales, int block) {
  return _mm512_maskz_permutexvar_epi8(kUpperBytes, _mm512_load_si512(kSpread.at[block]), scales);
}

// E2M1 times UE5M3 is computed as f16 and moved 3 bits down, which is bf16 times 2^-112: the two biases differ by 112.
struct Nvfp4 {
  using Scales = __m512h;
  static constexpr int kRaise = 96;    // tokens are held times 2^96, so that small products do not end below 2^-126
  static constexpr int kLarge = 31;    // unless one of the row's values is at least 2^31
  static constexpr int kWeight = 112;  // weights are held times 2^-112

  // Every scale is held exactly.
  struct Watch {
    FOURMOE_INLINE void see(__m512i) {}
    FOURMOE_INLINE bool any() const { return false; }
  };

  FOURMOE_INLINE static Scales spread(__m512i scales, int block) {
    return _mm512_castsi512_ph(_mm512_srli_epi16(upper_bytes(scales, block), 1));
  }

  FOURMOE_INLINE static void decode_half(const std::byte* codes, Scales scale, std::byte* out) {
    const __m512i table = _mm512_load_si512(kTable);
    const __m512i keep = _mm512_set1_epi16(static_cast<short>(0x8fff));  // the shift repeats the sign
    const __m512i words = _mm512_load_si512(codes);
    const __m512i at_upper[4] = {_mm512_slli_epi32(words, 8), _mm512_slli_epi32(words, 4), words,
                                 _mm512_srli_epi32(words, 4)};
    FOURMOE_UNROLL for (int i = 0; i < 4; ++i) {
      const __m512h value = _mm512_castsi512_ph(_mm512_maskz_permutexvar_epi8(kUpperBytes, at_upper[i], table));
      const __m512i product = _mm512_castph_si512(_mm512_mul_ph(value, scale));
      _mm512_store_si512(out + i * kStepBytes, _mm512_and_si512(_mm512_srai_epi16(product, 3), keep));
    }
  }

 private:
// E2M1 as the upper byte of f16, four times: a permutation of bytes reads 6 bits of its index.
#define FOURMOE_E2M1 0x00, 0x38, 0x3c, 0x3e, 0x40, 0x42, 0x44, 0x46, 0x80, 0xb8, 0xbc, 0xbe, 0xc0, 0xc2, 0xc4, 0xc6
  alignas(64) static constexpr unsigned char kTable[64] = {FOURMOE_E2M1, FOURMOE_E2M1, FOURMOE_E2M1, FOURMOE_E2M1};
#undef FOURMOE_E2M1
};

constexpr int kBase = 252;  // so that base and the largest code stay below the sign

// E2M1 as bf16 with exponents raised by kBase, twice: a permutation of words reads 5 bits of its index. Codes of 2 and
// more are 2^(m / 2 - 1), half as much again where m is odd; 1 is one half.
struct alignas(64) RaisedCodes {
  unsigned short at[32];

  constexpr RaisedCodes() : at() {
    for (int code = 0; code < 32; ++code) {
      const int m = code % 8;
      const int exponent = m == 1 ? 0 : m / 2;  // of the value times 2
      const int half = m > 2 && m % 2 == 1 ? 64 : 0;
      const int sign = code % 16 >= 8 ? 0x8000 : 0;
      at[code] = static_cast<unsigned short>(m == 0 ? 0 : sign + (kBase + exponent) * 128 + half);
    }
  }
};
constexpr RaisedCodes kRaisedCodes;

// E2M1 times E8M0 is the code as bf16 with the scale's power of two added to its exponent. Codes are looked up with an
// exponent raised by kBase, from which base and scale are taken together: a code of zero then ends at zero, where
// subtraction saturates, and a sign above all this stays. Weights are held as they are, of scales 2^-67 to 2^33 (so
// that products with tokens of 2^-57 and more are no subnormals); of other scales, which a Watch notes, only zeros are.
struct Mxfp4 {
  using Scales = __m512i;
  static constexpr int kRaise = 0;
  static constexpr int kLarge = 127;
  static constexpr int kWeight = 0;
  static constexpr int kLeast = 60, kMost = 160;  // scale bytes

  struct Watch {
    __m512i most = _mm512_setzero_si512();

    FOURMOE_INLINE void see(__m512i scales) {
      most = _mm512_max_epu8(most, _mm512_sub_epi8(scales, _mm512_set1_epi8(kLeast)));
    }
    FOURMOE_INLINE bool any() const {
      return _mm512_cmpgt_epu8_mask(most, _mm512_set1_epi8(static_cast<char>(kMost - kLeast))) != 0;
    }
  };

  FOURMOE_INLINE static Scales spread(__m512i scales, int block) {
    const __m512i left = _mm512_sub_epi8(_mm512_set1_epi8(static_cast<char>(kBase + 1)), scales);
    return _mm512_srli_epi16(upper_bytes(left, block), 1);
  }

  FOURMOE_INLINE static void decode_half(const std::byte* codes, Scales left, std::byte* out) {
    const __m512i table = _mm512_load_si512(kRaisedCodes.at);
    const __m512i words = _mm512_load_si512(codes);
    const __m512i at[4] = {words, _mm512_srli_epi16(words, 4), _mm512_srli_epi16(words, 8),
                           _mm512_srli_epi16(words, 12)};
    FOURMOE_UNROLL for (int i = 0; i < 4; ++i) {
      _mm512_store_si512(out + i * kStepBytes, _mm512_subs_epu16(_mm512_permutexvar_epi16(at[i], table), left));
    }
  }
};

}  // namespace
}  // namespace fourmoe::cpu
