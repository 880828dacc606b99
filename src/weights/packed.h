// Packed: weights in the order in which a room streams them. Rooms state their order as data; only packed.* knows it.
//
// Rows are cut into panels of `panel_rows`; a panel is contiguous, starts at a 64-byte boundary and holds its columns
// from first to last:
//   4-bit: groups of 64 columns (the last one of 16, 32 or 48), so that no load of codes crosses a cache line.
//          A group is panel_rows * 8 code bytes for each of its blocks of 16, then panel_rows scale bytes for each.
//          Codes: for each half of 8 columns, one 32-bit little-endian word a row; nibble j is column j of the half.
//          Scales: nvfp4 as UE5M3 (format/number.h), mxfp4 as E8M0 (the two halves of a block of 32 repeat it).
//   bf16:  a column is panel_rows values (u16); f32: the same with f32 values (f16, f32, fp8 are exact in f32).
// Rows beyond the matrix are zero (code 0 with scale 0, or with 2^-127 for mxfp4), so they multiply to zero.
// Gate and up panels alternate, so that one task reads both halves of a pair from one stream.
#pragma once

#include <span>

#include "executor.h"
#include "weights/expert_table.h"
#include "weights/region.h"

namespace fourmoe::weights {

struct Order {
  i32 panel_rows;  // rows that a kernel's lanes hold
};

inline constexpr i32 kGroupBlocks = 4;  // blocks of 16 columns in a group of a 4-bit panel

// How a packed panel stores its values.
enum class PanelFormat : u8 { nvfp4, mxfp4, bf16, f32 };

PanelFormat panel_format(format::Encoding encoding);

// Bytes of one panel of `cols` columns, a multiple of 64.
i64 panel_bytes(PanelFormat format, const Order& order, i32 cols);

// Panels of a matrix: ceil(rows / panel_rows).
i32 panel_count(const Order& order, i32 rows);

// Writes `count` panels starting at panel `first` of the matrix, `stride` bytes apart.
void pack_panels(const format::Matrix& matrix, const Order& order, i32 first, i32 count, std::byte* out, i64 stride);

// Back to the checkpoint's codes and scales (4-bit) or values (dense; f16 and fp8 come back as f32): what tests
// compare. `codes` [rows, cols / 2] or [rows, cols] values, `scales` [rows, cols / block]; null scales for dense.
void unpack(PanelFormat format, const Order& order, i32 rows, i32 cols, const std::byte* panels, i64 stride, u8* codes,
            u8* scales);

// Owner of a layer's packed experts: one buffer of gemm1 blobs, one of gemm2 blobs.
class Packed {
 public:
  // Packs all experts of the table and points its entries' gemm1 and gemm2 at the blobs. Parallel over experts and
  // panels. Throws Error: out_of_memory, or internal when the experts' shapes or encodings differ.
  Packed(std::span<Expert> experts, const Order& order, Executor& executor, Placement placement = machine().placement);

  // Packs experts of the same number, shapes and encoding into the same memory and points them at it.
  void repack(std::span<Expert> experts, Executor& executor);
  i64 bytes() const { return bytes_; }

 private:
  Order order_;
  i64 bytes_ = 0;
  Region memory_;
};

}  // namespace fourmoe::weights
