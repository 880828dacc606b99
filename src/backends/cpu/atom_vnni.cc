// Products of NVFP4 or int8 tokens and 4-bit panels in whole numbers.
//
// E2M1 doubled is a whole number of at most 12, so the sum of a block's 16 products is exact in 32 bits:
//   4 sum_k w_k x_k = sum_k (2 w_k + 12)(2 x_k) - 12 sum_k 2 x_k
// where the first factor has no sign, as VNNI wants it. It then joins the total as in atoms of f32 tokens, so that the
// results are the same, bit for bit:  total += weight_scale * (token_scale * sum)
// Codes of int8 tokens are not doubled: theirs is  2 sum_k w_k x_k = sum_k (2 w_k + 12) x_k - 12 sum_k x_k, at most
// 24 * 127 * 16 in magnitude.
#include "backends/cpu/atom.h"

#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__)

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // gcc 12's own header: bug 105593
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

#include <utility>

#include "backends/cpu/atom_inline.h"

namespace fourmoe::cpu {
namespace {

// 32 vector registers: the totals of 24 tokens by one panel, or of 12 by two, leave 8 for codes, scales and the table.
constexpr int kTile = 24;
constexpr int kPairTile = 12;
constexpr int kGroupBlocks = 4;
constexpr int kBlockBytes = 9 * kPanelRows;
constexpr int kAhead = 2304;  // bytes: as in atom_amx.cc

// A token's block: columns 0 2 4 6, 1 3 5 7, 8 10 12 14, 9 11 13 15, of NVFP4 doubled.
struct Step {
  std::int8_t codes[16];
  std::int32_t correction;  // -12 times their sum
  float scale;              // a quarter of the block's, or half of int8's group
  std::int64_t unused;
};
static_assert(sizeof(Step) == 32);

enum Scale { kUe5m3, kE8m0 };

// 2 E2M1 + 12, four times: a permutation of bytes reads 6 bits of its index.
#define FOURMOE_E2M1 12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0
alignas(64) constexpr unsigned char kTable[64] = {FOURMOE_E2M1, FOURMOE_E2M1, FOURMOE_E2M1, FOURMOE_E2M1};

template <Scale S>
FOURMOE_INLINE __m512 decode_scales(const std::byte* scales) {
  const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scales)));
  if (S == kUe5m3) return _mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(bytes, 20)), _mm512_set1_ps(0x1p112f));
  // Byte 0 is 2^-127, an f32 subnormal.
  return _mm512_castsi512_ps(_mm512_max_epu32(_mm512_slli_epi32(bytes, 23), _mm512_set1_epi32(0x00400000)));
}

// A block of 16 rows: `codes` in the order of Step, and a scale a row.
struct Weights {
  __m512i codes[4];
  __m512 scale;
};

template <Scale S>
FOURMOE_INLINE Weights decode_block(const std::byte* panel, int block, int blocks) {
  const int first = block & ~(kGroupBlocks - 1);
  const int count = blocks - first < kGroupBlocks ? blocks - first : kGroupBlocks;
  const std::byte* group = panel + std::int64_t{first} * kBlockBytes;
  const std::byte* codes = group + (block - first) * 8 * kPanelRows;
  const __m512i table = _mm512_load_si512(kTable);
  Weights weights;
  FOURMOE_UNROLL for (int half = 0; half < 2; ++half) {
    const __m512i words = _mm512_load_si512(codes + half * 4 * kPanelRows);
    weights.codes[2 * half] = _mm512_permutexvar_epi8(words, table);
    weights.codes[2 * half + 1] = _mm512_permutexvar_epi8(_mm512_srli_epi32(words, 4), table);
  }
  weights.scale = decode_scales<S>(group + (count * 8 + (block - first)) * kPanelRows);
  return weights;
}

