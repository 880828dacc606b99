#include "gpu/kept.h"

namespace fourmoe::gpu {

Kept::Kept(i64 bytes) : bytes_((bytes + 255) / 256 * 256) {
  if (bytes_ == 0) return;
  throw_unless_ok(Buffer::make(Kind::device, kPieces * bytes_, "counters of a layer", &memory_));
  throw_unless_ok(fill(memory_.data(), 0, memory_.bytes(), nullptr));
  throw_unless_ok(synchronise(nullptr));
}

std::byte* Kept::find(const void* workspace) {
  if (bytes_ == 0) return nullptr;
  const std::lock_guard<std::mutex> lock(mutex_);
  if (const auto known = pieces_.find(workspace); known != pieces_.end()) return known->second;
  const i64 used = static_cast<i64>(pieces_.size());
  if (used == kPieces) return nullptr;
  return pieces_[workspace] = memory_.data() + used * bytes_;
}

}  // namespace fourmoe::gpu
