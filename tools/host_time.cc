#include "host_time.h"

#include <algorithm>
#include <chrono>

#include "weights/packed.h"

namespace fourmoe::tools {
namespace {

using Clock = std::chrono::steady_clock;

const weights::Order* order_of(const Layer& layer) {
  for (const Step* step : layer.plan().steps) {
    if (step->order != nullptr) return step->order;
  }
  return nullptr;
}

}  // namespace

f64 measure_packing(const Layer& layer, Executor& executor) {
  if (order_of(layer) == nullptr) return 0.0;
  const weights::Order& order = *order_of(layer);
  const std::vector<weights::Expert>& experts = layer.weights().experts;
  const auto panels = [&](const format::Matrix& m) { return m.empty() ? 0 : weights::panel_count(order, m.rows); };
  const auto stride = [&](const format::Matrix& m) {
    return weights::panel_bytes(weights::panel_format(m.encoding), order, m.cols);
  };
  i64 expert_bytes = 0;
  for (const format::Matrix* m : {&experts[0].gate, &experts[0].up, &experts[0].down}) {
    expert_bytes += panels(*m) * stride(*m);
  }
  const i64 slots = 4 * i64{executor.threads()};
  std::vector<u8> memory(static_cast<std::size_t>(slots * expert_bytes), 1);
  f64 best = 0.0;
  for (int repeat = 0; repeat < 3; ++repeat) {
    const Clock::time_point start = Clock::now();
    executor.parallel_for(slots, [&](i64 slot) {
      for (std::size_t e = static_cast<std::size_t>(slot); e < experts.size(); e += static_cast<std::size_t>(slots)) {
        auto* out = reinterpret_cast<std::byte*>(memory.data()) + slot * expert_bytes;
        for (const format::Matrix* m : {&experts[e].gate, &experts[e].up, &experts[e].down}) {
          if (!m->empty()) weights::pack_panels(*m, order, 0, panels(*m), out, stride(*m));
          out += panels(*m) * stride(*m);
        }
      }
    });
    const f64 seconds = std::chrono::duration<f64>(Clock::now() - start).count();
    best = std::max(best, static_cast<f64>(experts.size()) * static_cast<f64>(expert_bytes) / seconds);
  }
  return best;
}

std::vector<f64> time_on_host(Rotation* rotation, const std::vector<cases::Call>& calls, f64 budget,
                              const std::function<void()>& turn) {
  constexpr std::size_t kLeast = 5;
  constexpr std::size_t kMost = 100000;
  // A layer makes its workspace in its first call, and memory is first touched then.
  const i64 warm_up = std::max<i64>(2, static_cast<i64>(rotation->layers.size()));
  std::vector<u8> output;
  std::vector<f64> taken;
  f64 spent = 0.0;
  for (i64 run = 0; taken.size() < kLeast || (spent < budget && taken.size() < kMost); ++run) {
    const LayerCall call = calls[static_cast<std::size_t>(run) % calls.size()].view(&output, format::Dtype::bf16);
    const Clock::time_point start = Clock::now();
    throw_unless_ok(rotation->at(run).run(call));
    const f64 seconds = std::chrono::duration<f64>(Clock::now() - start).count();
    turn();
    if (run < warm_up) continue;
    taken.push_back(seconds);
    spent += seconds;
  }
  std::sort(taken.begin(), taken.end());
  return taken;
}

}  // namespace fourmoe::tools
