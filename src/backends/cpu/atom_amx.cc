// Products of bf16 tokens and 4-bit panels in AMX tiles, at every number of tokens.
//
// A step is 32 columns: the tile of tokens [m, 32] bf16 times the tile of a panel [32, 16] bf16, which holds codes
// times scales: exact, for at most 6 significant bits. The tile unit multiplies exactly and adds to f32 in the order of
// steps and, within a step, of pairs of columns; a token's sums see no other token, so they are the same in every
// batch. It takes subnormals (tokens below 2^-126) and makes subnormal sums zero.
//
// Weights are held times a power of two, tokens times another, so that their products stay far from both ends of f32;
// the factors that load returns undo it. A token with a value of 2^kLarge or more is not raised: what then becomes zero
// is 2^35 times smaller than the smallest product of that value.
#include "backends/cpu/atom.h"

// gcc and later clangs name it __AMX_BF16__, clang 14 __AMXBF16__.
#if (defined(__AMX_BF16__) || defined(__AMXBF16__)) && defined(__AVX512FP16__) && defined(__AVX512VBMI__)

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // gcc 12's own header: bug 105593
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

#include "backends/cpu/atom_amx_decode.h"
#include "backends/cpu/atom_inline.h"

namespace fourmoe::cpu {
namespace {

constexpr int kTileRows = 16;         // of a tile register
constexpr int kTile = 8 * kTileRows;  // tokens of one configuration
constexpr int kGroupLines = kGroupBytes / 64;
constexpr int kFirstLines = 5;   // of a group's lines, asked for with its first step
constexpr int kMostTiles = 3;    // of tokens at a time: six sums in eight registers
constexpr int kAheadGroups = 4;  // 2304 bytes: measured, docs/cpu.md

// gcc 12's tile intrinsics say nothing of the memory that they read and write.
FOURMOE_INLINE void fence() { __atomic_signal_fence(__ATOMIC_SEQ_CST); }

template <class F>
FOURMOE_INLINE void decode_block(const std::byte* codes, typename F::Scales scales, std::byte* out) {
  F::decode_half(codes, scales, out);
  F::decode_half(codes + 4 * kPanelRows, scales, out + kDecodedBlock / 2);
}

// Block B of a whole group.
template <class F, int B>
FOURMOE_INLINE void decode_whole(const std::byte* group, typename F::Watch* watch, std::byte* out) {
  const __m512i scales = _mm512_load_si512(group + kGroupBlocks * 8 * kPanelRows);
  if constexpr (B == 0) watch->see(scales);
  decode_block<F>(group + B * 8 * kPanelRows, F::spread(scales, B), out);
}

// A block of a last group of 1 to 3 blocks; in place of one that is not there, the first with scales that make it zero
// or, at least, finite: what it is multiplied by is zero.
template <class F>
__attribute__((noinline)) void decode_last(const std::byte* group, int count, int block, typename F::Watch* watch,
                                           std::byte* out) {
  const __mmask64 inside = (1ull << (kPanelRows * count)) - 1;
  const __m512i scales = _mm512_maskz_loadu_epi8(inside, group + count * 8 * kPanelRows);
  const __m512i first = _mm512_broadcast_i32x4(_mm512_castsi512_si128(scales));
  const __m512i filled = _mm512_mask_mov_epi8(first, inside, scales);
  watch->see(filled);
  const std::byte* codes = group + (block < count ? block : 0) * 8 * kPanelRows;
  decode_block<F>(codes, F::spread(filled, block), out);
}

// A strip's m tokens are cut into tiles of one height. The last may reach beyond m: what it reads there are rows of the
// next step or of the scratch, finite or not, and their sums are not used.
struct Cut {
  int tiles;
  int height;