FOURMOE_INLINE __m512 add_block(const Weights& weights, const Step& token, __m512 total) {
  __m512i sum = _mm512_set1_epi32(token.correction);
  FOURMOE_UNROLL for (int i = 0; i < 4; ++i) {
    std::int32_t four;
    __builtin_memcpy(&four, token.codes + 4 * i, sizeof four);
    sum = _mm512_dpbusd_epi32(sum, weights.codes[i], _mm512_set1_epi32(four));
  }
  const __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(token.scale));
  return _mm512_fmadd_ps(weights.scale, scaled, total);
}

FOURMOE_INLINE void prefetch(const std::byte* block, std::int64_t skip) {
  for (int line = 0; line < kBlockBytes; line += 64) {
    _mm_prefetch(reinterpret_cast<const char*>(block + kAhead + skip + line), _MM_HINT_T0);
  }
}

// Panels p .. p + P - 1 of the strip by M tokens.
template <Scale S, int M, int P>
FOURMOE_INLINE void multiply_panels(const Strip& strip, int p) {
  const std::byte* panel = strip.panels + p * strip.stride;
  const Step* x = reinterpret_cast<const Step*>(strip.x);
  __m512 total[P][M];
  FOURMOE_UNROLL for (int i = 0; i < P; ++i) {
    FOURMOE_UNROLL for (int m = 0; m < M; ++m) total[i][m] = _mm512_setzero_ps();
  }
  for (int b = 0; b < strip.blocks; ++b, x += M) {
    const std::int64_t at = std::int64_t{b} * kBlockBytes;
    // What follows the end of a panel beside another is not the next panel but the one after it.
    const std::int64_t skip = (strip.blocks - b) * kBlockBytes > kAhead ? 0 : (P - 1) * strip.stride;
    FOURMOE_UNROLL for (int i = 0; i < P; ++i) {
      prefetch(panel + i * strip.stride + at, skip);
      const Weights weights = decode_block<S>(panel + i * strip.stride, b, strip.blocks);
      FOURMOE_UNROLL for (int m = 0; m < M; ++m) total[i][m] = add_block(weights, x[m], total[i][m]);
    }
  }
  FOURMOE_UNROLL for (int i = 0; i < P; ++i) {
    FOURMOE_UNROLL for (int m = 0; m < M; ++m) {
      _mm512_store_ps(strip.out + (p + i) * strip.pitch + m * kPanelRows, total[i][m]);
    }
  }
}

template <Scale S, int M>
void multiply(const Strip& strip) {
  int p = 0;
  if constexpr (M <= kPairTile) {
    for (; p + 2 <= strip.count; p += 2) multiply_panels<S, M, 2>(strip, p);
  }
  for (; p < strip.count; ++p) multiply_panels<S, M, 1>(strip, p);
}

FOURMOE_INLINE void store_step(std::byte* out, __m128i codes, float scale) {
  const __m128i fours = _mm_dpbusd_epi32(_mm_setzero_si128(), _mm_set1_epi8(1), codes);
  const __m128i twos = _mm_add_epi32(fours, _mm_shuffle_epi32(fours, 0x4e));
  const int sum = _mm_cvtsi128_si32(_mm_add_epi32(twos, _mm_shuffle_epi32(twos, 0xb1)));
  Step* step = reinterpret_cast<Step*>(out);
  _mm_store_si128(reinterpret_cast<__m128i*>(step->codes), codes);
  step->correction = -12 * sum;
  step->scale = scale;
}

float load_nvfp4(const Row& row, std::int32_t blocks, std::byte* out, std::int64_t stride) {
  const __m128i doubled = _mm_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12);
  const __m128i low = _mm_set1_epi8(15);
  for (std::int32_t b = 0; b < blocks; ++b, out += stride) {
    const __m128i pairs = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(row.values + 8 * b));
    const __m128i even = _mm_shuffle_epi8(doubled, _mm_and_si128(pairs, low));
    const __m128i odd = _mm_shuffle_epi8(doubled, _mm_and_si128(_mm_srli_epi16(pairs, 4), low));
    store_step(out, _mm_unpacklo_epi32(even, odd), 0.25f * e4m3_to_f32(row.scales[b]));
  }
  return 1.0f;
}

