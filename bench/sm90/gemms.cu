// The two GEMMs of the Hopper room, timed: gemm1, gemm2 and both in a CUDA graph, as many layers in turn as it takes to
// leave the L2 cold. One JSON object a line.
#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "backends/sm90/gemm1.h"
#include "backends/sm90/gemm2.h"
#include "backends/sm90/tiles.h"
#include "gpu/memory.h"
#include "route/route.h"

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
  // Weights in so many allocations, of neighbouring experts.
  Layer(const Shape& s, i64 max_slots, int multiprocessors, int buffers)
      : shape_(s),
        max_slots_(max_slots),
        multiprocessors_(multiprocessors),
        y_(max_slots * s.inter),
        z_(max_slots * s.hidden),
        progress_(kMostCalls * route::progress_words(s.experts)) {
    const DeviceVector<u8> first(noise(blob_bytes(rows1(s), s.hidden))), second(noise(blob_bytes(s.hidden, s.inter)));
    const i64 bytes = first.size() + second.size();
    std::vector<const std::byte*> one, two;
    for (int e = 0, left = 0; e < s.experts; ++e, --left) {
      if (left == 0) {
        left = (s.experts - e) / (buffers - static_cast<int>(blobs_.size()));
        blobs_.emplace_back(left * bytes);
      }
      u8* blob = blobs_.back().data() + blobs_.back().size() - left * bytes;
      require(cudaMemcpy(blob, first.data(), first.size(), cudaMemcpyDeviceToDevice), "weights");
      require(cudaMemcpy(blob + first.size(), second.data(), second.size(), cudaMemcpyDeviceToDevice), "weights");
      one.push_back(reinterpret_cast<const std::byte*>(blob));
      two.push_back(reinterpret_cast<const std::byte*>(blob + first.size()));
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

  // Where both GEMMs of calls 0 to kMostCalls - 1 meet.
  static constexpr int kMostCalls = 8;
  void clear_progress(cudaStream_t stream) const {
    require(cudaMemsetAsync(progress_.data(), 0, progress_.size() * sizeof(u64), stream), "progress");
  }
  Progress progress(int call) const {
    return {progress_.data() + call * route::progress_words(shape_.experts), shape_.inter};
  }

  void gemm1(const Routing& r, int tile, const Progress& progress, cudaStream_t stream) const {
    Gemm1 call;
    call.blobs = table1_.data(), call.globals = globals_.data(), call.expert_begin = r.device.data();
    call.rows = x_.data(), call.y = y_.data();
    call.experts = shape_.experts, call.hidden = shape_.hidden, call.inter = shape_.inter;
    call.max_slots = max_slots_, call.tile = tile, call.expected_slots = r.begin.back();
    call.activation.kind = shape_.gated ? ActivationKind::swiglu : ActivationKind::relu2;
    call.progress = progress;
    check(launch(call, multiprocessors_, stream));
  }
  void gemm2(const Routing& r, int tile, const Progress& progress, cudaStream_t stream) const {
    Gemm2 call;
    call.blobs = table2_.data(), call.globals = globals_.data(), call.expert_begin = r.device.data();
    call.rows = y_.data(), call.z = z_.data();
    call.progress = progress, call.follows_gemm1 = progress.stored != nullptr;
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
  DeviceVector<u64> progress_;
};

f64 median(std::vector<f64> values) {
  std::nth_element(values.begin(), values.begin() + values.size() / 2, values.end());
  return values[values.size() / 2];
}

// A graph of before(stream) and `layers` calls of body(i, stream), replayed. Both GEMMs of a call meet, each alone does
// not: its tiles are dealt.
class Replay {
 public:
  Replay(int layers, const std::function<void(cudaStream_t)>& before,
         const std::function<void(int, cudaStream_t)>& body)
      : layers_(layers) {
    require(cudaStreamCreate(&stream_), "stream");
    require(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), "capture");
    before(stream_);
    for (int i = 0; i < layers; ++i) body(i, stream_);
    require(cudaStreamEndCapture(stream_, &graph_), "capture");
    require(cudaGraphInstantiate(&replay_, graph_, 0), "graph");
    require(cudaEventCreate(&begin_), "event");
    require(cudaEventCreate(&end_), "event");
  }
  Replay(const Replay&) = delete;
  ~Replay() {
    cudaGraphExecDestroy(replay_), cudaGraphDestroy(graph_), cudaEventDestroy(begin_), cudaEventDestroy(end_);
    cudaStreamDestroy(stream_);
  }

  // Median microseconds a call, once the card has worked for a while: clocks fall under load within milliseconds, and
  // a launch after a pause runs up to a third faster than one behind others; or, rested, after pauses.
  f64 microseconds(bool rested) const {
    if (rested) return microseconds_rested();
    for (f64 spent = 0; spent < 120e3;) spent += once();
    std::vector<f64> times;
    for (f64 spent = 0; spent < 80e3 || times.size() < 5; spent += times.back()) times.push_back(once());
    return median(std::move(times)) / layers_;
  }

 private:
  // The same of a card that rests between the replays: what it can do before it has to save power.
  f64 microseconds_rested() const {
    std::vector<f64> times;
    for (int i = 0; i < 12; ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(15));
      times.push_back(once());
    }
    return median(std::move(times)) / layers_;
  }

  f64 once() const {
    require(cudaEventRecord(begin_, stream_), "record");
    require(cudaGraphLaunch(replay_, stream_), "replay");
    require(cudaEventRecord(end_, stream_), "record");
    require(cudaEventSynchronize(end_), "replay");
    f32 milliseconds;
    require(cudaEventElapsedTime(&milliseconds, begin_, end_), "elapsed");
    return milliseconds * 1000;
  }
  int layers_;
  cudaStream_t stream_;
  cudaGraph_t graph_;
  cudaGraphExec_t replay_;
  cudaEvent_t begin_, end_;
};

