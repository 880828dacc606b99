#include "weights/packed.h"

#include <fmt/format.h>

#include <array>

#include "status.h"

namespace fourmoe::weights {
namespace {

using format::Encoding;
using format::Matrix;

constexpr i32 kBlock = format::kNvfp4Block;
constexpr i64 kLine = 64;  // cache line: where panels start

bool is_fp4(PanelFormat format) { return format == PanelFormat::nvfp4 || format == PanelFormat::mxfp4; }

i64 round_up(i64 value, i64 multiple) { return (value + multiple - 1) / multiple * multiple; }

// Where block `index` of a 4-bit panel has its codes and scales.
struct Place {
  i64 codes;
  i64 scales;
};

Place place(const Order& order, i32 blocks, i32 index) {
  const i32 first = index / kGroupBlocks * kGroupBlocks;
  const i32 in_group = std::min(kGroupBlocks, blocks - first);
  const i64 base = i64{first} * order.panel_rows * 9;
  return {base + i64{index - first} * order.panel_rows * 8,
          base + (i64{in_group} * 8 + (index - first)) * order.panel_rows};
}

// An E4M3 magnitude in f32 has its 8 significant bits of UE5M3 at bit 20; E4M3's exponent bias is 7, UE5M3's 15.
const std::array<u8, 256>& ue5m3_table() {
  static const std::array<u8, 256> table = [] {
    std::array<u8, 256> made{};
    for (i32 byte = 0; byte < 256; ++byte) made[byte] = format::to_ue5m3(static_cast<u8>(byte));
    return made;
  }();
  return table;
}

// One 4-bit panel: rows [row, row + panel_rows) of the matrix, as far as it has them; `out` is zeroed where it has not.
void pack_fp4(const Matrix& matrix, const Order& order, i32 row, std::byte* out) {
  const i32 rows = std::min(order.panel_rows, matrix.rows - row);
  const i32 blocks = matrix.cols / kBlock;
  const i32 blocks_a_scale = format::block_of(matrix.encoding) / kBlock;
  const std::array<u8, 256>& ue5m3 = ue5m3_table();
  for (i32 block = 0; block < blocks; ++block) {
    const Place at = place(order, blocks, block);
    std::byte* low = out + at.codes;
    std::byte* high = low + i64{order.panel_rows} * 4;
    for (i32 r = 0; r < rows; ++r) {
      const u8* codes = matrix.row(row + r) + i64{block} * 8;
      std::memcpy(low + 4 * r, codes, 4);
      std::memcpy(high + 4 * r, codes + 4, 4);
      const u8 scale = matrix.scale_row(row + r)[block / blocks_a_scale];
      out[at.scales + r] = std::byte{matrix.encoding == Encoding::nvfp4 ? ue5m3[scale] : scale};
    }
  }
}

// Columns go block by block, so that the lines of `out` that a block fills stay in the nearest cache.
void pack_dense(const Matrix& matrix, const Order& order, i32 row, std::byte* out) {
  const i32 rows = std::min(order.panel_rows, matrix.rows - row);
  const bool as_bf16 = matrix.encoding == Encoding::bf16;
  for (i32 first = 0; first < matrix.cols; first += kBlock) {
    for (i32 r = 0; r < rows; ++r) {
      for (i64 col = first; col < first + kBlock; ++col) {
        const i64 index = col * order.panel_rows + r;
        const f32 value = as_bf16 ? 0.0f : static_cast<f32>(format::weight_at(matrix, row + r, col));  // exact
        if (as_bf16) std::memcpy(out + 2 * index, matrix.row(row + r) + 2 * col, 2);
        else std::memcpy(out + 4 * index, &value, 4);
      }
    }
  }
}

// Bytes of one expert, projection by projection; every expert of a layer has the same.
struct Layout {
  i64 gemm1_panel = 0;  // of gate, and of up
  i64 gemm2_panel = 0;
  i32 inter_panels = 0;   // of gate, and of up
  i32 hidden_panels = 0;  // of down
  i32 halves = 0;         // 2 with a gate, else 1

