#!/bin/bash
# Builds the GPU programs, checks them, runs the standard benchmarks and leaves records: for a machine with a Hopper GPU,
# nvcc, fmt, GoogleTest and a python3 with torch. Under 10 minutes.
# Usage: gpu_check.sh FOLDER      (records to copy into bench/results, plots to copy into docs/plots)
set -euo pipefail
cd "$(dirname "$0")/.."
out=$(realpath "${1:?usage: gpu_check.sh FOLDER}")
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT

flags=(-std=c++20 -O3 -Isrc --expt-relaxed-constexpr -gencode arch=compute_90a,code=sm_90a)
nvcc "${flags[@]}" bench/sm90/gemms.cu src/backends/sm90/tiles.cc -o "$build/gemms" 2> "$build/log" ||
  { cat "$build/log" >&2; exit 1; }

# Route and combine, with the host's bodies for comparison (on threads of its own executor) and GoogleTest.
stages=(src/route/*.cu src/combine/*.cu src/gpu/*.cc src/route/*.cc src/combine/*.cc src/format/quantise.cc
  tests/tsan/executor.cc)
nvcc "${flags[@]}" -Xcompiler -ffp-contract=off bench/gpu/route.cu "${stages[@]}" -lfmt -o "$build/route" \
  2> "$build/log" || { cat "$build/log" >&2; exit 1; }
nvcc "${flags[@]}" -Itests -Xcompiler -ffp-contract=off tests/gpu/*.cu "${stages[@]}" -lfmt -lgtest_main -lgtest \
  -o "$build/route_tests" 2> "$build/log" || { cat "$build/log" >&2; exit 1; }

echo "== route and combine against the host"
"$build/route_tests" --gtest_brief=1

echo "== results of the GEMMs against sums in double"
"$build/gemms" check | tee "$build/check" | grep -c '"ok": true'
for tool in memcheck racecheck synccheck initcheck; do
  echo "== $tool"
  timeout 120 compute-sanitizer --tool "$tool" --error-exitcode 1 "$build/gemms" check-small | tail -n 1
done

for tool in memcheck racecheck synccheck initcheck; do
  echo "== $tool of route and combine"
  small='*SmallCalls*:*EveryType*:*Refuse*:*Zero*:*LogitsAre*:*Ties*'
  if [ "$tool" = racecheck ]; then small='*SmallCalls*:*Refuse*:*Zero*'; fi  # it takes minutes for the others
  timeout 300 compute-sanitizer --tool "$tool" --error-exitcode 1 "$build/route_tests" --gtest_brief=1 \
    --gtest_filter="$small" | tail -n 1
done

echo "== ceilings"
python3 bench/sm90/ceilings.py --output "$out/sm90-ceilings.json" --plot "$out/sm90-ceilings.svg" 2> "$build/log" |
  head -n 4

echo "== speed of the GEMMs"
"$build/gemms" bench > "$build/rows"
python3 bench/sm90/record.py "$build/rows" --ceilings "$out/sm90-ceilings.json" --output "$out/sm90-gemms.json" \
  --plot "$out/sm90-gemms.svg"

echo "== speed of route and combine"
"$build/route" > "$build/route_rows"
python3 bench/gpu/record.py "$build/route_rows" --output "$out/gpu-route.json"
