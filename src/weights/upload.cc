#include "weights/upload.h"

#include <algorithm>
#include <cstring>

namespace fourmoe::weights {
namespace {

constexpr i64 kCopyRows = 64;  // rows that one task copies

}  // namespace

Upload::Upload(i64 bytes, Executor& executor) : executor_(executor), bytes_(bytes) {
  throw_unless_ok(gpu::OwnStream::make(&stream_));
}

void Upload::make() {
  for (Slot& slot : slots_) {
    throw_unless_ok(gpu::Buffer::make(gpu::Kind::pinned, bytes_, "staging for weights", &slot.host));
    throw_unless_ok(gpu::Buffer::make(gpu::Kind::device, bytes_, "staging for weights", &slot.device));
    throw_unless_ok(gpu::Event::make(&slot.done));
  }
}

void Upload::begin() {
  if (slots_[0].host.data() == nullptr) make();
  turn_ ^= 1;
  throw_unless_ok(slots_[turn_].done.wait());
  used_ = 0;
}

const u8* Upload::add(const u8* rows, i64 stride, i64 row_bytes, i32 count) {
  std::byte* to = slots_[turn_].host.data() + used_;
  executor_.parallel_for((count + kCopyRows - 1) / kCopyRows, [&](i64 task) {
    for (i64 row = task * kCopyRows; row < std::min<i64>(count, (task + 1) * kCopyRows); ++row) {
      std::memcpy(to + row * row_bytes, rows + row * stride, row_bytes);
    }
  });
  const u8* at = reinterpret_cast<const u8*>(slots_[turn_].device.data() + used_);
  used_ += count * row_bytes;
  return at;
}

void Upload::send() {
  const Slot& slot = slots_[turn_];
  throw_unless_ok(gpu::copy(slot.device.data(), slot.host.data(), used_, stream(), "weights"));
}

void Upload::end() { throw_unless_ok(slots_[turn_].done.record(stream())); }

}  // namespace fourmoe::weights
