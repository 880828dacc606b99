/* A model of gpu/queue.h and of what sm90's one launch does with it (backends/sm90/whole.cuh): launches that follow one
 * another without end and share the queue's memory, each with any number of hits. run.sh searches every interleaving.
 *
 * A launch has BLOCKS thread blocks, of which the machine holds PLACES at once: others come when one has ended. A block
 * is three processes, as its warps are: one takes tiles, one brings what a tile needs (and waits for gemm1), one stores,
 * reports and adds up. A wait that is not over may be given up at any time; -DPATIENT leaves that out, so that a wait
 * that cannot end is a deadlock. The next launch begins when all blocks have ended, as a stream orders them.
 *
 * What the model notes for itself (stored, done, added up) is put back at the end of a launch, so that the states are
 * finite though launches are not: what holds here holds for any number of them. Steps take effect in one order that all
 * see; that stores come before the report of them is shown by tests/queue_test.cc under thread sanitizer.
 *
 * MUTANT_... breaks a step of the protocol; run.sh says how each must show.
 */
#ifndef BLOCKS
#define BLOCKS 2
#endif
#ifndef PLACES
#define PLACES BLOCKS
#endif
#ifndef HITS /* of a launch, at most */
#define HITS 2
#endif
#ifndef FEWEST /* at least */
#define FEWEST 0
#endif
#ifndef ROWS /* row tiles of gemm1, of a hit */
#define ROWS 2
#endif
#ifndef COLUMNS /* row tiles of gemm2: tiles of output columns */
#define COLUMNS 2
#endif
#ifndef TALL /* row tiles of a tile; the last of a hit may have fewer */
#define TALL 1
#endif
#ifndef AHEAD /* tiles that a block has taken, beside the last one and that which it brings */
#define AHEAD 0
#endif
#ifndef HANDED /* tiles that it has multiplied beside the one it stores */
#define HANDED 0
#endif

#define TILES1 ((ROWS + TALL - 1) / TALL) /* of a hit */
#define TILES2 ((COLUMNS + TALL - 1) / TALL)
#define NO_TILE 255
#define TURNED 64 /* the word of arrivals: above this bit, set 1 is in use */
#define SET (1 + HITS + COLUMNS)

/* The queue's memory: the word of arrivals, and two sets: tickets, rows of each hit, hits of each tile of columns. */
byte arrivals;
byte words[2 * SET];
#define tickets(s) words[(s) * SET]
#define rows_word(s, hit) words[(s) * SET + 1 + (hit)]
#define columns_word(s, c) words[(s) * SET + 1 + HITS + (c)]

/* What blocks know. */
byte hits;         /* of the launch */
bit set[BLOCKS];   /* in use, as each was told */
bool late[BLOCKS]; /* it gave up a wait in this launch */
bool fault;        /* the launch is marked: its output is not valid */

/* What has happened in this launch. */
bool came[BLOCKS];
byte arrived, running, ended;
bit used; /* the set that the first block was told */
bool executed[HITS * (TILES1 + TILES2)];
byte y[HITS];        /* row tiles that are stored */
byte z[COLUMNS];     /* hits whose part is stored */
bool wrong[COLUMNS]; /* a part is of rows that were not there */
bool nan[COLUMNS];   /* a part was stored as not a number */
bool summed[COLUMNS];

#define end_row(width, row) \
  (row + TALL < (width == 1 -> COLUMNS : ROWS) -> row + TALL : (width == 1 -> COLUMNS : ROWS))

/* What a tile's number stands for. */
inline find(tile) {
#ifdef MUTANT_REVERSED /* tiles of gemm2 come first */
  width = tile < hits * TILES2;
  i = (width == 1 -> tile : tile - hits * TILES2);
#else
  width = tile >= hits * TILES1;
  i = (width == 1 -> tile - hits * TILES1 : tile);
#endif
  hit = i / (width == 1 -> TILES2 : TILES1);
  row = i % (width == 1 -> TILES2 : TILES1) * TALL
}

