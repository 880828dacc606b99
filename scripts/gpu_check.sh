#!/bin/bash
# Builds the library for GPUs, checks it, runs the standard benchmarks and leaves records: for a machine with a Hopper
# GPU, nvcc, the packages of scripts/install_deps.sh and a python3 with torch. Meant for 10 minutes on 16 cores; what
# fails is said and the rest goes on. CMAKE_PREFIX_PATH in the environment finds packages in other places.
# Usage: gpu_check.sh FOLDER [checks|speed]    (records to copy into bench/results, plots to copy into docs/plots)
# FOURMOE_BUILD in the environment: a folder in which everything is built already.
set -euo pipefail
cd "$(dirname "$0")/.."
out=$(realpath "${1:?usage: gpu_check.sh FOLDER [checks|speed]}")
part=${2:-all}
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
build=${FOURMOE_BUILD:-$logs/build}
failed=()  # names of checks
check() { "${@:2}" || failed+=("$1"); }

build_all() {
  cmake -S . -B "$build" -G Ninja --log-level=WARNING -DFOURMOE_CUDA=ON > "$logs/build.log"
  local targets=(fourmoe_gpu_tests fourmoe_race_tests fourmoe_gpu_api_tests fourmoe_tool fourmoe_bench_gemms fourmoe_bench_route)
  has_package && targets+=(fourmoe_package)
  cmake --build "$build" --target "${targets[@]}" > "$logs/build.log" 2>&1 || { grep -A 20 FAILED "$logs/build.log" >&2; exit 1; }
  echo "built in $SECONDS s"
}
has_package() { [ -f "$build/python/cmake_install.cmake" ]; }  # where python3 has nanobind

# Of the GEMMs, of whole layers, and of route and combine.
few='*Small*:*Refuse*:*Zero*:*EveryPrecision.Shared*:*EveryPrecision.Duplicate*:*EveryPrecision.Refit*'
few+=':*EveryType*:*LogitsAre*:*Ties*:QuantisedTokens.*:*ComeQuantised*'
few+=':PackingSmall.*:PackingRefusal.*:DeviceWeights.*Freed:DeviceWeights.Stacks*:DeviceWeights.Copies*'
# racecheck sees shared memory alone: the GEMMs, picks and slots (few, many, given), logits; beside it the one launch.
shared='*Gemms.Small*:DeviceRoute.SmallCalls:DeviceRoute.*OfEveryType:DeviceRows.LogitsAre*'
timed='*Replays.*:*EveryWait.*'  # tests
check_with() {  # TOOL PROGRAM FILTER
  timeout 300 compute-sanitizer --tool "$1" --error-exitcode 1 "$build/tests/$2" --gtest_brief=1 --gtest_filter="$3"
}
check_package() {
  local name status=0
  for name in python_package python_places python_torch torch_cuda torch_cuda_weights flashinfer transformers docs; do
    python3 "tests/python/${name}_test.py" > "$logs/$name" 2>&1 || { status=1 && cat "$logs/$name"; }
    echo "$name: $(tail -n 1 "$logs/$name")"
  done
  return "$status"
}

run_checks() {
  echo "== tests"
  # Alone, for launches give up waits after a time that other processes' turns on the GPU would take.
  check waits "$build/tests/fourmoe_gpu_tests" --gtest_brief=1 --gtest_filter="$timed"
  check api "$build/tests/fourmoe_gpu_api_tests" --gtest_brief=1
  # All at the same time, since each mostly waits for the host.
  export PYTHONPATH=$build/python FOURMOE_BUILD=$build FOURMOE_SOURCE=$PWD FOURMOE_COMMAND=$build/fourmoe
  local -A checks
  local name lines
  "$build/tests/fourmoe_gpu_tests" --gtest_brief=1 --gtest_filter="-$timed" > "$logs/tests" 2>&1 & checks[tests]=$!
  for name in memcheck synccheck initcheck; do
    check_with "$name" fourmoe_gpu_tests "$few" > "$logs/$name" 2>&1 & checks[$name]=$!
  done
  check_with racecheck fourmoe_race_tests "$shared" > "$logs/racecheck" 2>&1 & checks[racecheck]=$!
  check_with racecheck fourmoe_race_tests 'OneLaunch.Small*' > "$logs/race_whole" 2>&1 & checks[race_whole]=$!
  if has_package; then check_package > "$logs/package" 2>&1 & checks[package]=$!; fi
  python3 tests/sass_loops.py "$build/fourmoe" > "$logs/loops" 2>&1 & checks[loops]=$!
  for name in "${!checks[@]}"; do
    lines=1
    wait "${checks[$name]}" || { failed+=("$name") && lines=60; }
    [ "$name" = package ] && lines=60
    echo "$name:"
    tail -n "$lines" "$logs/$name"
  done
  echo "== a layer of the shipped model, and MXFP4 as gpt-oss and GGUF store it"
  local checkpoint
  for checkpoint in examples/tiny-moe/nvfp4 tests/fixtures/gpt-oss-mxfp4 tests/fixtures/gguf-mxfp4.gguf; do
    check "$checkpoint" "$build/fourmoe" verify "$checkpoint" --layer 0 --backend sm90
  done
  if has_package; then
    check overhead python3 bench/python_overhead.py --check --output "$out/python-overhead.json"
  else
    echo "package: not built, python3 here has no nanobind"
  fi
  echo "checked after $SECONDS s"
}

