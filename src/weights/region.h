// Region: memory of packed weights. Two megabytes and more are huge pages where the system has them, placed as asked.
#pragma once

#include <memory>

#include "machine.h"

namespace fourmoe::weights {

class Region {
 public:
  // Not touched yet, at a 64-byte boundary. Throws Error(out_of_memory).
  Region(i64 bytes, Placement placement);

  std::byte* data() const { return memory_.get(); }
  bool interleaved() const { return interleaved_; }  // asked for, large enough, and allowed by the kernel

 private:
  struct Release {
    i64 mapped;  // bytes to unmap; 0: to free
    void operator()(std::byte* p) const;
  };

  std::unique_ptr<std::byte[], Release> memory_;
  bool interleaved_ = false;
};

}  // namespace fourmoe::weights
