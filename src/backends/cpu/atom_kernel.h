// The loop nest of atom.h, once for all levels. A level's source defines in an unnamed namespace, before it includes
// this header, a struct Lanes:
//   F, U                    vectors of kRows f32 and of kRows u32, a lane a row; kRows divides 16
//   F zero(), broadcast(const float*), load_f32(p), load_bf16(p), mul(a, b), fma(a, b, c) = a * b + c, add(a, b)
//   void store(float*, F)
//   U words(p)              kRows words of 8 codes
//   F code<j>(U)            the E2M1 value of nibble j
//   F ue5m3(p), e8m0(p)     kRows scale bytes
//   prefetch(p)
// and kTile, the most tokens of a tile, and kWide, the most tokens for which the vectors of 16 rows are summed together
// rather than one after the other. Everything here is unnamed too: no code of one level can end up in another.
#pragma once

#include <utility>

#include "backends/cpu/atom.h"
#include "backends/cpu/atom_inline.h"

namespace fourmoe::cpu {
namespace {

// f(0), f(1), ... f(N - 1), each with its index as a constant.
template <int N, class F>
FOURMOE_INLINE void unroll(F&& f) {
  [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
    (f(std::integral_constant<int, I>{}), ...);
  }
  (std::make_integer_sequence<int, N>{});
}

// What a step holds of a token: its 16 values; or twice their codes, and their half scale (atom.h, atoms of int8).
enum Form { kValues, kWhole };
constexpr int step_floats(Form form) { return form == kValues ? 16 : kWholeStepFloats; }

enum Scale { kUe5m3, kE8m0 };

// How far ahead of the multiplication a panel's bytes are asked for: about 100 ns at 15 GB/s.
constexpr int kAhead = 2048;

// A block of a panel as its lanes see it: vector v holds rows row + v * kRows and on. 4-bit: codes and scales, see
// weights/packed.h.
template <Scale S>
struct Fp4 {
  using F = Lanes::F;
  static constexpr bool kScaled = true;
  static constexpr int kBlockBytes = 9 * kPanelRows;

  const std::byte* codes;
  const std::byte* scales;

  FOURMOE_INLINE Fp4(const std::byte* panel, int block, int blocks, int row) {
    const int first = block & ~3;  // kGroupBlocks is 4
    const int in_group = blocks - first < 4 ? blocks - first : 4;
    const std::byte* group = panel + static_cast<std::int64_t>(first) * kBlockBytes;
    codes = group + (block - first) * 8 * kPanelRows + row * 4;
    scales = group + (in_group * 8 + (block - first)) * kPanelRows + row;
  }

  FOURMOE_INLINE Lanes::U words(int half, int v) const {
    return Lanes::words(codes + (half * kPanelRows + v * Lanes::kRows) * 4);
  }
  FOURMOE_INLINE F scale(int v) const {
    const std::byte* at = scales + v * Lanes::kRows;
    return S == kUe5m3 ? Lanes::ue5m3(at) : Lanes::e8m0(at);
  }
};

template <int ValueBytes>
struct Dense {
  using F = Lanes::F;
  static constexpr bool kScaled = false;
  static constexpr int kBlockBytes = 16 * kPanelRows * ValueBytes;

  const std::byte* values;

  FOURMOE_INLINE Dense(const std::byte* panel, int block, int, int row)
      : values(panel + static_cast<std::int64_t>(block) * kBlockBytes + row * ValueBytes) {}

