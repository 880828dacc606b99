#include "backends/cpu/tiles.h"

#include <fmt/format.h>

#include <algorithm>
#include <atomic>

namespace fourmoe::cpu {
namespace {

// A chunk's rows share the second-level cache (1 to 2 MiB on today's cores) with the panels that stream by.
constexpr i64 kChunkBytes = 512 << 10;
constexpr i32 kLeastChunkRows = 16;
constexpr i32 kMostChunkRows = 128;  // more rows bring no further reuse and make items coarse
constexpr i32 kItemsAWorker = 32;    // the last item to finish costs at most a thirty-second of the time
constexpr i32 kLeastItemPanels = 4;  // below this, taking an item and loading its rows show

i32 ceil_div(i32 a, i32 b) { return (a + b - 1) / b; }

i64 row_bytes(const Atom& atom, i32 cols) { return i64{ceil_div(cols / 16, atom.step_blocks)} * atom.step_bytes; }

// Whole tiles, unless a single one is too large.
i32 chunk_rows(const Atom& atom, i32 cols) {
  const i32 fitting = static_cast<i32>(std::min<i64>(kChunkBytes / row_bytes(atom, cols), kMostChunkRows));
  return std::max(fitting >= atom.tile ? fitting / atom.tile * atom.tile : fitting, kLeastChunkRows);
}

// A worker's scratch: a chunk's rows, and a row that is being made.
struct Scratch {
  Scratch(const Atom& atom, i32 cols)
      : rows(i64{chunk_rows(atom, cols)} * row_bytes(atom, cols)),
        bytes(rows + std::max(ceil_div(2 * cols, 64) * 64, kSlack)) {}

  i64 rows;
  i64 bytes;
};

i32 workers(const Machine& machine) { return std::max(machine.cores, 1); }

// Slots [first, first + rows) of one local expert.
struct Unit {
  i32 expert = 0;
  i32 first = 0;
  i32 rows = 0;
};

// Walks the units in order; seek goes forward only.
class Units {
 public:
  Units(const i32* expert_begin, i32 experts, i32 rows) : begin_(expert_begin), experts_(experts), rows_(rows) {}

  i32 count() const {
    i32 total = 0;
    for (i32 e = 0; e < experts_; ++e) total += chunks(e);
    return total;
  }

  Unit seek(i32 index) {
    while (index - passed_ >= chunks(expert_)) passed_ += chunks(expert_++);
    const i32 n = begin_[expert_ + 1] - begin_[expert_];
    const i32 parts = chunks(expert_);
    const i32 part = index - passed_;
    // Chunks of even size: 65 rows are 33 and 32, not 64 and 1.
    const i32 from = static_cast<i32>(i64{n} * part / parts);
    const i32 to = static_cast<i32>(i64{n} * (part + 1) / parts);
    return {expert_, begin_[expert_] + from, to - from};
  }

 private:
  i32 chunks(i32 e) const { return ceil_div(begin_[e + 1] - begin_[e], rows_); }

  const i32* begin_;
  i32 experts_;
  i32 rows_;
  i32 expert_ = 0;
  i32 passed_ = 0;  // units of the experts before expert_
};

// The cut of a product into items; item i is part i % parts of unit i / parts.
struct Cut {
  i32 parts;   // ranges of strips
  i32 strips;  // of a blob
  i32 items;
};

Cut cut(const Product& product, i32 units, i32 threads) {
  const i32 strips = ceil_div(product.panels(), kStripPanels);
  const i32 most = std::max(1, product.panels() / kLeastItemPanels);
  const i32 parts = std::clamp(ceil_div(kItemsAWorker * threads, std::max(units, 1)), 1, most);
  return {parts, strips, units * parts};
}

TokenFormat token_format(const Problem& problem) {
  if (problem.precision == Precision::w4a4) return TokenFormat::nvfp4;
  return problem.activations == format::Dtype::f16 ? TokenFormat::f16 : TokenFormat::bf16;
}

class Worker {
 public:
  Worker(const Product& product, const Args& args, const Atom& atom, std::byte* scratch)
      : product_(product), args_(args), atom_(atom), x_(scratch), blocks_(product.cols() / 16) {
    buffer_ = reinterpret_cast<u16*>(scratch + Scratch(atom, product.cols()).rows);
    row_bytes_ = row_bytes(atom, product.cols());
    load_ = atom.load[static_cast<int>(token_format(*args.problem))];
    format_ = weights::panel_format(args.problem->encoding);
    stride_ = weights::panel_bytes(format_, kOrder, product.cols());
  }

