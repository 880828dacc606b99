// The two GEMMs of the Hopper room, timed for every tile shape: gemm1 and gemm2 in one CUDA graph, as many layers in
// turn as it takes to leave the L2 cold. One JSON object a line.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "backends/sm90/gemm1.h"
#include "backends/sm90/gemm2.h"
#include "backends/sm90/tiles.h"
#include "gpu/memory.h"

namespace fourmoe {
namespace {

using namespace sm90;
using testing::DeviceVector;
using testing::require;

struct Shape {
  const char* name;
  int hidden, inter, experts, top_k;
  bool gated = true;
};

int rows1(const Shape& s) { return s.gated ? 2 * s.inter : s.inter; }

// Picks of one layer at random, sorted: this program measures the GEMMs, not the route.
struct Routing {
  std::vector<i32> begin;
  int active = 0;
  DeviceVector<i32> device;
};

Routing route(const Shape& shape, int tokens, u64 seed) {
  std::mt19937_64 random(seed);
  std::vector<i32> count(shape.experts, 0);
  for (int t = 0; t < tokens; ++t) {
    std::set<int> chosen;
    while (static_cast<int>(chosen.size()) < shape.top_k) chosen.insert(static_cast<int>(random() % shape.experts));
    for (int e : chosen) ++count[e];
  }
  Routing r;
  r.begin.push_back(0);
  for (const i32 c : count) r.begin.push_back(r.begin.back() + c), r.active += c > 0;
  r.device = DeviceVector<i32>(r.begin);
  return r;
}

// Random bytes with ordinary scales: a valid blob of some weights.
std::vector<u8> noise(i64 bytes) {
  std::mt19937_64 random(11);
  std::vector<u8> out(bytes);
  for (i64 i = 0; i + 8 <= bytes; i += 8) {
    const u64 word = random();
    std::memcpy(out.data() + i, &word, 8);
  }
  for (i64 tile = 0; tile < bytes; tile += kTileBytes) {
    for (int i = 0; i < 256; ++i) out[tile + kCodeBytes + i] &= 0x77;
  }
  return out;
}

class Layer {
 public:
  Layer(const Shape& s, i64 max_slots, int multiprocessors)
      : shape_(s),
        max_slots_(max_slots),
        multiprocessors_(multiprocessors),
        y_(max_slots * s.inter),
        z_(max_slots * s.hidden) {
    const auto first = noise(blob_bytes(rows1(s), s.hidden)), second = noise(blob_bytes(s.hidden, s.inter));
    std::vector<const std::byte*> one, two;
    for (int e = 0; e < s.experts; ++e) {
      blobs_.emplace_back(first);
      one.push_back(reinterpret_cast<const std::byte*>(blobs_.back().data()));
      blobs_.emplace_back(second);
      two.push_back(reinterpret_cast<const std::byte*>(blobs_.back().data()));
    }
    table1_ = DeviceVector<const std::byte*>(one), table2_ = DeviceVector<const std::byte*>(two);
    globals_ = DeviceVector<f32>(std::vector<f32>(2 * s.experts, 0.004f));
    std::mt19937_64 random(7);
    std::normal_distribution<f32> normal;
    std::vector<u16> some(1 << 20);
    for (u16& v : some) v = format::to_bf16(normal(random));
    x_ = DeviceVector<u16>(max_slots * s.hidden);
    for (i64 i = 0; i < x_.size(); i += static_cast<i64>(some.size())) {
      const i64 count = std::min<i64>(some.size(), x_.size() - i);
      require(cudaMemcpy(x_.data() + i, some.data(), count * 2, cudaMemcpyHostToDevice), "tokens");
    }
  }

  void gemm1(const Routing& r, int tile, cudaStream_t stream) const {
    Gemm1 call;
    call.blobs = table1_.data(), call.globals = globals_.data(), call.expert_begin = r.device.data();
    call.rows = x_.data(), call.y = y_.data();
    call.experts = shape_.experts, call.hidden = shape_.hidden, call.inter = shape_.inter;
    call.max_slots = max_slots_, call.tile = tile, call.expected_slots = r.begin.back();
    call.activation.kind = shape_.gated ? ActivationKind::swiglu : ActivationKind::relu2;
    check(launch(call, multiprocessors_, stream));
  }
  void gemm2(const Routing& r, int tile, bool follows, cudaStream_t stream) const {
    Gemm2 call;
    call.blobs = table2_.data(), call.globals = globals_.data(), call.expert_begin = r.device.data();
    call.rows = y_.data(), call.z = z_.data(), call.follows_gemm1 = follows;
    call.experts = shape_.experts, call.hidden = shape_.hidden, call.inter = shape_.inter;
    call.max_slots = max_slots_, call.tile = tile, call.expected_slots = r.begin.back();
    check(launch(call, multiprocessors_, stream));
  }

