// Place: in whose memory weights lie that a caller has handed in.
#pragma once

#include "format/number.h"

namespace fourmoe::weights {

// The GPU whose memory an address is in, or -1 for the host's. `device` is where the layer lives: CUDA is not asked for
// a layer of the host, nor for a GPU that the machine lacks. Throws Error(device_failed).
i32 place_of(const void* address, i32 device);

}  // namespace fourmoe::weights