  Worker(const Worker&) = delete;
  Worker& operator=(const Worker&) = delete;
  ~Worker() {
    if (entered_ != 0 && atom_.leave != nullptr) atom_.leave();
    product_.settle();
  }

  // Strips [from, to) times the unit's rows.
  void run(const Unit& unit, i32 from, i32 to) {
    if (unit.first != held_.first || unit.rows != held_.rows) load(unit);
    const i32 tiles = ceil_div(unit.rows, atom_.tile);
    for (i32 strip = from; strip < to; ++strip) {
      for (i32 tile = 0; tile < tiles; ++tile) multiply_tile(unit, strip, tile, tiles);
    }
  }

 private:
  static i32 tile_begin(const Unit& unit, i32 tile, i32 tiles) { return unit.rows * tile / tiles; }

  void load(const Unit& unit) {
    const i32 tiles = ceil_div(unit.rows, atom_.tile);
    for (i32 tile = 0; tile < tiles; ++tile) {
      const i32 begin = tile_begin(unit, tile, tiles);
      const i32 rows = tile_begin(unit, tile + 1, tiles) - begin;
      std::byte* x = x_ + begin * row_bytes_;
      for (i32 r = 0; r < rows; ++r) {
        const Row row = product_.row(unit.first + begin + r, buffer_);
        factors_[begin + r] = load_(row, blocks_, x + r * atom_.step_bytes, i64{rows} * atom_.step_bytes);
      }
    }
    held_ = unit;
  }

  void multiply_tile(const Unit& unit, i32 strip, i32 tile, i32 tiles) {
    const i32 begin = tile_begin(unit, tile, tiles);
    const i32 rows = tile_begin(unit, tile + 1, tiles) - begin;
    const i32 panel = strip * kStripPanels;
    const i32 panels = std::min(kStripPanels, product_.panels() - panel);
    const weights::Expert& expert = args_.weights.experts[unit.expert];
    if (rows != entered_ && atom_.enter != nullptr) atom_.enter(rows);
    entered_ = rows;
    const i64 pitch = i64{rows + kSpareRows} * kPanelRows;
    alignas(64) f32 sums[kStripPanels * (kMaxTile + kSpareRows) * kPanelRows];
    atom_.multiply[static_cast<int>(format_)][rows - 1]({product_.blob(expert) + panel * stride_, stride_, panels,
                                                         blocks_, x_ + begin * row_bytes_, rows, sums, pitch});
    product_.store({&expert, unit.first + begin, rows, panel, panels, sums, pitch, factors_ + begin});
  }

