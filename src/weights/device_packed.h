// Device packed: a layer's weights in the memory of one GPU, packed there in the order in which a room streams them.
//
// A room's blob is a row of bands: `band_rows` features of a matrix (of gate and of up alike) make one band, the last
// one filled up with zeros. Codes and scales in host memory are uploaded a few bands at a time (upload.h), those in the
// GPU's own are read where they are, each as it lies; besides the blobs packing takes kStagingBytes four times, or
// nothing where all lies on the GPU.
#pragma once

#include <functional>
#include <vector>

#include "executor.h"
#include "gpu/runtime.h"
#include "weights/expert_table.h"
#include "weights/upload.h"
#include "weights/window.h"

namespace fourmoe {
struct Problem;
}

namespace fourmoe::weights {

// Rows of a matrix in device memory.
struct Rows {
  const u8* values = nullptr;  // [rows, cols/2] E2M1 pairs, low nibble first, or [rows, cols] bf16; any alignment; null
                               // for no matrix
  const u8* scales = nullptr;  // [rows, cols/block] E4M3 or E8M0; null unless 4-bit
  i64 values_stride = 0;       // bytes
  i64 scales_stride = 0;       // bytes
  i32 window = 0;              // mxfp4: the first exponent of the matrix's window (window.h)
};

// Some bands of one projection: what a room packs with one launch.
struct Piece {
  Rows gate;  // empty for down, and where there is no gate
  Rows up;
  format::Encoding encoding = format::Encoding::nvfp4;  // or mxfp4, bf16
  i32 rows = 0;                                         // of each matrix in this piece, starting with a band
  i32 cols = 0;
  std::byte* out = nullptr;  // its first band
};

// How a room packs; what a Step states.
struct Packing {
  i32 (*band_rows)(bool gated);                   // rows of a matrix in a band
  i64 (*band_bytes)(format::Encoding, i32 cols);  // of a blob in a band
  i32 (*exponent)(format::Encoding, i32 window);  // of the power of two that joins a matrix's global
  Status (*pack)(const Piece&, gpu::Stream);      // enqueues
};

// The table without the problem's local experts: what is packed after them.
DeviceTable entries_from(const DeviceTable& table, const Problem& problem);

// Owner of a layer's blobs and of its DeviceTable.
class DevicePacked {
 public:
  // Takes memory for the layer and packs it. Matrices and biases lie in host memory or in that of `device`, where what
  // fills them must have ended; they are not read again. Throws Error: out_of_memory, device_failed, tensor_mismatch
  // when the experts' shapes or encodings differ, memory_misplaced for another GPU's memory, scale_invalid for a block
  // scale in the device's memory (those in host memory are checked before), encoding_unsupported when a matrix's MXFP4
  // scales fit no window.
  DevicePacked(const Problem& problem, std::span<const Expert> experts, const Packing& packing, i32 device,
               Executor& executor);

  // Packs other weights of the same shape at the same addresses; calls must not overlap it. Throws like the above: a
  // refusal leaves the old weights; after out_of_memory or device_failed what the layer computes is undefined until a
  // refit succeeds.
  void refit(std::span<const Expert> experts, Executor& executor);

  const DeviceTable& table() const { return table_; }
  i64 bytes() const { return blobs_.bytes() + numbers_.bytes(); }

 private:
  // A matrix that is packed, and how.
  struct Source {
    const format::Matrix* matrix;
    bool values_here = true;  // in the device's memory, or there are none
    bool scales_here = true;
    i32 window = 0;  // mxfp4: the first exponent

    bool here() const { return values_here && scales_here; }
  };
  using Sources = std::vector<Source>;  // [experts, 3] gate, up, down
  // Takes rows [first, first + count) of gate, which may be empty, and of up.
  using Enqueue = std::function<void(const Rows& gate, const Rows& up, i32 first, i32 count)>;

  f32 global(const Source& source) const;
  i64 blob_bytes(i32 rows, i32 cols, bool gated) const;
  i64 row_bytes(i32 cols) const;
  i64 staging_bytes() const;
  void lay_out();
  std::byte* gemm1_blob(i64 expert) const;
  std::byte* gemm2_blob(i64 expert) const;

  void check(std::span<const Expert> experts) const;
  bool is_here(const void* address, const char* part, i64 index) const;
  Sources find(std::span<const Expert> experts) const;
  void check_scales(const Sources& sources, gpu::Stream stream) const;
  std::vector<Exponents> scan(const Sources& sources, Upload* upload, Executor& executor) const;
  void find_windows(Sources* sources, Upload* upload, Executor& executor) const;
  void write_bias(const f32* bias, i64 index, i32 count, f32* to, gpu::Stream stream) const;
  void write_numbers(std::span<const Expert> experts, const Sources& sources, gpu::Stream stream);
  void for_bands(const Source& gate, const Source& up, Upload* upload, const Enqueue& enqueue) const;
  void pack(const Source& gate, const Source& up, std::byte* blob, Upload* upload) const;

  const Packing& packing_;
  i32 device_;
  i32 experts_;
  i32 hidden_;
  i32 inter_;
  format::Encoding encoding_;
  bool gated_;
  bool quantised_;       // w4a4: globals include the scales of what they multiply
  bool biases_[3];       // gate, up, down
  gpu::Buffer blobs_;    // gemm1 of all experts, then gemm2
  gpu::Buffer numbers_;  // what table_ points to: addresses, scales, biases
  std::vector<std::byte> numbers_host_;
  DeviceTable table_;
};

}  // namespace fourmoe::weights
