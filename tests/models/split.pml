/* A model of how gemm1 and gemm2 of the split steps meet (backends/sm90/tiles_product.cuh): calls that follow one another
 * without end and share the counters, each with any number of experts that have slots. run.sh searches every
 * interleaving.
 *
 * Each of the two launches of a call has BLOCKS thread blocks; the machine holds PLACES at once. Blocks of gemm1 begin
 * where there is room, those of gemm2 where there is room once all of gemm1's have begun (programmatic dependent
 * launch). A block's first tile is its own number, then it takes the next that nobody has, up to AHEAD of them before
 * it is done with the first. In gemm1 a warp of its own counts what is stored; gemm2 waits for all of an expert's
 * tiles, and does not end before gemm1. Route, which leaves the counters zero, begins when the gemm2 before has ended.
 *
 * What the model notes for itself (stored, done) is put back at the end of a call, so that the states are finite though
 * calls are not. Steps take effect in one order that all see; that stores come before the count of them is what release
 * and acquire are for.
 *
 * MUTANT_... breaks a step of the protocol; run.sh says how each must show.
 */
#ifndef BLOCKS
#define BLOCKS 2
#endif
#ifndef PLACES
#define PLACES BLOCKS
#endif
#ifndef EXPERTS /* with slots, at most */
#define EXPERTS 2
#endif
#ifndef TILES1 /* of gemm1, of an expert */
#define TILES1 2
#endif
#ifndef TILES2
#define TILES2 1
#endif
#ifndef AHEAD
#define AHEAD 1
#endif

/* Memory of the device. */
byte counted[EXPERTS]; /* tiles of y that are said to be stored */
byte tickets[2];       /* tiles taken beyond each block's first */

/* The machine. */
byte running;           /* blocks */
byte begun[2], ended[2]; /* of each launch */
bool came[2 * BLOCKS];

/* The model's own notes. */
byte hits;
byte stored[EXPERTS];
bool done1[EXPERTS * TILES1], done2[EXPERTS * TILES2];

proctype call() {
  byte i;
progress:
  do
  ::
     /* route */
     d_step {
#ifndef MUTANT_NO_ZEROS
       for (i : 0 .. EXPERTS - 1) { counted[i] = 0 }
       tickets[0] = 0; tickets[1] = 0;
#endif
       for (i : 0 .. EXPERTS - 1) { stored[i] = 0 }
       for (i : 0 .. EXPERTS * TILES1 - 1) { done1[i] = false }
       for (i : 0 .. EXPERTS * TILES2 - 1) { done2[i] = false }
       i = 0
     }
     select(hits : 0 .. EXPERTS);
     d_step {
       begun[0] = 0; begun[1] = 0; ended[0] = 0; ended[1] = 0;
       for (i : 0 .. 2 * BLOCKS - 1) { came[i] = false }
       i = 0
     }
     /* combine */
     ended[1] == BLOCKS;
     d_step {
       for (i : 0 .. hits * TILES1 - 1) { assert(done1[i]) }
       for (i : 0 .. hits * TILES2 - 1) { assert(done2[i]) }
       i = 0
     }
  od
}

/* Schedule::advance */
inline take(gemm) {
#ifdef MUTANT_TORN_TICKET /* a load and a store */
  tile = BLOCKS + tickets[gemm];
  tickets[gemm] = tile - BLOCKS + 1
#else
  d_step { tile = BLOCKS + tickets[gemm]; tickets[gemm]++ }
#endif
}

inline begin(gemm, may) {
  d_step { may && !came[gemm * BLOCKS + b] && running < PLACES -> came[gemm * BLOCKS + b] = true; running++; begun[gemm]++ }
}
inline end(gemm) {
  d_step { running--; ended[gemm]++ }
}

#define NO_TILE 255

/* A block of gemm1: who takes tiles, who stores them, who counts them. */
proctype take1(byte b; chan feed) {
  byte tile;
  do
  :: begin(0, true);
     tile = b;
     do
     :: tile < hits * TILES1 -> feed ! tile; take(0)
     :: else -> break
     od;
     feed ! NO_TILE
  od
}
proctype store1(chan feed; chan report) {
  byte tile;
  do
  :: feed ? tile;
     if
     :: tile == NO_TILE
     :: else ->
        assert(!done1[tile]);
        done1[tile] = true;
#ifdef MUTANT_EARLY_REPORT
        report ! tile;
        stored[tile / TILES1]++
#else
        stored[tile / TILES1]++;
        report ! tile
#endif
     fi;
     if
     :: tile == NO_TILE -> report ! NO_TILE
     :: else
     fi
  od
}
proctype report1(chan report) {
  byte tile;
  do
  :: report ? tile;
     if
     :: tile == NO_TILE -> end(0)
     :: else -> counted[tile / TILES1]++
     fi
  od
}

/* A block of gemm2: who takes tiles, who waits and multiplies. */
proctype take2(byte b; chan feed) {
  byte tile;
  do
#ifdef MUTANT_BEGINS_WITH_FIRST /* when one of gemm1's blocks has begun */
  :: begin(1, begun[0] > 0);
#else
  :: begin(1, begun[0] == BLOCKS);
#endif
     tile = b;
     do
     :: tile < hits * TILES2 -> feed ! tile; take(1)
     :: else -> break
     od;
     feed ! NO_TILE
  od
}
proctype multiply2(chan feed) {
  byte tile, expert;
  do
  :: feed ? tile;
     if
     :: tile == NO_TILE ->
#ifndef MUTANT_ENDS_ALONE
        ended[0] == BLOCKS;
#endif
        end(1)
     :: else ->
        expert = tile / TILES2;
#ifdef MUTANT_ANY
        counted[expert] > 0;
#else
#ifndef MUTANT_NO_WAIT
        counted[expert] == TILES1;
#endif
#endif
        assert(stored[expert] == TILES1 /* y */);
        assert(!done2[tile]);
        done2[tile] = true
     fi
  od
}

init {
  byte b;
  chan feed1[BLOCKS] = [AHEAD] of { byte };
  chan reports[BLOCKS] = [AHEAD] of { byte };
  chan feed2[BLOCKS] = [AHEAD] of { byte };
  atomic {
    for (b : 0 .. 2 * BLOCKS - 1) { came[b] = true }
    for (b : 0 .. BLOCKS - 1) {
      run take1(b, feed1[b]); run store1(feed1[b], reports[b]); run report1(reports[b]);
      run take2(b, feed2[b]); run multiply2(feed2[b])
    }
    run call()
  }
}