/* Queue::take */
inline take(s) {
#ifdef MUTANT_TORN_TICKET /* a load and a store */
  tile = tickets(s);
  tickets(s) = tile + 1
#else
  d_step {
#ifdef MUTANT_DEALT /* tiles are dealt to the blocks in turn, come or not */
    tile = b + BLOCKS * taken;
    taken++
#else
    tile = tickets(s);
    tickets(s)++
#endif
#ifdef MUTANT_FIRST_GIVEN /* a block's first tile is its own number */
    ;
    if
    :: taken == 0 -> tickets(s)--; tile = b
    :: else -> tile = BLOCKS + tile
    fi;
    taken = 1
#endif
  }
#endif
}

proctype schedule(byte b; chan feed) {
  bit width;
  byte before, tile, hit, row, taken, i;
  do
  :: d_step { !came[b] && running < PLACES -> came[b] = true; running++; taken = 0 }

     /* Queue::arrive */
     d_step {
       before = arrivals;
       arrivals++;
       set[b] = before >= TURNED;
       if
       :: arrived == 0 ->
          used = set[b];
#ifndef OUTCOMES
          for (i : 0 .. SET - 1) { assert(words[used * SET + i] == 0 /* clear */) }
       :: else -> assert(set[b] == used)
#else
       :: else
#endif
       fi;
       arrived++
     }
#ifdef MUTANT_FIRST_TURNS /* and not the last */
#define LAST 0
#else
#define LAST (BLOCKS - 1)
#endif
     if
     :: before % TURNED == LAST ->
#ifdef MUTANT_FIRST_TURNS
        d_step { arrivals = (set[b] -> arrivals - TURNED : arrivals + TURNED) }
#else
        arrivals = (set[b] -> 0 : TURNED)
#endif
     :: else
     fi;
     take(set[b])

     /* Queue::clear_other, the block's share: nobody else uses these words now, so one step stands for all. */
#ifndef MUTANT_NO_CLEAR
     d_step {
       i = b;
       do
#ifdef MUTANT_CLEAR_OWN
       :: i < SET -> words[set[b] * SET + i] = 0; i = i + BLOCKS
#else
       :: i < SET -> words[(1 - set[b]) * SET + i] = 0; i = i + BLOCKS
#endif
       :: else -> break
       od;
       i = 0
     }
#endif
     do
     :: tile < hits * (TILES1 + TILES2) ->
        d_step { find(tile) }
        feed!tile, width, hit, row;
        take(set[b])
#ifdef MUTANT_ENDLESS /* a block that gets no tile asks again */
     :: else
#else
     :: else -> break
#endif
     od;
     feed!NO_TILE, 0, 0, 0;
     d_step { tile = 0; width = 0; hit = 0; row = 0; i = 0; before = 0; taken = 0 }
  od
}

proctype load(byte b; chan feed, handed) {
  bit width;
  byte tile, hit, row, end;
  do
  :: feed?tile, width, hit, row ->
     if
     :: tile != NO_TILE && width == 1 ->
#ifndef MUTANT_NO_WAIT
        if
        :: d_step { rows_word(set[b], hit) >= ROWS }
        :: late[b] /* it waits no more */
#ifndef PATIENT
        :: d_step {
             rows_word(set[b], hit) < ROWS && !late[b] ->
             late[b] = true;
#ifndef MUTANT_UNMARKED
             fault = true
#endif
           }
#endif
        fi;
#endif
        d_step {
          assert(y[hit] == ROWS || late[b]);
          for (end : row .. end_row(1, row) - 1) { wrong[end] = wrong[end] || y[hit] < ROWS }
          end = 0
        }
     :: else
     fi;
     handed!tile, width, hit, row;
     d_step { tile = 0; width = 0; hit = 0; row = 0 }
  od
}

#ifdef MUTANT_NUMBERS /* who gave up stores what it read */
#define store_nan() skip
#else
#define store_nan() nan[r] = nan[r] || late[b]
#endif

inline store_parts() {
  d_step {
    assert(!executed[tile]);
    executed[tile] = true;
    for (r : row .. end_row(1, row) - 1) { z[r]++; store_nan() }
    r = row
  }
}

