// What tests of a GPU share: the device that they use, and the message with which they skip without one.
#pragma once

#include <gtest/gtest.h>

#include "machine.h"

namespace fourmoe::cases {

inline bool hopper_here() {
  return !machine().devices.empty() && machine().devices[0].major == 9 && machine().devices[0].minor == 0;
}

}  // namespace fourmoe::cases

#define FOURMOE_NEEDS_HOPPER() \
  if (!fourmoe::cases::hopper_here()) GTEST_SKIP() << "needs a GPU of compute capability 9.0 as cuda:0"
