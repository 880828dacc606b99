#include "device_time.h"

#include <algorithm>

namespace fourmoe::tools {
namespace {

constexpr int kWarmUp = 3;
constexpr std::size_t kLeast = 5;
constexpr std::size_t kMost = 10000;
constexpr i64 kRuns = 16;  // of a graph at least: one launch of a graph costs microseconds

}  // namespace

f64 measure_copy_rate(i32 device) {
  constexpr i64 kBytes = i64{1} << 30;  // far more than any cache
  const gpu::Current current(device);
  throw_unless_ok(current.status());
  gpu::Buffer from, to;
  throw_unless_ok(gpu::Buffer::make(gpu::Kind::device, kBytes, "memory to copy", &from));
  throw_unless_ok(gpu::Buffer::make(gpu::Kind::device, kBytes, "memory to copy", &to));
  gpu::OwnStream stream;
  gpu::Event begin, end;
  throw_unless_ok(gpu::OwnStream::make(&stream));
  throw_unless_ok(gpu::Event::make(&begin));
  throw_unless_ok(gpu::Event::make(&end));
  f64 best = 0.0;
  for (int repeat = 0; repeat < 20; ++repeat) {
    throw_unless_ok(begin.record(stream.get()));
    throw_unless_ok(gpu::copy(to.data(), from.data(), kBytes, stream.get(), "memory"));
    throw_unless_ok(end.record(stream.get()));
    throw_unless_ok(end.wait());
    f64 taken = 0.0;
    throw_unless_ok(gpu::Event::seconds(begin, end, &taken));
    best = std::max(best, 2.0 * kBytes / taken);
  }
  return best;
}

Replays::Replays(std::span<const std::unique_ptr<Layer>> layers, const std::vector<LayerCall>& calls, i64 runs)
    : layers_(layers), runs_(runs), current_(layers.front()->plan().machine.device) {
  throw_unless_ok(current_.status());
  throw_unless_ok(gpu::OwnStream::make(&stream_));
  throw_unless_ok(gpu::Event::make(&begin_));
  throw_unless_ok(gpu::Event::make(&end_));
  for (const LayerCall& call : calls) {
    mirrors_.emplace_back(*layers.front(), call);
    mirrors_.back().call().stream = stream_.get();
  }
}

std::size_t Replays::capture() {
  const i64 bytes = layers_.front()->workspace_bytes();
  if (workspaces_.empty() || workspaces_.back().bytes() < bytes) {
    throw_unless_ok(gpu::Buffer::make(gpu::Kind::device, bytes, "workspace", &workspaces_.emplace_back()));
  }
  std::byte* workspace = workspaces_.back().data();
  const auto enqueue = [&] {
    Status status;
    for (std::size_t i = 0; i < static_cast<std::size_t>(runs_) && status.ok(); ++i) {
      status = layers_[i % layers_.size()]->run(mirrors_[i % mirrors_.size()].call(), {workspace, bytes});
    }
    return status;
  };
  throw_unless_ok(gpu::Graph::capture(stream_.get(), enqueue, &graphs_.emplace_back()));
  return graphs_.size() - 1;
}

f64 Replays::seconds(std::size_t graph) {
  throw_unless_ok(begin_.record(stream_.get()));
  throw_unless_ok(graphs_[graph].launch(stream_.get()));
  throw_unless_ok(end_.record(stream_.get()));
  throw_unless_ok(end_.wait());
  f64 taken = 0.0;
  throw_unless_ok(gpu::Event::seconds(begin_, end_, &taken));
  return taken / static_cast<f64>(runs_);
}

void Replays::check() {
  for (const auto& layer : layers_) throw_unless_ok(layer->wait(stream_.get()));
}

std::vector<f64> time_on_device(std::span<const std::unique_ptr<Layer>> layers, const std::vector<cases::Call>& calls,
                                f64 budget) {
  std::vector<std::vector<u8>> outputs(calls.size());
  std::vector<LayerCall> views;
  for (std::size_t i = 0; i < calls.size(); ++i) views.push_back(calls[i].view(&outputs[i], format::Dtype::bf16));
  const i64 runs = std::max(static_cast<i64>(layers.size()), kRuns);
  Replays replays(layers, views, runs);
  const std::size_t graph = replays.capture();
  for (int turn = 0; turn < kWarmUp; ++turn) replays.seconds(graph);
  std::vector<f64> samples;
  for (f64 spent = 0.0; samples.size() < kLeast || (spent < budget && samples.size() < kMost);) {
    samples.push_back(replays.seconds(graph));
    spent += samples.back() * static_cast<f64>(runs);
  }
  replays.check();
  std::sort(samples.begin(), samples.end());
  return samples;
}

}  // namespace fourmoe::tools