FOURMOE_INLINE __m512 from_bf16(__m256i bits) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

// An infinity as the largest f16; NaNs stay.
FOURMOE_INLINE __m512 from_f16(__m256i bits) {
  const __m512 limit = _mm512_set1_ps(65504.0f), negative = _mm512_set1_ps(-65504.0f);
  return _mm512_max_ps(negative, _mm512_min_ps(limit, _mm512_cvtph_ps(bits)));
}

// format::quantise_int8 of a group: two blocks, of which the second may be zeros. Half its scale.
FOURMOE_INLINE float half_scale(__m512 first, __m512 second) {
  const __m512i amax = _mm512_max_epi32(_mm512_castps_si512(_mm512_abs_ps(first)),
                                        _mm512_castps_si512(_mm512_abs_ps(second)));  // NaNs are the largest
  const int bits = _mm512_reduce_max_epi32(amax);
  return bits < 0x7f800000 ? __builtin_bit_cast(float, bits) / 254.0f : __builtin_nanf("");
}

// Its codes of one block, in the order of Step. Where the scale is 0 or a NaN they are NaNs, which convert to 2^31,
// whose low byte is 0.
FOURMOE_INLINE __m128i int8_codes(__m512 values, float scale) {
  const __m512i codes = _mm512_cvtps_epi32(_mm512_div_ps(values, _mm512_set1_ps(scale)));
  const __m128i order = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
  return _mm_shuffle_epi8(_mm512_cvtepi32_epi8(codes), order);
}

template <__m512 (*Widen)(__m256i)>
float load_int8(const Row& row, std::int32_t blocks, std::byte* out, std::int64_t stride) {
  const auto read = [&](std::int32_t b) {
    return b < blocks ? Widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row.values + 32 * b)))
                      : _mm512_setzero_ps();
  };
  for (std::int32_t b = 0; b < blocks; b += 2, out += 2 * stride) {
    const __m512 first = read(b);
    const __m512 second = read(b + 1);
    const float half = half_scale(first, second);
    store_step(out, int8_codes(first, 2.0f * half), half);
    if (b + 1 < blocks) store_step(out + stride, int8_codes(second, 2.0f * half), half);
  }
  return 1.0f;
}

template <Scale S, int... M>
constexpr void fill(Atom::Multiply* row, std::integer_sequence<int, M...>) {
  ((row[M] = multiply<S, M + 1>), ...);
}

constexpr Atom make_atom(const char* name) {
  Atom atom{};
  atom.name = name;
  atom.tile = kTile;
  atom.step_blocks = 1;
  atom.step_bytes = sizeof(Step);
  constexpr auto tokens = std::make_integer_sequence<int, kTile>{};
  fill<kUe5m3>(atom.multiply[0], tokens);  // in the order of weights::PanelFormat
  fill<kE8m0>(atom.multiply[1], tokens);
  return atom;
}

constexpr Atom make_nvfp4_atom() {
  Atom atom = make_atom("AVX-512 VNNI on doubled codes");
  atom.load[2] = load_nvfp4;  // in the order of TokenFormat
  return atom;
}

constexpr Atom make_int8_atom() {
  Atom atom = make_atom("AVX-512 VNNI on int8 tokens");
  atom.load[0] = load_int8<from_bf16>;
  atom.load[1] = load_int8<from_f16>;
  return atom;
}

}  // namespace

const Atom* atom_vnni() {
  static constexpr Atom kAtom = make_nvfp4_atom();
  return &kAtom;
}

const Atom* atom_vnni_int8() {
  static constexpr Atom kAtom = make_int8_atom();
  return &kAtom;
}

}  // namespace fourmoe::cpu

#else

namespace fourmoe::cpu {
const Atom* atom_vnni() { return nullptr; }
const Atom* atom_vnni_int8() { return nullptr; }
}  // namespace fourmoe::cpu

#endif
