#!/usr/bin/env bash
# Installs the Debian packages that the targets of the Makefile use beyond Python itself. Needs root, or sudo.
# (Debian's own Python also needs python3-venv.)
#   make                         runs the targets
#   g++                          compiles DeepSpeed's CPU Adam at first use: `make test-slow`, and runs with
#                                optimizer.name deepspeed_adam
#   slurm-wlm munge              a cluster of two nodes on this machine, on which the tests submit jobs
#   openmpi-bin libopenmpi-dev   mpirun, under which the tests run two ranks
set -euo pipefail
packages=(g++ make slurm-wlm munge openmpi-bin libopenmpi-dev)
missing=()
for package in "${packages[@]}"; do
    dpkg-query --show --showformat='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
done
[ ${#missing[@]} -eq 0 ] && exit 0
run=()
[ "$(id -u)" -eq 0 ] || run=(sudo)
run+=(env DEBIAN_FRONTEND=noninteractive)
if ! "${run[@]}" apt-get update -qq || ! "${run[@]}" apt-get install -y -qq --no-install-recommends "${missing[@]}"; then
    echo "$0: could not install: ${missing[*]} (needs root or sudo, and a Debian mirror)" >&2
    exit 1
fi
