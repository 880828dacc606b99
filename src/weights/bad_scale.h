// Bad scale: the block scales that format/validate.h refuses, looked for where they lie in a GPU's memory.
#pragma once

#include "format/validate.h"
#include "gpu/runtime.h"

namespace fourmoe::weights {

struct Rows;  // device_packed.h

inline constexpr u64 kNoBadScale = ~u64{0};

// (row * blocks + block) * 256 + byte: the least is the first one of a matrix of `blocks` blocks a row.
constexpr format::BadScale bad_scale_of(u64 found, i64 blocks) {
  const i64 index = static_cast<i64>(found >> 8);
  return {index / blocks, index % blocks, static_cast<u8>(found)};
}

// Of [rows, cols] in device memory: enqueues what lowers *found, which begins as kNoBadScale.
Status find_bad_scale(const Rows& matrix, format::Encoding encoding, i32 rows, i32 cols, u64* found,
                      gpu::Stream stream);

}  // namespace fourmoe::weights
