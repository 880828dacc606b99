// Stands in for src/executor.cc in the thread sanitizer's build: plain threads, whose hand-overs the sanitizer sees.
// (oneTBB as Debian ships it is not instrumented, so each of its forks and joins would be reported as a race.)
#include "executor.h"

#include <atomic>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace fourmoe {
namespace {

class ThreadExecutor final : public Executor {
 public:
  explicit ThreadExecutor(i32 threads) : threads_(threads) {}

  i32 threads() const override { return threads_; }

  void parallel_for(i64 count, const Task& task) override {
    std::atomic<i64> next = 0;
    std::exception_ptr failure;
    std::mutex mutex;
    const auto work = [&] {
      try {
        for (i64 index = next++; index < count; index = next++) task(index);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(mutex);
        failure = std::current_exception();
      }
    };
    std::vector<std::thread> others;
    for (i64 thread = 1; thread < threads_ && thread < count; ++thread) others.emplace_back(work);
    work();
    for (std::thread& other : others) other.join();
    if (failure) std::rethrow_exception(failure);
  }

 private:
  const i32 threads_;
};

}  // namespace

std::unique_ptr<Executor> make_tbb_executor(i32 threads, Affinity) {
  return std::make_unique<ThreadExecutor>(threads > 0 ? threads : 2);
}

Executor& tbb_executor(i32 threads) {
  static std::mutex mutex;
  static std::map<i32, std::unique_ptr<ThreadExecutor>> executors;
  const std::lock_guard<std::mutex> lock(mutex);
  auto& executor = executors[threads > 0 ? threads : 0];
  if (!executor) executor = std::make_unique<ThreadExecutor>(threads > 0 ? threads : 2);
  return *executor;
}

}  // namespace fourmoe
