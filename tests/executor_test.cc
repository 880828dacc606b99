// The library's own threads where they are hard to have: behind a fork, and under a limit.
#include "executor.h"

#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <thread>

namespace fourmoe {
namespace {

#if defined(__SANITIZE_THREAD__)
constexpr bool kCanFork = false;  // the sanitizer ends a child that starts threads
#else
constexpr bool kCanFork = true;
#endif

bool computes(Executor& executor) {
  std::atomic<i64> sum = 0;
  executor.parallel_for(100, [&](i64 index) { sum += index; });
  return sum == 4950;
}

// What `work` says in a child process; false where the child ends otherwise or has not ended after 20 seconds.
template <class Work>
bool in_child(const Work& work) {
  const pid_t child = ::fork();
  if (child == 0) {
    ::alarm(20);
    ::_exit(work() ? 0 : 1);
  }
  int status = -1;
  return ::waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

TEST(Executor, AForkComputesWithoutTheThreadsThatDoNotFollow) {
  if (!kCanFork) GTEST_SKIP();
  std::atomic<bool> stop = false;
  std::thread busy([&] {
    while (!stop) computes(tbb_executor(4));
  });
  bool all = true;
  for (int turn = 0; turn < 8 && all; ++turn) {
    ASSERT_TRUE(computes(tbb_executor(4)));
    all = in_child([] { return computes(tbb_executor(4)) && computes(*make_tbb_executor(3, Affinity::none)); });
  }
  stop = true;
  busy.join();
  EXPECT_TRUE(all);
}

// The first executor of its process where each test has one, as ctest runs them; else a fork of one that has some.
TEST(Executor, TakesFewerThreadsWhereNoMoreCanBeHad) {
  if (!kCanFork) GTEST_SKIP();
  EXPECT_TRUE(in_child([] {
    const rlimit few = {3, 3};
    if (::setrlimit(RLIMIT_NPROC, &few) != 0) return false;
    if (::getuid() == 0 && ::setuid(65534) != 0) return false;  // root has no such limit
    const auto executor = make_tbb_executor(16, Affinity::none);
    return executor->threads() <= 3 && computes(*executor) && computes(tbb_executor(8));
  }));
}

}  // namespace
}  // namespace fourmoe
