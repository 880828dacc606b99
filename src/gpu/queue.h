// queue: the tiles of one launch that runs both GEMMs of a layer: who takes which, what is done, who adds up.
//
// Tiles are taken one at a time, so a block that comes late, or when others have ended, holds none that somebody waits
// for; so are the parts of the memory of numbers (gpu/numbers.cuh) that are emptied first, and the sums of the output
// that are made last, and pieces of tokens that gemm1 does not take as they come. What a block has taken early waits
// for blocks that run already, and for nobody who waits for it. Nobody clears the counters before a launch: they are
// zero when they are made, launches that follow one another share them, and there are two sets. A launch uses one and
// clears the other, which the launch before it used. The word of arrivals says which: it counts the blocks that came,
// and the last of them, when all have read it, turns it over for the next launch. A launch that gave up a wait
// (whole.cuh) has still counted everything, so nothing is left behind.
//
// Compiled for the host too: tests/queue_test.cc runs it in threads, tests/models/queue.pml is a model of it.
#pragma once

#include "format/number.h"

namespace fourmoe::gpu {

inline constexpr i64 kQueueCycles = 40'000'000'000;  // of a wait, about 20 s; a whole layer takes milliseconds

struct QueueShape {
  i32 blocks;  // of every launch
  i32 hits;    // at most

  static constexpr i32 kLine = 32;         // words of a cache line
  static constexpr i32 kHits = 6 * kLine;  // lines of their own for what all blocks change, then words of hits

  FOURMOE_HD i32 set_words() const { return kHits + (hits + kLine - 1) / kLine * kLine; }
  FOURMOE_HD i32 words() const { return kLine + 2 * set_words(); }
};

// Atomic: add(i32*, i32) returns what was there before; add_release and load_acquire order what a block wrote before it
// reported and what others read after they heard.
template <class Atomic>
struct Queue {
  QueueShape shape;
  i32* words;  // [shape.words()]; zeros before the first launch; caller's

  // One thread of each block, first: the launch's set.
  FOURMOE_HD int arrive() const {
    const i32 before = Atomic::add(&words[0], 1);
    const int set = before >= kTurned ? 1 : 0;
    if (before % kTurned == shape.blocks - 1) Atomic::store(&words[0], set == 0 ? kTurned : 0);
    return set;
  }

  // Shares of the launch's blocks and threads: words first, first + step, ... of the other set.
  FOURMOE_HD void clear_other(int set, i32 first, i32 step) const {
    for (i32 i = first; i < shape.set_words(); i += step) Atomic::store(&base(1 - set)[i], 0);
  }

  // The number of a tile that nobody else gets; of a part to empty; of a sum to make.
  FOURMOE_HD i32 take(int set) const { return Atomic::add(&base(set)[0], 1); }
  FOURMOE_HD i32 take_part(int set) const { return Atomic::add(&base(set)[QueueShape::kLine], 1); }
  FOURMOE_HD i32 take_sum(int set) const { return Atomic::add(&base(set)[2 * QueueShape::kLine], 1); }

  // A part is empty; and how many are.
  FOURMOE_HD void report_part(int set) const { Atomic::add_release(&base(set)[3 * QueueShape::kLine], 1); }
  FOURMOE_HD i32 parts(int set) const { return Atomic::load_acquire(&base(set)[3 * QueueShape::kLine]); }

  // The same of pieces of the tokens' rows, where picks have rows of their own.
  FOURMOE_HD i32 take_piece(int set) const { return Atomic::add(&base(set)[4 * QueueShape::kLine], 1); }
  FOURMOE_HD void report_piece(int set) const { Atomic::add_release(&base(set)[5 * QueueShape::kLine], 1); }
  FOURMOE_HD i32 pieces(int set) const { return Atomic::load_acquire(&base(set)[5 * QueueShape::kLine]); }

  // `rows` row tiles of a hit's gemm1 are stored; and how many are.
  FOURMOE_HD void report_rows(int set, i32 hit, i32 rows) const {
    Atomic::add_release(&base(set)[QueueShape::kHits + hit], rows);
  }
  FOURMOE_HD i32 rows(int set, i32 hit) const { return Atomic::load_acquire(&base(set)[QueueShape::kHits + hit]); }

 private:
  static constexpr i32 kTurned = 1 << 30;

  FOURMOE_HD i32* base(int set) const { return words + QueueShape::kLine + set * shape.set_words(); }
};

}  // namespace fourmoe::gpu
