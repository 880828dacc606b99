#include "weights/place.h"

#include "gpu/runtime.h"

namespace fourmoe::weights {

i32 place_of(const void* address, i32 device) {
  if (device < 0 || device >= static_cast<i32>(machine().devices.size())) return -1;
  i32 found = -1;
  throw_unless_ok(gpu::locate(address, &found));
  return found;
}

}  // namespace fourmoe::weights
