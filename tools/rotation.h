// Rotation: layers of the same shape that take turns, so that no measured call finds its weights in a cache.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "layer.h"
#include "progress.h"

namespace fourmoe::tools {

// Weights come from memory when at least this much of other weights, and twice the last-level cache, was read since.
inline constexpr i64 kColdBytes = i64{1} << 30;
inline constexpr i64 kMostLayers = 64;

struct Rotation {
  std::vector<std::unique_ptr<Layer>> layers;
  std::string weights;          // where they come from
  f64 pack_seconds = 0.0;       // the least that making one of them took, its memory touched first
  f64 packed_per_second = 0.0;  // bytes packed into memory of the host that was touched before; 0 on a GPU

  bool on_device() const { return layers.front()->plan().machine.device >= 0; }
  Layer& at(i64 turn) { return *layers[static_cast<std::size_t>(turn) % layers.size()]; }
};

// What to measure: random weights of a shape, or the weights of a checkpoint's layer.
struct Subject {
  std::string path;     // of a checkpoint; empty: the shape
  std::string shape;    // see parse_shape
  int layer = -1;       // of the checkpoint; -1: its first MoE layer
  bool shared = false;  // with the checkpoint's shared expert, or one of the shape of the routed ones

  std::string words() const;  // as arguments of the command
};

// As many layers as it takes to be cold. Throws Error.
Rotation make_rotation(const Subject& subject, const LayerOptions& how, Progress* progress);

}  // namespace fourmoe::tools
