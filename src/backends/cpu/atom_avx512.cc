#include "backends/cpu/atom.h"
#include "backends/cpu/atom_inline.h"

#if defined(__AVX512F__) && defined(__AVX512BW__)

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // gcc 12's own header: bug 105593
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

namespace fourmoe::cpu {
namespace {

// 32 vector registers: 12 tokens take 24 for block sums and totals, which leaves 8 for the table, codes and weights.
constexpr int kTile = 12;
constexpr int kWide = 12;

struct Lanes {
  using F = __m512;
  using U = __m512i;
  static constexpr int kRows = 16;

  static F zero() { return _mm512_setzero_ps(); }
  static F broadcast(const float* p) { return _mm512_set1_ps(*p); }
  static F load_f32(const std::byte* p) { return _mm512_load_ps(p); }
  static F load_bf16(const std::byte* p) { return widen(_mm256_load_si256(reinterpret_cast<const __m256i*>(p))); }
  static F widen(__m256i bf16) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16)); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F value) { _mm512_store_ps(p, value); }
  static void store_unaligned(float* p, F value) { _mm512_storeu_ps(p, value); }
  static void store_past(float* p, F value) { _mm512_stream_ps(p, value); }
  FOURMOE_INLINE static void prefetch(const std::byte* p) {
    _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0);
  }

  static U words(const std::byte* p) { return _mm512_load_si512(p); }

  // The permutation reads the low 4 bits of each lane.
  template <int J>
  static F code(U words) {
    const F table = _mm512_setr_ps(0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f, -0.0f, -0.5f, -1.0f, -1.5f, -2.0f,
                                   -3.0f, -4.0f, -6.0f);
    return _mm512_permutexvar_ps(_mm512_srli_epi32(words, 4 * J), table);
  }

  static U bytes(const std::byte* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static F ue5m3(const std::byte* p) {
    return _mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(bytes(p), 20)), _mm512_set1_ps(0x1p112f));
  }
  // Byte 0 is 2^-127, an f32 subnormal.
  static F e8m0(const std::byte* p) {
    return _mm512_castsi512_ps(_mm512_max_epu32(_mm512_slli_epi32(bytes(p), 23), _mm512_set1_epi32(0x00400000)));
  }

  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F round(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static F power(F n) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
  }
  static void bf16(std::uint16_t* p, F value) {
    const U bits = _mm512_castps_si512(value);
    const U odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const U rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    const U kept = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));  // a NaN stays one
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16)));
  }
  // What f16 holds; NaNs stay.
  static F within_f16(F value) {
    const F limit = _mm512_set1_ps(65504.0f);
    return max(_mm512_sub_ps(zero(), limit), min(limit, value));
  }
  static void f16(std::uint16_t* p, F value) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(within_f16(value), _MM_FROUND_TO_NEAREST_INT));
  }
};

__m256i load_halves(const std::uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }

float widen_bf16(const Row& row, std::int32_t blocks, std::byte* out, std::int64_t stride) {
  for (std::int32_t b = 0; b < blocks; ++b)
    _mm512_store_ps(out + b * stride, Lanes::widen(load_halves(row.values + 32 * b)));
  return 1.0f;
}

float widen_f16(const Row& row, std::int32_t blocks, std::byte* out, std::int64_t stride) {
  for (std::int32_t b = 0; b < blocks; ++b)
    _mm512_store_ps(out + b * stride, Lanes::within_f16(_mm512_cvtph_ps(load_halves(row.values + 32 * b))));
  return 1.0f;
}

}  // namespace
}  // namespace fourmoe::cpu

#include "backends/cpu/atom_finish.h"
#include "backends/cpu/atom_kernel.h"

namespace fourmoe::cpu {

const Atom* atom_avx512() {
  static constexpr Atom kAtom = make_atom("AVX-512 on f32 tokens", widen_bf16, widen_f16);
  return &kAtom;
}

const Atom* atom_avx512_int8() {
  static constexpr Atom kAtom = make_int8_atom("AVX-512 on int8 tokens, as f32");
  return &kAtom;
}

const Finish* finish_avx512() {
  static constexpr Finish kFinish = make_finish();
  return &kFinish;
}

}  // namespace fourmoe::cpu

#else

namespace fourmoe::cpu {
const Atom* atom_avx512() { return nullptr; }
const Atom* atom_avx512_int8() { return nullptr; }
const Finish* finish_avx512() { return nullptr; }
}  // namespace fourmoe::cpu

#endif
