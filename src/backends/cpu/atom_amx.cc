// Products of bf16 tokens and NVFP4 panels in AMX tiles, at every number of tokens.
//
// A step is 32 columns: the tile of tokens [m, 32] bf16 times the tile of a panel [32, 16] bf16, which holds codes
// times scales: exact, for at most 6 significant bits. The tile unit multiplies exactly and adds to f32 in the order of
// steps and, within a step, of pairs of columns; a token's sums see no other token, so they are the same in every
// batch. It takes subnormals (tokens below 2^-126) and makes subnormal sums zero.
//
// E2M1 times UE5M3 is computed as f16 and moved 3 bits down, which is bf16 times 2^-112: the two biases differ by 112.
// So that small products do not end below 2^-126, tokens are held times 2^96, and their sums are multiplied by 2^16.
// A token with a value of 2^31 or more stays as it is, and its sums are multiplied by 2^112: what then becomes zero is
// 2^35 times smaller than the smallest product of that value.
#include "backends/cpu/atom.h"

// gcc and later clangs name it __AMX_BF16__, clang 14 __AMXBF16__.
#if (defined(__AMX_BF16__) || defined(__AMXBF16__)) && defined(__AVX512FP16__) && defined(__AVX512VBMI__)

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // gcc 12's own header: bug 105593
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

#include "backends/cpu/atom_inline.h"

namespace fourmoe::cpu {
namespace {

constexpr int kTileRows = 16;                // of a tile register
constexpr int kTile = 8 * kTileRows;         // tokens that share a decoded stretch
constexpr int kStepBytes = 64;               // 32 bf16
constexpr int kBlockBytes = 9 * kPanelRows;  // codes and scales
constexpr int kGroupBlocks = 4;
constexpr int kGroupBytes = kGroupBlocks * kBlockBytes;
constexpr int kDecodedBlock = 16 * kPanelRows * 2;  // bytes
constexpr int kDecodedGroup = kGroupBlocks * kDecodedBlock;
constexpr int kStretchBlocks = 16;  // 256 columns; twice as many crowd the tokens out of the nearest cache
constexpr int kDecodedStretch = kStretchBlocks * kDecodedBlock;
constexpr int kAheadGroups = 4;  // 2304 bytes: measured, docs/cpu.md

// gcc 12's tile intrinsics say nothing of the memory that they read and write.
FOURMOE_INLINE void fence() { __atomic_signal_fence(__ATOMIC_SEQ_CST); }

// E2M1 as the upper byte of f16, four times: a permutation of bytes reads 6 bits of its index.
#define FOURMOE_E2M1 0x00, 0x38, 0x3c, 0x3e, 0x40, 0x42, 0x44, 0x46, 0x80, 0xb8, 0xbc, 0xbe, 0xc0, 0xc2, 0xc4, 0xc6
alignas(64) constexpr unsigned char kTable[64] = {FOURMOE_E2M1, FOURMOE_E2M1, FOURMOE_E2M1, FOURMOE_E2M1};

// Eight columns of 16 rows: a word of `codes` is a row, its nibble j column j. Writes columns (0, 4), (1, 5), (2, 6)
// and (3, 7) as pairs of bf16, a row of a tile each.
FOURMOE_INLINE void decode_half(const std::byte* codes, __m512h scale, std::byte* out) {
  const __m512i table = _mm512_load_si512(kTable);
  const __m512i keep = _mm512_set1_epi16(static_cast<short>(0x8fff));  // the shift repeats the sign
  const __mmask64 upper = 0xaaaaaaaaaaaaaaaaull;
  const __m512i words = _mm512_load_si512(codes);
  const __m512i at_upper[4] = {_mm512_slli_epi32(words, 8), _mm512_slli_epi32(words, 4), words,
                               _mm512_srli_epi32(words, 4)};
  FOURMOE_UNROLL for (int i = 0; i < 4; ++i) {
    const __m512h value = _mm512_castsi512_ph(_mm512_maskz_permutexvar_epi8(upper, at_upper[i], table));
    const __m512i product = _mm512_castph_si512(_mm512_mul_ph(value, scale));
    _mm512_store_si512(out + i * kStepBytes, _mm512_and_si512(_mm512_srai_epi16(product, 3), keep));
  }
}

// UE5M3 bytes of 16 rows as pairs of f16.
FOURMOE_INLINE __m512h decode_scales(const std::byte* scales) {
  const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scales)));
  return _mm512_castsi512_ph(_mm512_or_si512(_mm512_slli_epi32(bytes, 7), _mm512_slli_epi32(bytes, 23)));
}