 private:
  static void check(const Status& status) {
    if (status.ok()) return;
    std::fprintf(stderr, "%s\n", status.detail.c_str());
    std::exit(1);
  }
  Shape shape_;
  i64 max_slots_;
  int multiprocessors_;
  std::vector<DeviceVector<u8>> blobs_;
  DeviceVector<const std::byte*> table1_, table2_;
  DeviceVector<f32> globals_;
  DeviceVector<u16> x_, y_;
  DeviceVector<f32> z_;
};

// Median over replays of a graph that holds `layers` calls of body(i, stream); microseconds a call.
f64 microseconds(int layers, const std::function<void(int, cudaStream_t)>& body) {
  cudaStream_t stream;
  require(cudaStreamCreate(&stream), "stream");
  cudaGraph_t graph;
  cudaGraphExec_t replay;
  require(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
  for (int i = 0; i < layers; ++i) body(i, stream);
  require(cudaStreamEndCapture(stream, &graph), "capture");
  require(cudaGraphInstantiate(&replay, graph, 0), "graph");
  cudaEvent_t begin, end;
  require(cudaEventCreate(&begin), "event");
  require(cudaEventCreate(&end), "event");
  std::vector<f64> times;
  f64 spent = 0;
  for (int i = 0; i < 13 && (spent < 60000 || i < 4); ++i) {
    require(cudaEventRecord(begin, stream), "record");
    require(cudaGraphLaunch(replay, stream), "replay");
    require(cudaEventRecord(end, stream), "record");
    require(cudaEventSynchronize(end), "replay");
    f32 milliseconds;
    require(cudaEventElapsedTime(&milliseconds, begin, end), "elapsed");
    if (i > 0) times.push_back(milliseconds * 1000 / layers);
    spent += milliseconds * 1000;
  }
  cudaGraphExecDestroy(replay), cudaGraphDestroy(graph), cudaEventDestroy(begin), cudaEventDestroy(end);
  cudaStreamDestroy(stream);
  std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
  return times[times.size() / 2];
}

// Worth timing: neither far too narrow nor far too wide for this many slots an expert.
bool fits(const TileShape& tile, f64 mean) { return tile.sizes[0] >= mean / 2 && tile.sizes[0] <= 16 * mean + 24; }

// What a command line picks; everything by default.
struct Choice {
  std::string shape;
  int tokens = -1;
  int tile = -2;
};

void measure(const Shape& s, std::vector<int> batch, const Choice& choice, int multiprocessors) {
  if (!choice.shape.empty() && choice.shape != s.name) return;
  if (choice.tokens >= 0) batch = {choice.tokens};
  const auto layers_of = [](int tokens) { return tokens <= 8 ? 8 : tokens <= 64 ? 3 : 1; };
  std::vector<std::vector<Routing>> all;
  i64 max_slots = 0;
  for (const int tokens : batch) {
    all.emplace_back();
    for (int i = 0; i < layers_of(tokens); ++i) all.back().push_back(route(s, tokens, tokens * 131 + i));
    max_slots = std::max<i64>(max_slots, all.back().back().begin.back());
  }
  const Layer layer(s, max_slots, multiprocessors);
  for (std::size_t b = 0; b < batch.size(); ++b) {
    const std::vector<Routing>& rs = all[b];
    const int layers = static_cast<int>(rs.size());
    const f64 weights = f64{1} * s.hidden * s.inter * (s.gated ? 3 : 2);
    f64 active = 0;
    for (const Routing& r : rs) active += f64(r.active) / layers;
    const f64 picks = rs[0].begin.back(), bytes = active * weights * 0.5625, flops = 2 * picks * weights;
    for (int tile = -1; tile < kTileShapeCount; ++tile) {
      if (choice.tile >= -1 ? tile != choice.tile : tile >= 0 && !fits(kTileShapes[tile], picks / active)) continue;
      const f64 t1 = microseconds(layers, [&](int i, cudaStream_t st) { layer.gemm1(rs[i], tile, st); });
      const f64 t2 = microseconds(layers, [&](int i, cudaStream_t st) { layer.gemm2(rs[i], tile, false, st); });
      const f64 apart = microseconds(layers, [&](int i, cudaStream_t st) {
        layer.gemm1(rs[i], tile, st);
        layer.gemm2(rs[i], tile, false, st);
      });
      const f64 both = microseconds(layers, [&](int i, cudaStream_t st) {
        layer.gemm1(rs[i], tile, st);
        layer.gemm2(rs[i], tile, true, st);
      });
      const TileShape shape = tile < 0 ? TileShape{} : kTileShapes[tile];
      std::printf(
          "{\"part\": \"gemms\", \"shape\": \"%s\", \"tokens\": %d, \"active\": %.1f, \"tile\": %d, \"most\": %d, "
          "\"groups\": %d, \"rows\": %d, \"split\": %d, \"gemm1_us\": %.1f, \"gemm2_us\": %.1f, "
          "\"apart_us\": %.1f, \"both_us\": %.1f, \"TBps\": %.3f, \"TFLOPs\": %.1f}\n",
          s.name, batch[b], active, tile, shape.sizes[0], shape.groups, shape.rows, shape.split, t1, t2, apart, both,
          bytes / both * 1e-6, flops / both * 1e-6);
      std::fflush(stdout);
    }
  }
}

int run(const Choice& choice) {
  cudaDeviceProp device;
  require(cudaGetDeviceProperties(&device, 0), "device");
  const int sms = device.multiProcessorCount;
  std::printf("{\"part\": \"device\", \"name\": \"%s\"}\n", device.name);
  measure({"dsv3", 7168, 2048, 256, 8}, {1, 8, 64, 512, 1024, 8192}, choice, sms);
  measure({"qwen3-235b", 4096, 1536, 128, 8}, {1, 8, 64, 512, 8192, 32768}, choice, sms);
  measure({"v4-flash", 4096, 2048, 256, 6}, {1, 8, 64}, choice, sms);
  measure({"qwen3-30b", 2048, 768, 128, 8}, {1, 8, 64, 512, 4096}, choice, sms);
  return 0;
}

}  // namespace
}  // namespace fourmoe

// gemms [SHAPE [TOKENS [TILE]]]
int main(int argc, char** argv) {
  fourmoe::Choice choice;
  if (argc > 1) choice.shape = argv[1];
  if (argc > 2) choice.tokens = std::atoi(argv[2]);
  if (argc > 3) choice.tile = std::atoi(argv[3]);
  return fourmoe::run(choice);
}