  explicit Cut(int tokens) : tiles((tokens + kTileRows - 1) / kTileRows), height((tokens + tiles - 1) / tiles) {}
};

// Tile registers: sums of panel p and tile of tokens t in p T + t, tokens in what is left of 0..6, a panel in 7.
struct alignas(64) Config {
  unsigned char palette = 1;
  unsigned char start_row = 0;
  unsigned char reserved[14] = {};
  unsigned short row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  unsigned char rows[16] = {};

  explicit Config(const Cut& cut) {
    for (int i = 0; i < 8; ++i) rows[i] = static_cast<unsigned char>(i < 7 ? cut.height : kTileRows);
  }
};

void enter(std::int32_t tokens) {
  const Config config{Cut(tokens)};
  fence();
  _tile_loadconfig(&config);
}

void leave() { _tile_release(); }

// A group of P neighbouring panels of a strip, and what follows it.
template <class F, int P>
struct Groups {
  const std::byte* data;  // of the first panel
  std::int64_t stride;    // to the next panel
  int left;               // blocks still to come, this group's included
  typename F::Watch watch;

  FOURMOE_INLINE Groups(const Strip& strip, int p)
      : data(strip.panels + p * strip.stride), stride(strip.stride), left(strip.blocks), watch() {}

  FOURMOE_INLINE void next() {
    data += kGroupBytes;
    left -= kGroupBlocks;
  }

  // Asks for the lines of a step of a later group. What follows the end of a panel that is multiplied beside another is
  // not the next panel but the one after it.
  template <int S>
  FOURMOE_INLINE void prefetch(int panel) const {
    const std::int64_t skip = left > kAheadGroups * kGroupBlocks ? 0 : (P - 1) * stride;
    const std::byte* ahead = data + panel * stride + skip + kAheadGroups * kGroupBytes;
    FOURMOE_UNROLL for (int line = S * kFirstLines; line < (S == 0 ? kFirstLines : kGroupLines); ++line) {
      _mm_prefetch(reinterpret_cast<const char*>(ahead + line * 64), _MM_HINT_T0);
    }
  }

  // Piece I of step S, if the group has that step: block I % 2 of panel I / 2.
  template <int S, int I>
  FOURMOE_INLINE void decode(std::byte (*out)[kDecodedStep]) {
    constexpr int kPanel = I / 2;
    constexpr int kHalf = I % 2;
    if (left <= 2 * S) return;
    if constexpr (kHalf == 0) prefetch<S>(kPanel);
    const std::byte* group = data + kPanel * stride;
    std::byte* to = out[kPanel] + kHalf * kDecodedBlock;
    if (left >= kGroupBlocks) decode_whole<F, 2 * S + kHalf>(group, &watch, to);
    else decode_last<F>(group, left, 2 * S + kHalf, &watch, to);
  }
};

// Decodes the pieces of step S that stand between two tile products; fences keep them there.
template <class F, int P, int S>
struct Between {
  Groups<F, P>& groups;
  std::byte (*out)[kDecodedStep];

  template <int... I>
  FOURMOE_INLINE void decode() const {
    fence();
    (groups.template decode<S, I>(out), ...);
    fence();
  }
  FOURMOE_INLINE void decode_all() const {
    decode<0, 1>();
    if constexpr (P == 2) decode<2, 3>();
  }
};

// A strip's tokens from some row and step on.
struct Tokens {
  const std::byte* x;   // [steps, m, 64 bytes]
  std::int64_t stride;  // bytes from step to step
  std::int64_t tile;    // bytes from tile to tile

