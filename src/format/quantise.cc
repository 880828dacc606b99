#include "format/quantise.h"

#include <algorithm>
#include <limits>

#include "machine.h"

#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // gcc 12's own header: bug 105593
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#endif

namespace fourmoe::format {
namespace {

// Magnitudes are ordered like their bits, and a NaN's are the largest.
f32 block_amax(const f32* x) {
  i32 largest = 0;
  for (i32 i = 0; i < kNvfp4Block; ++i) largest = std::max(largest, std::bit_cast<i32>(x[i]) & 0x7fffffff);
  return std::bit_cast<f32>(largest);
}

f32 larger(f32 a, f32 b) { return std::bit_cast<f32>(std::max(std::bit_cast<i32>(a), std::bit_cast<i32>(b))); }

void quantise_plain(const Blocks& blocks, i64 count, f32 global) {
  for (i64 block = 0; block < count; ++block) {
    const f32* values = blocks.x + block * blocks.x_stride;
    const u8 scale = block_scale(block_amax(values), global);
    const f32 step = from_e4m3(scale) * global;
    i32 codes[kNvfp4Block];  // plain loops over a block, which compilers turn into vectors
    for (i32 i = 0; i < kNvfp4Block; ++i) codes[i] = to_e2m1(values[i] / step);
    u8* out = blocks.codes + block * blocks.codes_stride;
    for (i32 pair = 0; pair < kNvfp4Block / 2; ++pair) {
      out[pair] = static_cast<u8>(codes[2 * pair] | codes[2 * pair + 1] << 4);
    }
    blocks.scales[block * blocks.scales_stride] = scale;
  }
}

#if defined(__x86_64__)

#define FOURMOE_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))

constexpr i64 kBatch = 16;  // blocks whose scales are found together, a lane each

// block_scale of 16 largest magnitudes: E4M3 bytes in 32-bit lanes.
FOURMOE_AVX512 __m512i block_scales(__m512 amax, f32 global) {
  const __m512 quotient = _mm512_div_ps(amax, _mm512_set1_ps(kE2m1Max * global));
  const __mmask16 zero = _mm512_cmp_ps_mask(quotient, _mm512_setzero_ps(), _CMP_EQ_OQ);
  const __m512 scale = _mm512_max_ps(_mm512_set1_ps(0x1p-9f), quotient);  // the second where it is a NaN
  const __m512i bits = _mm512_castps_si512(scale);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 20), _mm512_set1_epi32(1));
  const __m512i rounded =
      _mm512_srli_epi32(_mm512_sub_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7ffff))),
                                         _mm512_set1_epi32(0x3c000000)),
                        20);
  const __m512i subnormal = _mm512_sub_epi32(_mm512_castps_si512(_mm512_add_ps(scale, _mm512_set1_ps(0x1p14f))),
                                             _mm512_set1_epi32(0x46800000));
  const __mmask16 small = _mm512_cmplt_epu32_mask(bits, _mm512_set1_epi32(0x3c800000));  // below 2^-6
  const __mmask16 large = _mm512_cmpge_epu32_mask(bits, _mm512_set1_epi32(0x43e00000));  // 448 and above
  const __mmask16 nan = _mm512_cmp_ps_mask(scale, scale, _CMP_UNORD_Q);
  __m512i bytes = _mm512_mask_mov_epi32(rounded, small, subnormal);
  bytes = _mm512_mask_mov_epi32(bytes, large, _mm512_set1_epi32(0x7e));
  bytes = _mm512_mask_mov_epi32(bytes, nan, _mm512_set1_epi32(0x7f));
  return _mm512_mask_mov_epi32(bytes, zero, _mm512_set1_epi32(0x38));  // 1
}

// from_e4m3 of non-negative bytes, times the global scale.
FOURMOE_AVX512 __m512 block_steps(__m512i bytes, f32 global) {
  const __m512 value = _mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(bytes, 20)), _mm512_set1_ps(0x1p120f));
  const __mmask16 nan = _mm512_cmpeq_epi32_mask(bytes, _mm512_set1_epi32(0x7f));
  const __m512 known = _mm512_mask_mov_ps(value, nan, _mm512_castsi512_ps(_mm512_set1_epi32(0x7fc00000)));
  return _mm512_mul_ps(known, _mm512_set1_ps(global));
}

