// Executor: the one way in which fourmoe uses several threads.
//
// A host program that owns a thread pool passes its own; otherwise oneTBB runs the tasks. Tasks are independent,
// are taken dynamically and may run in any order on any thread: results never depend on it.
#pragma once

#include <functional>
#include <memory>

#include "machine.h"

namespace fourmoe {

class Executor {
 public:
  using Task = std::function<void(i64 index)>;

  virtual ~Executor() = default;
  virtual i32 threads() const = 0;                             // upper bound of tasks at work at once, >= 1
  virtual void parallel_for(i64 count, const Task& task) = 0;  // returns when task(0..count-1) have all returned
};

// What callers may ask for.
inline constexpr i32 kMostThreads = 1024;

// A oneTBB executor of its own, of fewer threads where a limit on processes allows no more. Its threads sleep when
// there is nothing to do, and do not follow a fork: in the child tasks run one after the other.
std::unique_ptr<Executor> make_tbb_executor(i32 threads, Affinity affinity);

// The process's oneTBB executor with `threads` threads (0: as many as the machine offers), placed as the
// machine's affinity says. Executors are kept, so asking again is cheap.
Executor& tbb_executor(i32 threads = 0);

}  // namespace fourmoe
