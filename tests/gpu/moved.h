// Moved: experts whose matrices and biases, or some of them, lie in the memory of the current GPU.
#pragma once

#include <functional>
#include <vector>

#include "gpu/runtime.h"
#include "weights/expert_table.h"

namespace fourmoe::cases {

// Parts of an expert: gate's values, its scales, those of up and of down, then the biases of gate, up and down.
inline constexpr int kParts = 9;
using Which = std::function<bool(i64 expert, int part)>;

struct Moved {
  std::vector<weights::Expert> experts;
  std::vector<gpu::Buffer> memory;

  void* take(const void* data, i64 bytes, i64 skip) {
    memory.emplace_back();
    throw_unless_ok(gpu::Buffer::make(gpu::Kind::device, bytes + skip, "raw weights", &memory.back()));
    std::byte* at = memory.back().data() + skip;
    throw_unless_ok(gpu::copy(at, data, bytes, nullptr, "raw weights"));
    return at;
  }

  // What the memory held becomes NaN, in scales and biases too; then it is freed.
  void destroy() {
    for (gpu::Buffer& buffer : memory) throw_unless_ok(gpu::fill(buffer.data(), 0xff, buffer.bytes(), nullptr));
    throw_unless_ok(gpu::synchronise(nullptr));
    memory.clear();
  }
};

// Matrices go to odd addresses: kernels read them at any alignment.
inline Moved move_to_device(
    std::vector<weights::Expert> experts, const Which& which = [](i64, int) { return true; }) {
  Moved moved;
  moved.experts = std::move(experts);
  for (std::size_t e = 0; e < moved.experts.size(); ++e) {
    weights::Expert& expert = moved.experts[e];
    int part = 0;
    for (format::Matrix* m : {&expert.gate, &expert.up, &expert.down}) {
      if (which(e, part++) && !m->empty()) {
        m->data = static_cast<const u8*>(moved.take(m->data, m->rows * m->data_stride, 1));
      }
      if (which(e, part++) && m->scales != nullptr) {
        m->scales = static_cast<const u8*>(moved.take(m->scales, m->rows * m->scales_stride, 3));
      }
    }
    const i32 rows[] = {expert.up.rows, expert.up.rows, expert.down.rows};
    int index = 0;
    for (const f32** bias : {&expert.gate_bias, &expert.up_bias, &expert.down_bias}) {
      const i32 count = rows[index++];
      if (which(e, part++) && *bias != nullptr) *bias = static_cast<const f32*>(moved.take(*bias, 4 * i64{count}, 0));
    }
  }
  throw_unless_ok(gpu::synchronise(nullptr));
  return moved;
}

}  // namespace fourmoe::cases