  const Product& product_;
  const Args& args_;
  const Atom& atom_;
  std::byte* x_;  // [chunk_rows], tile after tile in the atom's form
  u16* buffer_;   // [cols]
  f32 factors_[kMostChunkRows];
  i64 row_bytes_;
  Atom::Load load_;
  i32 blocks_;
  i64 stride_;
  weights::PanelFormat format_;
  Unit held_;
  i32 entered_ = 0;  // tokens of the tile multiplied last
};

Status check_weights(const Product& product, const Args& args) {
  for (const weights::Expert& expert : args.weights.experts) {
    if (product.blob(expert) != nullptr) continue;
    return refuse(Reason::internal, fmt::format("expert {} is not packed for the cpu room",
                                                args.problem->first_expert + (&expert - args.weights.experts.data())));
  }
  return {};
}

}  // namespace

const Atom* atom_for(const Problem& problem, const Machine& machine) {
  const bool w4a16 = problem.precision == Precision::w4a16;
  const CpuLevel level = machine.cpu_level;
  if (problem.precision == Precision::w4a8_int8) return atom_int8(level);
  if (level >= CpuLevel::amx && w4a16 && problem.activations == format::Dtype::bf16) {
    if (problem.encoding == format::Encoding::nvfp4) return atom_amx();
    if (problem.encoding == format::Encoding::mxfp4) return atom_amx_mxfp4();
  }
  if (level >= CpuLevel::vnni && !w4a16) return atom_vnni();
  if (level >= CpuLevel::avx512) return atom_avx512();
  return level == CpuLevel::avx2 ? atom_avx2() : atom_portable();
}

const Finish& finish_of(const Machine& machine) {
  const Finish* best = machine.cpu_level >= CpuLevel::avx512 ? finish_avx512()
                       : machine.cpu_level == CpuLevel::avx2 ? finish_avx2()
                                                             : nullptr;
  return best != nullptr ? *best : *finish_portable();
}

f32 e4m3_to_f32(u8 byte) { return format::from_e4m3(byte); }

f32 widen_nvfp4(const Row& row, i32 blocks, std::byte* out, i64 stride) {
  for (i32 b = 0; b < blocks; ++b, out += stride) {
    const f32 scale = format::from_e4m3(row.scales[b]);
    f32* x = reinterpret_cast<f32*>(out);
    for (i32 i = 0; i < 16; ++i) x[i] = format::from_e2m1(format::code_at(row.values, 16 * i64{b} + i)) * scale;
  }
  return 1.0f;
}

Verdict can(const Problem& problem, const Machine& machine) {
  if (atom_for(problem, machine) == nullptr) {
    return reject(Reason::not_built, fmt::format("this build has no {} level; FOURMOE_CPU_LEVEL=portable would pass",
                                                 cpu_level_name(machine.cpu_level)));
  }
  if (problem.precision != Precision::w4a16 && !format::is_fp4(problem.encoding)) {
    return reject(Reason::precision_unsupported,
                  fmt::format("{} needs 4-bit weights, these are {}; w4a16 would pass",
                              precision_name(problem.precision), format::encoding_name(problem.encoding)));
  }
  return accept();
}

std::string describe(const Problem& problem, const Machine& machine) {
  const Atom* atom = atom_for(problem, machine);
  return fmt::format("{}: {}, panels of {} rows, up to {} tokens a tile", cpu_level_name(machine.cpu_level),
                     atom == nullptr ? "not built" : atom->name, kPanelRows, atom == nullptr ? 0 : atom->tile);
}

i64 scratch_bytes(const Problem& problem, i32 cols, const Machine& machine) {
  const Atom* atom = atom_for(problem, machine);
  return atom == nullptr ? 0 : workers(machine) * Scratch(*atom, cols).bytes;
}

Status multiply(const Product& product, const Args& args, std::byte* scratch) {
  if (Status status = check_weights(product, args); !status.ok()) return status;
  const Atom& atom = *atom_for(*args.problem, *args.machine);
  const i64 worker_bytes = Scratch(atom, product.cols()).bytes;
  const Units units(args.slots.expert_begin, args.problem->local_experts, chunk_rows(atom, product.cols()));
  const i32 threads = std::min(args.executor->threads(), workers(*args.machine));
  const Cut plan = cut(product, units.count(), threads);

  std::atomic<i32> next = 0;
  args.executor->parallel_for(std::min(threads, plan.items), [&](i64 index) {
    Worker worker(product, args, atom, scratch + index * worker_bytes);
    Units own = units;
    for (i32 item = next++; item < plan.items; item = next++) {
      const Unit unit = own.seek(item / plan.parts);
      const i64 part = item % plan.parts;
      worker.run(unit, static_cast<i32>(part * plan.strips / plan.parts),
                 static_cast<i32>((part + 1) * plan.strips / plan.parts));
    }
  });
  return {};
}

}  // namespace fourmoe::cpu
