#include "checkpoint/source.h"

#include <fmt/format.h>

#include <exception>
#include <mutex>

#include "status.h"

namespace fourmoe::checkpoint {

void refuse_layer(const std::string& path, i32 layer, const std::vector<i32>& layers) {
  // "3-60, 62": runs of consecutive numbers.
  std::string text;
  for (std::size_t i = 0; i < layers.size();) {
    std::size_t end = i + 1;
    while (end < layers.size() && layers[end] == layers[end - 1] + 1) ++end;
    text += fmt::format("{}{}", text.empty() ? "" : ", ", layers[i]);
    if (end - i > 1) text += fmt::format("-{}", layers[end - 1]);
    i = end;
  }
  throw Error(Reason::layer_missing, fmt::format("{}: layer {} has no experts; layers with experts: {}", path, layer,
                                                 text.empty() ? "none" : text));
}

void run_all(Executor& executor, i64 count, const std::function<void(i64 index)>& task) {
  std::mutex mutex;
  std::exception_ptr first;
  i64 lowest = count;
  executor.parallel_for(count, [&](i64 index) {
    try {
      task(index);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex);
      if (index >= lowest) return;
      lowest = index;
      first = std::current_exception();
    }
  });
  if (first) std::rethrow_exception(first);
}

}  // namespace fourmoe::checkpoint
