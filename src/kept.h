// Kept: memory of a GPU that steps keep between the calls that share a workspace: zeros at first, then what the last
// call left.
//
// Calls that may overlap have workspaces of their own, so a workspace stands for the calls that follow one another. A
// piece goes to a workspace when it first comes, and stays with its address: a graph may have captured both.
#pragma once

#include <mutex>
#include <unordered_map>
#include <vector>

#include "gpu/runtime.h"

namespace fourmoe {

class Kept {
 public:
  // Memory for the first workspaces. `bytes` of a piece; 0: no step keeps anything. Throws Error.
  explicit Kept(i64 bytes);

  // The workspace's piece, or null: then steps clear memory of the workspace instead. New pieces are made as they are
  // needed, but for a stream that is being captured, which must not allocate.
  Status find(const void* workspace, gpu::Stream stream, std::byte** piece);

 private:
  Status grow();

  i64 bytes_;
  std::mutex mutex_;
  std::vector<gpu::Buffer> chunks_;
  i64 free_ = 0;  // pieces of the last chunk that nobody has
  std::unordered_map<const void*, std::byte*> pieces_;
};

}  // namespace fourmoe