  FOURMOE_INLINE Tokens(const Strip& strip, const Cut& cut, int row)
      : x(strip.x + row * kStepBytes), stride(strip.tokens * std::int64_t{kStepBytes}), tile(cut.height * kStepBytes) {}
};

// A step of P decoded panels by one, two or three tiles of tokens; `next` decodes a step in pieces between the
// products.
template <int P, class Next>
FOURMOE_INLINE void multiply_by_one(const std::byte (*decoded)[kDecodedStep], const Tokens& tokens, const Next& next) {
  next.decode_all();
  _tile_loadd(4, tokens.x, kStepBytes);
  _tile_loadd(7, decoded[0], kStepBytes);
  _tile_dpbf16ps(0, 4, 7);
  if constexpr (P == 2) {
    _tile_loadd(7, decoded[P - 1], kStepBytes);
    _tile_dpbf16ps(1, 4, 7);
  }
}

template <int P, class Next>
FOURMOE_INLINE void multiply_by_two(const std::byte (*decoded)[kDecodedStep], const Tokens& tokens, const Next& next) {
  _tile_loadd(4, tokens.x, kStepBytes);
  _tile_loadd(7, decoded[0], kStepBytes);
  _tile_dpbf16ps(0, 4, 7);
  next.template decode<0>();
  _tile_loadd(5, tokens.x + tokens.tile, kStepBytes);
  _tile_dpbf16ps(1, 5, 7);
  next.template decode<1>();
  if constexpr (P == 1) return;
  _tile_loadd(7, decoded[P - 1], kStepBytes);
  _tile_dpbf16ps(2, 4, 7);
  if constexpr (P == 2) next.template decode<2>();
  _tile_dpbf16ps(3, 5, 7);
  if constexpr (P == 2) next.template decode<3>();
}

// Three tiles leave one register to tokens.
template <int P, class Next>
FOURMOE_INLINE void multiply_by_three(const std::byte (*decoded)[kDecodedStep], const Tokens& tokens,
                                      const Next& next) {
  _tile_loadd(6, tokens.x, kStepBytes);
  _tile_loadd(7, decoded[0], kStepBytes);
  _tile_dpbf16ps(0, 6, 7);
  next.template decode<0>();
  _tile_loadd(6, tokens.x + tokens.tile, kStepBytes);
  _tile_dpbf16ps(1, 6, 7);
  next.template decode<1>();
  _tile_loadd(6, tokens.x + 2 * tokens.tile, kStepBytes);
  _tile_dpbf16ps(2, 6, 7);
  if constexpr (P == 1) return;
  _tile_loadd(7, decoded[P - 1], kStepBytes);
  _tile_dpbf16ps(5, 6, 7);
  if constexpr (P == 2) next.template decode<2>();
  _tile_loadd(6, tokens.x + tokens.tile, kStepBytes);
  _tile_dpbf16ps(4, 6, 7);
  if constexpr (P == 2) next.template decode<3>();
  _tile_loadd(6, tokens.x, kStepBytes);
  _tile_dpbf16ps(3, 6, 7);
}

template <int P, int T, class Next>
FOURMOE_INLINE void multiply_step(const std::byte (*decoded)[kDecodedStep], Tokens* tokens, const Next& next) {
  fence();
  if constexpr (T == 3) multiply_by_three<P>(decoded, *tokens, next);
  else if constexpr (T == 2) multiply_by_two<P>(decoded, *tokens, next);
  else multiply_by_one<P>(decoded, *tokens, next);
  fence();
  tokens->x += tokens->stride;
}

// Writes the sums of P panels by T tiles of tokens, from the strip's panel p and tile `from` on.
template <int P, int T>
FOURMOE_INLINE void store_sums(const Strip& strip, const Cut& cut, int p, int from) {
  float* out = strip.out + p * strip.pitch + from * cut.height * kPanelRows;
  const auto at = [&](int i) { return out + i / T * strip.pitch + i % T * cut.height * kPanelRows; };
  _tile_stored(0, at(0), kStepBytes);
  if constexpr (P * T > 1) _tile_stored(1, at(1), kStepBytes);
  if constexpr (P * T > 2) _tile_stored(2, at(2), kStepBytes);
  if constexpr (P * T > 3) _tile_stored(3, at(3), kStepBytes);
  if constexpr (P * T > 4) _tile_stored(4, at(4), kStepBytes);
  if constexpr (P * T > 5) _tile_stored(5, at(5), kStepBytes);
  fence();
}

template <int T>
FOURMOE_INLINE void zero_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  if constexpr (T == kMostTiles) _tile_zero(4);
  if constexpr (T == kMostTiles) _tile_zero(5);
}

// 2^exponent, within f32.
float power(int exponent) { return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128((127 + exponent) << 23))); }