  i64 gemm1_bytes() const { return gemm1_panel * inter_panels * halves; }
  i64 gemm2_bytes() const { return gemm2_panel * hidden_panels; }
  i64 bytes(i64 experts) const { return experts * (gemm1_bytes() + gemm2_bytes()); }
};

bool same_shape(const Matrix& a, const Matrix& b) {
  return a.rows == b.rows && a.cols == b.cols && a.encoding == b.encoding;
}

Layout lay_out(std::span<const Expert> experts, const Order& order) {
  if (experts.empty()) return {};
  const Expert& first = experts.front();
  for (const Expert& expert : experts) {
    const bool same = same_shape(expert.up, first.up) && same_shape(expert.down, first.down) &&
                      expert.gate.empty() == first.gate.empty() &&
                      (expert.gate.empty() || same_shape(expert.gate, first.up));
    if (same) continue;
    throw Error(Reason::internal,
                fmt::format("expert {} differs from expert 0 in shape or encoding", &expert - experts.data()));
  }
  return {panel_bytes(panel_format(first.up.encoding), order, first.up.cols),
          panel_bytes(panel_format(first.down.encoding), order, first.down.cols), panel_count(order, first.up.rows),
          panel_count(order, first.down.rows), first.gate.empty() ? 1 : 2};
}

// One task packs this many panels of each projection: about a megabyte in large layers, so that tasks outweigh their
// hand-out and still spread over many threads.
constexpr i32 kPanelsATask = 16;

}  // namespace

PanelFormat panel_format(Encoding encoding) {
  switch (encoding) {
    case Encoding::nvfp4: return PanelFormat::nvfp4;
    case Encoding::mxfp4: return PanelFormat::mxfp4;
    case Encoding::bf16: return PanelFormat::bf16;
    case Encoding::f16:
    case Encoding::f32:
    case Encoding::fp8: return PanelFormat::f32;
  }
  return PanelFormat::f32;
}

i64 panel_bytes(PanelFormat format, const Order& order, i32 cols) {
  const i64 values = i64{order.panel_rows} * cols;
  if (is_fp4(format)) return round_up(values / 2 + values / kBlock, kLine);
  return round_up(values * (format == PanelFormat::bf16 ? 2 : 4), kLine);
}

i32 panel_count(const Order& order, i32 rows) { return (rows + order.panel_rows - 1) / order.panel_rows; }

void pack_panels(const Matrix& matrix, const Order& order, i32 first, i32 count, std::byte* out, i64 stride) {
  const PanelFormat format = panel_format(matrix.encoding);
  for (i32 panel = first; panel < first + count; ++panel, out += stride) {
    const i32 row = panel * order.panel_rows;
    const i64 bytes = panel_bytes(format, order, matrix.cols);
    const i64 used = i64{order.panel_rows} * matrix.cols * 9 / 16;
    if (row + order.panel_rows > matrix.rows) std::memset(out, 0, bytes);
    if (!is_fp4(format)) {
      pack_dense(matrix, order, row, out);
      continue;
    }
    std::memset(out + used, 0, bytes - used);
    pack_fp4(matrix, order, row, out);
  }
}

void unpack(PanelFormat format, const Order& order, i32 rows, i32 cols, const std::byte* panels, i64 stride, u8* codes,
            u8* scales) {
  const i32 blocks = cols / kBlock;
  const i32 blocks_a_scale = format == PanelFormat::mxfp4 ? 2 : 1;
  for (i32 row = 0; row < rows; ++row) {
    const std::byte* panel = panels + row / order.panel_rows * stride;
    const i32 r = row % order.panel_rows;
    if (!is_fp4(format)) {
      const i64 size = format == PanelFormat::bf16 ? 2 : 4;
      for (i64 col = 0; col < cols; ++col) {
        std::memcpy(codes + (i64{row} * cols + col) * size, panel + (col * order.panel_rows + r) * size, size);
      }
      continue;
    }
    for (i32 block = 0; block < blocks; ++block) {
      const Place at = place(order, blocks, block);
      u8* pairs = codes + i64{row} * (cols / 2) + i64{block} * 8;
      std::memcpy(pairs, panel + at.codes + 4 * r, 4);
      std::memcpy(pairs + 4, panel + at.codes + (i64{order.panel_rows} + r) * 4, 4);
      const u8 scale = static_cast<u8>(panel[at.scales + r]);
      scales[i64{row} * (blocks / blocks_a_scale) + block / blocks_a_scale] =
          format == PanelFormat::nvfp4 ? format::from_ue5m3(scale) : scale;
    }
  }
}

Packed::Packed(std::span<Expert> experts, const Order& order, Executor& executor, Placement placement)
    : order_(order), bytes_(lay_out(experts, order).bytes(std::ssize(experts))), memory_(bytes_, placement) {
  repack(experts, executor);
}

void Packed::repack(std::span<Expert> experts, Executor& executor) {
  const Layout layout = lay_out(experts, order_);
  const i64 count = static_cast<i64>(experts.size());
  if (layout.bytes(count) != bytes_) {
    throw Error(Reason::internal, "experts of another number, shape or encoding were packed before");
  }
  std::byte* const gemm1 = memory_.data();
  std::byte* const gemm2 = gemm1 + count * layout.gemm1_bytes();
  for (i64 e = 0; e < count; ++e) {
    experts[e].gemm1 = gemm1 + e * layout.gemm1_bytes();
    experts[e].gemm2 = gemm2 + e * layout.gemm2_bytes();
  }

  const i64 tasks = panel_count({kPanelsATask}, std::max(layout.inter_panels, layout.hidden_panels));
  executor.parallel_for(count * tasks, [&](i64 index) {
    const i64 e = index / tasks;
    const i32 first = static_cast<i32>(index % tasks) * kPanelsATask;
    const Expert& expert = experts[e];
    const auto pack = [&](const Matrix& matrix, i32 panels, std::byte* out, i64 stride) {
      const i32 n = std::min(kPanelsATask, panels - first);
      if (n > 0) pack_panels(matrix, order_, first, n, out + first * stride, stride);
    };
    const i64 pair = layout.gemm1_panel * layout.halves;
    std::byte* const blob = gemm1 + e * layout.gemm1_bytes();
    if (layout.halves == 2) pack(expert.gate, layout.inter_panels, blob, pair);
    pack(expert.up, layout.inter_panels, blob + pair - layout.gemm1_panel, pair);
    pack(expert.down, layout.hidden_panels, gemm2 + e * layout.gemm2_bytes(), layout.gemm2_panel);
  });
}

}  // namespace fourmoe::weights
