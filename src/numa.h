// NUMA: which of a host's memory nodes this process may use, and pages spread over them. Linux's own calls, without
// libnuma: two are needed, and a kernel that does not know or allow them leaves pages where they would have been.
#pragma once

#include <array>

#include "format/number.h"

namespace fourmoe {

struct Nodes {
  std::array<unsigned long, 16> mask{};  // bit n: node n; the kernel's most is 1024
  i32 count = 0;                         // nodes in the mask; 0: the kernel does not say
};

Nodes memory_nodes();

// The policy that memory's page at `address` has; -1 where the kernel does not say.
inline constexpr int kPolicyInterleave = 3;  // MPOL_INTERLEAVE of linux/mempolicy.h
int policy_at(const void* address);

// Pages of [memory, memory + bytes) not touched yet will take turns over the nodes; `memory` starts a page. False: the
// kernel refused, nothing changed.
bool interleave(void* memory, i64 bytes, const Nodes& nodes);

}  // namespace fourmoe
