#!/bin/bash
# Prints a python3 that has numpy: the one in PYTHON, the first in PATH, Debian's, or a .venv made for it.
set -euo pipefail
cd "$(dirname "$0")/.."

for candidate in ${PYTHON:+"$PYTHON"} python3 /usr/bin/python3 .venv/bin/python3; do
  if path=$(command -v "$candidate") && "$path" -c 'import numpy' 2> /dev/null; then
    case "$path" in /*) echo "$path" ;; *) echo "$PWD/$path" ;; esac
    exit 0
  fi
done

if scripts/install_deps.sh numpy >&2 && /usr/bin/python3 -c 'import numpy' 2> /dev/null; then
  echo /usr/bin/python3
elif python3 -m venv .venv > /dev/null && .venv/bin/pip install --quiet numpy >&2; then
  echo "$PWD/.venv/bin/python3"
else
  echo "find_python.sh: no python3 with numpy; please install the package python3-numpy" >&2
  exit 1
fi
