#include "executor.h"

#include <oneapi/tbb/global_control.h>
#include <oneapi/tbb/info.h>
#include <oneapi/tbb/parallel_for.h>
#include <oneapi/tbb/task_arena.h>
#include <oneapi/tbb/task_scheduler_observer.h>
#include <sched.h>
#include <unistd.h>

#include <latch>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <system_error>
#include <thread>
#include <vector>

namespace fourmoe {
namespace {

// Keeps each worker on a core while it is in the arena: place i of the arena on core i of those that the process had
// when the arena was made. The thread that calls stays the caller's.
class Pins final : public tbb::task_scheduler_observer {
 public:
  explicit Pins(tbb::task_arena& arena) : task_scheduler_observer(arena) {
    CPU_ZERO(&all_);
    if (sched_getaffinity(0, sizeof all_, &all_) != 0) return;
    for (int core = 0; core < CPU_SETSIZE; ++core) {
      if (CPU_ISSET(core, &all_)) cores_.push_back(core);
    }
    observe(true);
  }
  Pins(const Pins&) = delete;
  Pins& operator=(const Pins&) = delete;
  ~Pins() override { observe(false); }

  void on_scheduler_entry(bool is_worker) override {
    const int place = tbb::this_task_arena::current_thread_index();
    if (!is_worker || place < 0) return;
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(cores_[place % cores_.size()], &one);
    sched_setaffinity(0, sizeof one, &one);  // a wish: where it is refused the thread runs anywhere
  }
  void on_scheduler_exit(bool is_worker) override {
    if (is_worker) sched_setaffinity(0, sizeof all_, &all_);
  }

 private:
  cpu_set_t all_;
  std::vector<int> cores_;
};

// How many of so many threads can be had, this one among them. A limit on processes may allow fewer, and a thread of
// oneTBB that cannot start the next ends the process.
i32 startable(i32 wanted) {
  std::latch done(1);
  std::vector<std::thread> others;
  others.reserve(wanted);
  try {
    while (static_cast<i32>(others.size()) + 1 < wanted) others.emplace_back([&done] { done.wait(); });
  } catch (const std::system_error&) {  // the limit
  }
  done.count_down();
  for (std::thread& other : others) other.join();
  return static_cast<i32>(others.size()) + 1;
}

// Whether this process is a fork of the one in which executors were first asked for: no thread of theirs came along.
bool is_fork() {
  static const pid_t first = ::getpid();
  return ::getpid() != first;
}

// oneTBB's pool ends at the machine's cores unless told otherwise, and says so on stderr. Of several limits it takes
// the least, so there is one: the most that was asked for.
void allow(i32 threads) {
  static std::mutex mutex;
  static i32 most = tbb::info::default_concurrency();
  static auto* limit = new std::optional<tbb::global_control>;  // outlives executors that static objects hold
  const std::lock_guard<std::mutex> lock(mutex);
  if (threads <= most) return;
  limit->reset();
  limit->emplace(tbb::global_control::max_allowed_parallelism, threads);
  most = threads;
}

class TbbExecutor final : public Executor {
 public:
  TbbExecutor(i32 threads, Affinity affinity)
      : arena_(is_fork() ? 1 : startable(threads > 0 ? threads : tbb::info::default_concurrency())) {
    if (is_fork()) return;
    allow(arena_.max_concurrency());
    arena_.initialize();
    if (affinity == Affinity::cores) pins_.emplace(arena_);
  }

  i32 threads() const override { return arena_.max_concurrency(); }

  void parallel_for(i64 count, const Task& task) override {
    if (count <= 0) return;
    if (count == 1 || threads() == 1 || is_fork()) {
      for (i64 index = 0; index < count; ++index) task(index);
      return;
    }
    arena_.execute([&] {
      tbb::parallel_for(
          i64{0}, count, [&](i64 index) { task(index); }, tbb::simple_partitioner{});
    });
  }

 private:
  tbb::task_arena arena_;
  std::optional<Pins> pins_;  // ends before its arena
};

}  // namespace

std::unique_ptr<Executor> make_tbb_executor(i32 threads, Affinity affinity) {
  return std::make_unique<TbbExecutor>(threads, affinity);
}

Executor& tbb_executor(i32 threads) {
  static std::mutex mutex;
  static std::map<i32, std::unique_ptr<Executor>> executors;
  const std::lock_guard<std::mutex> lock(mutex);
  auto& executor = executors[threads > 0 ? threads : 0];
  if (!executor) executor = make_tbb_executor(threads, machine().affinity);
  return *executor;
}

}  // namespace fourmoe