// Worth timing: neither far too narrow nor far too wide for this many slots an expert.
bool fits(const TileShape& tile, f64 mean) { return tile.sizes[0] >= mean / 2 && tile.sizes[0] <= 16 * mean + 24; }

// What a command line picks: all shapes and token counts, the tile that is chosen for each.
struct Choice {
  std::string shape;
  std::vector<int> tokens;
  bool sweep = false;   // every tile that fits
  bool splits = false;  // the same weights in 1, 2, 4 and 8 allocations
  bool rested = false;  // with pauses between the replays
};

Replay replay_both(const Layer& layer, const std::vector<Routing>& rs, int tile) {
  return Replay(
      static_cast<int>(rs.size()), [&](cudaStream_t stream) { layer.clear_progress(stream); },
      [&](int i, cudaStream_t stream) {
        layer.gemm1(rs[i], tile, layer.progress(i), stream);
        layer.gemm2(rs[i], tile, layer.progress(i), stream);
      });
}

// In turns, each beginning with another, so that clocks are alike: medians of the turns, and of each turn's share of
// the same weights in one allocation. One allocation is there twice: what the second differs by is no cost of splits.
void measure_splits(const Shape& s, const std::vector<int>& batch, const std::vector<std::vector<Routing>>& all,
                    i64 max_slots, int multiprocessors) {
  constexpr std::size_t kTurns = 5;
  constexpr int kBuffers[] = {1, 1, 2, 4, 8};
  std::vector<Layer> layers;
  for (const int buffers : kBuffers) layers.emplace_back(s, max_slots, multiprocessors, buffers);
  for (std::size_t b = 0; b < batch.size(); ++b) {
    std::vector<std::vector<f64>> times(layers.size());
    for (std::size_t turn = 0; turn < kTurns; ++turn) {
      for (std::size_t k = 0; k < layers.size(); ++k) {
        const std::size_t i = (turn + k) % layers.size();
        times[i].push_back(replay_both(layers[i], all[b], -1).microseconds(false));
      }
    }
    for (std::size_t i = 0; i < layers.size(); ++i) {
      std::vector<f64> shares;
      for (std::size_t turn = 0; turn < kTurns; ++turn) shares.push_back(times[i][turn] / times[0][turn]);
      std::printf(
          "{\"part\": \"splits\", \"shape\": \"%s\", \"tokens\": %d, \"buffers\": %d, \"both_us\": %.2f, "
          "\"of_one\": %.4f, \"least\": %.4f, \"most\": %.4f}\n",
          s.name, batch[b], kBuffers[i], median(times[i]), median(shares),
          *std::min_element(shares.begin(), shares.end()), *std::max_element(shares.begin(), shares.end()));
    }
    std::fflush(stdout);
  }
}

