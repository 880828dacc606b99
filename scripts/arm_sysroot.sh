#!/bin/bash
# Unpacks the libraries that a 64-bit ARM build needs into FOLDER, which it makes anew when it is not complete. They are
# Debian's packages for arm64, found with package lists of their own: the machine's packages stay as they are.
# Usage: scripts/arm_sysroot.sh FOLDER
set -euo pipefail

packages=(libtbb-dev libtbb12 libtbbmalloc2 libtbbbind-2-5 libfmt-dev libfmt9 nlohmann-json3-dev libcli11-dev libgtest-dev libgmock-dev)
mkdir -p "$1"
root=$(cd "$1" && pwd)
complete="$root/complete"
if [ -f "$complete" ] && [ "$(cat "$complete")" = "${packages[*]}" ]; then exit 0; fi

rm -rf "${root:?}"/*
mkdir -p "$root/apt/lists/partial" "$root/apt/archives/partial"
touch "$root/apt/status"
cd "$root/apt"
apt=(apt-get -qq -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o Dir::State="$PWD" -o Dir::State::status="$PWD/status"
  -o Dir::Cache="$PWD" -o APT::Sandbox::User="$(id -un)")
"${apt[@]}" update
"${apt[@]}" download "${packages[@]}"
for package in *.deb; do dpkg-deb -x "$package" "$root"; done
rm -rf "$root/apt"
echo "${packages[*]}" > "$complete"
