/* A model of gpu/queue.h and of what sm90's one launch does with it (backends/sm90/whole.cuh): launches that follow one
 * another without end and share the queue's memory, each with any number of hits. run.sh searches every interleaving.
 *
 * A launch has BLOCKS thread blocks, of which the machine holds PLACES at once: others come when one has ended. A block
 * is three processes: one empties memory and takes tiles, one brings what a tile needs (and waits for gemm1), one stores,
 * reports and, when no tiles are left, adds up. In the kernel emptying and reporting are a warp of their own, which waits
 * for nobody, and four warps add up. z is numbers that are polled: what an earlier launch
 * left looks like one until it is emptied. With -DSINGLE y is, too, and nothing is reported. With -DOWN picks have rows of
 * their own, a piece each hit, that blocks make before gemm1 reads them; in the kernel that is work of the four warps,
 * which wait for nobody meanwhile. A wait that is not over may
 * be given up at any time; -DPATIENT leaves that out, so that a wait that cannot end is a deadlock. The next launch begins
 * when all blocks have ended, as a stream orders them.
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
#ifndef PARTS /* of the memory of numbers */
#define PARTS 2
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
#ifdef OWN
#define SET (6 + HITS)
#define piece_tickets(s) words[(s) * SET + 4 + HITS]
#define pieces_word(s) words[(s) * SET + 5 + HITS]
#else
#define SET (4 + HITS)
#endif

/* The queue's memory: the word of arrivals, and two sets: tickets of tiles, parts and sums, parts that are empty, rows of
 * each hit; of OWN, tickets of pieces and pieces that are made. */
byte arrivals;
byte words[2 * SET];
#define tickets(s) words[(s) * SET]
#define part_tickets(s) words[(s) * SET + 1]
#define sum_tickets(s) words[(s) * SET + 2]
#define parts_word(s) words[(s) * SET + 3]
#define rows_word(s, hit) words[(s) * SET + 4 + (hit)]

/* What blocks know. */
byte hits;         /* of the launch */
bit set[BLOCKS];   /* in use, as each was told */
byte sum_of[BLOCKS]; /* the sum that each took first */
bool late[BLOCKS]; /* it gave up a wait in this launch */
bool fault;        /* the launch is marked: its output is not valid */

/* What has happened in this launch. */
bool came[BLOCKS];
byte arrived, running, ended;
bit used; /* the set that the first block was told */
bool executed[HITS * (TILES1 + TILES2)];
byte y[HITS];        /* row tiles that are stored */
byte z[COLUMNS];     /* hits whose part is stored */
bool y_old[HITS];    /* of an earlier launch */
#ifdef OWN
bool x[HITS];        /* a hit's own rows are made */
bool y_wrong[HITS];  /* a row tile is of rows that were not there */
bool y_nan[HITS];    /* and was stored as not a number */
#endif
bool z_old[COLUMNS];
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

/* Until a condition holds, or the block waits no more. */
#ifdef PATIENT
#define await(condition) \
  if \
  :: d_step { condition } \
  :: late[b] \
  fi
#else
#ifdef MUTANT_UNMARKED
#define mark() skip
#else
#define mark() fault = true
#endif
#define await(condition) \
  if \
  :: d_step { condition } \
  :: late[b] \
  :: d_step { !(condition) && !late[b] -> late[b] = true; mark() } \
  fi
#endif

/* A part, in one step: who must not touch it meanwhile waits for the report. */
inline empty_part() {
  d_step {
    i = part;
    do
    :: i < COLUMNS -> z[i] = 0; z_old[i] = false; i = i + PARTS
    :: else -> break
    od;
#ifdef SINGLE
    i = part;
    do
    :: i < HITS -> y[i] = 0; y_old[i] = false; i = i + PARTS
    :: else -> break
    od;
#endif
    i = 0
  }
}

proctype schedule(byte b; chan feed) {
  bit width;
  bool emptied;
  byte before, tile, hit, row, taken, part, i;
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
     d_step { /* two counters, which nothing else connects */
       sum_of[b] = sum_tickets(set[b]);
       sum_tickets(set[b])++;
       part = part_tickets(set[b]);
       part_tickets(set[b])++
     }

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
     :: part < PARTS ->
#ifdef MUTANT_EARLY_EMPTY /* reported before it is */
        d_step { parts_word(set[b])++ }
#endif
#ifndef MUTANT_NO_EMPTY
        empty_part();
#endif
#ifndef MUTANT_EARLY_EMPTY
        d_step { parts_word(set[b])++ }
#endif
        d_step { part = part_tickets(set[b]); part_tickets(set[b])++ }
     :: else -> break
     od;
#ifdef OWN
     skip; /* no jump into a step */
     d_step { part = piece_tickets(set[b]); piece_tickets(set[b])++ }
     do
     :: part < hits ->
#ifdef MUTANT_EARLY_PIECE /* reported before it is made */
        d_step { pieces_word(set[b])++ }
        x[part] = true;
#else
        x[part] = true;
        d_step { pieces_word(set[b])++ }
#endif
        d_step { part = piece_tickets(set[b]); piece_tickets(set[b])++ }
     :: else -> break
     od;
#endif
     do
     :: tile < hits * (TILES1 + TILES2) ->
        d_step { find(tile) }
#ifdef SINGLE /* before others poll y */
#ifndef MUTANT_UNAWAITED
        if
        :: width == 1 && !emptied -> await(parts_word(set[b]) == PARTS); emptied = true
        :: else
        fi;
#endif
#endif
        feed!tile, width, hit, row;
        take(set[b])
#ifdef MUTANT_ENDLESS /* a block that gets no tile asks again */
     :: else
#else
     :: else -> break
#endif
     od;
     feed!NO_TILE, 0, 0, 0;
     d_step { tile = 0; width = 0; hit = 0; row = 0; i = 0; before = 0; taken = 0; part = 0; emptied = false }
  od
}

