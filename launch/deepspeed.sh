#!/usr/bin/env bash
# A run by the `deepspeed` launcher: start it on one node, it reaches the others of the host file.
#   launch/deepspeed.sh HOSTFILE CONFIG.yaml [--a.b VALUE …]
# HOSTFILE (see hostfile.example) names a node and its number of ranks a line. The first node is where the ranks meet;
# MASTER_PORT sets another port than 29500. More nodes than this one want ssh without password, and pdsh, or LAUNCHER
# for another one: openmpi, mpich, impi, mvapich, slurm. All nodes want the same paths: code, environment, data, run_dir.
# What has to be set on every node (NCCL_SOCKET_IFNAME=…) goes, a line each, into a file .deepspeed_env here.
set -euo pipefail
if [ $# -lt 2 ]; then
    sed -n '2,7s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
hostfile=$1
shift
exec deepspeed --hostfile "$hostfile" --launcher "${LAUNCHER:-pdsh}" --master_port "${MASTER_PORT:-29500}" \
    --module mmd2v train "$@" --resume auto
