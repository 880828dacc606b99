// List: every step of every room, fastest first, the reference last. Plans, tests, benchmarks, `explain` and the
// support table in the README are produced from it.
#pragma once

#include <span>

#include "flow.h"

namespace fourmoe::backends {

std::span<const Step* const> list();

}  // namespace fourmoe::backends