FOURMOE_INLINE void decode_block(const std::byte* group, int count, int b, std::byte* decoded) {
  const __m512h scale = decode_scales(group + (count * 8 + b) * kPanelRows);
  const std::byte* codes = group + b * 8 * kPanelRows;
  std::byte* out = decoded + b * kDecodedBlock;
  decode_half(codes, scale, out);
  decode_half(codes + 4 * kPanelRows, scale, out + kDecodedBlock / 2);
}

// The blocks of a group as tiles; half a tile at the end is filled with zeros.
FOURMOE_INLINE void decode_group(const std::byte* group, int count, std::byte* decoded) {
  if (count == kGroupBlocks) {
    FOURMOE_UNROLL for (int b = 0; b < kGroupBlocks; ++b) decode_block(group, kGroupBlocks, b, decoded);
    return;
  }
  for (int b = 0; b < count; ++b) decode_block(group, count, b, decoded);
  if (count % 2 == 0) return;
  for (int i = 0; i < 8; ++i) _mm512_store_si512(decoded + count * kDecodedBlock + i * 64, _mm512_setzero_si512());
}

// A strip's m tokens are cut into tiles of one height. The last may reach beyond m: what it reads there are rows of the
// next step or of the scratch, finite or not, and their sums are not used.
struct Cut {
  int tiles;
  int height;

  explicit Cut(int tokens) : tiles((tokens + kTileRows - 1) / kTileRows), height((tokens + tiles - 1) / tiles) {}
};

// Tiles 0..3 hold sums, of panel p and tile of tokens t at p T + t; 4 and 5 hold tokens, 6 and 7 panels.
struct alignas(64) Config {
  unsigned char palette = 1;
  unsigned char start_row = 0;
  unsigned char reserved[14] = {};
  unsigned short row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  unsigned char rows[16] = {};

  explicit Config(const Cut& cut) {
    for (int i = 0; i < 8; ++i) rows[i] = static_cast<unsigned char>(i < 6 ? cut.height : kTileRows);
  }
};

void enter(std::int32_t tokens) {
  const Config config{Cut(tokens)};
  fence();
  _tile_loadconfig(&config);
}

void leave() { _tile_release(); }

// A strip's tokens from some step on.
struct Tokens {
  const std::byte* x;   // [steps, m, 64 bytes]
  std::int64_t stride;  // bytes from step to step
  int height;           // of a tile

  FOURMOE_INLINE Tokens(const Strip& strip, const Cut& cut)
      : x(strip.x), stride(strip.tokens * std::int64_t{kStepBytes}), height(cut.height) {}
  FOURMOE_INLINE const std::byte* row(int index) const { return x + index * kStepBytes; }
};