// to_e2m1 of 16 values as 8 bytes. Between 0 and 2 the codes are halves, to 4 they are ones, to 6 twos, and rounding to
// whole numbers settles ties alike; outside its range each of the three is above the right one.
FOURMOE_AVX512 i64 e2m1_pairs(__m512 value) {
  const __mmask16 number = _mm512_cmp_ps_mask(value, value, _CMP_ORD_Q);
  const __mmask16 negative = _mm512_cmp_ps_mask(value, _mm512_setzero_ps(), _CMP_LT_OQ);
  const __m512 magnitude = _mm512_maskz_min_ps(number, _mm512_abs_ps(value), _mm512_set1_ps(kE2m1Max));
  const __m512i halves = _mm512_cvtps_epi32(_mm512_add_ps(magnitude, magnitude));
  const __m512i ones = _mm512_add_epi32(_mm512_cvtps_epi32(magnitude), _mm512_set1_epi32(2));
  const __m512i twos =
      _mm512_add_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(magnitude, _mm512_set1_ps(0.5f))), _mm512_set1_epi32(4));
  const __m512i code = _mm512_min_epi32(halves, _mm512_min_epi32(ones, twos));
  const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_mask_or_epi32(code, negative, code, _mm512_set1_epi32(8)));
  const __m128i pairs = _mm_maddubs_epi16(bytes, _mm_set1_epi16(0x1001));  // even + 16 odd
  return _mm_cvtsi128_si64(_mm_packus_epi16(pairs, pairs));
}

FOURMOE_AVX512 void quantise_avx512(const Blocks& blocks, i64 count, f32 global) {
  alignas(64) f32 lanes[kBatch] = {};
  alignas(16) u8 scales[kBatch];
  for (i64 first = 0; first < count; first += kBatch) {
    const i64 n = std::min(kBatch, count - first);
    const f32* x = blocks.x + first * blocks.x_stride;
    for (i64 b = 0; b < n; ++b) {  // magnitudes are ordered like their bits, and a NaN's are the largest
      const __m512i magnitude = _mm512_castps_si512(_mm512_abs_ps(_mm512_loadu_ps(x + b * blocks.x_stride)));
      lanes[b] = std::bit_cast<f32>(_mm512_reduce_max_epi32(magnitude));
    }
    const __m512i bytes = block_scales(_mm512_load_ps(lanes), global);
    _mm_store_si128(reinterpret_cast<__m128i*>(scales), _mm512_cvtepi32_epi8(bytes));
    _mm512_store_ps(lanes, block_steps(bytes, global));
    for (i64 b = 0; b < n; ++b) {
      const __m512 value = _mm512_div_ps(_mm512_loadu_ps(x + b * blocks.x_stride), _mm512_set1_ps(lanes[b]));
      const i64 pairs = e2m1_pairs(value);
      std::memcpy(blocks.codes + (first + b) * blocks.codes_stride, &pairs, sizeof pairs);
      blocks.scales[(first + b) * blocks.scales_stride] = scales[b];
    }
  }
}

#endif

}  // namespace

void quantise_blocks(const Blocks& blocks, i64 count, f32 global) {
#if defined(__x86_64__)
  if (machine().cpu_level >= CpuLevel::avx512) return quantise_avx512(blocks, count, global);
#endif
  quantise_plain(blocks, count, global);
}

void quantise_row(const f32* x, i64 n, f32 global, u8* codes, u8* scales) {
  quantise_blocks({x, kNvfp4Block, codes, kNvfp4Block / 2, scales, 1}, n / kNvfp4Block, global);
}

void quantise_int8(const f32* x, i64 n, i8* codes, f32* halves) {
  constexpr f32 kWhole = 0x1.8p23f;  // a sum with it has no bits below 1, so it rounds, ties to even
  for (i64 first = 0; first < n; first += kInt8Group, ++halves) {
    const i64 end = std::min<i64>(n, first + kInt8Group);
    f32 amax = block_amax(x + first);
    if (end - first > kNvfp4Block) amax = larger(amax, block_amax(x + first + kNvfp4Block));
    *halves = std::isfinite(amax) ? amax / 254.0f : std::numeric_limits<f32>::quiet_NaN();
    const f32 scale = 2.0f * *halves;
    for (i64 i = first; i < end; ++i) codes[i] = scale > 0.0f ? static_cast<i8>(x[i] / scale + kWhole - kWhole) : i8{0};
  }
}

void dequantise_row(const u8* codes, const u8* scales, i64 n, f32* out) {
  for (i64 i = 0; i < n; ++i) out[i] = from_e2m1(code_at(codes, i)) * from_e4m3(scales[i / kNvfp4Block]);
}

}  // namespace fourmoe::format
