// Kept: memory of a GPU that steps keep between the calls that share a workspace: zeros at first, then what the last
// call left.
//
// Calls that may overlap have workspaces of their own, so a workspace stands for the calls that follow one another. A
// piece goes to a workspace when it first comes, and stays with its address: a graph may have captured both. All pieces
// are made with the layer, for a call allocates nothing.
#pragma once

#include <mutex>
#include <unordered_map>

#include "gpu/runtime.h"

namespace fourmoe::gpu {

class Kept {
 public:
  static constexpr i64 kPieces = 32;

  // `bytes` of a piece; 0: no step keeps anything. Throws Error.
  explicit Kept(i64 bytes);

  // The workspace's piece. Null where kPieces other workspaces came before: steps then clear memory of the workspace
  // in each call, which takes a launch more.
  std::byte* find(const void* workspace);

 private:
  i64 bytes_;
  Buffer memory_;
  std::mutex mutex_;
  std::unordered_map<const void*, std::byte*> pieces_;
};

}  // namespace fourmoe::gpu
