#include "device_time.h"

#include <algorithm>

#include "gpu/runtime.h"
#include "mirror.h"

namespace fourmoe::tools {
namespace {

constexpr int kWarmUp = 3;
constexpr std::size_t kLeast = 5;
constexpr std::size_t kMost = 10000;
constexpr std::size_t kRuns = 16;  // of a graph at least: one launch of a graph costs microseconds

// What is timed again and again between two events.
class Clock {
 public:
  Clock() {
    throw_unless_ok(gpu::OwnStream::make(&stream_));
    throw_unless_ok(gpu::Event::make(&begin_));
    throw_unless_ok(gpu::Event::make(&end_));
  }
  gpu::Stream stream() const { return stream_.get(); }

  template <class Work>
  f64 seconds(const Work& work) {
    throw_unless_ok(begin_.record(stream()));
    throw_unless_ok(work());
    throw_unless_ok(end_.record(stream()));
    throw_unless_ok(end_.wait());
    f64 taken = 0.0;
    throw_unless_ok(gpu::Event::seconds(begin_, end_, &taken));
    return taken;
  }

 private:
  gpu::OwnStream stream_;
  gpu::Event begin_;
  gpu::Event end_;
};

}  // namespace

f64 measure_copy_rate(i32 device) {
  constexpr i64 kBytes = i64{1} << 30;  // far more than any cache
  const gpu::Current current(device);
  throw_unless_ok(current.status());
  gpu::Buffer from, to;
  throw_unless_ok(gpu::Buffer::make(gpu::Kind::device, kBytes, "memory to copy", &from));
  throw_unless_ok(gpu::Buffer::make(gpu::Kind::device, kBytes, "memory to copy", &to));
  Clock clock;
  f64 best = 0.0;
  for (int repeat = 0; repeat < 20; ++repeat) {
    const f64 taken =
        clock.seconds([&] { return gpu::copy(to.data(), from.data(), kBytes, clock.stream(), "memory"); });
    best = std::max(best, 2.0 * kBytes / taken);
  }
  return best;
}

std::vector<f64> time_on_device(std::span<const std::unique_ptr<Layer>> layers, const std::vector<cases::Call>& calls,
                                f64 budget) {
  const gpu::Current current(layers.front()->plan().machine.device);
  throw_unless_ok(current.status());
  Clock clock;
  std::vector<std::vector<u8>> outputs(calls.size());
  std::vector<cases::Mirror> mirrors;
  for (std::size_t i = 0; i < calls.size(); ++i) {
    mirrors.emplace_back(*layers.front(), calls[i].view(&outputs[i], format::Dtype::bf16));
    mirrors.back().call().stream = clock.stream();
  }
  gpu::Buffer workspace;  // one for all: they run one after the other
  const i64 bytes = layers.front()->workspace_bytes();
  throw_unless_ok(gpu::Buffer::make(gpu::Kind::device, bytes, "workspace", &workspace));
  const std::size_t runs = std::max(layers.size(), kRuns);
  const auto enqueue = [&] {
    Status status;
    for (std::size_t i = 0; i < runs && status.ok(); ++i) {
      status = layers[i % layers.size()]->run(mirrors[i % mirrors.size()].call(), {workspace.data(), bytes});
    }
    return status;
  };
  gpu::Graph graph;
  throw_unless_ok(gpu::Graph::capture(clock.stream(), enqueue, &graph));

  std::vector<f64> samples;
  f64 spent = 0.0;
  for (int turn = 0; samples.size() < kLeast || (spent < budget && samples.size() < kMost); ++turn) {
    const f64 taken = clock.seconds([&] { return graph.launch(clock.stream()); });
    if (turn < kWarmUp) continue;
    samples.push_back(taken / static_cast<f64>(runs));
    spent += taken;
  }
  for (const auto& layer : layers) throw_unless_ok(layer->wait(clock.stream()));
  std::sort(samples.begin(), samples.end());
  return samples;
}

}  // namespace fourmoe::tools
