// Host time: how long layers take on this machine's processor, and how fast their weights are packed.
#pragma once

#include "case.h"
#include "rotation.h"

namespace fourmoe::tools {

// Packs the layer's experts, each over an earlier one's panels: bytes a second; 0 where the room packs nothing.
f64 measure_packing(const Layer& layer, Executor& executor);

// Seconds of each run, ascending: for the time given, at least five runs; inputs and layers change from run to run.
// `turn` is called between them.
std::vector<f64> time_on_host(Rotation* rotation, const std::vector<cases::Call>& calls, f64 budget,
                              const std::function<void()>& turn);

}  // namespace fourmoe::tools
