#!/bin/bash
# Installs the Debian packages of the named groups that are missing. Says nothing when none is.
# Usage: scripts/install_deps.sh [build] [test] [numpy] [python] [check] [clang] [arm]      (default: build)
set -euo pipefail

packages_of() {
  case "$1" in
    build) echo g++ cmake ninja-build libtbb-dev libfmt-dev nlohmann-json3-dev libcli11-dev ;;
    test) echo libgtest-dev python3 pkg-config binutils spin ;;
    numpy) echo python3-numpy ;;
    python) echo python3-dev python3-venv python3-pip ;;
    check) echo clang-format-14 python3 ;;
    clang) echo clang-14 libclang-rt-14-dev ;;
    arm) echo g++-aarch64-linux-gnu qemu-user ;;
    *) echo "install_deps.sh: unknown group '$1'" >&2; exit 2 ;;
  esac
}

wanted=()
for group in "${@:-build}"; do
  list=$(packages_of "$group")
  read -ra names <<< "$list"
  wanted+=("${names[@]}")
done

if ! command -v dpkg-query > /dev/null; then
  echo "install_deps.sh: this is not a Debian machine; please provide what these packages hold: ${wanted[*]}" >&2
  exit 0
fi

installed=$(dpkg-query -W -f='${db:Status-Abbrev} ${Package}\n' "${wanted[@]}" 2> /dev/null | sed -n 's/^ii *//p' || true)
missing=()
for name in "${wanted[@]}"; do
  grep -qxF -- "$name" <<< "$installed" || missing+=("$name")
done
[ "${#missing[@]}" -eq 0 ] && exit 0

as_root=()
if [ "$(id -u)" -ne 0 ]; then
  if ! command -v sudo > /dev/null || ! { [ -t 0 ] || sudo -n true 2> /dev/null; }; then
    echo "install_deps.sh: missing packages: ${missing[*]}" >&2
    echo "install_deps.sh: neither root nor sudo here; please run: apt-get install ${missing[*]}" >&2
    exit 1
  fi
  as_root=(sudo)
fi

# Output is kept and shown only when apt fails.
log=$(mktemp)
trap 'rm -f "$log"' EXIT
apt() {
  ${as_root[@]+"${as_root[@]}"} env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 -qq "$@" > "$log" 2>&1 < /dev/null
}
install() { apt install -y --no-install-recommends "${missing[@]}"; }

echo "install_deps.sh: installing ${missing[*]}"
# The package lists of a fresh machine are empty or old: try them as they are, then bring them up to date once.
if ! { apt-cache show "${missing[@]}" > /dev/null 2>&1 && install; } && ! { apt update && install; }; then
  cat "$log" >&2
  echo "install_deps.sh: could not install: ${missing[*]}" >&2
  exit 1
fi
