#!/bin/bash
# The shared library exports the C ABI and nothing else.
# Usage: symbols_test.sh LIBRARY
set -euo pipefail

exported=$(nm --dynamic --defined-only --extern-only "$1" | awk '{print $NF}')
strangers=$(grep -v '^fourmoe_' <<< "$exported" || true)
if [ -n "$strangers" ]; then
  printf 'exported beside fourmoe_*:\n%s\n' "$strangers" >&2
  exit 1
fi
[ -n "$exported" ] || { echo "nothing is exported" >&2; exit 1; }
echo "$(wc -l <<< "$exported") functions exported, all fourmoe_*"
