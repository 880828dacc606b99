// Device packed: a layer's weights in the memory of one GPU, packed there in the order in which a room streams them.
//
// A room's blob is a row of bands: `band_rows` features of a matrix (of gate and of up alike) make one band, the last
// one filled up with zeros. The checkpoint's matrices are uploaded a few bands at a time through two page-locked pieces
// of memory, or read where they are if that is the same GPU; besides the blobs packing takes kStagingBytes four times.
#pragma once

#include <vector>

#include "executor.h"
#include "gpu/runtime.h"
#include "weights/expert_table.h"

namespace fourmoe {
struct Problem;
}

namespace fourmoe::weights {

// Rows of an NVFP4 matrix in device memory.
struct Rows {
  const u8* codes = nullptr;   // [rows, cols/2] E2M1 pairs, low nibble first, any alignment; null for no matrix
  const u8* scales = nullptr;  // [rows, cols/16] E4M3
  i64 codes_stride = 0;        // bytes
  i64 scales_stride = 0;       // bytes
};

// Some bands of one projection: what a room packs with one launch.
struct Piece {
  Rows gate;  // empty for down, and where there is no gate
  Rows up;
  i32 rows = 0;  // of each matrix in this piece, starting with a band
  i32 cols = 0;
  std::byte* out = nullptr;  // its first band
};

// How a room packs; what a Step states.
struct Packing {
  i32 (*band_rows)(bool gated);               // rows of a matrix in a band
  i64 (*band_bytes)(i32 cols);                // of a blob in a band
  Status (*pack)(const Piece&, gpu::Stream);  // enqueues
};

i64 blob_bytes(const Packing& packing, i32 rows, i32 cols, bool gated);

// Owner of a layer's blobs and of its DeviceTable.
class DevicePacked {
 public:
  // Takes memory for the layer and packs it. Throws Error: out_of_memory, device_failed, internal when the experts'
  // shapes or encodings differ.
  DevicePacked(const Problem& problem, std::span<const Expert> experts, const Packing& packing, i32 device,
               Executor& executor);

  // Packs other weights of the same shape at the same addresses; calls must not overlap it. Throws like the above, and
  // then what the layer computes is undefined until a refit succeeds.
  void refit(std::span<const Expert> experts, Executor& executor);

  const DeviceTable& table() const { return table_; }
  i64 bytes() const { return blobs_.bytes() + numbers_.bytes(); }

 private:
  class Upload;
  void lay_out();
  void write_numbers(std::span<const Expert> experts);
  std::byte* gemm1_blob(i64 expert) const;
  std::byte* gemm2_blob(i64 expert) const;
  void pack(const format::Matrix& gate, const format::Matrix& up, std::byte* blob, Upload* upload) const;
  void pack(std::span<const Expert> experts, Executor& executor);

  const Packing& packing_;
  i32 device_;
  i32 experts_;
  i32 hidden_;
  i32 inter_;
  bool gated_;
  bool quantised_;       // w4a4: globals include the scales of what they multiply
  bool biases_[3];       // gate, up, down
  gpu::Buffer blobs_;    // gemm1 of all experts, then gemm2
  gpu::Buffer numbers_;  // what table_ points to: addresses, scales, biases
  std::vector<std::byte> numbers_host_;
  DeviceTable table_;
};

}  // namespace fourmoe::weights
