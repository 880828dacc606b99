// What every step of a GPU asks of the machine, in builds with and without CUDA alike.
#include <fmt/format.h>

#include "gpu/runtime.h"

namespace fourmoe::gpu {
namespace {

// The device that the plan is for, else the first: what explain speaks of when the plan is for the host.
const Device* judged(const Machine& machine) {
  if (machine.device >= 0) return device_of(machine);
  return machine.devices.empty() ? nullptr : &machine.devices.front();
}

}  // namespace

Verdict can(const Machine& machine, i32 major, i32 minor) {
  if (!machine.cuda) {
    return reject(Reason::not_built, "this build has no CUDA; a build with FOURMOE_CUDA=ON would pass");
  }
  const Device* device = judged(machine);
  if (device == nullptr) {
    return reject(Reason::device_missing, fmt::format("{} GPUs here; one of compute capability {}.{} would pass",
                                                      machine.devices.size(), major, minor));
  }
  if (device->major == major && device->minor == minor) return accept();
  return reject(Reason::instruction_missing,
                fmt::format("cuda:{} ({}) has compute capability {}.{}; {}.{} would pass", device->index, device->name,
                            device->major, device->minor, major, minor));
}

}  // namespace fourmoe::gpu
