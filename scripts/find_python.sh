#!/bin/bash
# Prints a python3 for the tests: the one in PYTHON, else the project's .venv, made for it with what the Python package
# is built and tested with, else one that has numpy at least. Without nanobind the Python package is not built.
set -euo pipefail
cd "$(dirname "$0")/.."

has() { "$1" -c "import ${2// /, }" 2> /dev/null; }
print_path() {
  local path
  path=$(command -v "$1")
  case "$path" in /*) echo "$path" ;; *) echo "$PWD/$path" ;; esac
  exit 0
}

for candidate in ${PYTHON:+"$PYTHON"} python3 /usr/bin/python3 .venv/bin/python3; do
  if command -v "$candidate" > /dev/null && has "$candidate" "numpy nanobind"; then print_path "$candidate"; fi
done
if [ -n "${PYTHON:-}" ] && has "$PYTHON" numpy; then print_path "$PYTHON"; fi

scripts/install_deps.sh python >&2 || true
if python3 -m venv .venv > /dev/null 2>&1 &&
  .venv/bin/pip install --quiet --disable-pip-version-check numpy ml_dtypes nanobind scikit-build-core mypy >&2; then
  print_path .venv/bin/python3
fi
echo "find_python.sh: no .venv with nanobind could be made, so the Python package is not built" >&2
for candidate in python3 /usr/bin/python3; do
  if command -v "$candidate" > /dev/null && has "$candidate" numpy; then print_path "$candidate"; fi
done
if scripts/install_deps.sh numpy >&2 && has /usr/bin/python3 numpy; then print_path /usr/bin/python3; fi
echo "find_python.sh: no python3 with numpy; please install the package python3-numpy" >&2
exit 1
