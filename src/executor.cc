#include "executor.h"

#include <oneapi/tbb/global_control.h>
#include <oneapi/tbb/info.h>
#include <oneapi/tbb/parallel_for.h>
#include <oneapi/tbb/task_arena.h>

#include <map>
#include <memory>
#include <mutex>
#include <optional>

namespace fourmoe {
namespace {

class TbbExecutor final : public Executor {
 public:
  explicit TbbExecutor(i32 threads) : arena_(threads > 0 ? threads : tbb::task_arena::automatic) {
    // oneTBB's pool ends at the machine's cores unless told otherwise, and says so on stderr.
    if (threads > tbb::info::default_concurrency()) {
      more_threads_.emplace(tbb::global_control::max_allowed_parallelism, threads);
    }
    arena_.initialize();
  }

  i32 threads() const override { return arena_.max_concurrency(); }

  void parallel_for(i64 count, const Task& task) override {
    if (count <= 0) return;
    if (count == 1 || threads() == 1) {
      for (i64 index = 0; index < count; ++index) task(index);
      return;
    }
    arena_.execute([&] {
      tbb::parallel_for(
          i64{0}, count, [&](i64 index) { task(index); }, tbb::simple_partitioner{});
    });
  }

 private:
  std::optional<tbb::global_control> more_threads_;
  tbb::task_arena arena_;
};

}  // namespace

Executor& tbb_executor(i32 threads) {
  static std::mutex mutex;
  static std::map<i32, std::unique_ptr<TbbExecutor>> executors;
  const std::lock_guard<std::mutex> lock(mutex);
  auto& executor = executors[threads > 0 ? threads : 0];
  if (!executor) executor = std::make_unique<TbbExecutor>(threads);
  return *executor;
}

}  // namespace fourmoe
