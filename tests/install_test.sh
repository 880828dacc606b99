#!/bin/bash
# Installs the package into a folder of its own, moves that folder, builds the examples against it by find_package
# and by pkg-config, and runs them on the small checkpoint.
# Usage: install_test.sh BUILD_FOLDER
set -euo pipefail
cd "$(dirname "$0")/.."

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cmake --install "$1" --prefix "$work/first" > /dev/null
mv "$work/first" "$work/prefix"  # nothing in the package may depend on where it was installed
prefix=$work/prefix

cp -r examples "$work/examples"  # away from the sources, so that only installed headers are found
cmake -S "$work/examples" -B "$work/build" -G Ninja --log-level=WARNING -DCMAKE_PREFIX_PATH="$prefix"
cmake --build "$work/build" -j 2 > "$work/log" || { cat "$work/log" >&2; exit 1; }

export PKG_CONFIG_PATH
PKG_CONFIG_PATH=$(dirname "$(find "$prefix" -name fourmoe.pc)")
read -ra flags <<< "$(pkg-config --cflags --libs fourmoe)"
libdir=$(pkg-config --variable=libdir fourmoe)

shopt -s nullglob
count=0
for source in examples/*.c examples/*.cc; do
  name=$(basename "${source%.*}")
  case "$source" in *.cc) compiler=(c++ -std=c++20) ;; *) compiler=(cc -std=c11) ;; esac
  "${compiler[@]}" -Wall -Wextra -Werror "$work/$source" "${flags[@]}" -Wl,-rpath,"$libdir" -o "$work/$name"
  for program in "$work/build/$name" "$work/$name"; do
    "$program" "$PWD/examples/tiny-moe/nvfp4" > "$work/log" 2>&1 || { echo "$name failed:" >&2; cat "$work/log" >&2; exit 1; }
  done
  count=$((count + 1))
done
[ "$count" -gt 0 ] || { echo "no examples" >&2; exit 1; }
"$prefix/bin/fourmoe" --version
echo "$count examples built by find_package and by pkg-config, and run"
