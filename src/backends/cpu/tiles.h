// Tiles: how the cpu room cuts the product of slots and packed weights, once for gemm1 and gemm2.
//
// A unit is a chunk of one expert's slots; its rows are held in the atom's form in a worker's scratch, tile by tile. An
// item is a unit times a range of panel strips. Workers take items in order, so the next item mostly finds its unit
// already held, and a worker's weights are one stream. Neither the cut nor who takes what changes a result: atom.h
// fixes the sums.
#pragma once

#include "args.h"
#include "backends/cpu/atom.h"
#include "weights/packed.h"

namespace fourmoe::cpu {

inline constexpr weights::Order kOrder{kPanelRows};
inline constexpr i32 kStripPanels = 2;  // most panels of a strip: gate and up of 16 rows

// Tokens of a tile by all rows of a strip, as gemm1 and gemm2 take it over.
struct Tile {
  const weights::Expert* expert;
  i32 slot;  // first of `rows` consecutive slots
  i32 rows;
  i32 panel;        // first panel of the strip, counted in the blob
  i32 panels;       // panels of the strip
  const f32* sums;  // [panels, rows, 16], panels `pitch` apart
  i64 pitch;
  const f32* factors;  // [rows]: of Gates and Sums
};

// One of the two GEMMs: what it multiplies and what becomes of the sums.
class Product {
 public:
  virtual ~Product() = default;
  virtual i32 cols() const = 0;    // summed over
  virtual i32 panels() const = 0;  // of one expert's blob
  virtual const std::byte* blob(const weights::Expert& expert) const = 0;
  virtual Row row(i32 slot, u16* buffer) const = 0;  // the slot's row; in `buffer` [cols] where it has to be made first
  virtual void store(const Tile& tile) const = 0;    // called from any thread, once for every tile
  virtual void settle() const {}                     // by each thread after its last store
};

// What multiplies this problem on this machine, or null where this build lacks it. It does not depend on the batch.
const Atom* atom_for(const Problem& problem, const Machine& machine);

// The same for tokens that become int8: w4a8_int8.
const Atom* atom_int8(CpuLevel level);

const Finish& finish_of(const Machine& machine);

// What both steps ask of problem and machine.
Verdict can(const Problem& problem, const Machine& machine);
std::string describe(const Problem& problem, const Machine& machine);

// Scratch of a product over `cols` columns.
i64 scratch_bytes(const Problem& problem, i32 cols, const Machine& machine);

Status multiply(const Product& product, const Args& args, std::byte* scratch);

}  // namespace fourmoe::cpu