void measure(const Shape& s, std::vector<int> batch, const Choice& choice, int multiprocessors) {
  if (!choice.shape.empty() && choice.shape != s.name) return;
  if (!choice.tokens.empty()) batch = choice.tokens;
  const auto layers_of = [](int tokens) {
    return tokens <= 8 ? Layer::kMostCalls : tokens <= 64 ? 3 : 1;
  };  // cold weights each
  std::vector<std::vector<Routing>> all;
  i64 max_slots = 0;
  for (const int tokens : batch) {
    all.emplace_back();
    for (int i = 0; i < layers_of(tokens); ++i) all.back().push_back(route(s, tokens, tokens * 131 + i));
    max_slots = std::max<i64>(max_slots, all.back().back().begin.back());
  }
  if (choice.splits) return measure_splits(s, batch, all, max_slots, multiprocessors);
  const Layer layer(s, max_slots, multiprocessors, s.experts);
  for (std::size_t b = 0; b < batch.size(); ++b) {
    const std::vector<Routing>& rs = all[b];
    const int layers = static_cast<int>(rs.size());
    const f64 weights = f64{1} * s.hidden * s.inter * (s.gated ? 3 : 2);
    f64 active = 0;
    for (const Routing& r : rs) active += f64(r.active) / layers;
    const f64 picks = rs[0].begin.back(), bytes = active * weights * 0.5625, flops = 2 * picks * weights;
    for (int tile = -1; tile < (choice.sweep ? kTileShapeCount : 0); ++tile) {
      if (tile >= 0 && (kTileShapes[tile].form != Form{} || !fits(kTileShapes[tile], picks / active))) continue;
      const auto nothing = [](cudaStream_t) {};
      const Replay first(layers, nothing, [&](int i, cudaStream_t stream) { layer.gemm1(rs[i], tile, {}, stream); });
      const Replay second(layers, nothing, [&](int i, cudaStream_t stream) { layer.gemm2(rs[i], tile, {}, stream); });
      const Replay both = replay_both(layer, rs, tile);
      const f64 t1 = first.microseconds(choice.rested), t2 = second.microseconds(choice.rested);
      const f64 t = both.microseconds(choice.rested);
      std::printf(
          "{\"part\": \"%s\", \"shape\": \"%s\", \"tokens\": %d, \"active\": %.1f, \"tile\": %d, "
          "\"gemm1_us\": %.1f, \"gemm2_us\": %.1f, \"both_us\": %.1f, \"TBps\": %.3f, \"TFLOPs\": %.1f}\n",
          choice.rested ? "rested" : "gemms", s.name, batch[b], active, tile, t1, t2, t, bytes / t * 1e-6,
          flops / t * 1e-6);
      std::fflush(stdout);
    }
  }
}

int run(const Choice& choice) {
  cudaDeviceProp device;
  require(cudaGetDeviceProperties(&device, 0), "device");
  const int sms = device.multiProcessorCount;
  std::printf("{\"part\": \"device\", \"name\": \"%s\"}\n", device.name);
  const std::vector<int> all = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 32768};
  measure({"dsv3", 7168, 2048, 256, 8}, all, choice, sms);
  measure({"dsv3-local", 7168, 2048, 32, 8}, all, choice, sms);  // what one GPU of eight holds, all picks within it
  measure({"qwen3-235b", 4096, 1536, 128, 8}, all, choice, sms);
  measure({"v4-flash", 4096, 2048, 256, 6}, all, choice, sms);
  measure({"qwen3-30b", 2048, 768, 128, 8}, all, choice, sms);
  measure({"nemotron3-nano", 2688, 1856, 128, 6, false}, all, choice, sms);
  return 0;
}

}  // namespace
}  // namespace fourmoe

// gemms [sweep|splits|rested] [SHAPE [TOKENS...]]
int main(int argc, char** argv) {
  fourmoe::Choice choice;
  if (argc > 1 && std::string(argv[1]) == "sweep") choice.sweep = true, --argc, ++argv;
  if (argc > 1 && std::string(argv[1]) == "splits") choice.splits = true, --argc, ++argv;
  if (argc > 1 && std::string(argv[1]) == "rested") choice.rested = true, --argc, ++argv;
  if (argc > 1) choice.shape = argv[1];
  for (int i = 2; i < argc; ++i) choice.tokens.push_back(std::atoi(argv[i]));
  return fourmoe::run(choice);
}