// A row of an MXFP4 panel as scalars see it.
struct PlainRow {
  const std::byte* panel;
  int blocks;
  int row;

  int scale(int block) const {
    return static_cast<int>(group(block)[(count(block) * 8 + block % 4) * kPanelRows + row]);
  }
  int code(int block, int k) const {
    const std::byte* word = group(block) + ((block % 4 * 2 + k / 8) * kPanelRows + row) * 4;
    return static_cast<int>(word[k % 8 / 2]) >> k % 2 * 4 & 15;
  }

 private:
  const std::byte* group(int block) const { return panel + std::int64_t{block / 4} * kGroupBytes; }
  int count(int block) const { return blocks - block / 4 * 4 < 4 ? blocks - block / 4 * 4 : 4; }
};

// Value j of a token in the strip's form, whose columns of each eight stand in the order 0, 4, 1, 5, 2, 6, 3, 7.
float token_at(const Strip& strip, int token, int j) {
  const int at = (j & ~7) + j % 4 * 2 + j % 8 / 4;
  const std::byte* step = strip.x + (std::int64_t{at / 32} * strip.tokens + token) * kStepBytes;
  std::uint16_t bits;
  __builtin_memcpy(&bits, step + at % 32 * 2, sizeof bits);
  return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(bits << 16)));
}

bool has_weights_of_rare_scale(const PlainRow& row) {
  for (int block = 0; block < row.blocks; ++block) {
    if (row.scale(block) >= Mxfp4::kLeast && row.scale(block) <= Mxfp4::kMost) continue;
    for (int k = 0; k < 16; ++k) {
      if (row.code(block, k) % 8 != 0) return true;
    }
  }
  return false;
}

// The order of sums in atom.h, in f32.
float sum_plainly(const Strip& strip, const PlainRow& row, int token) {
  static constexpr float kE2m1[16] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                                      -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};
  float total = 0.0f;
  for (int block = 0; block < row.blocks; ++block) {
    float sum = 0.0f;
    for (int k = 0; k < 16; ++k) sum += kE2m1[row.code(block, k)] * token_at(strip, token, block * 16 + k);
    const int exponent = row.scale(block) - 127;
    total += sum * power(exponent / 2) * power(exponent - exponent / 2);
  }
  return total;
}

// Rows of MXFP4 panels that hold weights of scales that tiles do not: once more, one by one. Trained layers have none.
__attribute__((noinline)) void multiply_rest(const Strip& strip, int first, int count) {
  for (int p = first; p < first + count; ++p) {
    for (int r = 0; r < kPanelRows; ++r) {
      const PlainRow row{strip.panels + p * strip.stride, strip.blocks, r};
      if (!has_weights_of_rare_scale(row)) continue;
      for (int m = 0; m < strip.tokens; ++m) {
        strip.out[p * strip.pitch + m * kPanelRows + r] = sum_plainly(strip, row, m);
      }
    }
  }
}

// P panels from p on by T tiles of tokens from the strip's tile `from` on. While the tile unit multiplies a step the
// vector units decode the next one into the other buffer: into the same one, the two would take turns.
template <class F, int P, int T>
FOURMOE_INLINE void multiply_tiles(const Strip& strip, const Cut& cut, int p, int from) {
  alignas(64) std::byte decoded[2][P][kDecodedStep];
  Groups<F, P> groups(strip, p);
  Tokens tokens(strip, cut, from * cut.height);
  zero_sums<T>();
  Between<F, P, 0>{groups, decoded[0]}.decode_all();
  for (int left = strip.blocks; left > 0; left -= kGroupBlocks) {
    multiply_step<P, T>(decoded[0], &tokens, Between<F, P, 1>{groups, decoded[1]});
    groups.next();
    if (left > 2) multiply_step<P, T>(decoded[1], &tokens, Between<F, P, 0>{groups, decoded[0]});
  }
  store_sums<P, T>(strip, cut, p, from);
  if (groups.watch.any()) multiply_rest(strip, p, P);
}

