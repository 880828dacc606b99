// The two GEMMs of the Hopper room, checked against sums in double and timed: gather, gemm1, gemm2 in one CUDA graph,
// as many layers in turn as it takes to leave the L2 cold. One JSON object a line.
#include <cuda_runtime.h>

#include <algorithm>
#include <climits>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "backends/sm90/atom.h"
#include "backends/sm90/gemm1.cuh"
#include "backends/sm90/gemm2.cuh"

namespace fourmoe {
namespace {

using namespace sm90;

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(status));
  std::exit(1);
}

template <class T>
T* allocate(i64 count) {
  T* memory;
  check(cudaMalloc(&memory, std::max<i64>(count, 1) * sizeof(T)), "malloc");
  return memory;
}

template <class T>
T* upload(const std::vector<T>& values) {
  T* memory = allocate<T>(values.size());
  check(cudaMemcpy(memory, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice), "upload");
  return memory;
}

struct Shape {
  const char* name;
  int hidden, inter, experts, top_k;
  bool gated = true;
};

// Instead of one N for all experts: a launch for each of these, side by side, each with the experts whose slots fit its
// N and not the one before (the last takes all larger ones too).
constexpr int kByClass = 0;
constexpr int kClasses[] = {8, 16, 24, 32, 40, 48, 64};

constexpr int kSlotTiles[] = {kByClass, 8, 16, 24, 32, 40, 48, 64, 96, 128, 192, 256};

// Picks of one layer, sorted on the host: this program measures the GEMMs, not the route.
struct Routing {
  int slots = 0;  // padded
  int picks = 0;
  int active = 0;  // experts with slots
  std::vector<int> rows, begin, slot_token;
};

Routing route(const Shape& shape, int tokens, u64 seed) {
  std::mt19937_64 random(seed);
  std::vector<std::vector<int>> of(shape.experts);
  for (int t = 0; t < tokens; ++t) {
    std::set<int> chosen;
    while (int(chosen.size()) < shape.top_k) chosen.insert(int(random() % shape.experts));
    for (int e : chosen) of[e].push_back(t);
  }
  Routing r;
  for (const auto& list : of) {
    r.begin.push_back(r.slots);
    r.rows.push_back(int(list.size()));
    r.active += !list.empty();
    r.picks += int(list.size());
    for (std::size_t i = 0; i < (list.size() + 7) / 8 * 8; ++i) r.slot_token.push_back(i < list.size() ? list[i] : -1);
    r.slots = int(r.slot_token.size());
  }
  return r;
}

struct DeviceRouting {
  explicit DeviceRouting(const Routing& r)
      : host(r), rows(upload(r.rows)), begin(upload(r.begin)), token(upload(r.slot_token)) {
    for (const int n : kSlotTiles) {
      if (n != kByClass) tile_begin[n] = upload(count_tiles(r, n, 0, INT_MAX));
    }
    int below = 0;
    for (const int n : kClasses) {
      class_begin[n] = upload(count_tiles(r, n, below, n == 64 ? INT_MAX : n));
      below = n;
    }
  }
  Routing host;
  int *rows, *begin, *token;
  std::map<int, int*> tile_begin;
  std::map<int, int*> class_begin;

 private:
  // Slot tiles before each expert, counting only experts of more than `above` and at most `most` slots.
  static std::vector<int> count_tiles(const Routing& r, int n, int above, int most) {
    std::vector<int> tiles(1, 0);
    for (const int count : r.rows)
      tiles.push_back(tiles.back() + (count > above && count <= most ? (count + n - 1) / n : 0));
    return tiles;
  }
};

// Streams of the launches that go side by side; made once.
struct Branches {
  Branches() {
    for (const int n : kClasses) {
      check(cudaStreamCreateWithFlags(&streams[n], cudaStreamNonBlocking), "stream");
      check(cudaEventCreateWithFlags(&done[n], cudaEventDisableTiming), "event");
    }
    check(cudaEventCreateWithFlags(&begin, cudaEventDisableTiming), "event");
  }
  std::map<int, cudaStream_t> streams;
  std::map<int, cudaEvent_t> done;
  cudaEvent_t begin;
};

