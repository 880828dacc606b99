// Route, gather, quantise and combine in CUDA graphs: microseconds of a call among others of its kind, against a device
// copy in the same run; and the deterministic combine against others. One JSON object a line.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "combine/device.h"
#include "gpu/fault.h"
#include "route/device.h"

namespace fourmoe {
namespace {

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(status));
  std::exit(1);
}

void check(const Status& status) {
  if (status.ok()) return;
  std::fprintf(stderr, "%s\n", status.detail.c_str());
  std::exit(1);
}

template <class T>
T* allocate(i64 count) {
  T* memory;
  check(cudaMalloc(&memory, std::max<i64>(count, 1) * sizeof(T)), "malloc");
  check(cudaMemset(memory, 0, std::max<i64>(count, 1) * sizeof(T)), "clear");
  return memory;
}

template <class T>
T* upload(const std::vector<T>& values) {
  T* memory = allocate<T>(values.size());
  check(cudaMemcpy(memory, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice), "upload");
  return memory;
}

// Median microseconds of a graph that holds `work` `repeats` times, divided by their number.
f64 microseconds(int repeats, const std::function<void(cudaStream_t)>& work) {
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  cudaEvent_t begin, end;
  check(cudaStreamCreate(&stream), "stream");
  check(cudaEventCreate(&begin), "event");
  check(cudaEventCreate(&end), "event");
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "capture");
  for (int i = 0; i < repeats; ++i) work(stream);
  check(cudaStreamEndCapture(stream, &graph), "capture");
  check(cudaGraphInstantiate(&executable, graph, 0), "graph");
  std::vector<f32> times;
  for (int i = 0; i < 23; ++i) {
    check(cudaEventRecord(begin, stream), "record");
    check(cudaGraphLaunch(executable, stream), "launch");
    check(cudaEventRecord(end, stream), "record");
    check(cudaEventSynchronize(end), "run");
    f32 ms;
    check(cudaEventElapsedTime(&ms, begin, end), "time");
    if (i >= 3) times.push_back(ms);
  }
  std::sort(times.begin(), times.end());
  cudaGraphExecDestroy(executable);
  cudaGraphDestroy(graph);
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  cudaStreamDestroy(stream);
  return times[times.size() / 2] * 1e3 / repeats;
}

__global__ void __launch_bounds__(256) copy_quads(const float4* from, float4* to, i64 quads) {
  const i64 i = i64{blockIdx.x} * 1024 + threadIdx.x;
  float4 x[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) x[j] = i + 256 * j < quads ? __ldcs(from + i + 256 * j) : float4{};
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (i + 256 * j < quads) to[i + 256 * j] = x[j];
  }
}

// GB/s, read plus written, of a copy of 1 GiB by a kernel (by cudaMemcpyAsync in a graph it is slower).
f64 copy_rate() {
  const i64 bytes = i64{1} << 30;
  float4 *from = allocate<float4>(bytes / 16), *to = allocate<float4>(bytes / 16);
  const u32 blocks = static_cast<u32>(bytes / 16 / 1024);
  const f64 us = microseconds(4, [&](cudaStream_t s) { copy_quads<<<blocks, 256, 0, s>>>(from, to, bytes / 16); });
  cudaFree(from);
  cudaFree(to);
  return 2.0 * bytes / us * 1e-3;
}

// Random bf16 of ordinary size, a period of 1 Mi values: zeros are unlike any activations.
u16* random_bf16(i64 count) {
  static const std::vector<u16> some = [] {
    std::mt19937 random(5);
    std::normal_distribution<f32> normal;
    std::vector<u16> values(1 << 20);
    for (u16& value : values) value = format::to_bf16(normal(random));
    return values;
  }();
  u16* memory = allocate<u16>(count);
  for (i64 i = 0; i < count; i += static_cast<i64>(some.size())) {
    const i64 part = std::min<i64>(count - i, static_cast<i64>(some.size()));
    check(cudaMemcpy(memory + i, some.data(), part * 2, cudaMemcpyHostToDevice), "upload");
  }
  return memory;
}