// P panels by all tokens, three or two tiles of them at a time. Decoding once for all would need what is decoded and
// all sums in the nearest cache, beside the tokens that stream by: slower (docs/cpu.md).
template <class F, int P>
FOURMOE_INLINE void multiply_panels(const Strip& strip, const Cut& cut, int p) {
  if (cut.tiles == 1) multiply_tiles<F, P, 1>(strip, cut, p, 0);
  for (int from = 0; from + 1 < cut.tiles;) {
    const int left = cut.tiles - from;
    const bool three = left == 3 || left > 4;  // never one alone
    if (three) multiply_tiles<F, P, 3>(strip, cut, p, from);
    else multiply_tiles<F, P, 2>(strip, cut, p, from);
    from += three ? 3 : 2;
  }
}

template <class F>
void multiply(const Strip& strip) {
  const Cut cut(strip.tokens);
  int p = 0;
  for (; p + 2 <= strip.count; p += 2) multiply_panels<F, 2>(strip, cut, p);
  if (p < strip.count) multiply_panels<F, 1>(strip, cut, p);
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

// Columns of each eight in the order (0, 4), (1, 5), (2, 6), (3, 7), times 2^kRaise where that cannot overflow.
template <class F>
float load_bf16(const Row& row, std::int32_t blocks, std::byte* out, std::int64_t stride) {
  constexpr unsigned kLarge = (127 + F::kLarge) << 7;  // infinity and NaN beyond it
  const bool large = largest_bits(row.values, blocks) >= kLarge;
  const __m512i exponent = _mm512_set1_epi16(0x7f80);
  const __m512i raise = _mm512_set1_epi16(large ? 0 : F::kRaise << 7);
  const __m512i order = _mm512_set_epi16(31, 27, 30, 26, 29, 25, 28, 24, 23, 19, 22, 18, 21, 17, 20, 16, 15, 11, 14, 10,
                                         13, 9, 12, 8, 7, 3, 6, 2, 5, 1, 4, 0);
  for (std::int32_t b = 0; b < blocks; b += 2, out += stride) {
    const __mmask32 inside = b + 2 <= blocks ? 0xffffffffu : 0xffffu;
    const __m512i values = _mm512_maskz_loadu_epi16(inside, row.values + 32 * b);
    const __mmask32 normal = _mm512_test_epi16_mask(values, exponent);
    const __m512i raised = _mm512_mask_add_epi16(values, normal, values, raise);
    _mm512_store_si512(out, _mm512_permutexvar_epi16(order, raised));
  }
  return power(F::kWeight - (large ? 0 : F::kRaise));
}

template <class F>
constexpr Atom make_atom(int format) {
  Atom atom{};
  atom.name = "AMX tiles of bf16 at every batch size";
  atom.tile = kTile;
  atom.step_blocks = 2;
  atom.step_bytes = kStepBytes;
  for (int m = 0; m < kTile; ++m) atom.multiply[format][m] = multiply<F>;
  atom.load[0] = load_bf16<F>;
  atom.enter = enter;
  atom.leave = leave;
  return atom;
}

}  // namespace

const Atom* atom_amx() {
  static constexpr Atom kAtom = make_atom<Nvfp4>(0);  // of weights::PanelFormat
  return &kAtom;
}

const Atom* atom_amx_mxfp4() {
  static constexpr Atom kAtom = make_atom<Mxfp4>(1);
  return &kAtom;
}

}  // namespace fourmoe::cpu

#else

namespace fourmoe::cpu {
const Atom* atom_amx() { return nullptr; }
const Atom* atom_amx_mxfp4() { return nullptr; }
}  // namespace fourmoe::cpu

#endif
