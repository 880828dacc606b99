#!/bin/bash
# Builds the GPU programs, checks them, runs the standard benchmark and leaves records: for a machine with a Hopper GPU,
# nvcc, and a python3 with torch. Under 10 minutes.
# Usage: gpu_check.sh FOLDER      (records to copy into bench/results, plots to copy into docs/plots)
set -euo pipefail
cd "$(dirname "$0")/.."
out=$(realpath "${1:?usage: gpu_check.sh FOLDER}")
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT

flags=(-std=c++20 -O3 -Isrc -Itests --expt-relaxed-constexpr -gencode arch=compute_90a,code=sm_90a)
sources=(src/gpu/launch.cu src/backends/sm90/{gemm1,gemm2}.cu src/backends/sm90/tiles.cc
         tests/gpu/sm90_gemms_test.cu bench/sm90/gemms.cu)
printf '%s\n' "${sources[@]}" | xargs -P "$(nproc)" -I{} sh -c \
  "nvcc ${flags[*]} -c {} -o $build/\$(basename {}).o 2> $build/\$(basename {}).log || { cat $build/\$(basename {}).log >&2; exit 1; }"
shared=("$build"/{launch.cu,gemm1.cu,gemm2.cu,tiles.cc}.o)
nvcc "${flags[@]}" "${shared[@]}" "$build/gemms.cu.o" -o "$build/gemms"
nvcc "${flags[@]}" "${shared[@]}" "$build/sm90_gemms_test.cu.o" -lgtest -lgtest_main -o "$build/tests"

echo "== tests"
"$build/tests" --gtest_brief=1
for tool in memcheck racecheck synccheck initcheck; do
  echo "== $tool"
  timeout 200 compute-sanitizer --tool "$tool" --error-exitcode 1 "$build/tests" --gtest_brief=1 \
    --gtest_filter='*Small*' | tail -n 1
done

echo "== ceilings"
python3 bench/sm90/ceilings.py --output "$out/sm90-ceilings.json" --plot "$out/sm90-ceilings.svg" 2> "$build/log" |
  head -n 4

echo "== speed of the GEMMs"
"$build/gemms" > "$build/rows"
python3 bench/sm90/record.py "$build/rows" --ceilings "$out/sm90-ceilings.json" --output "$out/sm90-gemms.json" \
  --plot "$out/sm90-gemms.svg"
