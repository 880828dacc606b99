#include "backends/sm90/tiles.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "backends/sm90/atom.h"

namespace fourmoe::sm90 {
namespace {

using format::Encoding;
using format::Matrix;

// A row of the blob: a row of one of the matrices, or nothing but zeros.
struct Source {
  const Matrix* matrix = nullptr;
  int row = 0;
  i32 window = 0;  // mxfp4: of the matrix

  bool has(int column) const { return matrix != nullptr && column < matrix->cols; }
  u8 scale_byte(int column) const { return matrix->scale_row(row)[column / format::block_of(matrix->encoding)]; }
  // Codes of columns `column`, + 1 (even) as the checkpoint's byte.
  u8 code_pair(int column) const {
    if (!has(column) || (matrix->encoding == Encoding::nvfp4 && scale_byte(column) == 0)) return 0;
    return matrix->row(row)[column / 2];
  }
  u8 scale(int column) const {
    if (!has(column)) return 0;
    const u8 byte = scale_byte(column);
    return matrix->encoding == Encoding::mxfp4 ? weights::to_power(byte, window) : format::to_ue5m3(byte);
  }
  // Dense values of columns `column`, + 1.
  u32 value_pair(int column) const { return has(column) ? format::load<u32>(matrix->row(row) + 2 * column) : 0; }
};

// Both matrices of a blob; gate may be null.
struct Matrices {
  const Matrix* gate;
  const Matrix* up;
  i32 gate_window = 0;
  i32 up_window = 0;
};

// Row `row` of the blob.
Source source_of(const Matrices& m, int row) {
  const bool gated = m.gate != nullptr;
  const int feature = feature_of(gated, row);
  if (feature >= m.up->rows) return {};
  return gated && row % 16 < 8 ? Source{m.gate, feature, m.gate_window} : Source{m.up, feature, m.up_window};
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

void pack_dense_tile(const Matrices& m, int row, int column, u8* tile) {
  for (int step = 0; step < 4; ++step) {
    for (int thread = 0; thread < 128; ++thread) {
      const int top = row + thread / 32 * 16 + thread % 32 / 4;
      const int first = column + 16 * step + thread % 4 * 2;
      const Source g = source_of(m, top), h = source_of(m, top + 8);
      const u32 words[4] = {g.value_pair(first), h.value_pair(first), g.value_pair(first + 8), h.value_pair(first + 8)};
      std::memcpy(tile + 16 * (128 * step + thread), words, sizeof words);
    }
  }
}

void pack_tile(const Matrices& m, int row, int column, u8* tile) {
  if (!format::is_fp4(m.up->encoding)) return pack_dense_tile(m, row, column, tile);
  for (int pair = 0; pair < 32; ++pair) {  // rows g and g + 8 of each warp's sixteen
    const int top = row + pair / 8 * 16 + pair % 8;
    const Source g = source_of(m, top);
    const Source h = source_of(m, top + 8);
    for (int t = 0; t < 4; ++t) pack_thread(g, h, column, t, tile + (pair * 4 + t) * 16);
    for (int half = 0; half < 2; ++half) {
      const int k = column + 32 * half;
      const auto join = m.up->encoding == Encoding::mxfp4 ? join_powers : join_scales;
      const u32 word = join(g.scale(k), h.scale(k), g.scale(k + 16), h.scale(k + 16));
      std::memcpy(tile + kCodeBytes + pair * 8 + half * 4, &word, 4);
    }
  }
}

// Experts that get slots, expected.
f64 expected_hits(i32 experts, i64 slots) { return experts * (1.0 - std::exp(-static_cast<f64>(slots) / experts)); }

}  // namespace

// Fitted to the shipped table of measured choices (tune/shipped.json), whose layers do not need it: gemm1 of up to
// about four slots an expert wants the finest tiles where few of 256 rows would come to a multiprocessor; then 256 rows
// until 512 keep the card busy, which gemm2's shorter rows do later, and stages of four K steps where there are many;
// wider tiles follow the slots that an expert has, of 256 rows again where 512 are few.
int choose(const Load& load, i32 multiprocessors) {
  const f64 hits = expected_hits(load.experts, load.slots);
  const f64 mean = static_cast<f64>(load.slots) / std::max(hits, 1.0);
  const f64 blocks = hits * load.row_tiles / 4 / multiprocessors;  // of 256 rows, a multiprocessor
  if (load.split && mean <= 8 && blocks < 0.83) return kSplitTile;
  if (load.split && load.first && mean <= 4.7 && blocks < 4.2) return kSplitTile;
  if (mean <= 17) {
    if (blocks < (load.first ? 4.5 : 16)) return kNarrowTile;
    return blocks < (load.first ? 25 : 40) ? kNarrowTile + 1 : kNarrowTile + 2;
  }
  if (mean <= 37) return blocks < (load.first ? 5 : 24) ? kNarrowTile + 3 : kNarrowTile + 2;
  if (mean <= 52) return kNarrowTile + 3;
  if (mean <= 80) return kNarrowTile + 4;
  const bool one = mean <= 132, two = mean > 235 && mean <= 300;  // tiles of up to 144 slots hold an expert's
  return one || two ? kNarrowTile + 5 : kNarrowTile + 6;
}

// Tiles of both GEMMs stand in one queue, which evens out what the finest tiles leave. A block that gets three tiles
// must not take three ahead; where there are many, those of 512 rows take fewer instructions, unless rows are left
// over. Fitted likewise; for picks with rows of their own, to bench/results/2026-11-30-sm90-w4a4.json.
int choose_whole(const LayerLoad& load, i32 multiprocessors) {
  if (!(load.form == Form{})) return choose(load.form, kWholeTile, kAllTileShapes);
  const f64 hits = expected_hits(load.experts, load.slots);
  const f64 tiles = hits * (load.row_tiles[0] + load.row_tiles[1]) / multiprocessors;  // of 64 rows, for each of them
  if (load.split && tiles < (load.by_pick ? 19 : 16.5))
    return tiles < 3.2 && !load.by_pick ? kWholeFewTile : kWholeTile;
  const auto blocks = [&](int gemm) { return (load.row_tiles[gemm] + 7) / 8; };  // of 512 rows
  const bool fill = (blocks(0) + blocks(1)) * 8 <= 1.05 * (load.row_tiles[0] + load.row_tiles[1]);
  return tiles < (load.by_pick ? 73 : 51.5) || !fill ? kWholeTile + 1 : kWholeTile + 2;
}

int choose(const Form& form, int first, int end) {
  if (form == Form{}) return -1;
  for (int tile = first; tile < end; ++tile) {
    if (kTileShapes[tile].form == form) return tile;
  }
  return -1;
}

std::string name_of(const TileShape& shape) {
  std::string name = fmt::format("{}x{}x{}{}:", shape.groups, shape.rows, shape.stages, shape.split ? "s" : "");
  for (int i = 0; i < static_cast<int>(std::size(shape.sizes)) && shape.sizes[i] > 0; ++i) {
    name += fmt::format("{}{}", i == 0 ? "" : ",", shape.sizes[i]);
  }
  if (shape.feed != TileShape{}.feed) name += fmt::format("+f{}", shape.feed);
  if (shape.handed > 0) name += fmt::format("+h{}", shape.handed);
  if (shape.depth != TileShape{}.depth) name += fmt::format("+d{}", shape.depth);
  if (shape.form.dense) name += "+dense";
  if (shape.form.planes != 1) name += fmt::format("+p{}", shape.form.planes);
  return name;
}

namespace {

// Neither far too narrow nor far too wide for the slots that an expert has.
bool fits(const TileShape& shape, f64 mean) {
  return shape.sizes[0] >= std::min(mean / 2, 128.0) && shape.sizes[0] <= 16 * mean + 24;
}

// Shapes `first` to `end` of the form, the rule's first.
std::vector<Variant> list_variants(int rule, int first, int end, const Load& load, const Form& form) {
  const f64 mean = static_cast<f64>(load.slots) / std::max(expected_hits(load.experts, load.slots), 1.0);
  std::vector<Variant> found = {{name_of(kTileShapes[rule]), rule}};
  for (int tile = first; tile < end; ++tile) {
    const TileShape& shape = kTileShapes[tile];
    if (tile == rule || !(shape.form == form) || (shape.split && !load.split)) continue;
    if (form == Form{} && !fits(shape, mean)) continue;
    found.push_back({name_of(shape), tile});
  }
  return found;
}

}  // namespace

std::vector<Variant> variants(const Load& load, const Form& form, i32 multiprocessors) {
  const int rule = form == Form{} ? choose(load, multiprocessors) : choose(form);
  return list_variants(rule, 0, kTileShapeCount, load, form);
}

std::vector<Variant> whole_variants(const LayerLoad& load, i32 multiprocessors) {
  const Load second{load.row_tiles[1], load.experts, load.slots, load.split, false};
  std::vector<Variant> found =
      list_variants(choose_whole(load, multiprocessors), kWholeTile, kAllTileShapes, second, load.form);
  std::erase_if(found, [&](const Variant& one) { return load.by_pick && !takes_pick_rows(one.number); });
  return found;
}

Form form_of(const Problem& problem) {
  const bool two = problem.precision == Precision::w4a16 && problem.activations == format::Dtype::f16;
  return {!format::is_fp4(problem.encoding), two ? 2 : 1};
}

Progress progress_of(const Problem& problem, u64* counters) {
  if (problem.precision == Precision::w4a4 || form_of(problem).planes == 2) return {};
  return {counters, problem.inter};
}

void pack(const Matrix* gate, const Matrix& up, u8* blob) {
  Matrices matrices{gate, &up};
  if (up.encoding == Encoding::mxfp4) {
    if (gate != nullptr) matrices.gate_window = weights::find_exponents(*gate).first();
    matrices.up_window = weights::find_exponents(up).first();
  }
  const int rows = gate == nullptr ? up.rows : 2 * up.rows;
  const int bytes = tile_bytes(up.encoding);
  const int steps = k_steps(up.cols);
  for (int tile = 0; tile < row_tiles(rows); ++tile) {
    for (int step = 0; step < steps; ++step) {
      pack_tile(matrices, tile * kTileRows, step * kTileColumns, blob + (i64{tile} * steps + step) * bytes);
    }
  }
}

namespace {

i32 band_rows(bool gated) { return gated ? kTileRows / 2 : kTileRows; }
i64 band_bytes(Encoding encoding, i32 cols) { return blob_bytes(kTileRows, cols, encoding); }

// Epilogues add what sums of NVFP4 lack. Dense sums lack nothing, and those of MXFP4 what a power of bits 0 is to the
// checkpoint, 2^(window - 127), and not to the atom.
i32 exponent(Encoding encoding, i32 window) {
  if (encoding == Encoding::mxfp4) return window - 127 - kPowerExponent + kProductExponent;
  return encoding == Encoding::nvfp4 ? 0 : kProductExponent;
}

Status pack_on_device(const weights::Piece& piece, gpu::Stream stream) {
  if constexpr (gpu::kBuilt) return pack(piece, stream);
  return gpu::not_built();
}

}  // namespace

const weights::Packing kPacking = {band_rows, band_bytes, exponent, pack_on_device};

Verdict can(const Problem& problem, const Machine& machine) {
  if (Verdict verdict = gpu::can(machine, 9, 0); !verdict.accepted()) return verdict;
  if (problem.precision == Precision::w4a8_int8) {
    return reject(Reason::precision_unsupported,
                  "w4a8_int8 is computed on the host only; w4a16 or w4a4, or device host, would pass");
  }
  if (format::is_fp4(problem.encoding) || problem.encoding == Encoding::bf16) return accept();
  return reject(Reason::encoding_unsupported, fmt::format("weights are {}; nvfp4, mxfp4 or bf16 would pass",
                                                          format::encoding_name(problem.encoding)));
}

std::string describe(const Problem&, const Machine& machine) {
  const Device* device = device_of(machine);
  return device == nullptr ? "" : fmt::format("cuda:{} {}, wgmma on {} SMs", device->index, device->name, device->sms);
}

}  // namespace fourmoe::sm90