// Runs launch(n, stream) for every class, after what the stream holds and before what follows on it.
template <class Launch>
void launch_classes(cudaStream_t stream, const Launch& launch) {
  static Branches branches;
  check(cudaEventRecord(branches.begin, stream), "fork");
  for (const int n : kClasses) {
    check(cudaStreamWaitEvent(branches.streams[n], branches.begin), "fork");
    launch(n, branches.streams[n]);
    check(cudaEventRecord(branches.done[n], branches.streams[n]), "join");
    check(cudaStreamWaitEvent(stream, branches.done[n]), "join");
  }
}

// Everything of a layer that does not depend on the routing.
struct Device {
  std::vector<std::byte*> gate_up, down;
  const std::byte** gate_up_table;
  const std::byte** down_table;
  f32 *scales1, *scales2;
  u8 *hidden, *x, *y;
  f32* z;
  i64 step_bytes;  // of x and of y
};

int rows1(const Shape& s) { return s.gated ? 2 * s.inter : s.inter; }

template <class T, class Epilogue>
void launch(const Operands& operands, const Epilogue& epilogue, int sms, cudaStream_t stream) {
  static const bool once = [] {
    check(cudaFuncSetAttribute(gemm<T, Epilogue>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes<T>()),
          "shared");
    return true;
  }();
  (void)once;
  gemm<T, Epilogue><<<sms, T::kThreads, shared_bytes<T>(), stream>>>(operands, epilogue);
  check(cudaGetLastError(), "gemm");
}

template <class Epilogue>
void launch_tiles(int n, const Operands& operands, const Epilogue& epilogue, int sms, cudaStream_t stream) {
  switch (n) {
    case 8: return launch<Tiles<8, 4, 2, 5>>(operands, epilogue, sms, stream);
    case 16: return launch<Tiles<16, 4, 2, 5>>(operands, epilogue, sms, stream);
    case 24: return launch<Tiles<24, 4, 2, 5>>(operands, epilogue, sms, stream);
    case 32: return launch<Tiles<32, 4, 2, 4>>(operands, epilogue, sms, stream);
    case 40: return launch<Tiles<40, 4, 1, 7>>(operands, epilogue, sms, stream);
    case 48: return launch<Tiles<48, 4, 1, 7>>(operands, epilogue, sms, stream);
    case 64: return launch<Tiles<64, 4, 1, 6>>(operands, epilogue, sms, stream);
    case 96: return launch<Tiles<96, 2, 2, 5>>(operands, epilogue, sms, stream);
    case 128: return launch<Tiles<128, 2, 2, 4>>(operands, epilogue, sms, stream);
    case 192: return launch<Tiles<192, 2, 1, 3>>(operands, epilogue, sms, stream);
    default: return launch<Tiles<256, 2, 1, 3>>(operands, epilogue, sms, stream);
  }
}

struct Run {
  const Shape& shape;
  const Device& device;
  int sms;

  void gather_tokens(const DeviceRouting& r, cudaStream_t stream) const {
    const Gather args{device.hidden, i64{shape.hidden} * 2, r.token, r.host.slots, shape.hidden,
                      device.x,      device.step_bytes};
    gather<<<(r.host.slots + 3) / 4, 128, 0, stream>>>(args);
  }
  void gemm1(const DeviceRouting& r, int n, cudaStream_t stream) const {
    if (n == kByClass) {
      return launch_classes(stream,
                            [&](int c, cudaStream_t branch) { gemm1_tiles(r, c, r.class_begin.at(c), branch); });
    }
    gemm1_tiles(r, n, r.tile_begin.at(n), stream);
  }
  void gemm2(const DeviceRouting& r, int n, cudaStream_t stream) const {
    if (n == kByClass) {
      return launch_classes(stream,
                            [&](int c, cudaStream_t branch) { gemm2_tiles(r, c, r.class_begin.at(c), branch); });
    }
    gemm2_tiles(r, n, r.tile_begin.at(n), stream);
  }

