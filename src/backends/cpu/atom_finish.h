// What becomes of a tile's sums, once for all levels of vectors: included by a level's source after its Lanes, which
// hold besides what atom_kernel.h names:
//   div(a, b); min(a, b) and max(a, b), which return b where either is a NaN
//   round(F) to the nearest whole number, power(F) = 2^x for whole x in [-126, 127]
//   bf16(uint16_t*, F), f16(uint16_t*, F)  round and store kRows values; f16 saturates
//   store_past(float*, F)                  past the caches, to an address aligned to the vector
#pragma once

#include "backends/cpu/atom.h"
#include "backends/cpu/atom_inline.h"

namespace fourmoe::cpu {
namespace {

using F = Lanes::F;

FOURMOE_INLINE F constant(float value) { return Lanes::broadcast(&value); }

// e^x to two units in the last place: a power of two times a polynomial on [-ln(2)/2, ln(2)/2] (Taylor's, whose first
// omitted term is below 2^-22). Beyond [-87, 88] it is the value there, so it is never infinite.
FOURMOE_INLINE F exp(F x) {
  x = Lanes::max(constant(-87.0f), Lanes::min(constant(88.0f), x));
  const F n = Lanes::round(Lanes::mul(x, constant(1.44269504f)));  // 1 / ln(2)
  F r = Lanes::fma(n, constant(-0.693359375f), x);                 // ln(2) in two parts, the first short
  r = Lanes::fma(n, constant(2.12194440e-4f), r);
  F sum = constant(1.0f / 720.0f);
  sum = Lanes::fma(sum, r, constant(1.0f / 120.0f));
  sum = Lanes::fma(sum, r, constant(1.0f / 24.0f));
  sum = Lanes::fma(sum, r, constant(1.0f / 6.0f));
  sum = Lanes::fma(sum, r, constant(0.5f));
  sum = Lanes::fma(sum, r, constant(1.0f));
  sum = Lanes::fma(sum, r, constant(1.0f));
  return Lanes::mul(sum, Lanes::power(n));
}

// x / (1 + e^(-slope x))
FOURMOE_INLINE F swish(F x, F slope) {
  const F e = exp(Lanes::mul(Lanes::mul(x, slope), constant(-1.0f)));
  return Lanes::div(x, Lanes::add(constant(1.0f), e));
}

struct Swiglu {
  FOURMOE_INLINE static F of(F gate, F up, const Gates&) { return Lanes::mul(swish(gate, constant(1.0f)), up); }
};

struct SwigluClamped {
  FOURMOE_INLINE static F of(F gate, F up, const Gates& g) {
    const F limited = Lanes::min(constant(g.limit), gate);
    const F u = Lanes::max(constant(-g.limit), Lanes::min(constant(g.limit), up));
    return Lanes::mul(swish(limited, constant(g.alpha)), Lanes::add(u, constant(g.beta)));
  }
};

// (1 + tanh(u)) / 2 = 1 / (1 + e^(-2u)), u = sqrt(2/pi) (x + 0.044715 x^3)
struct GegluTanh {
  FOURMOE_INLINE static F of(F gate, F up, const Gates&) {
    const F square = Lanes::mul(gate, gate);
    const F slope = Lanes::mul(constant(1.59576912f), Lanes::fma(square, constant(0.044715f), constant(1.0f)));
    return Lanes::mul(swish(gate, slope), up);
  }
};

struct Relu2 {
  FOURMOE_INLINE static F of(F, F up, const Gates&) {
    const F positive = Lanes::max(constant(0.0f), up);
    return Lanes::mul(positive, positive);
  }
};

FOURMOE_INLINE F scaled(const float* sums, float factor, float global, const float* bias) {
  const F value = Lanes::mul(Lanes::mul(Lanes::load(sums), constant(factor)), constant(global));
  return bias == nullptr ? value : Lanes::add(value, Lanes::load(bias));
}

template <class Kind>
void activate(const Gates& g) {
  for (int at = 0; at < kPanelRows; at += Lanes::kRows) {
    for (int r = 0; r < g.rows; ++r) {
      const int i = r * kPanelRows + at;
      const F gate = scaled(g.gate + i, g.factors[r], g.gate_global, g.gate_bias ? g.gate_bias + at : nullptr);
      const F up = scaled(g.up + i, g.factors[r], g.up_global, g.up_bias ? g.up_bias + at : nullptr);
      Lanes::store(g.y + i, Kind::of(gate, up, g));
    }
  }
}

template <void (*Store)(std::uint16_t*, F)>
void round_rows(const float* y, std::int32_t rows, std::uint16_t* out, std::int64_t stride) {
  for (int r = 0; r < rows; ++r, y += kPanelRows, out += stride) {
    for (int at = 0; at < kPanelRows; at += Lanes::kRows) Store(out + at, Lanes::load(y + at));
  }
}

template <void (*Store)(float*, F)>
FOURMOE_INLINE void scale_rows(const Sums& s) {
  for (int r = 0; r < s.rows; ++r) {
    for (int at = 0; at < kPanelRows; at += Lanes::kRows) {
      const float* bias = s.bias == nullptr ? nullptr : s.bias + at;
      Store(s.out + r * s.stride + at, scaled(s.sums + r * kPanelRows + at, s.factors[r], s.global, bias));
    }
  }
}

// Rows that nobody reads soon: without them in a cache, memory is written without being read first.
void scale(const Sums& s) {
  const bool aligned = reinterpret_cast<std::uintptr_t>(s.out) % 64 == 0 && s.stride % kPanelRows == 0;
  if (s.past_caches && aligned) scale_rows<Lanes::store_past>(s);
  else scale_rows<Lanes::store_unaligned>(s);
}

void settle() { _mm_sfence(); }

constexpr Finish make_finish() {
  Finish finish{};
  finish.activate[0] = activate<Swiglu>;  // in the order of ActivationKind
  finish.activate[1] = activate<SwigluClamped>;
  finish.activate[3] = activate<GegluTanh>;
  finish.activate[4] = activate<Relu2>;
  finish.round_bf16 = round_rows<Lanes::bf16>;
  finish.round_f16 = round_rows<Lanes::f16>;
  finish.scale = scale;
  finish.settle = settle;
  return finish;
}

}  // namespace
}  // namespace fourmoe::cpu