/* gemm2's tokens are there, as who brings them sees it. */
#ifdef SINGLE
#define rows_there() (y_old[hit] || y[hit] == ROWS)
#else
#define rows_there() (rows_word(set[b], hit) >= ROWS)
#endif

proctype load(byte b; chan feed, handed) {
  bit width;
  byte tile, hit, row, end;
  do
  :: feed?tile, width, hit, row ->
     if
     :: tile != NO_TILE && width == 1 ->
#ifndef MUTANT_NO_WAIT
        await(rows_there());
#endif
        d_step {
          assert((y[hit] == ROWS && !y_old[hit]) || late[b]);
          for (end : row .. end_row(1, row) - 1) {
            wrong[end] = wrong[end] || y[hit] < ROWS || y_old[hit];
#ifdef OWN
            wrong[end] = wrong[end] || y_wrong[hit];
            nan[end] = nan[end] || y_nan[hit]
#endif
          }
          end = 0
        }
#ifdef OWN
     :: tile != NO_TILE && width == 0 ->
#ifndef MUTANT_NO_WAIT_ROWS
        await(pieces_word(set[b]) >= hits);
#endif
        d_step {
          assert(x[hit] || late[b]);
          y_wrong[hit] = y_wrong[hit] || !x[hit]
        }
#endif
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
    r = 0
  }
}

/* Who gave up makes no number of what there is. */
inline add_up(c) {
  d_step {
    assert(late[b] || (z[c] == hits && !z_old[c]));
    nan[c] = nan[c] || late[b];
    assert(!summed[c]);
    assert(!wrong[c] || nan[c]);
    summed[c] = true
  }
}

inline report_rows() {
#ifdef MUTANT_TORN /* a load and a store */
  seen = rows_word(set[b], hit);
  d_step { rows_word(set[b], hit) = seen + end_row(0, row) - row; seen = 0 }
#else
  d_step { rows_word(set[b], hit) = rows_word(set[b], hit) + end_row(0, row) - row }
#endif
}

proctype finish(byte b; chan handed) {
  bit width;
  bool emptied;
  byte tile, hit, row, r;
#ifdef MUTANT_TORN
  byte seen;
#endif
  do
  :: handed?tile, width, hit, row ->
#ifndef MUTANT_UNAWAITED
     if
     :: !emptied -> await(parts_word(set[b]) == PARTS); emptied = true
     :: else
     fi;
#endif
     if
     :: tile == NO_TILE ->
        do
        :: sum_of[b] < COLUMNS ->
           await(z_old[sum_of[b]] || z[sum_of[b]] == hits);
           add_up(sum_of[b]);
           d_step { sum_of[b] = sum_tickets(set[b]); sum_tickets(set[b])++ }
        :: else -> break
        od;
        skip; /* no jump into a step */
        d_step { late[b] = false; emptied = false; sum_of[b] = 0; running--; ended++ }

     :: tile != NO_TILE && width == 0 ->
#ifdef MUTANT_EARLY_ROWS
        report_rows();
#endif
        d_step {
          assert(!executed[tile]);
          executed[tile] = true;
          y[hit] = y[hit] + end_row(0, row) - row;
#ifdef OWN
#ifndef MUTANT_NUMBERS_ROWS /* who gave up its rows stores what came of them */
          y_nan[hit] = y_nan[hit] || late[b]
#endif
#endif
        }
#ifndef MUTANT_EARLY_ROWS
#ifndef SINGLE
        report_rows()
#endif
#endif

     :: tile != NO_TILE && width == 1 -> store_parts()
     fi;
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
         z[i] = 0; z_old[i] = true; wrong[i] = false; nan[i] = false; summed[i] = false
       }
       for (i : 0 .. HITS - 1) {
         y[i] = 0;
#ifdef OWN
         x[i] = false; y_wrong[i] = false; y_nan[i] = false;
#endif
#ifdef SINGLE
         y_old[i] = true
#endif
       }
       i = 0; arrived = 0; ended = 0; used = 0; fault = false
     }
progress: /* every launch ends */
     skip
  od
}
