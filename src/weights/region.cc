#include "weights/region.h"

#include <fmt/format.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>

#include "numa.h"
#include "status.h"

namespace fourmoe::weights {
namespace {

constexpr i64 kLine = 64;
constexpr i64 kHugePage = 2ll << 20;  // one of them spares 512 page walks

i64 round_up(i64 value, i64 multiple) { return (value + multiple - 1) / multiple * multiple; }

// Whole huge pages from the start of one on; null where there is no memory. A mapping of its own, so that a policy for
// it never stays behind on memory that the heap hands out again.
std::byte* map(i64 size) {
  void* all = mmap(nullptr, size + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (all == MAP_FAILED) return nullptr;
  const i64 before = -reinterpret_cast<i64>(all) & (kHugePage - 1);
  std::byte* const start = static_cast<std::byte*>(all) + before;
  if (before > 0) munmap(all, before);
  munmap(start + size, kHugePage - before);
  madvise(start, size, MADV_HUGEPAGE);  // a hint: without it only the speed differs
  return start;
}

}  // namespace

void Region::Release::operator()(std::byte* p) const {
  if (mapped > 0) munmap(p, mapped);
  else std::free(p);
}

Region::Region(i64 bytes, Placement placement) {
  const bool large = bytes >= kHugePage;
  const i64 size = round_up(std::max(bytes, kLine), large ? kHugePage : kLine);
  std::byte* memory = large ? map(size) : static_cast<std::byte*>(std::aligned_alloc(kLine, size));
  if (memory == nullptr) throw Error(Reason::out_of_memory, fmt::format("{} bytes of packed weights", bytes));
  memory_ = {memory, Release{large ? size : 0}};
  if (large && placement == Placement::interleave) interleaved_ = interleave(memory, size, memory_nodes());
}

}  // namespace fourmoe::weights
