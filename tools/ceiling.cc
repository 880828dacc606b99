#include "ceiling.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <random>
#include <vector>

#include "machine.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fourmoe::tools {
namespace {

using Clock = std::chrono::steady_clock;

constexpr i64 kStreams = 4;                   // a thread; one stream leaves the prefetcher's reach unused
constexpr i64 kBufferBytes = i64{512} << 20;  // beyond any last-level cache of two sockets' share
constexpr i64 kMultiplyAdds = 1 << 18;        // rounds of one task: about a millisecond
constexpr int kAccumulators = 12;             // hide four cycles of latency on three ports

// Sum of kStreams chunks of `bytes` each (a multiple of 64), read in turns.
using ReadBody = u64 (*)(const u8* data, i64 bytes);
// Returns the operations of kMultiplyAdds rounds.
using MultiplyBody = f64 (*)(f32* sink);

u64 read_portable(const u8* data, i64 bytes) {
  u64 sum[kStreams] = {};
  for (i64 at = 0; at < bytes; at += 64) {
    for (i64 s = 0; s < kStreams; ++s) {
      for (i64 word = 0; word < 64; word += 8) sum[s] += format::load<u64>(data + s * bytes + at + word);
    }
  }
  return sum[0] + sum[1] + sum[2] + sum[3];
}

f64 multiply_portable(f32* sink) {
  f32 sums[kAccumulators][4];
  for (auto& sum : sums) std::fill(sum, sum + 4, 1.0f);
  for (i64 round = 0; round < kMultiplyAdds; ++round) {
    for (auto& sum : sums) {
      for (f32& value : sum) value = value * 0.999f + 0.001f;
    }
  }
  for (const auto& sum : sums) *sink += sum[0] + sum[1] + sum[2] + sum[3];
  return 2.0 * kMultiplyAdds * kAccumulators * 4;
}

#if defined(__x86_64__)

__attribute__((target("avx2"))) u64 read_avx2(const u8* data, i64 bytes) {
  __m256i sum = _mm256_setzero_si256();
  for (i64 at = 0; at < bytes; at += 64) {
    for (i64 s = 0; s < kStreams; ++s) {
      const auto* line = reinterpret_cast<const __m256i*>(data + s * bytes + at);
      sum = _mm256_add_epi64(sum, _mm256_xor_si256(_mm256_loadu_si256(line), _mm256_loadu_si256(line + 1)));
    }
  }
  return static_cast<u64>(_mm256_extract_epi64(sum, 0) + _mm256_extract_epi64(sum, 3));
}

__attribute__((target("avx512f"))) u64 read_avx512(const u8* data, i64 bytes) {
  __m512i sum = _mm512_setzero_si512();
  for (i64 at = 0; at < bytes; at += 64) {
    for (i64 s = 0; s < kStreams; ++s) sum = _mm512_add_epi64(sum, _mm512_loadu_si512(data + s * bytes + at));
  }
  u64 words[8];
  _mm512_storeu_si512(words, sum);
  return words[0] + words[3] + words[7];
}

__attribute__((target("avx2,fma"))) f64 multiply_avx2(f32* sink) {
  __m256 sums[kAccumulators];
  for (__m256& sum : sums) sum = _mm256_set1_ps(1.0f);
  const __m256 a = _mm256_set1_ps(0.999f);
  const __m256 b = _mm256_set1_ps(0.001f);
  for (i64 round = 0; round < kMultiplyAdds; ++round) {
#pragma GCC unroll 12
    for (int i = 0; i < kAccumulators; ++i) sums[i] = _mm256_fmadd_ps(sums[i], a, b);
  }
  for (const __m256& sum : sums) *sink += _mm256_cvtss_f32(sum);
  return 2.0 * kMultiplyAdds * kAccumulators * 8;
}

__attribute__((target("avx512f"))) f64 multiply_avx512(f32* sink) {
  __m512 sums[kAccumulators];
  for (__m512& sum : sums) sum = _mm512_set1_ps(1.0f);
  const __m512 a = _mm512_set1_ps(0.999f);
  const __m512 b = _mm512_set1_ps(0.001f);
  for (i64 round = 0; round < kMultiplyAdds; ++round) {
#pragma GCC unroll 12
    for (int i = 0; i < kAccumulators; ++i) sums[i] = _mm512_fmadd_ps(sums[i], a, b);
  }
  for (const __m512& sum : sums) *sink += _mm512_cvtss_f32(sum);
  return 2.0 * kMultiplyAdds * kAccumulators * 16;
}

// bf16 values of both signs from 0.5 to 2: zeros would be multiplied a fifth faster, at a higher clock.
struct alignas(64) TileOperands {
  static constexpr i64 kBytes = 32 << 10;
  u16 values[kBytes / 2];

