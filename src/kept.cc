#include "kept.h"

namespace fourmoe {
namespace {

constexpr i64 kPieces = 16;  // of a chunk; a piece has a few KiB
constexpr i64 kAlignment = 256;

i64 aligned(i64 bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

}  // namespace

Kept::Kept(i64 bytes) : bytes_(aligned(bytes)) {
  if (bytes_ > 0) throw_unless_ok(grow());
}

Status Kept::grow() {
  gpu::Buffer chunk;
  Status status = gpu::Buffer::make(gpu::Kind::device, kPieces * bytes_, "counters of a layer", &chunk);
  if (!status.ok()) return status;
  gpu::OwnStream stream;  // the caller's may be busy for long
  status = gpu::OwnStream::make(&stream);
  if (status.ok()) status = gpu::fill(chunk.data(), 0, chunk.bytes(), stream.get());
  if (status.ok()) status = gpu::synchronise(stream.get());
  if (!status.ok()) return status;
  chunks_.push_back(std::move(chunk));
  free_ = kPieces;
  return {};
}

Status Kept::find(const void* workspace, gpu::Stream stream, std::byte** piece) {
  *piece = nullptr;
  if (bytes_ == 0) return {};
  const std::lock_guard<std::mutex> lock(mutex_);
  if (const auto known = pieces_.find(workspace); known != pieces_.end()) {
    *piece = known->second;
    return {};
  }
  if (free_ == 0) {
    bool captured = false;
    if (Status status = gpu::capturing(stream, &captured); !status.ok() || captured) return status;
    if (Status status = grow(); !status.ok()) return status;
  }
  *piece = chunks_.back().data() + --free_ * bytes_;
  pieces_.emplace(workspace, *piece);
  return {};
}

}  // namespace fourmoe
