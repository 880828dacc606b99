#include "numa.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <bit>

namespace fourmoe {
namespace {

constexpr unsigned long kMemsAllowed = 4, kOfAddress = 2;  // MPOL_F_MEMS_ALLOWED, MPOL_F_ADDR

constexpr unsigned long kMaskBits = sizeof(Nodes::mask) * 8;

}  // namespace

Nodes memory_nodes() {
  Nodes nodes;
  if (syscall(SYS_get_mempolicy, nullptr, nodes.mask.data(), kMaskBits, nullptr, kMemsAllowed) != 0) return {};
  for (const unsigned long word : nodes.mask) nodes.count += std::popcount(word);
  return nodes;
}

int policy_at(const void* address) {
  int policy = -1;
  Nodes nodes;
  const long done = syscall(SYS_get_mempolicy, &policy, nodes.mask.data(), kMaskBits, address, kOfAddress);
  return done == 0 ? policy : -1;
}

bool interleave(void* memory, i64 bytes, const Nodes& nodes) {
  if (nodes.count == 0) return false;
  return syscall(SYS_mbind, memory, static_cast<unsigned long>(bytes), kPolicyInterleave, nodes.mask.data(), kMaskBits,
                 0ul) == 0;
}

}  // namespace fourmoe
