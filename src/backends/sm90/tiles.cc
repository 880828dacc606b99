#include "backends/sm90/tiles.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "backends/sm90/atom.h"

namespace fourmoe::sm90 {
namespace {

// A row of the blob: a row of one of the matrices, or nothing but zeros.
struct Source {
  const format::Matrix* matrix = nullptr;
  int row = 0;

  u8 scale_byte(int column) const {
    return matrix == nullptr || column >= matrix->cols ? u8{0} : matrix->scale_row(row)[column / format::kNvfp4Block];
  }
  // Codes of columns `column`, + 1 (even) as the checkpoint's byte.
  u8 code_pair(int column) const { return scale_byte(column) == 0 ? u8{0} : matrix->row(row)[column / 2]; }
  u8 scale(int column) const { return format::to_ue5m3(scale_byte(column)); }
};

// Row `row` of the blob: sixteens of 8 gate and 8 up rows when there is a gate.
Source source_of(const format::Matrix* gate, const format::Matrix& up, int row) {
  if (gate == nullptr) return row < up.rows ? Source{&up, row} : Source{};
  const int feature = row / 16 * 8 + row % 8;
  if (feature >= up.rows) return {};
  return {row % 16 < 8 ? gate : &up, feature};
}

// What one thread reads of a tile: rows g and h, columns of K steps `column`, + 16, + 32, + 48 (column is a multiple of
// 64).
void pack_thread(const Source& g, const Source& h, int column, int t, u8* codes) {
  for (int pair = 0; pair < 2; ++pair) {
    std::array<std::array<u8, 2>, 8> a{};
    for (int r = 0; r < 8; ++r) {
      const Source& source = r % 2 == 0 ? g : h;
      const int first = column + 32 * pair + r / 4 * 16 + r % 4 / 2 * 8 + 2 * t;
      const u8 codes_here = source.code_pair(first);
      a[r] = {static_cast<u8>(codes_here & 15), static_cast<u8>(codes_here >> 4)};
    }
    const auto words = join_codes(a);
    std::memcpy(codes + 8 * pair, words.data(), 8);
  }
}

void pack_tile(const format::Matrix* gate, const format::Matrix& up, int row, int column, u8* tile) {
  for (int pair = 0; pair < 32; ++pair) {  // rows g and g + 8 of each warp's sixteen
    const int top = row + pair / 8 * 16 + pair % 8;
    const Source g = source_of(gate, up, top);
    const Source h = source_of(gate, up, top + 8);
    for (int t = 0; t < 4; ++t) pack_thread(g, h, column, t, tile + (pair * 4 + t) * 16);
    for (int half = 0; half < 2; ++half) {
      const int k = column + 32 * half;
      const u32 word = join_scales(g.scale(k), h.scale(k), g.scale(k + 16), h.scale(k + 16));
      std::memcpy(tile + kCodeBytes + pair * 8 + half * 4, &word, 4);
    }
  }
}

}  // namespace

// Measured on an H200 (bench/results, sweep of five layers by 15 token counts): the smallest launches want the finest
// tiles, then 256 rows until 512 keep the card busy; wider tiles follow the slots that an expert has.
int choose(i32 row_tiles, i32 experts, i64 slots, i32 multiprocessors) {
  const f64 hit = experts * (1.0 - std::exp(-static_cast<f64>(slots) / experts));  // experts with slots, expected
  const f64 mean = static_cast<f64>(slots) / std::max(hit, 1.0);
  const f64 blocks = hit * row_tiles / 4 / multiprocessors;  // of 256 rows, a multiprocessor
  if (mean <= 8 && blocks < 0.83) return kSplitTile;
  if (mean <= 12) return blocks < 3.6 ? kNarrowTile : kNarrowTile + 1;
  constexpr f64 kMeans[] = {28, 48, 112};  // most slots an expert of the shapes that follow
  int tile = kNarrowTile + 2;
  for (const f64 most : kMeans) tile += mean > most ? 1 : 0;
  return tile;
}

void pack(const format::Matrix* gate, const format::Matrix& up, u8* blob) {
  const int rows = gate == nullptr ? up.rows : 2 * up.rows;
  const int steps = k_steps(up.cols);
  for (int tile = 0; tile < row_tiles(rows); ++tile) {
    for (int step = 0; step < steps; ++step) {
      pack_tile(gate, up, tile * kTileRows, step * kTileColumns, blob + (i64{tile} * steps + step) * kTileBytes);
    }
  }
}

namespace {

i32 band_rows(bool gated) { return gated ? kTileRows / 2 : kTileRows; }
i64 band_bytes(i32 cols) { return blob_bytes(kTileRows, cols); }

Status pack_on_device(const weights::Piece& piece, gpu::Stream stream) {
  if constexpr (gpu::kBuilt) return pack(piece, stream);
  return gpu::check_launch("sm90 pack");
}

}  // namespace

const weights::Packing kPacking = {band_rows, band_bytes, pack_on_device};

Verdict can(const Problem& problem, const Machine& machine) {
  if (Verdict verdict = gpu::can(machine, 9, 0); !verdict.accepted()) return verdict;
  if (problem.encoding != format::Encoding::nvfp4) {
    return reject(Reason::encoding_unsupported,
                  fmt::format("weights are {}; nvfp4 would pass", format::encoding_name(problem.encoding)));
  }
  if (problem.precision == Precision::w4a16 && problem.activations != format::Dtype::bf16) {
    return reject(Reason::dtype_unsupported,
                  fmt::format("activations are {}; bf16 would pass", format::dtype_name(problem.activations)));
  }
  return accept();
}

std::string describe(const Problem&, const Machine& machine) {
  const Device* device = device_of(machine);
  return device == nullptr ? "" : fmt::format("cuda:{} {}, wgmma on {} SMs", device->index, device->name, device->sms);
}

}  // namespace fourmoe::sm90
