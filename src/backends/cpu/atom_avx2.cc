#include "backends/cpu/atom.h"
#include "backends/cpu/atom_inline.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

#include <immintrin.h>

namespace fourmoe::cpu {
namespace {

// 16 vector registers: 4 tokens take 8 for block sums and totals of 8 rows; the table, the sign, codes, a weight and a
// token take the rest. One token has room for all 16 rows at once.
constexpr int kTile = 4;
constexpr int kWide = 1;

struct Lanes {
  using F = __m256;
  using U = __m256i;
  static constexpr int kRows = 8;

  static F zero() { return _mm256_setzero_ps(); }
  static F broadcast(const float* p) { return _mm256_broadcast_ss(p); }
  static F load_f32(const std::byte* p) { return _mm256_load_ps(reinterpret_cast<const float*>(p)); }
  static F load_bf16(const std::byte* p) { return widen(_mm_load_si128(reinterpret_cast<const __m128i*>(p))); }
  static F widen(__m128i bf16) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bf16), 16)); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F value) { _mm256_store_ps(p, value); }
  static void store_unaligned(float* p, F value) { _mm256_storeu_ps(p, value); }
  static void store_past(float* p, F value) { _mm256_stream_ps(p, value); }
  FOURMOE_INLINE static void prefetch(const std::byte* p) {
    _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0);
  }

  static U words(const std::byte* p) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(p)); }

  // The permutation reads the low 3 bits of each lane, the magnitude; bit 3 of the nibble goes to the sign.
  template <int J>
  static F code(U words) {
    const F table = _mm256_setr_ps(0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f);
    const F sign = _mm256_and_ps(_mm256_castsi256_ps(_mm256_slli_epi32(words, 28 - 4 * J)), _mm256_set1_ps(-0.0f));
    return _mm256_or_ps(_mm256_permutevar8x32_ps(table, _mm256_srli_epi32(words, 4 * J)), sign);
  }

  static U bytes(const std::byte* p) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }
  static F ue5m3(const std::byte* p) {
    return _mm256_mul_ps(_mm256_castsi256_ps(_mm256_slli_epi32(bytes(p), 20)), _mm256_set1_ps(0x1p112f));
  }
  // Byte 0 is 2^-127, an f32 subnormal.
  static F e8m0(const std::byte* p) {
    return _mm256_castsi256_ps(_mm256_max_epu32(_mm256_slli_epi32(bytes(p), 23), _mm256_set1_epi32(0x00400000)));
  }

  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F min(F a, F b) { return _mm256_min_ps(a, b); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static F round(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static F power(F n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
  }
  static void bf16(std::uint16_t* p, F value) {
    const U bits = _mm256_castps_si256(value);
    const U odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const U rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const U nan = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));  // a NaN stays one
    const U kept =
        _mm256_srli_epi32(_mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(rounded), _mm256_castsi256_ps(nan),
                                                               _mm256_cmp_ps(value, value, _CMP_UNORD_Q))),
                          16);
    const U packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(kept, kept), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
  }
  // What f16 holds; NaNs stay.
  static F within_f16(F value) {
    const F limit = _mm256_set1_ps(65504.0f);
    return max(_mm256_sub_ps(zero(), limit), min(limit, value));
  }
  static void f16(std::uint16_t* p, F value) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(within_f16(value), _MM_FROUND_TO_NEAREST_INT));
  }
};

__m128i load_halves(const std::uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }

float widen_bf16(const Row& row, std::int32_t blocks, std::byte* out, std::int64_t stride) {
  for (std::int32_t b = 0; b < blocks; ++b, out += stride) {
    float* x = reinterpret_cast<float*>(out);
    _mm256_store_ps(x, Lanes::widen(load_halves(row.values + 32 * b)));
    _mm256_store_ps(x + 8, Lanes::widen(load_halves(row.values + 32 * b + 16)));
  }
  return 1.0f;
}

float widen_f16(const Row& row, std::int32_t blocks, std::byte* out, std::int64_t stride) {
  for (std::int32_t b = 0; b < blocks; ++b, out += stride) {
    float* x = reinterpret_cast<float*>(out);
    _mm256_store_ps(x, Lanes::within_f16(_mm256_cvtph_ps(load_halves(row.values + 32 * b))));
    _mm256_store_ps(x + 8, Lanes::within_f16(_mm256_cvtph_ps(load_halves(row.values + 32 * b + 16))));
  }
  return 1.0f;
}

}  // namespace
}  // namespace fourmoe::cpu

#include "backends/cpu/atom_finish.h"
#include "backends/cpu/atom_kernel.h"

namespace fourmoe::cpu {

const Atom* atom_avx2() {
  static constexpr Atom kAtom = make_atom("AVX2 on f32 tokens", widen_bf16, widen_f16);
  return &kAtom;
}

const Atom* atom_avx2_int8() {
  static constexpr Atom kAtom = make_int8_atom("AVX2 on int8 tokens, as f32");
  return &kAtom;
}

const Finish* finish_avx2() {
  static constexpr Finish kFinish = make_finish();
  return &kFinish;
}

}  // namespace fourmoe::cpu

#else

namespace fourmoe::cpu {
const Atom* atom_avx2() { return nullptr; }
const Atom* atom_avx2_int8() { return nullptr; }
const Finish* finish_avx2() { return nullptr; }
}  // namespace fourmoe::cpu

#endif
