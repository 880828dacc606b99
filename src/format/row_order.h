// Row order: where a fused matrix of gate and up rows keeps them.
//
// Engines store gate and up of an expert as one matrix of 2R rows in which the halves alternate in groups of `group`
// rows: 64 in FlashInfer's kernels for sm_100 (up first), 16 in its swapped ones (gate first), 1 in gpt-oss (gate
// first), R (one after the other) in most checkpoints (gate first) and in b12x (up first).
#pragma once

#include "format/number.h"

namespace fourmoe::format {

struct RowOrder {
  i64 group = 1;          // rows of one half before the other's, divides the rows of a half
  bool up_first = false;  // which half begins

  i64 gate_row(i64 row) const { return place(row, up_first ? 1 : 0); }
  i64 up_row(i64 row) const { return place(row, up_first ? 0 : 1); }

 private:
  i64 place(i64 row, i64 half) const { return row / group * 2 * group + half * group + row % group; }
};

}  // namespace fourmoe::format
