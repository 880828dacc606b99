#!/bin/bash
# Searches every interleaving of queue.pml and split.pml: nothing is wrong in the protocols, and each mutant shows by
# what it breaks. A line a search; ends with 77 where spin or a C compiler is missing. Usage: run.sh
set -uo pipefail
models=$(cd "$(dirname "$0")" && pwd)
compiler=${CC:-cc}
for needed in spin "$compiler"; do
  command -v "$needed" > /dev/null || { echo "skipped: there is no $needed here"; exit 77; }
done
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder" || exit
failures=0

# search LEVEL CHECK OPTION...: of $model; what spin says is in ./report. States take at most 1.5 GB; $packed for many.
model=queue.pml
packed=
search() {
  local level=$1 check=-DSAFETY look=()
  [ "$2" = cycles ] && check=-DNP look=(-l)
  shift 2
  spin -a "$@" "$models/$model" > report 2>&1 && "$compiler" "$level" -w "$check" $packed -DMEMLIM=1500 -o pan pan.c \
    >> report 2>&1 && ./pan ${look[@]+"${look[@]}"} -m100000 -w22 > report 2>&1
}

say() {
  printf '%-4s %s: %s (%s states)\n' "$1" "$2" "$3" "$(sed -n 's/^ *\([0-9]*\) states, stored.*/\1/p' report)"
  [ "$1" = ok ] || { cat report; failures=$((failures + 1)); }
}

# right CHECK WORDS OPTION...: nothing is wrong and the search was complete. CHECK is `wrong`, which looks for broken
# claims and deadlocks; `all`, which also wants every statement of the model reached; `cycles`: no launch without an end.
right() {
  local check=$1 words=$2
  shift 2
  search -O1 "$check" "$@"
  if ! grep -q 'errors: 0$' report || grep -Eq 'not completed|too small|out of memory' report; then
    say FAIL "$words" "$(grep -m1 '^pan:1:' report)"
  elif [ "$check" = all ] && grep -E "${model//./\\.}:[0-9]+, state" report | grep -qv -- '-end-'; then
    say FAIL "$words" "a statement is never reached"
  else
    say ok "$words" "nothing wrong"
  fi
}

# What spin prints of each kind of finding.
declare -A printed=(
  ["deadlock"]='invalid end state'
  ["a launch does not end"]='non-progress cycle'
  ["a tile was done twice"]='\(executed\[tile\]\)|done[12]\[tile\]'
  ["columns are numbers of rows that were not there"]='wrong\['
  ["a set was not clear"]='words\[.*==0'
  ["blocks of one launch use two sets"]='set\[b\]==used'
  ["gemm2 read what gemm1 had not stored"]='y\[hit\]==|stored\[expert\]=='
  ["gemm1 read rows that nobody had made"]='\(x\[hit\]'
  ["columns were not added up"]='summed\[i\]'
  ["columns were added up twice"]='!\(summed\['
  ["columns were added up before their parts"]='z\[.*==hits'
  ["a launch without its numbers is not marked"]='nan\[i\].*fault'
)

# mutant WORDS KIND OPTION...: the first thing found is of the kind.
mutant() {
  local words=$1 kind=$2 check=wrong
  shift 2
  [ "$kind" = "a launch does not end" ] && check=cycles
  search -O0 "$check" "$@"
  if grep -m1 '^pan:1:' report | grep -Eq "${printed[$kind]}"; then say ok "mutant: $words" "$kind"
  else say FAIL "mutant: $words" "expected: $kind"; fi
}

right all "2 blocks, 0 to 2 hits, any wait given up" -DROWS=1 -DCOLUMNS=1
right all "2 blocks, a single token, any wait given up" -DSINGLE -DROWS=1 -DCOLUMNS=1 -DHITS=1
right all "2 blocks, rows of picks, any wait given up" -DOWN -DROWS=1 -DCOLUMNS=1 -DHITS=1 -DPARTS=1
right wrong "2 blocks, rows of picks, 0 to 2 hits" -DOWN -DPATIENT -DROWS=1 -DCOLUMNS=1 -DPARTS=1
right wrong "2 blocks, rows of picks of a single token" -DOWN -DSINGLE -DPATIENT -DROWS=1 -DCOLUMNS=1 -DPARTS=1
right wrong "3 blocks in 2 places, rows of picks" -DOWN -DPATIENT -DBLOCKS=3 -DPLACES=2 -DHITS=1 -DROWS=1 -DCOLUMNS=1 -DPARTS=1
right wrong "2 blocks, 0 to 2 hits" -DPATIENT -DPARTS=1
right wrong "2 blocks, a single token" -DSINGLE -DPATIENT
right wrong "2 blocks, tiles of several rows, any wait given up" -DROWS=3 -DCOLUMNS=3 -DTALL=2 -DHITS=1 -DPARTS=1
right wrong "2 blocks, more tiles ahead" -DPATIENT -DAHEAD=2 -DHANDED=2 -DROWS=1 -DCOLUMNS=1 -DFEWEST=2
right wrong "2 blocks, more tiles ahead, any wait given up" -DAHEAD=1 -DHANDED=1 -DCOLUMNS=1 -DHITS=1 -DPARTS=1
packed=-DCOLLAPSE
right wrong "3 blocks" -DPATIENT -DBLOCKS=3 -DHITS=1 -DROWS=1 -DCOLUMNS=1 -DFEWEST=1 -DPARTS=1
packed=
right wrong "3 blocks in 2 places, any wait given up" -DBLOCKS=3 -DPLACES=2 -DHITS=1 -DCOLUMNS=1 -DROWS=1 -DPARTS=1
right wrong "3 blocks in 2 places, 2 hits" -DPATIENT -DBLOCKS=3 -DPLACES=2 -DROWS=1 -DCOLUMNS=1 -DFEWEST=2
right wrong "3 blocks in 1 place, any wait given up" -DBLOCKS=3 -DPLACES=1
right cycles "every launch ends, any wait given up" -DHITS=1 -DROWS=1 -DCOLUMNS=1
right cycles "every launch ends, 2 hits" -DPATIENT -DROWS=1 -DCOLUMNS=1 -DFEWEST=2

