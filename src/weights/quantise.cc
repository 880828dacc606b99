#include "weights/quantise.h"

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <vector>

#include "format/quantise.h"
#include "status.h"

namespace fourmoe::weights {
namespace {

using format::Encoding;
using format::Matrix;

constexpr i64 kTaskValues = 1 << 16;  // 256 KiB of f32 a task: long enough to hide the cost of taking it

i64 rows_per_task(const Matrix& matrix) { return std::max<i64>(1, kTaskValues / std::max(matrix.cols, 1)); }

i64 task_count(const Matrix& matrix) {
  const i64 rows = rows_per_task(matrix);
  return (matrix.rows + rows - 1) / rows;
}

void widen(const u8* row, Encoding encoding, i64 n, f32* out) {
  switch (encoding) {
    case Encoding::bf16:
      for (i64 i = 0; i < n; ++i) out[i] = format::from_bf16(format::load<u16>(row + 2 * i));
      break;
    case Encoding::f16:
      for (i64 i = 0; i < n; ++i) out[i] = format::from_f16(format::load<u16>(row + 2 * i));
      break;
    default: std::memcpy(out, row, 4 * n);
  }
}

// Magnitudes of floats are ordered like their bits; those of infinities and NaNs are the largest.
u32 largest_magnitude(const f32* x, i64 n) {
  u32 largest = 0;
  for (i64 i = 0; i < n; ++i) largest = std::max(largest, std::bit_cast<u32>(x[i]) & 0x7fffffffu);
  return largest;
}

// Calls body(row, values) for each row of task `index`, values widened to f32 [cols].
template <class Body>
void for_rows(const Matrix& dense, i64 index, const Body& body) {
  thread_local std::vector<f32> values;
  values.resize(dense.cols);
  const i64 first = index * rows_per_task(dense);
  const i64 last = std::min<i64>(dense.rows, first + rows_per_task(dense));
  for (i64 row = first; row < last; ++row) {
    widen(dense.row(row), dense.encoding, dense.cols, values.data());
    body(row, values.data());
  }
}

[[noreturn]] void throw_not_finite(const Matrix& dense, std::string_view name, i64 row) {
  std::vector<f32> values(dense.cols);
  widen(dense.row(row), dense.encoding, dense.cols, values.data());
  const auto odd = std::find_if(values.begin(), values.end(), [](f32 value) { return !std::isfinite(value); });
  throw Error(Reason::value_not_finite,
              fmt::format("tensor '{}' has {} at [{}, {}]", name, *odd, row, odd - values.begin()));
}

void store_max(std::atomic<u32>* target, u32 value) {
  for (u32 seen = *target; seen < value && !target->compare_exchange_weak(seen, value);) {
  }
}

void store_min(std::atomic<i64>* target, i64 value) {
  for (i64 seen = *target; seen > value && !target->compare_exchange_weak(seen, value);) {
  }
}

}  // namespace

f32 find_amax(const Matrix& dense, std::string_view name, Executor& executor) {
  if (dense.encoding != Encoding::bf16 && dense.encoding != Encoding::f16 && dense.encoding != Encoding::f32) {
    throw Error(Reason::dtype_unsupported, fmt::format("tensor '{}' is {}; expected bf16, f16 or f32", name,
                                                       format::encoding_name(dense.encoding)));
  }
  constexpr u32 kInfinity = 0x7f800000u;
  constexpr i64 kNone = std::numeric_limits<i64>::max();
  std::atomic<u32> largest = 0;
  std::atomic<i64> first_odd_row = kNone;
  executor.parallel_for(task_count(dense), [&](i64 task) {
    for_rows(dense, task, [&](i64 row, const f32* values) {
      const u32 magnitude = largest_magnitude(values, dense.cols);
      if (magnitude >= kInfinity) store_min(&first_odd_row, row);
      else store_max(&largest, magnitude);
    });
  });
  if (first_odd_row != kNone) throw_not_finite(dense, name, first_odd_row);
  return std::bit_cast<f32>(largest.load());
}

f32 global_of(f32 amax) {
  if (amax == 0.0f) return 1.0f;
  return std::max(amax / format::kNvfp4Max, std::numeric_limits<f32>::denorm_min());
}

void quantise(const Matrix& dense, f32 global, Executor& executor, u8* codes, u8* scales) {
  executor.parallel_for(task_count(dense), [&](i64 task) {
    for_rows(dense, task, [&](i64 row, const f32* values) {
      format::quantise_row(values, dense.cols, global, codes + row * dense.cols / 2,
                           scales + row * dense.cols / format::kNvfp4Block);
    });
  });
}

}  // namespace fourmoe::weights
