// Device time: how long layers take on a GPU, and its ceiling, as a CUDA graph replays them.
#pragma once

#include <span>
#include <vector>

#include "case.h"
#include "gpu/runtime.h"
#include "mirror.h"

namespace fourmoe::tools {

// Bytes per second that a copy within the GPU's memory moves, read and written counted; the best of some.
f64 measure_copy_rate(i32 device);

// Graphs of layers at work on the same calls, replayed in any order: to compare plans in alternation.
class Replays {
 public:
  // A graph runs the layers in turn, `runs` runs, on one call after the other and with nothing in between. The calls'
  // tensors are in host memory and copied to the layers' device.
  Replays(std::span<const std::unique_ptr<Layer>> layers, const std::vector<LayerCall>& calls, i64 runs);

  std::size_t capture();           // a graph of what the layers' plans are now: its number
  f64 seconds(std::size_t graph);  // of one run in one replay
  void check();                    // throws what kernels found wrong

 private:
  std::span<const std::unique_ptr<Layer>> layers_;
  i64 runs_;
  gpu::Current current_;
  gpu::OwnStream stream_;
  gpu::Event begin_;
  gpu::Event end_;
  std::vector<cases::Mirror> mirrors_;
  std::vector<gpu::Buffer> workspaces_;  // one for all graphs but those that need more than the ones before
  std::vector<gpu::Graph> graphs_;
};

// Seconds of one layer in turn with the others, ascending, one value a replay: a graph runs the layers in
// turn, each once and all together at least sixteen times, on one call after the other and with nothing in between.
// Takes about `budget` seconds, at least five replays.
std::vector<f64> time_on_device(std::span<const std::unique_ptr<Layer>> layers, const std::vector<cases::Call>& calls,
                                f64 budget);

}  // namespace fourmoe::tools