struct Shape {
  const char* name;
  i32 hidden, inter, experts, top_k;
  Routing routing;
};

// All buffers of a layer's call; random logits.
struct Layer {
  Layer(const Shape& shape, i32 count) : tokens(count) {
    Problem p;
    p.hidden = shape.hidden, p.inter = shape.inter;
    p.experts = p.local_experts = shape.experts;
    p.top_k = shape.top_k;
    p.max_tokens = tokens;
    p.routing = shape.routing;
    const i64 picks = i64{tokens} * p.top_k, slot_values = picks * p.hidden;
    std::mt19937_64 random(tokens);
    std::normal_distribution<f32> normal;
    std::vector<f32> logits(i64{tokens} * p.experts), bias(p.experts);
    for (f32& value : logits) value = normal(random);
    for (f32& value : bias) value = 0.05f * normal(random);
    slots.problem = p;
    slots.tokens = tokens;
    slots.in.logits = {upload(logits), format::Dtype::f32, tokens, p.experts, p.experts};
    if (p.routing.score == Score::sigmoid) slots.in.bias = upload(bias);
    slots.out.ids = allocate<i32>(picks);
    slots.out.weights = allocate<f32>(picks);
    slots.out.expert_begin = allocate<i32>(p.local_experts + 1);
    slots.out.slot_pick = allocate<i32>(picks);
    slots.out.pick_slot = allocate<i32>(picks);
    slots.fault = upload(std::vector<gpu::Fault>(1));
    slots.chunk_counts = allocate<u32>(route::sort_scratch_bytes(p) / 4);
    hidden = {random_bf16(i64{tokens} * p.hidden), format::Dtype::bf16, tokens, p.hidden, p.hidden};
    gather = {p, tokens, hidden, slots.out, nullptr, allocate<u16>(slot_values)};
    quantise = gather;
    quantise.input_scales = upload(std::vector<f32>(p.local_experts, 0.01f));
    const f32* z = reinterpret_cast<const f32*>(random_bf16(2 * slot_values));
    sum = {tokens, p.hidden, p.top_k, false, slots.out.pick_slot, slots.out.weights, z};
    sum.out.output = {allocate<u16>(i64{tokens} * p.hidden), format::Dtype::bf16, tokens, p.hidden, p.hidden};
    logits_args = {hidden,
                   {random_bf16(i64{p.experts} * p.hidden), format::Dtype::bf16, p.experts, p.hidden, p.hidden},
                   nullptr,
                   allocate<f32>(i64{tokens} * p.experts)};
  }
  ~Layer() {
    for (const void* memory :
         {(const void*)slots.in.logits.data, (const void*)slots.in.bias, (const void*)slots.out.ids,
          (const void*)slots.out.weights, (const void*)slots.out.expert_begin, (const void*)slots.out.slot_pick,
          (const void*)slots.out.pick_slot, (const void*)slots.fault, (const void*)slots.chunk_counts,
          (const void*)hidden.data, (const void*)gather.rows, (const void*)quantise.input_scales, (const void*)sum.rows,
          (const void*)sum.out.output.data, (const void*)logits_args.router.data, (const void*)logits_args.logits}) {
      cudaFree(const_cast<void*>(memory));
    }
  }
  i32 tokens;
  route::DeviceSlots slots;
  format::Tensor hidden;
  route::DeviceTokens gather, quantise;
  combine::DeviceSum sum;
  route::DeviceLogits logits_args;
};

// Other ways to combine, as fast as they come: each thread a quad of columns, no order kept.
enum class Way { two_sums, loads_cached, wide, persistent };

__device__ void add(f32 w, const float4& z, float4* acc) {
  acc->x = fmaf(w, z.x, acc->x), acc->y = fmaf(w, z.y, acc->y);
  acc->z = fmaf(w, z.z, acc->z), acc->w = fmaf(w, z.w, acc->w);
}

__device__ uint2 to_bf16(const float4& x) {
  return {format::to_bf16(x.x) | u32{format::to_bf16(x.y)} << 16,
          format::to_bf16(x.z) | u32{format::to_bf16(x.w)} << 16};
}