 private:
  void gemm1_tiles(const DeviceRouting& r, int n, const int* tile_begin, cudaStream_t stream) const {
    const Operands operands{device.gate_up_table,
                            device.x,
                            device.step_bytes,
                            r.begin,
                            r.rows,
                            tile_begin,
                            shape.experts,
                            row_tiles(rows1(shape)),
                            k_steps(shape.hidden)};
    Activate epilogue{};
    epilogue.scales = device.scales1;
    epilogue.activation.kind = shape.gated ? ActivationKind::swiglu : ActivationKind::relu2;
    epilogue.y = device.y;
    epilogue.step_bytes = device.step_bytes;
    epilogue.inter = shape.inter;
    epilogue.row_tiles = operands.row_tiles;
    launch_tiles(n, operands, epilogue, sms, stream);
  }
  void gemm2_tiles(const DeviceRouting& r, int n, const int* tile_begin, cudaStream_t stream) const {
    const Operands operands{device.down_table,
                            device.y,
                            device.step_bytes,
                            r.begin,
                            r.rows,
                            tile_begin,
                            shape.experts,
                            row_tiles(shape.hidden),
                            k_steps(shape.inter)};
    launch_tiles(n, operands, Project{device.scales2, nullptr, device.z, shape.hidden}, sms, stream);
  }
};

// Random weights of a few experts, host and packed.
struct HostExpert {
  std::vector<u8> codes[3], scales[3];
  format::Matrix gate, up, down;
};

void fill(format::Matrix* m, int rows, int cols, std::vector<u8>* codes, std::vector<u8>* scales,
          std::mt19937_64* random) {
  codes->resize(i64{rows} * cols / 2);
  scales->resize(i64{rows} * cols / 16);
  for (u8& c : *codes) c = u8((*random)());
  for (u8& s : *scales) s = (*random)() % 64 == 0 ? u8{0} : u8(0x20 + (*random)() % 0x28);  // some blocks are zero
  *m = {codes->data(), scales->data(), cols / 2, cols / 16, rows, cols, format::Encoding::nvfp4, 1.0f};
}

HostExpert random_expert(const Shape& s, u64 seed) {
  std::mt19937_64 random(seed);
  HostExpert e;
  if (s.gated) fill(&e.gate, s.inter, s.hidden, &e.codes[0], &e.scales[0], &random);
  fill(&e.up, s.inter, s.hidden, &e.codes[1], &e.scales[1], &random);
  fill(&e.down, s.hidden, s.inter, &e.codes[2], &e.scales[2], &random);
  return e;
}

f32 bf16(u16 bits) { return format::from_bf16(bits); }

