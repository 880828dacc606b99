#!/bin/bash
# Builds the library for GPUs, checks it, runs the standard benchmarks and leaves records: for a machine with a Hopper
# GPU, nvcc, the packages of scripts/install_deps.sh and a python3 with torch. Less than 10 minutes on 16 cores; what
# fails is said and the rest goes on. CMAKE_PREFIX_PATH in the environment finds packages in other places.
# Usage: gpu_check.sh FOLDER      (records to copy into bench/results, plots to copy into docs/plots)
set -euo pipefail
cd "$(dirname "$0")/.."
out=$(realpath "${1:?usage: gpu_check.sh FOLDER}")
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT

cmake -S . -B "$build" -G Ninja --log-level=WARNING -DFOURMOE_CUDA=ON > "$build/log"
targets=(fourmoe_gpu_tests fourmoe_gpu_api_tests fourmoe_tool fourmoe_bench_gemms fourmoe_bench_route)
package=no
[ -f "$build/python/cmake_install.cmake" ] && package=yes && targets+=(fourmoe_package)  # python3 has nanobind
cmake --build "$build" --target "${targets[@]}" > "$build/log" 2>&1 || { grep -A 20 FAILED "$build/log" >&2; exit 1; }
echo "built in $SECONDS s"

failed=()  # names of checks
check() { "${@:2}" || failed+=("$1"); }

echo "== tests"
check tests "$build/tests/fourmoe_gpu_tests" --gtest_brief=1
check api "$build/tests/fourmoe_gpu_api_tests" --gtest_brief=1
# Of the GEMMs, of whole layers, and of route and combine.
few='*Small*:*Refuse*:*Zero*:*EveryPrecision.Shared*:*EveryPrecision.Duplicate*:*EveryPrecision.Refit*'
few+=':*EveryType*:*LogitsAre*:*Ties*:QuantisedTokens.*:*ComeQuantised*'
few+=':PackingSmall.*:PackingRefusal.*:DeviceWeights.*Freed:DeviceWeights.Stacks*:DeviceWeights.Copies*'
# racecheck sees shared memory alone: the GEMMs, picks and slots (few, many, given), logits.
shared='*Gemms.Small*:DeviceRoute.SmallCalls:DeviceRoute.*OfEveryType:DeviceRows.LogitsAre*'
# All at the same time, since each mostly waits for the host.
check_with() {
  local tool=$1 filter=$few
  [ "$tool" = racecheck ] && filter=$shared
  timeout 300 compute-sanitizer --tool "$tool" --error-exitcode 1 "$build/tests/fourmoe_gpu_tests" --gtest_brief=1 \
    --gtest_filter="$filter" > "$build/$tool" 2>&1
}
check_package() {
  export PYTHONPATH=$build/python FOURMOE_BUILD=$build FOURMOE_SOURCE=$PWD FOURMOE_COMMAND=$build/fourmoe
  local name status=0
  for name in python_package python_places python_torch torch_cuda torch_cuda_weights flashinfer transformers docs; do
    python3 "tests/python/${name}_test.py" > "$build/$name" 2>&1 || { status=1 && cat "$build/$name"; }
    echo "$name: $(tail -n 1 "$build/$name")"
  done
  return "$status"
}
declare -A checks
for tool in memcheck synccheck initcheck racecheck; do check_with "$tool" & checks[$tool]=$!; done
if [ "$package" = yes ]; then
  check_package > "$build/package" 2>&1 & checks[package]=$!
else
  echo "package: not built, python3 here has no nanobind"
fi
for name in "${!checks[@]}"; do
  lines=1
  wait "${checks[$name]}" || { failed+=("$name") && lines=60; }
  [ "$name" = package ] && lines=60
  tail -n "$lines" "$build/$name"
done
echo "checked after $SECONDS s"

echo "== a layer of the shipped model, and MXFP4 as gpt-oss and GGUF store it"
for checkpoint in examples/tiny-moe/nvfp4 tests/fixtures/gpt-oss-mxfp4 tests/fixtures/gguf-mxfp4.gguf; do
  check "$checkpoint" "$build/fourmoe" verify "$checkpoint" --layer 0 --backend sm90
done
if [ "$package" = yes ]; then
  PYTHONPATH=$build/python check overhead python3 bench/python_overhead.py --check --output "$out/python-overhead.json"
fi

echo "== ceilings"
python3 bench/sm90/ceilings.py --output "$out/sm90-ceilings.json" --plot "$out/sm90-ceilings.svg" 2> "$build/log" |
  head -n 4

echo "== speed of the GEMMs"
for shape in dsv3 qwen3-235b v4-flash qwen3-30b nemotron3-nano; do  # all token counts and tiles: `gemms sweep`, minutes
  "$build/fourmoe_bench_gemms" "$shape" 1 8 64 512 1024 4096 32768
done > "$build/rows"
python3 bench/sm90/record.py "$build/rows" --ceilings "$out/sm90-ceilings.json" --output "$out/sm90-gemms.json" \
  --plot "$out/sm90-gemms.svg"

echo "== speed of whole layers: given picks, then from logits, then with a shared expert"
layer() { "$build/fourmoe" bench --backend sm90 --seconds 0.3 "${@:2}" --output "$out/sm90-layer-$1.json" | grep -E '^ +[0-9]'; }
for shape in dsv3 qwen3-235b v4-flash qwen3-30b nemotron-nano 2048,512,256,8; do
  layer "${shape//,/x}" --shape "$shape" --tokens 1,2,4,8,16,64,512
  layer "${shape//,/x}-logits" --shape "$shape" --tokens 1,2,4,8 --logits
done
for shape in dsv3 2048,512,512,10; do
  layer "${shape//,/x}-shared" --shape "$shape" --tokens 1,8 --shared
done

echo "== choices of plans and tiles against the best of all"
for shape in dsv3 qwen3-235b v4-flash qwen3-30b nemotron-nano; do
  "$build/fourmoe" tune --shape "$shape" --tokens 1,3,8,24,64,256,1024,4096 --seconds 0.02 --dry-run --json > "$build/$shape.json"
done
python3 bench/sm90/choices.py "$build"/{dsv3,qwen3-235b,v4-flash,qwen3-30b,nemotron-nano}.json \
  --output "$out/sm90-choices.json" | tail -n 1

echo "== speed of route and combine"
"$build/fourmoe_bench_route" > "$build/route_rows"
python3 bench/gpu/record.py "$build/route_rows" --output "$out/gpu-route.json"

echo "done after $SECONDS s; failed: ${failed[*]:-nothing}"
[ "${#failed[@]}" -eq 0 ]