/* All parts of a tile of columns are there. */
inline add_up(c) {
  d_step {
    assert(z[c] == hits && !summed[c]);
    assert(!wrong[c] || nan[c]);
    summed[c] = true
  }
}

inline report_rows() {
  d_step { rows_word(set[b], hit) = rows_word(set[b], hit) + end_row(0, row) - row }
}

proctype finish(byte b; chan handed) {
  bit width;
  byte tile, hit, row, r;
  bool last[TALL];
#ifdef MUTANT_TORN
  byte seen;
#endif
  do
  :: handed?tile, width, hit, row ->
     if
     :: tile == NO_TILE -> /* without a hit nobody has written the output */
        r = b;
        do
        :: hits == 0 && r < COLUMNS -> add_up(r); r = r + BLOCKS
        :: else -> break
        od;
        r = 0;
        d_step { late[b] = false; running--; ended++ }

     :: tile != NO_TILE && width == 0 ->
#ifdef MUTANT_EARLY_ROWS
        report_rows();
#endif
        d_step { assert(!executed[tile]); executed[tile] = true; y[hit] = y[hit] + end_row(0, row) - row }
#ifndef MUTANT_EARLY_ROWS
        report_rows()
#endif

     :: tile != NO_TILE && width == 1 ->
#ifdef MUTANT_EARLY_COLUMNS
        r = row;
#else
        store_parts();
#endif
#ifdef MUTANT_SILENT /* who gave up does not report */
        if
        :: late[b] -> goto next
        :: else
        fi;
#endif
        do
#ifdef MUTANT_TORN /* a report is a load and a store */
        :: r < end_row(1, row) ->
           seen = columns_word(set[b], r);
           d_step { last[r - row] = seen == hits - 1; columns_word(set[b], r) = seen + 1; seen = 0; r++ }
#else
        :: r < end_row(1, row) ->
           d_step {
             last[r - row] = columns_word(set[b], r) == hits - 1;
             columns_word(set[b], r) = columns_word(set[b], r) + 1;
             r++
           }
#endif
        :: r == end_row(1, row) -> r = row; break
        od;
#ifdef MUTANT_EARLY_COLUMNS
        skip;
        store_parts();
#endif
        do
        :: r < end_row(1, row) && last[r - row] -> add_up(r); last[r - row] = false; r++
        :: r < end_row(1, row) && !last[r - row] -> r++
        :: r == end_row(1, row) -> break
        od;
        r = 0
     fi;
#ifdef MUTANT_SILENT
     next: skip;
#endif
     d_step { tile = 0; width = 0; hit = 0; row = 0 }
  od
}

/* The stream: one launch after the other. */
init {
  byte i;
  chan feed[BLOCKS] = [AHEAD] of { byte, bit, byte, byte };
  chan handed[BLOCKS] = [HANDED] of { byte, bit, byte, byte };
  atomic {
    for (i : 0 .. BLOCKS - 1) {
      came[i] = true;
      run schedule(i, feed[i]);
      run load(i, feed[i], handed[i]);
      run finish(i, handed[i])
    }
  }
  do
  :: atomic {
       select(hits : FEWEST .. HITS);
       d_step {
         for (i : 0 .. BLOCKS - 1) { came[i] = false }
         i = 0
       }
     }
     d_step {
       ended == BLOCKS ->
       for (i : 0 .. HITS * (TILES1 + TILES2) - 1) {
         assert(executed[i] == (i < hits * (TILES1 + TILES2)));
         executed[i] = false
       }
       for (i : 0 .. COLUMNS - 1) {
         assert(summed[i] /* every column is added up */);
         assert(!nan[i] || fault);
         z[i] = 0; wrong[i] = false; nan[i] = false; summed[i] = false
       }
       for (i : 0 .. HITS - 1) { y[i] = 0 }
       i = 0; arrived = 0; ended = 0; used = 0; fault = false
     }
progress: /* every launch ends */
     skip
  od
}