layer() { "$build/fourmoe" bench --backend sm90 --seconds 0.1 "${@:2}" --output "$logs/sm90-layer-$1.json" | grep -E '^ +[0-9]'; }
measure() {
  echo "== ceilings"
  python3 bench/sm90/ceilings.py --output "$out/sm90-ceilings.json" --plot "$out/sm90-ceilings.svg" 2> "$logs/ceilings.log" |
    sed -n 1,4p

  echo "== speed of the GEMMs"
  for shape in dsv3 qwen3-235b v4-flash qwen3-30b nemotron3-nano; do  # all token counts and tiles: `gemms sweep`, minutes
    "$build/fourmoe_bench_gemms" "$shape" 1 8 64 512 1024 4096 32768
  done > "$logs/rows"
  for shape in dsv3 qwen3-235b v4-flash qwen3-30b nemotron3-nano; do
    "$build/fourmoe_bench_gemms" rested "$shape" 64 512 1024
  done >> "$logs/rows"
  for shape in dsv3 qwen3-30b; do "$build/fourmoe_bench_gemms" splits "$shape" 8 64 512; done >> "$logs/rows"
  python3 bench/sm90/record.py "$logs/rows" --ceilings "$out/sm90-ceilings.json" --output "$out/sm90-gemms.json" \
    --plot "$out/sm90-gemms.svg"

  echo "== speed of whole layers: given picks, then from logits, then with a shared expert"
  for shape in dsv3 qwen3-235b v4-flash qwen3-30b nemotron-nano 2048,512,256,8; do
    layer "${shape//,/x}" --shape "$shape" --tokens 1,2,4,8,16,32,64,512
    layer "${shape//,/x}-logits" --shape "$shape" --tokens 1,2,4,8,16,32,64 --logits
  done
  for shape in dsv3 2048,512,512,10; do
    layer "${shape//,/x}-shared" --shape "$shape" --tokens 1,8 --shared
  done
  python3 bench/sm90/layers.py "$logs"/sm90-layer-*.json --output "$out/sm90-layers.json"

  echo "== choices of plans and tiles against the best of all"
  for shape in dsv3 qwen3-235b v4-flash qwen3-30b nemotron-nano; do
    "$build/fourmoe" tune --shape "$shape" --tokens 1,8,24,64,256,1024 --seconds 0.02 --dry-run --json > "$logs/$shape.json"
  done
  python3 bench/sm90/choices.py "$logs"/{dsv3,qwen3-235b,v4-flash,qwen3-30b,nemotron-nano}.json \
    --output "$out/sm90-choices.json" --plot "$out/sm90-choices.svg" | tail -n 1

  echo "== speed of route and combine"
  "$build/fourmoe_bench_route" > "$logs/route_rows"
  python3 bench/gpu/record.py "$logs/route_rows" --output "$out/gpu-route.json"
}

[ -n "${FOURMOE_BUILD:-}" ] || build_all
[ "$part" = speed ] || run_checks
[ "$part" = checks ] || measure
echo "done after $SECONDS s; failed: ${failed[*]:-nothing}"
[ "${#failed[@]}" -eq 0 ]
