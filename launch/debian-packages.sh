#!/usr/bin/env bash
# Installs the Debian packages that `make test` uses beyond Python itself. Needs root, or sudo.
#   g++   DeepSpeed compiles its CPU Adam at first use
#   make  runs the targets
set -euo pipefail
packages=(g++ make)
missing=()
for package in "${packages[@]}"; do
    dpkg-query --show --showformat='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
done
[ ${#missing[@]} -eq 0 ] && exit 0
run=()
[ "$(id -u)" -eq 0 ] || run=(sudo)
"${run[@]}" apt-get update -qq
"${run[@]}" apt-get install -y -qq --no-install-recommends "${missing[@]}"