template <Way kWay, int kPicks>
__device__ void sum_quad(const combine::DeviceSum& s, i64 token, i64 quad) {
  const i64 quads = s.hidden / 4;
  float4 z[kPicks], acc[2] = {};
#pragma unroll
  for (int p = 0; p < kPicks; ++p) {
    const float4* at = reinterpret_cast<const float4*>(s.rows) + s.pick_slot[token * kPicks + p] * quads + quad;
    z[p] = kWay == Way::loads_cached ? *at : __ldcs(at);
  }
#pragma unroll
  for (int p = 0; p < kPicks; ++p) add(s.weights[token * kPicks + p], z[p], &acc[p % 2]);
  acc[0].x += acc[1].x, acc[0].y += acc[1].y, acc[0].z += acc[1].z, acc[0].w += acc[1].w;
  static_cast<uint2*>(s.out.output.data)[token * quads + quad] = to_bf16(acc[0]);
}

template <Way kWay, int kPicks>
__global__ void __launch_bounds__(256) sum_unordered(const combine::DeviceSum s) {
  const i64 quads = s.hidden / 4;
  if (kWay == Way::persistent) {
    for (i64 i = blockIdx.x * 256 + threadIdx.x; i < s.tokens * quads; i += gridDim.x * 256) {
      sum_quad<kWay, kPicks>(s, i / quads, i % quads);
    }
  } else if (kWay == Way::wide) {
    for (i64 quad = threadIdx.x; quad < quads; quad += 256) sum_quad<kWay, kPicks>(s, blockIdx.x, quad);
  } else {
    const i64 i = i64{blockIdx.x} * 256 + threadIdx.x;
    if (i < s.tokens * quads) sum_quad<kWay, kPicks>(s, i / quads, i % quads);
  }
}

// Slot by slot with atomic adds of 16 bytes into f32 sums, then rounded.
__global__ void __launch_bounds__(256) scatter_add(const combine::DeviceSum s, const i32* slot_pick, float4* sums) {
  const i64 quads = s.hidden / 4, slot = blockIdx.x;
  const i32 pick = slot_pick[slot];
  const f32 w = s.weights[pick];
  for (i64 quad = threadIdx.x; quad < quads; quad += 256) {
    const float4 z = __ldcs(reinterpret_cast<const float4*>(s.rows) + slot * quads + quad);
    atomicAdd(&sums[pick / s.top_k * quads + quad], float4{w * z.x, w * z.y, w * z.z, w * z.w});
  }
}

__global__ void __launch_bounds__(256) round_sums(const combine::DeviceSum s, const float4* sums) {
  const i64 i = i64{blockIdx.x} * 256 + threadIdx.x;
  if (i < i64{s.tokens} * s.hidden / 4) static_cast<uint2*>(s.out.output.data)[i] = to_bf16(sums[i]);
}

void compare_combines(const char* shape, const Layer& layer, f64 copy) {
  const combine::DeviceSum& s = layer.sum;
  const i64 quads = i64{s.tokens} * s.hidden / 4;
  const u32 blocks = static_cast<u32>((quads + 255) / 256);
  float4* sums = allocate<float4>(quads);
  const auto time = [&](const char* way, const std::function<void(cudaStream_t)>& work) {
    const f64 us = microseconds(2, work);
    const f64 bytes = f64(s.tokens) * s.hidden * (4.0 * s.top_k + 2);
    std::printf(
        "{\"part\": \"combine\", \"shape\": \"%s\", \"tokens\": %d, \"way\": \"%s\", \"us\": %.2f, \"GBps\": "
        "%.0f, \"of_copy\": %.3f}\n",
        shape, s.tokens, way, us, bytes / us * 1e-3, bytes / us * 1e-3 / copy);
  };
  for (int round = 0; round < 2; ++round) {
    time("deterministic", [&](cudaStream_t st) { check(combine::launch_combine(s, st)); });
    time("two sums", [&](cudaStream_t st) { sum_unordered<Way::two_sums, 8><<<blocks, 256, 0, st>>>(s); });
    time("cached loads", [&](cudaStream_t st) { sum_unordered<Way::loads_cached, 8><<<blocks, 256, 0, st>>>(s); });
    time("block a token", [&](cudaStream_t st) { sum_unordered<Way::wide, 8><<<s.tokens, 256, 0, st>>>(s); });
    time("persistent", [&](cudaStream_t st) { sum_unordered<Way::persistent, 8><<<132 * 3, 256, 0, st>>>(s); });
    time("atomics", [&](cudaStream_t st) {
      check(cudaMemsetAsync(sums, 0, quads * 16, st), "clear");
      scatter_add<<<s.tokens * s.top_k, 256, 0, st>>>(s, layer.slots.out.slot_pick, sums);
      round_sums<<<blocks, 256, 0, st>>>(s, sums);
    });
  }
  cudaFree(sums);
}