# OUTCOMES: without the claims about the sets themselves.
mutant "the other set is not cleared" "a set was not clear" -DMUTANT_NO_CLEAR
mutant "the same" "columns were not added up" -DMUTANT_NO_CLEAR -DOUTCOMES
mutant "the first to arrive turns the set" "blocks of one launch use two sets" -DMUTANT_FIRST_TURNS
mutant "the same" "columns were added up twice" -DMUTANT_FIRST_TURNS -DOUTCOMES
mutant "a launch clears its own set" "a set was not clear" -DMUTANT_CLEAR_OWN
mutant "the same" "columns were added up twice" -DMUTANT_CLEAR_OWN -DOUTCOMES
mutant "a block's first tile is its number" "deadlock" -DMUTANT_FIRST_GIVEN -DPATIENT -DPLACES=1
mutant "the same, 3 blocks in 2 places" "deadlock" -DMUTANT_FIRST_GIVEN -DPATIENT -DBLOCKS=3 -DPLACES=2 -DROWS=1
mutant "tiles are dealt in turn" "deadlock" -DMUTANT_DEALT -DPATIENT -DPLACES=1
mutant "tiles of gemm2 come first" "deadlock" -DMUTANT_REVERSED -DPATIENT -DPLACES=1
mutant "a block that gets no tile asks again" "a launch does not end" -DMUTANT_ENDLESS -DHITS=1
mutant "gemm2 does not wait" "gemm2 read what gemm1 had not stored" -DMUTANT_NO_WAIT
mutant "rows are reported before they are stored" "gemm2 read what gemm1 had not stored" -DMUTANT_EARLY_ROWS
mutant "gemm1 does not wait for rows of picks" "gemm1 read rows that nobody had made" -DOWN -DMUTANT_NO_WAIT_ROWS
mutant "a piece is reported before it is made" "gemm1 read rows that nobody had made" -DOWN -DMUTANT_EARLY_PIECE -DHITS=1
mutant "who gave up rows stores numbers" "columns are numbers of rows that were not there" -DOWN -DMUTANT_NUMBERS_ROWS -DHITS=1
mutant "nothing is emptied" "columns were added up before their parts" -DMUTANT_NO_EMPTY -DROWS=1 -DPARTS=1
mutant "the same, a single token" "columns were added up before their parts" -DMUTANT_NO_EMPTY -DSINGLE -DCOLUMNS=1
mutant "a part is reported before it is empty" "deadlock" -DMUTANT_EARLY_EMPTY -DPATIENT -DROWS=1 -DCOLUMNS=1
mutant "nobody waits until memory is empty" "deadlock" -DMUTANT_UNAWAITED -DPATIENT -DROWS=1 -DCOLUMNS=1
mutant "a ticket is a load and a store" "a tile was done twice" -DMUTANT_TORN_TICKET -DROWS=1
mutant "a report is a load and a store" "deadlock" -DMUTANT_TORN -DPATIENT -DCOLUMNS=1
mutant "who gave up stores numbers" "columns are numbers of rows that were not there" -DMUTANT_NUMBERS
mutant "who gave up does not mark the launch" "a launch without its numbers is not marked" -DMUTANT_UNMARKED

model=split.pml
right all "split steps, 2 blocks, 0 to 2 experts"
right wrong "split steps, 2 blocks in 1 place" -DPLACES=1
right wrong "split steps, 3 blocks in 2 places" -DBLOCKS=3 -DPLACES=2 -DEXPERTS=1
right wrong "split steps, room for both launches" -DPLACES=4 -DEXPERTS=1 -DTILES1=3 -DTILES2=2
right cycles "split steps, every call ends"
mutant "counters are not zeroed" "deadlock" -DMUTANT_NO_ZEROS
mutant "a ticket of the split steps is a load and a store" "a tile was done twice" -DMUTANT_TORN_TICKET
mutant "y is counted before it is stored" "gemm2 read what gemm1 had not stored" -DMUTANT_EARLY_REPORT
mutant "gemm2 begins with the first of gemm1's blocks" "deadlock" -DMUTANT_BEGINS_WITH_FIRST
mutant "gemm2 waits for any tile of an expert's y" "gemm2 read what gemm1 had not stored" -DMUTANT_ANY
mutant "gemm2 waits for no tile" "gemm2 read what gemm1 had not stored" -DMUTANT_NO_WAIT
mutant "gemm2 ends before gemm1" "a tile was done twice" -DMUTANT_ENDS_ALONE

[ "$failures" -eq 0 ] || { echo "searches that ended otherwise: $failures"; exit 1; }
