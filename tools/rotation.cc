#include "rotation.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <random>

#include "case.h"
#include "describe.h"
#include "quantity.h"

namespace fourmoe::tools {
namespace {

using Clock = std::chrono::steady_clock;

// Random weights whose matrices are windows of one pool. The blobs that a room packs from them are memory of their own,
// and the pool is quickly filled, however large the layer.
struct Pool {
  std::vector<u8> codes;
  std::vector<u8> scales;
};

i64 largest_codes(const Problem& p) { return i64{p.hidden} * p.inter / 2; }

std::shared_ptr<Pool> make_pool(const Problem& p) {
  constexpr i64 kSpread = 1 << 16;  // offsets of the windows
  auto pool = std::make_shared<Pool>();
  std::mt19937_64 random(1);
  pool->codes.resize(static_cast<std::size_t>(largest_codes(p) + kSpread));
  pool->scales.resize(static_cast<std::size_t>(largest_codes(p) / 8 + kSpread));
  for (u8& byte : pool->codes) byte = static_cast<u8>(random() >> 32);
  // E4M3 of 2^-3 to 2^2, and E8M0 of about the same.
  for (u8& byte : pool->scales) {
    const u64 bits = random() >> 32;
    byte = p.encoding == format::Encoding::mxfp4 ? static_cast<u8>(124 + bits % 6)
                                                 : static_cast<u8>((4 + bits % 6) << 3 | (bits >> 8) % 8);
  }
  return pool;
}

format::Matrix window(const Pool& pool, const Problem& p, i32 rows, i32 cols, std::mt19937_64* random) {
  format::Matrix matrix;
  matrix.rows = rows;
  matrix.cols = cols;
  matrix.encoding = p.encoding;
  matrix.data_stride = cols / 2;
  matrix.scales_stride = cols / format::block_of(p.encoding);
  const u64 offset = (*random)() % (1 << 16);
  matrix.data = pool.codes.data() + offset;
  matrix.scales = pool.scales.data() + offset;
  matrix.global = p.encoding == format::Encoding::mxfp4 ? 1.0f : 0.17f / std::sqrt(static_cast<f32>(cols));
  return matrix;
}

weights::Expert random_expert(const Problem& p, const Pool& pool, std::mt19937_64* random) {
  weights::Expert expert;
  if (p.activation.gated()) expert.gate = window(pool, p, p.inter, p.hidden, random);
  expert.up = window(pool, p, p.inter, p.hidden, random);
  expert.down = window(pool, p, p.hidden, p.inter, random);
  expert.input_scale = 5.0f / format::kNvfp4Max;
  expert.inter_scale = 4.0f / format::kNvfp4Max;
  return expert;
}

checkpoint::Layer random_weights(const Problem& p, const std::shared_ptr<Pool>& pool, u64 seed, bool shared) {
  std::mt19937_64 random(seed);
  checkpoint::Layer layer;
  layer.problem = p;
  for (i32 e = 0; e < p.local_experts; ++e) layer.experts.push_back(random_expert(p, *pool, &random));
  if (shared) {
    Problem one = p;
    one.experts = one.local_experts = one.top_k = 1;
    one.routing = {};
    one.routing.score = Score::none;
    layer.shared = checkpoint::Layer::Shared{one, random_expert(p, *pool, &random), {}};
  }
  layer.owner = pool;
  return layer;
}

// The memory that holds the packed weights, and the cache before it.
struct Store {
  i64 memory_bytes;
  i64 cache_bytes;
};

Store store_of(i32 device) {
  const Machine& m = machine();
  if (device < 0 || device >= static_cast<i32>(m.devices.size())) return {m.memory_bytes, m.cache_bytes};
  return {m.devices[device].memory_bytes, m.devices[device].l2_bytes};
}

i64 copies_to_be_cold(i64 bytes, const Store& store) {
  const i64 budget = store.memory_bytes / 4;
  const i64 wanted = (std::max(kColdBytes, 2 * store.cache_bytes) + bytes - 1) / bytes;
  return std::clamp<i64>(std::min(wanted, budget / bytes), 1, kMostLayers);
}

// Expert bytes of all, and the same packed: what making the layer will take.
void check_memory(const Problem& p, const Store& store) {
  const i64 bytes = cases::expert_bytes(p) * p.local_experts;
  if (bytes <= store.memory_bytes / 4 * 3) return;
  throw Error(Reason::out_of_memory, fmt::format("the layer has {} of weights, the device {} of memory",
                                                 bytes_text(bytes), bytes_text(store.memory_bytes)));
}

void add_layer(Rotation* rotation, checkpoint::Layer weights, const LayerOptions& options) {
  const Clock::time_point start = Clock::now();
  rotation->layers.push_back(std::make_unique<Layer>(std::move(weights), options));
  const f64 seconds = std::chrono::duration<f64>(Clock::now() - start).count();
  rotation->pack_seconds = rotation->layers.size() == 1 ? seconds : std::min(rotation->pack_seconds, seconds);
}

void add_of_checkpoint(const Subject& subject, const LayerOptions& how, Progress* progress, Rotation* rotation) {
  const Store store = store_of(how.device);
  const auto checkpoint = checkpoint::Checkpoint::open(subject.path);
  i32 index = subject.layer;
  if (index < 0) {
    const checkpoint::Info info = checkpoint.inspect();
    if (info.layers.empty()) throw Error(Reason::layer_missing, fmt::format("{} has no MoE layers", info.path));
    index = info.layers.front().index;
  }
  checkpoint::Layer weights = checkpoint.load(index, *how.executor);
  if (!subject.shared) weights.shared.reset();  // the figures are those of the routed experts
  const i64 copies = copies_to_be_cold(cases::expert_bytes(weights.problem) * weights.problem.local_experts, store);
  for (i64 i = 0; i < copies; ++i) {
    progress->show_count("packing weights", i, copies);
    add_layer(rotation, weights, how);
  }
  rotation->weights = fmt::format("layer {} of {}", index, subject.path);
}

void add_random(const Subject& subject, const LayerOptions& how, Progress* progress, Rotation* rotation) {
  const Store store = store_of(how.device);
  const Problem problem = parse_shape(subject.shape);
  if (const Verdict verdict = check(problem); !verdict.accepted()) throw Error(verdict.reason, verdict.detail);
  check_memory(problem, store);
  const std::shared_ptr<Pool> pool = make_pool(problem);
  const i64 copies = copies_to_be_cold(cases::expert_bytes(problem) * problem.local_experts, store);
  for (i64 i = 0; i < copies; ++i) {
    progress->show_count("packing weights", i, copies);
    add_layer(rotation, random_weights(problem, pool, static_cast<u64>(i) + 1, subject.shared), how);
  }
  rotation->weights = fmt::format("random, {}", subject.shape);
}

}  // namespace

std::string Subject::words() const {
  std::string words = path.empty() ? "--shape " + shape : path;
  if (layer >= 0) words += fmt::format(" --layer {}", layer);
  if (shared) words += " --shared";
  return words;
}

Rotation make_rotation(const Subject& subject, const LayerOptions& how, Progress* progress) {
  Rotation rotation;
  if (subject.path.empty()) add_random(subject, how, progress, &rotation);
  else add_of_checkpoint(subject, how, progress, &rotation);
  return rotation;
}

}  // namespace fourmoe::tools