void measure(const Shape& shape, i32 tokens, f64 copy) {
  Layer layer(shape, tokens);
  const int repeats = tokens <= 512 ? 20 : tokens <= 4096 ? 4 : 1;
  const auto slots = [&](cudaStream_t s) { check(route::launch_slots(layer.slots, s)); };
  const auto gather = [&](cudaStream_t s) { check(route::launch_gather(layer.gather, s)); };
  const auto quantise = [&](cudaStream_t s) { check(route::launch_quantise(layer.quantise, s)); };
  const auto combine = [&](cudaStream_t s) { check(combine::launch_combine(layer.sum, s)); };
  const f64 slots_us = microseconds(repeats, slots), gather_us = microseconds(repeats, gather);
  const f64 quantise_us = microseconds(repeats, quantise), combine_us = microseconds(repeats, combine);
  const f64 two_us = microseconds(repeats, [&](cudaStream_t s) { slots(s), combine(s); });
  const f64 three_us = microseconds(repeats, [&](cudaStream_t s) { slots(s), gather(s), combine(s); });
  const f64 logits_us =
      microseconds(tokens <= 512 ? 20 : 1, [&](cudaStream_t s) { check(route::launch_logits(layer.logits_args, s)); });
  const f64 values = f64(tokens) * shape.hidden, picks = shape.top_k;
  std::printf(
      "{\"part\": \"stages\", \"shape\": \"%s\", \"tokens\": %d, \"logits_us\": %.2f, \"slots_us\": %.2f, "
      "\"gather_us\": %.2f, \"quantise_us\": %.2f, \"combine_us\": %.2f, \"slots_combine_us\": %.2f, "
      "\"slots_gather_combine_us\": %.2f, \"gather_of_copy\": %.3f, \"quantise_of_copy\": %.3f, \"combine_of_copy\": "
      "%.3f}\n",
      shape.name, tokens, logits_us, slots_us, gather_us, quantise_us, combine_us, two_us, three_us,
      values * 2 * (1 + picks) / gather_us * 1e-3 / copy, values * 2 * (1 + picks) / quantise_us * 1e-3 / copy,
      values * (2 + 4 * picks) / combine_us * 1e-3 / copy);
  if (tokens == 4096) compare_combines(shape.name, layer, copy);
}

int run(bool combines) {
  cudaDeviceProp device;
  check(cudaGetDeviceProperties(&device, 0), "device");
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  const f64 copy = copy_rate();
  std::printf("{\"part\": \"device\", \"name\": \"%s\", \"copy_GBps\": %.0f}\n", device.name, copy);
  const Shape dsv3 = {"dsv3", 7168, 2048, 256, 8, {Score::sigmoid, 8, 4, 2, true, 2.5f, false}};
  const Shape qwen = {"qwen3-30b", 2048, 768, 128, 8, {}};
  for (const Shape& shape : {dsv3, qwen}) {
    for (const i32 tokens : {1, 8, 64, 128, 256, 512, 4096, 32768}) {
      if (!combines || tokens == 4096) measure(shape, tokens, copy);
    }
  }
  return 0;
}

}  // namespace
}  // namespace fourmoe

// With `combines`, only what compares ways to combine.
int main(int argc, char** argv) { return fourmoe::run(argc > 1 && std::string(argv[1]) == "combines"); }