// `steps` steps of P decoded panels, `panel` bytes apart, by T tiles of tokens from `row` on.
template <int P, int T>
FOURMOE_INLINE void multiply_steps(const std::byte* decoded, int panel, const Tokens& tokens, int row, int steps) {
  const std::byte* x = tokens.row(row);
  for (int step = 0; step < steps; ++step, x += tokens.stride, decoded += 2 * kDecodedBlock) {
    _tile_loadd(4, x, kStepBytes);
    if constexpr (T == 2) _tile_loadd(5, x + tokens.height * kStepBytes, kStepBytes);
    _tile_loadd(6, decoded, kStepBytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (T == 2) _tile_dpbf16ps(1, 5, 6);
    if constexpr (P == 2) _tile_loadd(7, decoded + panel, kStepBytes);
    if constexpr (P == 2 && T == 1) _tile_dpbf16ps(1, 4, 7);
    if constexpr (P == 2 && T == 2) _tile_dpbf16ps(2, 4, 7);
    if constexpr (P == 2 && T == 2) _tile_dpbf16ps(3, 5, 7);
  }
}

// Sums of P panels by all tokens, as the tile registers leave and find them.
template <int P>
struct alignas(64) Accumulators {
  float sums[P][kTile][kPanelRows];

  // The address of tile register i's first row, for T tiles of tokens from `row` on.
  template <int T>
  FOURMOE_INLINE float* at(int i, int row, int height) {
    return sums[i / T][row + i % T * height];
  }

  template <int T>
  FOURMOE_INLINE void load(int row, int height) {
    _tile_loadd(0, at<T>(0, row, height), kStepBytes);
    if constexpr (P * T > 1) _tile_loadd(1, at<T>(1, row, height), kStepBytes);
    if constexpr (P * T > 2) _tile_loadd(2, at<T>(2, row, height), kStepBytes);
    if constexpr (P * T > 3) _tile_loadd(3, at<T>(3, row, height), kStepBytes);
  }

  template <int T>
  FOURMOE_INLINE void store(int row, int height) {
    _tile_stored(0, at<T>(0, row, height), kStepBytes);
    if constexpr (P * T > 1) _tile_stored(1, at<T>(1, row, height), kStepBytes);
    if constexpr (P * T > 2) _tile_stored(2, at<T>(2, row, height), kStepBytes);
    if constexpr (P * T > 3) _tile_stored(3, at<T>(3, row, height), kStepBytes);
  }

  FOURMOE_INLINE void write(const Strip& strip, float* out) const {
    fence();
    for (int p = 0; p < P; ++p) {
      for (int m = 0; m < strip.tokens; ++m, out += kPanelRows) {
        _mm512_store_ps(out, _mm512_mul_ps(_mm512_load_ps(sums[p][m]), _mm512_set1_ps(strip.factors[m])));
      }
    }
  }
};

FOURMOE_INLINE void zero_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

// Asks for a group's lines. What follows the last groups of a panel that is multiplied beside another is not the next
// panel but the one after it: `skip` bytes further.
FOURMOE_INLINE void prefetch_group(const std::byte* group, std::int64_t skip) {
  const std::byte* ahead = group + kAheadGroups * kGroupBytes + skip;
  FOURMOE_UNROLL for (int line = 0; line < kGroupBytes; line += 64) {
    _mm_prefetch(reinterpret_cast<const char*>(ahead + line), _MM_HINT_T0);
  }
}

// A group of P panels to `decoded`, `panel` bytes apart; `left` blocks of each are still to come, this group's
// included.
template <int P>
FOURMOE_INLINE void decode_panels(const std::byte* group, std::int64_t stride, int left, std::byte* decoded,
                                  int panel) {
  const std::int64_t skip = left > kAheadGroups * kGroupBlocks ? 0 : (P - 1) * stride;
  FOURMOE_UNROLL for (int i = 0; i < P; ++i) {
    prefetch_group(group + i * stride, skip);
    decode_group(group + i * stride, left < kGroupBlocks ? left : kGroupBlocks, decoded + i * panel);
  }
}

// P panels by one or two tiles of tokens, whose sums stay in registers: a group is multiplied as soon as it is decoded.
template <int P, int T>
FOURMOE_INLINE void multiply_few(const Strip& strip, const Cut& cut, int p) {
  alignas(64) std::byte decoded[P * kDecodedGroup];
  const std::byte* group = strip.panels + p * strip.stride;
  Tokens tokens(strip, cut);
  zero_sums();
  for (int left = strip.blocks; left > 0; left -= kGroupBlocks, group += kGroupBytes, tokens.x += 2 * tokens.stride) {
    decode_panels<P>(group, strip.stride, left, decoded, kDecodedGroup);
    fence();
    multiply_steps<P, T>(decoded, kDecodedGroup, tokens, 0, left > 2 ? 2 : 1);
    fence();
  }
  Accumulators<P> sums;
  sums.template store<T>(0, cut.height);
  sums.write(strip, strip.out + p * strip.tokens * kPanelRows);
}

// T tiles of tokens from `row` on by a decoded stretch of P panels; sums continue those of the stretch before, if any.
template <int P, int T>
FOURMOE_INLINE void multiply_stretch(const std::byte* decoded, const Tokens& tokens, int row, int steps, bool first,
                                     Accumulators<P>* sums) {
  if (first) zero_sums();
  else sums->template load<T>(row, tokens.height);
  multiply_steps<P, T>(decoded, kDecodedStretch, tokens, row, steps);
  sums->template store<T>(row, tokens.height);
}

// P panels by any number of tiles of tokens, two at a time: a stretch is decoded once and stays in the nearest cache
// for all of them; sums rest in memory from stretch to stretch.
template <int P>
FOURMOE_INLINE void multiply_many(const Strip& strip, const Cut& cut, int p) {
  alignas(64) std::byte decoded[P * kDecodedStretch];
  Accumulators<P> sums;
  const std::byte* group = strip.panels + p * strip.stride;
  Tokens tokens(strip, cut);
  for (int left = strip.blocks; left > 0; left -= kStretchBlocks, tokens.x += kStretchBlocks / 2 * tokens.stride) {
    const int blocks = left < kStretchBlocks ? left : kStretchBlocks;
    for (int b = 0; b < blocks; b += kGroupBlocks, group += kGroupBytes) {
      decode_panels<P>(group, strip.stride, left - b, decoded + b * kDecodedBlock, kDecodedStretch);
    }
    fence();
    const int steps = (blocks + 1) / 2;
    const bool first = left == strip.blocks;
    for (int tile = 0; tile < cut.tiles; tile += 2) {
      const int row = tile * cut.height;
      if (tile + 1 < cut.tiles) multiply_stretch<P, 2>(decoded, tokens, row, steps, first, &sums);
      else multiply_stretch<P, 1>(decoded, tokens, row, steps, first, &sums);
    }
    fence();
  }
  sums.write(strip, strip.out + p * strip.tokens * kPanelRows);
}

template <int P>
FOURMOE_INLINE void multiply_panels(const Strip& strip, const Cut& cut, int p) {
  if (cut.tiles == 1) multiply_few<P, 1>(strip, cut, p);
  else if (cut.tiles == 2) multiply_few<P, 2>(strip, cut, p);
  else multiply_many<P>(strip, cut, p);
}

void multiply(const Strip& strip) {
  const Cut cut(strip.tokens);
  int p = 0;
  for (; p + 2 <= strip.count; p += 2) multiply_panels<2>(strip, cut, p);
  if (p < strip.count) multiply_panels<1>(strip, cut, p);
}

// Largest magnitude bits of a row.
FOURMOE_INLINE unsigned largest_bits(const std::uint8_t* values, int blocks) {
  const __m256i magnitude = _mm256_set1_epi16(0x7fff);
  __m256i most = _mm256_setzero_si256();
  for (int b = 0; b < blocks; ++b) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + 32 * b));
    most = _mm256_max_epu16(most, _mm256_and_si256(bits, magnitude));
  }
  // The smallest of the complements is the complement of the largest.
  const __m128i half = _mm_max_epu16(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
  const __m128i ones = _mm_set1_epi16(-1);
  return 0xffffu - (static_cast<unsigned>(_mm_cvtsi128_si32(_mm_minpos_epu16(_mm_xor_si128(half, ones)))) & 0xffffu);
}

