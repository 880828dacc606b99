// Workspace: one piece of memory, carved once. Who lays it out also sizes it, by carving nothing at all.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "format/number.h"
#include "status.h"

namespace fourmoe {

inline constexpr i64 kWorkspaceAlignment = 64;  // a cache line, and the widest vector

// Memory that a call may scribble on; nothing in it is kept between calls.
struct Workspace {
  std::byte* data = nullptr;  // aligned to kWorkspaceAlignment; caller's
  i64 bytes = 0;
};

inline Status check_alignment(const Workspace& workspace) {
  if (reinterpret_cast<std::uintptr_t>(workspace.data) % kWorkspaceAlignment == 0) return {};
  return refuse(Reason::argument_invalid,
                "workspace is not aligned to " + std::to_string(kWorkspaceAlignment) + " bytes");
}

// Hands out consecutive aligned pieces; without memory it only counts.
class Carver {
 public:
  explicit Carver(std::byte* base) : base_(base) {}

  template <class T>
  T* take(i64 count) {
    T* piece = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
    const i64 bytes = count * static_cast<i64>(sizeof(T));
    used_ += (bytes + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment;
    return piece;
  }
  i64 used() const { return used_; }

 private:
  std::byte* base_;
  i64 used_ = 0;
};

}  // namespace fourmoe
