#!/usr/bin/env bash
# A run by mpirun (OpenMPI): start it on one node, it reaches the others of the host file. mpi4py must be installed,
# built for this MPI or as its wheel: pip install 'mmd2v[mpi]'. It carries the meeting place from rank 0 to the others.
#   RANKS=16 HOSTFILE=hosts launch/mpirun.sh CONFIG.yaml [--a.b VALUE …]
# Without HOSTFILE all ranks are on this node. OpenMPI's own variables set the rest: OMPI_MCA_btl_tcp_if_include=eth0,
# OMPI_MCA_rmaps_base_oversubscribe=1, OMPI_ALLOW_RUN_AS_ROOT=1 (with OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 in a container).
set -euo pipefail
if [ $# -lt 1 ]; then
    sed -n '2,6s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
hosts=()
[ -z "${HOSTFILE:-}" ] || hosts=(--hostfile "$HOSTFILE")
passed=()
for name in PATH PYTHONPATH LD_LIBRARY_PATH; do  # the other nodes' shells may know another environment
    [ -z "${!name:-}" ] || passed+=(-x "$name")
done
exec mpirun -np "${RANKS:-1}" ${hosts[@]+"${hosts[@]}"} --bind-to none "${passed[@]}" \
    python -m mmd2v train "$@" --resume auto
