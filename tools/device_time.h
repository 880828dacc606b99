// Device time: how long layers take on a GPU, and its ceiling, as a CUDA graph replays them.
#pragma once

#include <span>
#include <vector>

#include "case.h"

namespace fourmoe::tools {

// Bytes per second that a copy within the GPU's memory moves, read and written counted; the best of some.
f64 measure_copy_rate(i32 device);

// Seconds of one layer in turn with the others, ascending, one value a replay: a graph runs the layers in
// turn, each once and all together at least sixteen times, on one call after the other and with nothing in between.
// Takes about `budget` seconds, at least five replays.
std::vector<f64> time_on_device(std::span<const std::unique_ptr<Layer>> layers, const std::vector<cases::Call>& calls,
                                f64 budget);

}  // namespace fourmoe::tools
