// Ceilings of the Hopper room, before any kernel: how fast tiles stream in, how fast unpacked weights feed the tensor
// core, and what the unpacking costs. One JSON object a line; bench/sm90/ceilings.py runs this and keeps the record.
#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "backends/sm90/atom.cuh"
#include "gpu/isa/bits.cuh"
#include "gpu/isa/bulk.cuh"
#include "gpu/isa/wgmma.cuh"

namespace fourmoe {
namespace {

using namespace gpu::isa;

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(status));
  std::exit(1);
}

// Median seconds of `repeats` launches, each timed by its own pair of events.
template <class Launch>
double seconds(int repeats, const Launch& launch) {
  std::vector<float> times;
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin), "event");
  check(cudaEventCreate(&end), "event");
  for (int i = 0; i < repeats + 2; ++i) {
    check(cudaEventRecord(begin), "record");
    launch();
    check(cudaEventRecord(end), "record");
    check(cudaEventSynchronize(end), "run");
    float ms = 0;
    check(cudaEventElapsedTime(&ms, begin, end), "time");
    if (i >= 2) times.push_back(ms);
  }
  std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
  return times[times.size() / 2] * 1e-3;
}

// Stream: one thread a CTA keeps `stages` bulk copies of `tile` bytes in flight; nothing reads what arrives.

__global__ void stream(const u8* data, i64 tiles, u32 tile, int stages) {
  extern __shared__ __align__(1024) u8 ring[];
  __shared__ u64 full[16];
  if (threadIdx.x == 0) {
    for (int s = 0; s < stages; ++s) barrier_init(&full[s], 1);
    barrier_fence_init();
    i64 issue = blockIdx.x;
    for (int s = 0; s < stages && issue < tiles; ++s, issue += gridDim.x) {
      barrier_expect(&full[s], tile);
      bulk_load(ring + s * tile, data + issue * tile, tile, &full[s]);
    }
    int s = 0;
    u32 parity = 0;
    for (i64 wait = blockIdx.x; wait < tiles; wait += gridDim.x) {
      while (!barrier_try(&full[s], parity)) {
      }
      if (issue < tiles) {
        barrier_expect(&full[s], tile);
        bulk_load(ring + s * tile, data + issue * tile, tile, &full[s]);
        issue += gridDim.x;
      }
      if (++s == stages) s = 0, parity ^= 1;
    }
  }
}

void measure_stream(const u8* data, i64 bytes, int sms) {
  check(cudaFuncSetAttribute(stream, cudaFuncAttributeMaxDynamicSharedMemorySize, 220 * 1024), "shared memory");
  for (const u32 tile : {2304u, 4608u, 9216u, 18432u, 36864u}) {
    for (const int stages : {2, 3, 4, 6, 8, 12, 16}) {
      if (tile * stages > 216 * 1024) continue;
      const i64 tiles = bytes / tile;
      const double s = seconds(5, [&] { stream<<<sms, 32, tile * stages>>>(data, tiles, tile, stages); });
      check(cudaGetLastError(), "stream");
      std::printf("{\"part\": \"stream\", \"tile\": %u, \"stages\": %d, \"TBps\": %.4f}\n", tile, stages,
                  tiles * double(tile) / s * 1e-12);
    }
  }
}

// Unpacking variants. Each turns a thread's 16 bytes of codes (4 K steps) and 8 bytes of scales into 16 operands.

struct Constant {  // no unpacking: what the tensor core alone can do
  static constexpr const char* kName = "constant";
  static __device__ __forceinline__ void unpack(const uint4& c, const uint2&, u32 (&a)[4][4]) {
    const u32 w[4] = {c.x, c.y, c.z, c.w};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
#pragma unroll
      for (int r = 0; r < 4; ++r) a[k][r] = w[k] ^ r;
    }
  }
};

struct Single {  // each word alone: the fourth code of a half takes three shifts and three logic operations
  static constexpr const char* kName = "single";
  static __device__ __forceinline__ void unpack(const uint4& c, const uint2& s, u32 (&a)[4][4]) {
    const u32 w[4] = {c.x, c.y, c.z, c.w};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const u32 pair = sm90::scale_pair(k < 2 ? s.x : s.y, k % 2);
      a[k][0] = sm90::multiply_half<0>(w[k] & sm90::kCodeMask, pair);
      a[k][1] = sm90::multiply_half<1>(w[k] << 3 & sm90::kCodeMask, pair);
      a[k][2] = sm90::multiply_half<0>(w[k] << 6 & sm90::kCodeMask, pair);
      const u32 last = (w[k] << 1 & 0x80008000u) | (w[k] >> 3 & 0x01800180u) | (w[k] >> 7 & 0x00400040u);
      a[k][3] = sm90::multiply_half<1>(last, pair);
    }
  }
};

