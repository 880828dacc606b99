// queue: the tiles of one launch that runs both GEMMs of a layer: who takes which, what is done, who adds up.
//
// Tiles are taken one at a time, so a block that comes late, or when others have ended, holds none that somebody waits
// for. Nobody clears the memory before a launch: it is zero when it is made, launches that follow one another share it,
// and it has two sets of counters. A launch uses one and clears the other, which the launch before it used. The word of
// arrivals says which: it counts the blocks that came, and the last of them, when all have read it, turns it over for
// the next launch. A launch that gave up a wait (whole.cuh) has still counted everything, so nothing is left behind.
//
// Compiled for the host too: tests/queue_test.cc runs it in threads, tests/models/queue.pml is a model of it.
#pragma once

#include "format/number.h"

namespace fourmoe::gpu {

inline constexpr i64 kQueueCycles = 40'000'000'000;  // of a wait, about 20 s; a whole layer takes milliseconds

struct QueueShape {
  i32 blocks;   // of every launch
  i32 hits;     // at most
  i32 columns;  // tiles of output columns

  static constexpr i32 kLine = 32;  // words of a cache line

  FOURMOE_HD i32 set_words() const { return (kLine + hits + columns + kLine - 1) / kLine * kLine; }
  FOURMOE_HD i32 words() const { return kLine + 2 * set_words(); }
};

// Atomic: add(i32*, i32) and add_ordered return what was there before; add_release, add_ordered and load_acquire order
// what a block wrote before it reported and what others read after they heard.
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

  // The number of a tile that nobody else gets.
  FOURMOE_HD i32 take(int set) const { return Atomic::add(&base(set)[0], 1); }

  // `rows` row tiles of a hit's gemm1 are stored; and how many are.
  FOURMOE_HD void report_rows(int set, i32 hit, i32 rows) const {
    Atomic::add_release(&base(set)[QueueShape::kLine + hit], rows);
  }
  FOURMOE_HD i32 rows(int set, i32 hit) const { return Atomic::load_acquire(&base(set)[QueueShape::kLine + hit]); }

  // A hit's part of a tile of columns is stored. True for the last hit of `hits`: all parts can be read.
  FOURMOE_HD bool report_columns(int set, i32 columns, i32 hits) const {
    return Atomic::add_ordered(&base(set)[QueueShape::kLine + shape.hits + columns], 1) == hits - 1;
  }

 private:
  static constexpr i32 kTurned = 1 << 30;

  FOURMOE_HD i32* base(int set) const { return words + QueueShape::kLine + set * shape.set_words(); }
};

}  // namespace fourmoe::gpu
