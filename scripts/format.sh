#!/bin/bash
# Lays out C++ and CUDA sources with clang-format 14, or with --check says which are not laid out and fails.
set -euo pipefail
cd "$(dirname "$0")/.."

formatter=$(command -v clang-format-14 || command -v clang-format) || {
  echo "format.sh: clang-format 14 is missing" >&2
  exit 1
}
case "$("$formatter" --version)" in
  *" 14."*) ;;
  *) echo "format.sh: $formatter is not version 14, whose layout the project keeps" >&2; exit 1 ;;
esac

mapfile -t files < <(find src include bindings tools tests bench examples -type f -regextype egrep \
  -regex '.*\.(h|hpp|c|cc|cu|cuh)' 2> /dev/null | sort)
[ "${#files[@]}" -gt 0 ] || exit 0
if [ "${1:-}" = --check ]; then
  "$formatter" --dry-run --Werror "${files[@]}" && echo "format: ${#files[@]} files as clang-format 14 lays them out"
else
  "$formatter" -i "${files[@]}"
fi
