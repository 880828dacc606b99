// Upload: rows from host memory to a GPU through two pieces of page-locked memory, in turn.
#pragma once

#include "executor.h"
#include "gpu/runtime.h"

namespace fourmoe::weights {

class Upload {
 public:
  // Of pieces of `bytes`, whose memory is taken when the first one begins. Throws Error.
  Upload(i64 bytes, Executor& executor);

  gpu::Stream stream() const { return stream_.get(); }  // of the copies, and of what reads them
  i64 bytes() const { return bytes_; }                  // of a piece

  // The next piece, once what read the last contents of its memory has ended.
  void begin();
  // Puts rows into the piece, close together. Returns where they are on the device after send().
  const u8* add(const u8* rows, i64 stride, i64 row_bytes, i32 count);
  void send();
  void end();  // what reads the piece is enqueued

 private:
  struct Slot {
    gpu::Buffer host;
    gpu::Buffer device;
    gpu::Event done;
  };
  void make();

  Executor& executor_;
  i64 bytes_;
  gpu::OwnStream stream_;
  Slot slots_[2];
  int turn_ = 0;
  i64 used_ = 0;
};

}  // namespace fourmoe::weights