  TileOperands() {
    std::minstd_rand random(1);
    for (u16& value : values) {
      const auto bits = static_cast<u32>(random()) >> 4;
      value = static_cast<u16>((bits & 0x8000u) | 0x3f00u | (bits & 0xffu));
    }
  }
};

// Two tiles of tokens by two of weights, 32 columns a step, operands from the nearest cache: what a product of bf16
// tiles reaches when all else is free. `sink` is not used: the tile unit's work is not left out.
__attribute__((target("amx-tile,amx-bf16"))) f64 multiply_amx(f32* sink) {
  struct alignas(64) {
    u8 palette = 1, start = 0, reserved[14] = {};
    u16 row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    u8 rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  constexpr i64 kTileBytes = 1024;
  constexpr i64 kSteps = TileOperands::kBytes / (4 * kTileBytes);
  static const TileOperands operands;
  std::atomic_signal_fence(std::memory_order_seq_cst);
  _tile_loadconfig(&config);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  constexpr i64 kRounds = kMultiplyAdds / 16;
  for (i64 round = 0; round < kRounds; ++round) {
    const u16* step = operands.values + round % kSteps * 2 * kTileBytes;
    _tile_loadd(4, step, 64);
    _tile_loadd(5, step + kTileBytes / 2, 64);
    _tile_loadd(6, step + kTileBytes, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 5, 6);
    _tile_loadd(7, step + 3 * kTileBytes / 2, 64);
    _tile_dpbf16ps(2, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
  *sink += 1.0f;
  return 2.0 * kRounds * 4 * 16 * 16 * 32;
}

ReadBody read_body(CpuLevel level) {
  return level >= CpuLevel::avx512 ? read_avx512 : level == CpuLevel::avx2 ? read_avx2 : read_portable;
}

MultiplyBody multiply_body(CpuLevel level) {
  return level >= CpuLevel::avx512 ? multiply_avx512 : level == CpuLevel::avx2 ? multiply_avx2 : multiply_portable;
}

#else

ReadBody read_body(CpuLevel) { return read_portable; }
MultiplyBody multiply_body(CpuLevel) { return multiply_portable; }
f64 multiply_amx(f32*) { return 0.0; }

#endif

f64 seconds_since(Clock::time_point start) { return std::chrono::duration<f64>(Clock::now() - start).count(); }

f64 measure_reading(Executor& executor) {
  const i64 total = std::min(kBufferBytes, std::max<i64>(machine().memory_bytes / 16, 1 << 20));
  const i64 tasks = 8 * i64{executor.threads()};
  const i64 stream = total / tasks / kStreams / 64 * 64;
  std::vector<u8> buffer(static_cast<std::size_t>(tasks * kStreams * stream), 1);
  const ReadBody body = read_body(machine().cpu_level);
  std::atomic<u64> sink = 0;
  f64 best = 0.0;
  for (int repeat = 0; repeat < 4; ++repeat) {
    const Clock::time_point start = Clock::now();
    executor.parallel_for(tasks, [&](i64 task) { sink += body(buffer.data() + task * kStreams * stream, stream); });
    best = std::max(best, static_cast<f64>(buffer.size()) / seconds_since(start));
  }
  return sink == 0 ? 0.0 : best;  // the sum is used, so no compiler leaves the reads out
}

f64 measure_multiplying(Executor& executor, MultiplyBody body) {
  const i64 tasks = 16 * i64{executor.threads()};
  std::vector<f32> sinks(static_cast<std::size_t>(tasks) * 16, 0.0f);  // a cache line apart
  std::vector<f64> operations(static_cast<std::size_t>(tasks));
  f64 best = 0.0;
  for (int repeat = 0; repeat < 4; ++repeat) {
    const Clock::time_point start = Clock::now();
    executor.parallel_for(tasks, [&](i64 task) { operations[task] = body(&sinks[task * 16]); });
    const f64 seconds = seconds_since(start);
    f64 sum = 0.0;
    for (const f64 count : operations) sum += count;
    best = std::max(best, sum / seconds);
  }
  return best;
}

}  // namespace

Ceilings measure_ceilings(Executor& executor, const Problem& problem) {
  Ceilings found;
  found.read_bytes_per_second = measure_reading(executor);
  found.fma_flops_per_second = measure_multiplying(executor, multiply_body(machine().cpu_level));
  const bool tiles = machine().cpu_level >= CpuLevel::amx && problem.precision == Precision::w4a16;
  found.unit = tiles ? "AMX bf16 with loads from L1" : "f32 multiply-add";
  found.flops_per_second = tiles ? measure_multiplying(executor, multiply_amx) : found.fma_flops_per_second;
  return found;
}

}  // namespace fourmoe::tools