  FOURMOE_INLINE F weight(int k, int v) const {
    const std::byte* at = values + (k * kPanelRows + v * Lanes::kRows) * ValueBytes;
    if constexpr (ValueBytes == 2) return Lanes::load_bf16(at);
    else return Lanes::load_f32(at);
  }
};

// Sums of one block over its 16 columns, for V vectors of rows and M tokens.
template <class Block, Form T, int M, int V>
FOURMOE_INLINE void sum_block(const Block& block, const float* x, Lanes::F (&sum)[V][M]) {
  FOURMOE_UNROLL for (int half = 0; half < 2; ++half) {
    typename Lanes::U words[V] = {};
    FOURMOE_UNROLL for (int v = 0; v < V; ++v) {
      if constexpr (Block::kScaled) words[v] = block.words(half, v);
    }
    unroll<8>([&](auto j) __attribute__((always_inline)) {
      const int k = half * 8 + j;
      FOURMOE_UNROLL for (int v = 0; v < V; ++v) {
        typename Lanes::F weight;
        if constexpr (Block::kScaled) weight = Lanes::template code<j>(words[v]);
        else weight = block.weight(k, v);
        FOURMOE_UNROLL for (int m = 0; m < M; ++m) {
          const auto token = Lanes::broadcast(x + m * step_floats(T) + k);
          sum[v][m] = k == 0 ? Lanes::mul(weight, token) : Lanes::fma(weight, token, sum[v][m]);
        }
      }
    });
  }
}

// V vectors of rows of one panel, from `row` on, by M tokens over all columns.
template <class Block, Form T, int M, int V>
FOURMOE_INLINE void multiply_rows(const std::byte* panel, int blocks, int row, const float* x, float* out) {
  typename Lanes::F total[V][M] = {};
  for (int b = 0; b < blocks; ++b, x += M * step_floats(T)) {
    const Block block(panel, b, blocks, row);
    FOURMOE_UNROLL for (int line = 0; line < Block::kBlockBytes; line += 64) {
      if (row == 0) Lanes::prefetch(panel + static_cast<std::int64_t>(b) * Block::kBlockBytes + kAhead + line);
    }
    typename Lanes::F sum[V][M] = {};
    sum_block<Block, T, M, V>(block, x, sum);
    FOURMOE_UNROLL for (int v = 0; v < V; ++v) {
      typename Lanes::F scale = Lanes::zero();
      if constexpr (Block::kScaled) scale = block.scale(v);
      FOURMOE_UNROLL for (int m = 0; m < M; ++m) {
        if constexpr (T == kWhole) {
          sum[v][m] = Lanes::mul(sum[v][m], Lanes::broadcast(x + m * step_floats(T) + 16));
        }
        total[v][m] = Block::kScaled ? Lanes::fma(scale, sum[v][m], total[v][m]) : Lanes::add(total[v][m], sum[v][m]);
      }
    }
  }
  FOURMOE_UNROLL for (int v = 0; v < V; ++v) {
    FOURMOE_UNROLL for (int m = 0; m < M; ++m) {
      Lanes::store(out + m * kPanelRows + row + v * Lanes::kRows, total[v][m]);
    }
  }
}

template <class Block, Form T, int M>
void multiply(const Strip& strip) {
  constexpr int kVectors = M <= kWide ? kPanelRows / Lanes::kRows : 1;
  for (int p = 0; p < strip.count; ++p) {
    for (int row = 0; row < kPanelRows; row += kVectors * Lanes::kRows) {
      multiply_rows<Block, T, M, kVectors>(strip.panels + p * strip.stride, strip.blocks, row,
                                           reinterpret_cast<const float*>(strip.x), strip.out + p * strip.pitch);
    }
  }
}

template <class Block, Form T = kValues, int... I>
constexpr void fill(Atom::Multiply* row, std::integer_sequence<int, I...>) {
  ((row[I] = multiply<Block, T, I + 1>), ...);
}

constexpr Atom make_atom(const char* name, Atom::Load widen_bf16, Atom::Load widen_f16) {
  Atom atom{};
  atom.name = name;
  atom.tile = kTile;
  atom.step_blocks = 1;
  atom.step_bytes = 16 * sizeof(float);
  constexpr auto tokens = std::make_integer_sequence<int, kTile>{};
  fill<Fp4<kUe5m3>>(atom.multiply[0], tokens);  // in the order of weights::PanelFormat
  fill<Fp4<kE8m0>>(atom.multiply[1], tokens);
  fill<Dense<2>>(atom.multiply[2], tokens);
  fill<Dense<4>>(atom.multiply[3], tokens);
  atom.load[0] = widen_bf16;  // in the order of TokenFormat
  atom.load[1] = widen_f16;
  atom.load[2] = widen_nvfp4;
  return atom;
}

constexpr Atom make_int8_atom(const char* name) {
  Atom atom{};
  atom.name = name;
  atom.tile = kTile;
  atom.step_blocks = 1;
  atom.step_bytes = kWholeStepFloats * sizeof(float);
  constexpr auto tokens = std::make_integer_sequence<int, kTile>{};
  fill<Fp4<kUe5m3>, kWhole>(atom.multiply[0], tokens);
  fill<Fp4<kE8m0>, kWhole>(atom.multiply[1], tokens);
  atom.load[0] = whole_bf16;
  atom.load[1] = whole_f16;
  return atom;
}

}  // namespace
}  // namespace fourmoe::cpu
