#!/bin/bash
# Builds the fuzz targets with clang and runs each for SECONDS, starting from tests/fuzz/corpus/TARGET.
# A finding ends the run with an error and stays as a file in build-fuzz/findings.
# Usage: fuzz.sh [SECONDS] [TARGET...]
set -euo pipefail
cd "$(dirname "$0")/.."

seconds=${1:-60}
shift || true
targets=("$@")
if [ "${#targets[@]}" -eq 0 ]; then
  mapfile -t targets < <(find tests/fuzz -name '*_fuzz.cc' -exec basename {} .cc \; 2> /dev/null | sort)
fi
if [ "${#targets[@]}" -eq 0 ]; then
  echo "fuzz: there are no targets in tests/fuzz"
  exit 0
fi

cmake --preset fuzz --log-level=WARNING > /dev/null
cmake --build build-fuzz --target "${targets[@]}"
mkdir -p build-fuzz/findings

fuzz() {
  local target=$1 corpus=build-fuzz/corpus/$1 log=build-fuzz/$1.log seeds=()  # what the fuzzer adds stays out of the sources
  mkdir -p "$corpus"
  [ -d "tests/fuzz/corpus/$target" ] && seeds=("tests/fuzz/corpus/$target")
  if ! build-fuzz/fuzz/"$target" -max_total_time="$seconds" -rss_limit_mb=2048 -timeout=10 -print_final_stats=1 \
    -artifact_prefix=build-fuzz/findings/"$target"- "$corpus" ${seeds[@]+"${seeds[@]}"} > "$log" 2>&1; then
    tail -n 60 "$log" >&2
    echo "fuzz: $target has a finding, kept in build-fuzz/findings" >&2
    return 1
  fi
  echo "fuzz: $target: $(sed -n 's/^stat::number_of_executed_units: *//p' "$log") runs in $seconds s, no finding"
}

status=0
running=0
for target in "${targets[@]}"; do  # as many at a time as there are cores
  if [ "$((running++))" -ge "$(nproc)" ]; then wait -n || status=1; fi
  fuzz "$target" &
done
for target in $(jobs -p); do wait "$target" || status=1; done
exit "$status"
