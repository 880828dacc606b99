// The level of any CPU: vectors of four lanes, which compilers map to SSE2, NEON or scalars.
#include <bit>

#include "backends/cpu/atom.h"
#include "format/nvfp4.h"
#include "gemm1/activation.h"

namespace fourmoe::cpu {
namespace {

constexpr int kTile = 4;
constexpr int kWide = 0;  // always one vector after the other

struct Lanes {
  typedef float F __attribute__((vector_size(16)));
  typedef std::uint32_t U __attribute__((vector_size(16)));
  static constexpr int kRows = 4;
  static constexpr const f32* kTable = format::kE2m1.data();

  static F zero() { return F{}; }
  static F broadcast(const float* p) { return F{*p, *p, *p, *p}; }
  static F load_f32(const std::byte* p) { return format::load<F>(p); }
  static F load_bf16(const std::byte* p) {
    F value{};
    for (int i = 0; i < kRows; ++i) value[i] = format::from_bf16(format::load<u16>(p + 2 * i));
    return value;
  }
  static F mul(F a, F b) { return a * b; }
  static F add(F a, F b) { return a + b; }
  static F fma(F a, F b, F c) { return a * b + c; }  // rounds twice; the other levels once
  static void store(float* p, F value) { std::memcpy(p, &value, sizeof value); }
  static void prefetch(const std::byte*) {}

  static U words(const std::byte* p) { return format::load<U>(p); }

  template <int J>
  static F code(U words) {
    const U codes = (words >> (4 * J)) & 15u;
    F value{};
    for (int i = 0; i < kRows; ++i) value[i] = kTable[codes[i]];
    return value;
  }

  static F ue5m3(const std::byte* p) {
    F value{};
    for (int i = 0; i < kRows; ++i) value[i] = std::bit_cast<f32>(static_cast<u32>(p[i]) << 20) * 0x1p112f;
    return value;
  }
  static F e8m0(const std::byte* p) {
    F value{};
    for (int i = 0; i < kRows; ++i) value[i] = format::from_e8m0(static_cast<u8>(p[i]));
    return value;
  }
};

template <f32 (*Read)(u16)>
f32 widen(const Row& row, i32 blocks, std::byte* out, i64 stride) {
  for (i32 b = 0; b < blocks; ++b, out += stride) {
    f32* x = reinterpret_cast<f32*>(out);
    for (i32 i = 0; i < 16; ++i) x[i] = Read(format::load<u16>(row.values + 2 * (16 * b + i)));
  }
  return 1.0f;
}

f32 plus(f32 value, const f32* bias, i32 i) { return bias == nullptr ? value : value + bias[i]; }

template <ActivationKind kKind>
void activate(const Gates& g) {
  const Activation activation{kKind, g.alpha, g.beta, g.limit};
  for (i32 at = 0; at < g.rows * kPanelRows; ++at) {
    const i32 i = at % kPanelRows;
    const f32 factor = g.factors[at / kPanelRows];
    const f32 gate = plus(g.gate[at] * factor * g.gate_global, g.gate_bias, i);
    g.y[at] = gemm1::activate(activation, gate, plus(g.up[at] * factor * g.up_global, g.up_bias, i));
  }
}

template <u16 (*Round)(f32)>
void round_rows(const f32* y, i32 rows, u16* out, i64 stride) {
  for (i32 r = 0; r < rows; ++r, y += kPanelRows, out += stride) {
    for (i32 i = 0; i < kPanelRows; ++i) out[i] = Round(y[i]);
  }
}

void scale_rows(const Sums& s) {
  for (i32 r = 0; r < s.rows; ++r) {
    for (i32 i = 0; i < kPanelRows; ++i) {
      s.out[r * s.stride + i] = plus(s.sums[r * kPanelRows + i] * s.factors[r] * s.global, s.bias, i);
    }
  }
}

}  // namespace
}  // namespace fourmoe::cpu

#include "backends/cpu/atom_kernel.h"

namespace fourmoe::cpu {

const Atom* atom_portable() {
  static constexpr Atom kAtom =
      make_atom("plain C++ on f32 tokens", widen<format::from_bf16>, widen<format::from_f16_saturated>);
  return &kAtom;
}

const Atom* atom_portable_int8() {
  static constexpr Atom kAtom = make_int8_atom("plain C++ on int8 tokens, as f32");
  return &kAtom;
}

const Finish* finish_portable() {
  using enum ActivationKind;
  static constexpr Finish kFinish = {
      {activate<swiglu>, activate<swiglu_clamped>, activate<geglu_erf>, activate<geglu_tanh>, activate<relu2>},
      round_rows<format::to_bf16>,
      round_rows<format::to_f16_saturated>,
      scale_rows,
      nullptr};
  return &kFinish;
}

}  // namespace fourmoe::cpu
