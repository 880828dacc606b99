// Tokens to int8 for atoms that sum whole numbers in f32, and which atom multiplies them at which level.
#include "backends/cpu/tiles.h"
#include "format/quantise.h"

namespace fourmoe::cpu {
namespace {

constexpr i32 kGroup = format::kInt8Group;

template <f32 (*Read)(u16)>
f32 whole(const Row& row, i32 blocks, std::byte* out, i64 stride) {
  for (i32 b = 0; b < blocks; b += kGroup / 16) {
    const i32 n = std::min(kGroup, (blocks - b) * 16);
    f32 values[kGroup];
    i8 codes[kGroup];
    f32 half = 0.0f;
    for (i32 i = 0; i < n; ++i) values[i] = Read(format::load<u16>(row.values + 2 * (16 * b + i)));
    format::quantise_int8(values, n, codes, &half);
    for (i32 at = 0; at < n; at += 16, out += stride) {
      f32* x = reinterpret_cast<f32*>(out);
      for (i32 i = 0; i < 16; ++i) x[i] = 2.0f * codes[at + i];
      x[16] = half;
    }
  }
  return 1.0f;
}

}  // namespace

f32 whole_bf16(const Row& row, i32 blocks, std::byte* out, i64 stride) {
  return whole<format::from_bf16>(row, blocks, out, stride);
}

f32 whole_f16(const Row& row, i32 blocks, std::byte* out, i64 stride) {
  return whole<format::from_f16_saturated>(row, blocks, out, stride);
}

const Atom* atom_int8(CpuLevel level) {
  if (level >= CpuLevel::vnni) return atom_vnni_int8();
  if (level >= CpuLevel::avx512) return atom_avx512_int8();
  return level == CpuLevel::avx2 ? atom_avx2_int8() : atom_portable_int8();
}

}  // namespace fourmoe::cpu