struct Paired {  // the atom: what two words leave over makes two codes
  static constexpr const char* kName = "paired";
  static __device__ __forceinline__ void unpack(const uint4& c, const uint2& s, u32 (&a)[4][4]) {
    u32 first[2][4], second[2][4];
    sm90::unpack<false>(c.x, c.y, s.x, first);
    sm90::unpack<false>(c.z, c.w, s.y, second);
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      a[0][r] = first[0][r], a[1][r] = first[1][r], a[2][r] = second[0][r], a[3][r] = second[1][r];
    }
  }
};

// Rate: kGroups warpgroups, each kRows tiles of 64 weight rows, multiply by the same kColumns tokens; operands cycle
// through 4 stages that lie in shared memory from the start. The unpacking of one tile overlaps the multiply of the one
// before.

template <int kColumns, int kGroups, int kRows>
struct Stage {
  u8 tokens[kColumns * 128];
  uint4 codes[kGroups][kRows][128];
  uint2 scales[kGroups][kRows][32];
};

template <class Unpack, int kColumns, int kGroups, int kRows>
__global__ void __launch_bounds__(kGroups * 128, 1) rate(const uint4* random, f32* out, int steps) {
  using Shared = Stage<kColumns, kGroups, kRows>;
  extern __shared__ u8 raw[];
  u8* aligned = raw + (1024 - shared_address(raw) % 1024) % 1024;
  for (u32 i = threadIdx.x; i < 4 * sizeof(Shared) / 16; i += blockDim.x) {
    reinterpret_cast<uint4*>(aligned)[i] = random[i % 4096];
  }
  fence_async_proxy();
  __syncthreads();
  const int group = threadIdx.x / 128;
  const int thread = threadIdx.x % 128;
  f32 d[kRows][kColumns / 2] = {};
  u32 a[2][4][4];
  const auto load = [&](int step, int row, u32(&operands)[4][4]) {
    const Shared& stage = reinterpret_cast<const Shared*>(aligned)[step % 4];
    Unpack::unpack(load_shared_16(shared_address(&stage.codes[group][row][thread])),
                   load_shared_8(shared_address(&stage.scales[group][row][thread / 4])), operands);
  };
  load(0, 0, a[0]);
#pragma unroll 1
  for (int step = 0; step < steps; step += 2) {
#pragma unroll
    for (int tile = 0; tile < 2 * kRows; ++tile) {
      const Shared& stage = reinterpret_cast<const Shared*>(aligned)[(step + tile / kRows) % 4];
      const u64 tokens = swizzled_rows(shared_address(stage.tokens));
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < 4; ++k) Wgmma<kColumns>::multiply(d[tile % kRows], a[tile % 2][k], tokens + 2 * k, true);
      wgmma_commit();
      wgmma_wait<1>();
      load(step + (tile + 1) / kRows, (tile + 1) % kRows, a[(tile + 1) % 2]);
    }
  }
  wgmma_wait<0>();
  f32 sum = 0;
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i) sum += d[row][i];
  }
  out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

template <class Unpack, int kColumns, int kGroups, int kRows>
void measure_rate(const uint4* random, f32* out, int sms) {
  const auto kernel = rate<Unpack, kColumns, kGroups, kRows>;
  const int bytes = 1024 + 4 * int(sizeof(Stage<kColumns, kGroups, kRows>));
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "shared memory");
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, kernel), "attributes");
  const int steps = 40000 * 128 / (kColumns * kRows) / 2 * 2;
  const double s = seconds(5, [&] { kernel<<<sms, kGroups * 128, bytes>>>(random, out, steps); });
  check(cudaGetLastError(), "rate");
  const double weights = double(sms) * kGroups * kRows * 64 * 64 * steps;
  std::printf(
      "{\"part\": \"rate\", \"unpack\": \"%s\", \"columns\": %d, \"groups\": %d, \"rows\": %d, \"registers\": %d, "
      "\"spilled\": %zu, \"TFLOPs\": %.1f, \"packed_TBps\": %.3f}\n",
      Unpack::kName, kColumns, kGroups, kRows, attributes.numRegs, attributes.localSizeBytes,
      2 * weights * kColumns / s * 1e-12, weights * 0.5625 / s * 1e-12);
}

template <int kColumns, int kGroups, int kRows>
void measure_rates(const uint4* random, f32* out, int sms) {
  measure_rate<Constant, kColumns, kGroups, kRows>(random, out, sms);
  measure_rate<Single, kColumns, kGroups, kRows>(random, out, sms);
  measure_rate<Paired, kColumns, kGroups, kRows>(random, out, sms);
}

