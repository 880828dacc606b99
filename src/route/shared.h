// The shared experts' one pick on a device: how much each token weighs it.
#pragma once

#include "route/device.h"

namespace fourmoe::route {

// args.logits [tokens] receives the sigmoid of the one-row router's logits, or 1 where args.router is empty. Enqueues.
Status launch_shared_weights(const DeviceLogits& args, void* stream);

}  // namespace fourmoe::route