Device make_device(const Shape& s, int tokens, int max_slots, bool random_blobs, const std::vector<HostExpert>& experts,
                   std::vector<u16>* hidden) {
  Device d{};
  const i64 bytes1 = blob_bytes(rows1(s), s.hidden), bytes2 = blob_bytes(s.hidden, s.inter);
  std::mt19937_64 random(11);
  std::vector<u8> noise;
  if (random_blobs) {
    noise.resize(std::max(bytes1, bytes2));
    for (i64 i = 0; i + 8 <= i64(noise.size()); i += 8) {
      const u64 word = random();
      std::memcpy(noise.data() + i, &word, 8);
    }
    for (i64 tile = 0; tile < i64(noise.size()); tile += kTileBytes) {  // ordinary scales
      for (int i = 0; i < 256; ++i) noise[tile + kCodeBytes + i] = u8(noise[tile + kCodeBytes + i] & 0x77);
    }
  }
  for (int e = 0; e < s.experts; ++e) {
    d.gate_up.push_back(allocate<std::byte>(bytes1));
    d.down.push_back(allocate<std::byte>(bytes2));
    if (random_blobs) {
      check(cudaMemcpy(d.gate_up[e], noise.data(), bytes1, cudaMemcpyHostToDevice), "blob");
      check(cudaMemcpy(d.down[e], noise.data(), bytes2, cudaMemcpyHostToDevice), "blob");
    } else {
      std::vector<u8> one(bytes1), two(bytes2);
      pack(s.gated ? &experts[e].gate : nullptr, experts[e].up, one.data());
      pack(nullptr, experts[e].down, two.data());
      check(cudaMemcpy(d.gate_up[e], one.data(), bytes1, cudaMemcpyHostToDevice), "blob");
      check(cudaMemcpy(d.down[e], two.data(), bytes2, cudaMemcpyHostToDevice), "blob");
    }
  }
  d.gate_up_table = const_cast<const std::byte**>(upload(d.gate_up));
  d.down_table = const_cast<const std::byte**>(upload(d.down));
  std::vector<f32> scales1, scales2;
  for (int e = 0; e < s.experts; ++e) {
    scales1.push_back(std::ldexp(0.004f + 0.0001f * e, -kProductExponent));
    scales1.push_back(std::ldexp(0.003f, -kProductExponent));
    scales2.push_back(std::ldexp(0.005f + 0.0001f * e, -kProductExponent));
  }
  d.scales1 = upload(scales1);
  d.scales2 = upload(scales2);
  std::normal_distribution<f32> normal;
  hidden->resize(i64{tokens} * s.hidden);
  for (u16& h : *hidden) h = format::to_bf16(normal(random));
  d.hidden = reinterpret_cast<u8*>(upload(*hidden));
  d.step_bytes = (i64{max_slots} + 256) / 8 * kGroupBytes;
  d.x = allocate<u8>(d.step_bytes * k_steps(s.hidden));
  d.y = allocate<u8>(d.step_bytes * k_steps(s.inter));
  d.z = allocate<f32>(i64{max_slots} * s.hidden);
  check(cudaMemset(d.x, 0xff, d.step_bytes * k_steps(s.hidden)), "poison");
  check(cudaMemset(d.y, 0xff, d.step_bytes * k_steps(s.inter)), "poison");
  check(cudaMemset(d.z, 0xff, i64{max_slots} * s.hidden * 4), "poison");
  return d;
}

void release(Device* d) {
  for (std::byte* b : d->gate_up) cudaFree(b);
  for (std::byte* b : d->down) cudaFree(b);
  for (void* p : {(void*)d->gate_up_table, (void*)d->down_table, (void*)d->scales1, (void*)d->scales2, (void*)d->hidden,
                  (void*)d->x, (void*)d->y, (void*)d->z}) {
    cudaFree(p);
  }
}

f64 dot(const format::Matrix& m, int row, const std::function<f64(int)>& x) {
  f64 sum = 0;
  for (int k = 0; k < m.cols; ++k) sum += format::weight_at(m, row, k) * x(k);
  return sum;
}