// The device's unpacking against the layout's own inverse, over all codes and scale bytes.
__global__ void unpack_all(const u32* words, u32* out, int cases) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= cases) return;
  u32 a[2][4];
  sm90::unpack<false>(words[3 * i], words[3 * i + 1], words[3 * i + 2], a);
  for (int r = 0; r < 8; ++r) out[8 * i + r] = a[r / 4][r % 4];
}

f32 from_half(u32 word, int half) {
  const u32 bits = half == 0 ? word << 16 : word & 0xffff0000u;
  f32 value;
  memcpy(&value, &bits, 4);
  return value;
}

void verify_unpack() {
  static constexpr f32 kE2m1[8] = {0, .5f, 1, 1.5f, 2, 3, 4, 6};
  std::mt19937 random(7);
  const int cases = 256 * 64;
  std::vector<u32> words(3 * cases);
  std::vector<std::array<std::array<u8, 2>, 8>> codes(cases);
  std::vector<std::array<u8, 4>> scales(cases);
  for (int i = 0; i < cases; ++i) {
    for (auto& pair : codes[i]) pair = {u8(random() % 16), u8(random() % 16)};
    scales[i] = {u8(i % 256), u8(random()), u8(random()), u8((i / 256 * 4 + i) % 256)};
    const auto joined = sm90::join_codes(codes[i]);
    words[3 * i] = joined[0], words[3 * i + 1] = joined[1];
    words[3 * i + 2] = sm90::join_scales(scales[i][0], scales[i][1], scales[i][2], scales[i][3]);
  }
  u32 *in, *out;
  check(cudaMalloc(&in, words.size() * 4), "malloc");
  check(cudaMalloc(&out, cases * 32), "malloc");
  check(cudaMemcpy(in, words.data(), words.size() * 4, cudaMemcpyHostToDevice), "copy");
  unpack_all<<<(cases + 127) / 128, 128>>>(in, out, cases);
  std::vector<u32> got(8 * cases);
  check(cudaMemcpy(got.data(), out, got.size() * 4, cudaMemcpyDeviceToHost), "unpack_all");
  i64 wrong = 0;
  for (int i = 0; i < cases; ++i) {
    for (int r = 0; r < 8; ++r) {
      const u8 scale = scales[i][r / 4 * 2 + r % 2];
      const f32 ue5m3 = std::ldexp(f32(8 + scale % 8), scale / 8 - 15 - 3 + sm90::kProductExponent);
      for (int half = 0; half < 2; ++half) {
        const u8 code = codes[i][r][half];
        wrong += from_half(got[8 * i + r], half) != (code & 8 ? -1 : 1) * kE2m1[code & 7] * ue5m3;
      }
    }
  }
  std::printf("{\"part\": \"verify\", \"products\": %d, \"wrong\": %lld}\n", cases * 16, static_cast<long long>(wrong));
  if (wrong != 0) std::exit(1);
}

void run() {
  cudaDeviceProp device;
  check(cudaGetDeviceProperties(&device, 0), "device");
  const int sms = device.multiProcessorCount;
  std::printf("{\"part\": \"device\", \"name\": \"%s\", \"sms\": %d}\n", device.name, sms);
  verify_unpack();

  const i64 bytes = i64{4} << 30;
  u8* data;
  check(cudaMalloc(&data, bytes), "malloc");
  std::vector<u32> host(1 << 24);
  std::mt19937 random(3);
  for (u32& word : host) word = random();
  for (i64 at = 0; at < bytes; at += host.size() * 4) {
    check(cudaMemcpy(data + at, host.data(), host.size() * 4, cudaMemcpyHostToDevice), "copy");
  }
  measure_stream(data, bytes, sms);

  // As bf16 tokens the random words must be ordinary numbers: exponents near 1.
  for (int i = 0; i < 4096 * 4; ++i) host[i] = (host[i] & 0x80ff80ffu) | 0x3f003f00u;
  check(cudaMemcpy(data, host.data(), 65536, cudaMemcpyHostToDevice), "copy");
  f32* out;
  check(cudaMalloc(&out, sms * 1024 * 4), "malloc");
  const uint4* words = reinterpret_cast<const uint4*>(data);
  measure_rates<256, 2, 1>(words, out, sms);
  measure_rates<128, 2, 1>(words, out, sms);
  measure_rates<128, 2, 2>(words, out, sms);
  measure_rates<64, 4, 1>(words, out, sms);
  measure_rates<64, 3, 2>(words, out, sms);
  measure_rates<32, 4, 1>(words, out, sms);
  measure_rates<32, 4, 2>(words, out, sms);
  measure_rates<16, 4, 2>(words, out, sms);
  measure_rates<16, 4, 4>(words, out, sms);
  measure_rates<8, 4, 2>(words, out, sms);
  measure_rates<8, 4, 4>(words, out, sms);
}

}  // namespace
}  // namespace fourmoe

int main() { fourmoe::run(); }
