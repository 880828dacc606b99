#!/bin/bash
# Builds the Python package as a wheel in dist/: with a manylinux tag, its libraries inside, where auditwheel is found.
# Checks that it is small and that it imports, computes and explains in an environment that has nothing else.
# Usage: scripts/wheel.sh PYTHON [cuda]      PYTHON has pip; scikit-build-core and nanobind are fetched where it lacks
# them. With "cuda" the wheel holds the code for GPUs too (needs nvcc); it still imports where there is no driver.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1
options=()
[ "${2:-}" = cuda ] && options=(-C cmake.define.FOURMOE_CUDA=ON)
most_bytes=$((50 << 20))

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
isolation=()
"$python" -c 'import scikit_build_core, nanobind' 2> /dev/null && isolation=(--no-build-isolation)
"$python" -m pip wheel . --no-deps --quiet ${options[@]+"${options[@]}"} ${isolation[@]+"${isolation[@]}"} --wheel-dir "$work/built"
wheel=$(echo "$work"/built/*.whl)

mkdir -p dist
if "$python" -m auditwheel --version > /dev/null 2>&1 && PATH="$(dirname "$python"):$PATH" command -v patchelf > /dev/null; then
  PATH="$(dirname "$python"):$PATH" "$python" -m auditwheel repair "$wheel" --wheel-dir "$work/repaired" > "$work/log" 2>&1 \
    || { cat "$work/log" >&2; exit 1; }
  wheel=$(echo "$work"/repaired/*.whl)
else
  echo "wheel.sh: no auditwheel with patchelf here, so the wheel is for this kind of machine alone" >&2
fi

bytes=$(stat -c %s "$wheel")
[ "$bytes" -le "$most_bytes" ] || { echo "wheel.sh: $bytes bytes, expected at most $most_bytes" >&2; exit 1; }

"$python" -m venv --without-pip "$work/bare"
"$python" -m pip --python "$work/bare/bin/python" install --quiet --no-deps "$wheel"
(cd "$work" && bare/bin/python - "$OLDPWD/examples/tiny-moe/nvfp4") << 'PROGRAM'
import array, sys, time
start = time.perf_counter()
import fourmoe
seconds = time.perf_counter() - start
layer = fourmoe.load(sys.argv[1], layer=0)
# A matrix without numpy: memoryview lends its buffer; the output is written into one, too.
tokens = memoryview(array.array("f", [0.5, -1.0] * 64)).cast("B").cast("f", (1, 128))
out = memoryview(bytearray(4 * 128)).cast("f", (1, 128))
layer(tokens, out=out)
assert any(out.tolist()[0]) and seconds < 1 and "torch" not in sys.modules, seconds
print(f"imports in {1e3 * seconds:.0f} ms and computes with Python's own arrays")
PROGRAM
"$work/bare/bin/python" -m fourmoe examples/tiny-moe/nvfp4 --layer 0 > /dev/null
"$work/bare/bin/fourmoe" support > /dev/null
cp "$wheel" dist/
echo "dist/$(basename "$wheel"): $((bytes / 1024)) KiB"