// Every slot in use, all outputs of gemm1 and gemm2, against double. gemm2 is judged on gemm1's own output.
bool verify(const Shape& s, int tokens, int n, int sms) {
  std::vector<HostExpert> experts;
  for (int e = 0; e < s.experts; ++e) experts.push_back(random_expert(s, e + 1));
  const Routing routing = route(s, tokens, 5);
  const DeviceRouting r(routing);
  std::vector<u16> hidden;
  Device d = make_device(s, tokens, routing.slots, false, experts, &hidden);
  const Run run{s, d, sms};
  run.gather_tokens(r, 0);
  run.gemm1(r, n, 0);
  run.gemm2(r, n, 0);
  check(cudaDeviceSynchronize(), "verify");
  std::vector<u8> y(d.step_bytes * k_steps(s.inter));
  std::vector<f32> z(i64{routing.slots} * s.hidden);
  check(cudaMemcpy(y.data(), d.y, y.size(), cudaMemcpyDeviceToHost), "y");
  check(cudaMemcpy(z.data(), d.z, z.size() * 4, cudaMemcpyDeviceToHost), "z");
  f64 dy = 0, ny = 0, dz = 0, nz = 0;
  std::mt19937_64 random(3);
  for (int e = 0; e < s.experts; ++e) {
    for (int i = 0; i < routing.rows[e]; ++i) {
      const int slot = routing.begin[e] + i;
      const u16* x = hidden.data() + i64{routing.slot_token[slot]} * s.hidden;
      const auto y_at = [&](int k) {
        return f64{bf16(format::load<u16>(chunk_address(y.data(), d.step_bytes, slot, k / 8) + k % 8 * 2))};
      };
      const int samples = std::max(8, 4000 / std::max(1, routing.picks));
      for (int j = 0; j < samples; ++j) {
        const int f = j == 0 ? s.inter - 1 : int(random() % s.inter);
        const auto x_at = [&](int k) { return f64{bf16(x[k])}; };
        const f64 up = dot(experts[e].up, f, x_at) * (s.gated ? 0.003f : 0.003f);
        const f64 gate = s.gated ? dot(experts[e].gate, f, x_at) * (0.004f + 0.0001f * e) : 0.0;
        const f64 want = s.gated ? gate / (1 + std::exp(-gate)) * up : (up > 0 ? up * up : 0);
        dy += (y_at(f) - want) * (y_at(f) - want), ny += want * want;
        const int h = j == 0 ? s.hidden - 1 : int(random() % s.hidden);
        const f64 out = dot(experts[e].down, h, y_at) * (0.005f + 0.0001f * e);
        const f64 got = z[i64{slot} * s.hidden + h];
        dz += (got - out) * (got - out), nz += out * out;
      }
      for (int k = s.inter; k < k_steps(s.inter) * 64; ++k) dy += y_at(k) != 0.0 ? INFINITY : 0.0;
    }
  }
  const f64 ey = std::sqrt(dy / ny), ez = std::sqrt(dz / nz);
  const bool ok = ey < 3e-3 && ez < 2e-4;
  std::printf(
      "{\"part\": \"verify\", \"shape\": \"%s\", \"tokens\": %d, \"N\": %d, \"gemm1_rel_l2\": %.2e, \"gemm2_rel_l2\": "
      "%.2e, \"ok\": %s}\n",
      s.name, tokens, n, ey, ez, ok ? "true" : "false");
  release(&d);
  return ok;
}

// Median microseconds of a graph that holds `work` for each of several routings, divided by their number.
f64 microseconds(int layers, const std::function<void(int, cudaStream_t)>& work) {
  cudaStream_t stream;
  check(cudaStreamCreate(&stream), "stream");
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "capture");
  for (int layer = 0; layer < layers; ++layer) work(layer, stream);
  check(cudaStreamEndCapture(stream, &graph), "capture");
  check(cudaGraphInstantiate(&executable, graph, 0), "graph");
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin), "event");
  check(cudaEventCreate(&end), "event");
  std::vector<f32> times;
  for (int i = 0; i < 18; ++i) {
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
  cudaStreamDestroy(stream);
  return times[times.size() / 2] * 1e3 / layers;
}