// Columns of each eight in the order (0, 4), (1, 5), (2, 6), (3, 7), times 2^96 where that cannot overflow.
float load_bf16(const Row& row, std::int32_t blocks, std::byte* out, std::int64_t stride) {
  constexpr unsigned kLarge = (127 + 31) << 7;  // 2^31, infinity and NaN beyond it
  const bool large = largest_bits(row.values, blocks) >= kLarge;
  const __m512i exponent = _mm512_set1_epi16(0x7f80);
  const __m512i raise = _mm512_set1_epi16(large ? 0 : 96 << 7);
  const __m512i order = _mm512_set_epi16(31, 27, 30, 26, 29, 25, 28, 24, 23, 19, 22, 18, 21, 17, 20, 16, 15, 11, 14, 10,
                                         13, 9, 12, 8, 7, 3, 6, 2, 5, 1, 4, 0);
  for (std::int32_t b = 0; b < blocks; b += 2, out += stride) {
    const __mmask32 inside = b + 2 <= blocks ? 0xffffffffu : 0xffffu;
    const __m512i values = _mm512_maskz_loadu_epi16(inside, row.values + 32 * b);
    const __mmask32 normal = _mm512_test_epi16_mask(values, exponent);
    const __m512i raised = _mm512_mask_add_epi16(values, normal, values, raise);
    _mm512_store_si512(out, _mm512_permutexvar_epi16(order, raised));
  }
  return large ? 0x1p112f : 0x1p16f;
}

constexpr Atom make_atom() {
  Atom atom{};
  atom.name = "AMX tiles of bf16 at every batch size";
  atom.tile = kTile;
  atom.step_blocks = 2;
  atom.step_bytes = kStepBytes;
  for (int m = 0; m < kTile; ++m) atom.multiply[0][m] = multiply;
  atom.load[0] = load_bf16;
  atom.enter = enter;
  atom.leave = leave;
  return atom;
}

}  // namespace

const Atom* atom_amx() {
  static constexpr Atom kAtom = make_atom();
  return &kAtom;
}

}  // namespace fourmoe::cpu

#else

namespace fourmoe::cpu {
const Atom* atom_amx() { return nullptr; }
}  // namespace fourmoe::cpu

#endif
