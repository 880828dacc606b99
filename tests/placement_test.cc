// Where memory and threads are: packed weights over NUMA nodes, the pool's threads on cores, and both at rest.
#include <gtest/gtest.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <cstring>
#include <ctime>
#include <mutex>
#include <set>
#include <thread>

#include "executor.h"
#include "numa.h"
#include "weights/region.h"

namespace fourmoe {
namespace {

using std::chrono::milliseconds;
using weights::Region;

constexpr i64 kLarge = 5ll << 20;

// The node that holds a page, or a negative error.
int node_of(std::byte* address) {
  void* page = address;
  int node = -1;
  return syscall(SYS_move_pages, 0, 1ul, &page, nullptr, &node, 0) == 0 ? node : -1;
}

TEST(Region, LargeOnesAreInterleavedWhenAsked) {
  const Nodes nodes = memory_nodes();
  const Region region(kLarge, Placement::interleave);
  std::memset(region.data(), 1, kLarge);
  EXPECT_EQ(reinterpret_cast<u64>(region.data()) % (2 << 20), 0u);
  if (nodes.count == 0 || policy_at(region.data()) < 0) GTEST_SKIP() << "this kernel has no memory policies";
  ASSERT_TRUE(region.interleaved());
  EXPECT_EQ(policy_at(region.data()), kPolicyInterleave);
  EXPECT_EQ(policy_at(region.data() + kLarge - 1), kPolicyInterleave);
  for (i64 at = 0; at < kLarge; at += 1 << 20) {
    const int node = node_of(region.data() + at);
    ASSERT_GE(node, 0) << at;
    EXPECT_TRUE(nodes.mask[node / 64] >> (node % 64) & 1) << node;
  }
}

TEST(Region, StaysWhereItIsOtherwise) {
  for (const i64 bytes : {i64{0}, i64{1}, i64{100}, kLarge}) {
    const Region region(bytes, Placement::local);
    std::memset(region.data(), 1, bytes);
    EXPECT_EQ(reinterpret_cast<u64>(region.data()) % 64, 0u);
    EXPECT_FALSE(region.interleaved());
    EXPECT_NE(policy_at(region.data()), kPolicyInterleave);
  }
  EXPECT_FALSE(Region(100, Placement::interleave).interleaved());  // shares its page with others
}

TEST(Region, ARefusalOfTheKernelLeavesItUsable) {
  const Region region(kLarge, Placement::local);
  Nodes none;
  none.count = 1;  // but no bit: an interleaving over nothing
  EXPECT_FALSE(interleave(region.data(), kLarge, none));
  EXPECT_FALSE(interleave(region.data() + 1, kLarge, memory_nodes()));  // starts no page
  std::memset(region.data(), 1, kLarge);
}

f64 cpu_seconds() {
  timespec now{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
  return static_cast<f64>(now.tv_sec) + 1e-9 * static_cast<f64>(now.tv_nsec);
}

TEST(Executor, DoesNotSpinWhenIdle) {
  const auto executor = make_tbb_executor(2, Affinity::none);
  std::set<std::thread::id> threads;
  std::mutex mutex;
  executor->parallel_for(16, [&](i64) {
    std::this_thread::sleep_for(milliseconds(5));
    const std::lock_guard lock(mutex);
    threads.insert(std::this_thread::get_id());
  });
  EXPECT_LE(threads.size(), 2u);
  const f64 before = cpu_seconds();
  std::this_thread::sleep_for(milliseconds(300));
  EXPECT_LT(cpu_seconds() - before, 0.030);
}

TEST(Executor, KeepsItsThreadsOnCoresWhenAsked) {
#if defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "the thread sanitizer's build has another executor";
#endif
  cpu_set_t mine, after;
  ASSERT_EQ(sched_getaffinity(0, sizeof mine, &mine), 0);
  if (CPU_COUNT(&mine) < 2) GTEST_SKIP() << "one core";
  const auto caller = std::this_thread::get_id();
  const auto executor = make_tbb_executor(2, Affinity::cores);
  std::mutex mutex;
  std::condition_variable came;
  int others = 0;
  executor->parallel_for(32, [&](i64) {
    cpu_set_t here;
    std::unique_lock lock(mutex);
    ASSERT_EQ(sched_getaffinity(0, sizeof here, &here), 0);
    if (std::this_thread::get_id() == caller) {
      EXPECT_TRUE(CPU_EQUAL(&here, &mine));
      // A busy machine can take longer to start the other thread than all tasks need.
      came.wait_for(lock, std::chrono::seconds(30), [&] { return others > 0; });
      return;
    }
    ++others;
    came.notify_one();
    EXPECT_EQ(CPU_COUNT(&here), 1);
  });
  EXPECT_GT(others, 0);
  ASSERT_EQ(sched_getaffinity(0, sizeof after, &after), 0);
  EXPECT_TRUE(CPU_EQUAL(&after, &mine));
}

}  // namespace
}  // namespace fourmoe