void measure(const Shape& s, const std::vector<int>& batch, int sms) {
  const int most = batch.back();
  int max_slots = 0;
  std::vector<std::vector<Routing>> all;
  for (const int tokens : batch) {
    all.emplace_back();
    const int layers = tokens <= 8 ? 8 : tokens <= 64 ? 3 : 1;
    for (int i = 0; i < layers; ++i) all.back().push_back(route(s, tokens, tokens * 131 + i));
    for (const Routing& r : all.back()) max_slots = std::max(max_slots, r.slots);
  }
  std::vector<u16> hidden;
  Device d = make_device(s, most, max_slots, true, {}, &hidden);
  const Run run{s, d, sms};
  for (std::size_t b = 0; b < batch.size(); ++b) {
    std::vector<DeviceRouting> rs(all[b].begin(), all[b].end());
    const int layers = int(rs.size());
    f64 picks = 0, bytes = 0, active = 0;
    for (const DeviceRouting& r : rs) {
      picks += r.host.picks, active += r.host.active;
      bytes += f64(r.host.active) * s.hidden * s.inter * (s.gated ? 3 : 2) * 0.5625;
    }
    picks /= layers, bytes /= layers, active /= layers;
    const f64 per_expert = picks / active;
    for (const int n : kSlotTiles) {
      if (n > 8 && n > 3 * per_expert + 8) continue;
      if (n > 0 && n < 64 && n < per_expert / 2) continue;
      if (n == kByClass && (per_expert < 2 || per_expert > 128)) continue;
      const f64 t1 = microseconds(layers, [&](int i, cudaStream_t st) { run.gemm1(rs[i], n, st); });
      const f64 t2 = microseconds(layers, [&](int i, cudaStream_t st) { run.gemm2(rs[i], n, st); });
      const f64 all3 = microseconds(layers, [&](int i, cudaStream_t st) {
        run.gather_tokens(rs[i], st);
        run.gemm1(rs[i], n, st);
        run.gemm2(rs[i], n, st);
      });
      const f64 flops = 2.0 * picks * s.hidden * s.inter * (s.gated ? 3 : 2);
      std::printf(
          "{\"part\": \"gemms\", \"shape\": \"%s\", \"tokens\": %d, \"active\": %.1f, \"N\": %d, \"gemm1_us\": %.1f, "
          "\"gemm2_us\": %.1f, \"gather_and_both_us\": %.1f, \"TBps\": %.3f, \"TFLOPs\": "
          "%.1f}\n",
          s.name, batch[b], active, n, t1, t2, all3, bytes / (t1 + t2) * 1e-6, flops / (t1 + t2) * 1e-6);
      std::fflush(stdout);
    }
  }
  release(&d);
}

int run(const std::string& mode) {
  cudaDeviceProp device;
  check(cudaGetDeviceProperties(&device, 0), "device");
  const int sms = device.multiProcessorCount;
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  if (mode != "bench") {
    bool ok = true;
    std::vector<Shape> small = {{"odd", 192, 80, 5, 2}};
    if (mode != "check-small") {
      small.insert(small.end(),
                   {{"gated", 512, 352, 8, 3}, {"relu2", 2688, 1856, 2, 1, false}, {"wide", 2880, 704, 3, 2}});
    }
    for (const Shape& s : small) {
      for (const auto& [tokens, n] : std::vector<std::pair<int, int>>{{1, 8},
                                                                      {7, 8},
                                                                      {1, kByClass},
                                                                      {30, kByClass},
                                                                      {61, kByClass},
                                                                      {250, kByClass},
                                                                      {23, 16},
                                                                      {30, 24},
                                                                      {50, 32},
                                                                      {60, 40},
                                                                      {70, 48},
                                                                      {90, 64},
                                                                      {130, 96},
                                                                      {150, 128},
                                                                      {200, 192},
                                                                      {260, 256}}) {
        ok = verify(s, tokens, n, sms) && ok;
      }
    }
    return ok ? 0 : 1;
  }
  std::printf("{\"part\": \"device\", \"name\": \"%s\"}\n", device.name);
  measure({"dsv3", 7168, 2048, 256, 8}, {1, 8, 64, 512, 1024, 8192}, sms);
  measure({"qwen3-235b", 4096, 1536, 128, 8}, {1, 8, 64, 512, 8192, 32768}, sms);
  measure({"v4-flash", 4096, 2048, 256, 6}, {1, 8, 64}, sms);
  measure({"qwen3-30b", 2048, 768, 128, 8}, {1, 8, 64, 512}, sms);
  return 0;
}

}  // namespace
}  // namespace fourmoe

int main(int argc, char** argv) { return fourmoe::run(argc > 1 ? argv[1] : ""); }
