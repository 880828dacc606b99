#!/bin/bash
# The objects of an instruction level define no function that a linker could take for other objects too: such a copy
# would run instructions that the machine may lack.
# Usage: levels_test.sh STATIC_LIBRARY BUILD_TYPE
set -euo pipefail

if [ "$2" = Debug ]; then
  echo "without optimisation small templates of the standard library are not inlined"
  exit 77
fi
shared=$(nm --print-file-name --defined-only --demangle "$1" | grep -E ':atom_(avx|vnni|amx)' | grep -E ' [WVu] ' || true)
if [ -n "$shared" ]; then
  printf 'weak symbols in a level:\n%s\n' "$shared" >&2
  exit 1
fi
echo "no weak symbols in the levels"
