#!/usr/bin/env bash
# A run by the `deepspeed` launcher. HOSTFILE (see hostfile.example) names a node and its number of ranks a line.
#   launch/deepspeed.sh HOSTFILE CONFIG.yaml [--a.b VALUE …]
# Started on one node it reaches the others by pdsh over ssh without password, or by another LAUNCHER: openmpi, mpich,
# impi, mvapich, slurm. Without ssh, start it on every node of the file with NODE_RANK=0, 1, … and HEAD=ADDRESS, that of
# the first one (on a single node: NODE_RANK=0). MASTER_PORT sets another port than 29500, where the ranks meet.
# All nodes want the same paths: code, environment, data, run_dir. What has to be set on each (NCCL_SOCKET_IFNAME=eth0)
# goes, a line each, into a file .deepspeed_env in the folder from which this starts.
set -euo pipefail
if [ $# -lt 2 ]; then
    sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
hostfile=$1
shift
reach=(--launcher "${LAUNCHER:-pdsh}")
if [ -n "${NODE_RANK:-}" ]; then
    reach=(--no_ssh --node_rank "$NODE_RANK" --master_addr "${HEAD:-127.0.0.1}")
fi
exec deepspeed --hostfile "$hostfile" "${reach[@]}" --master_port "${MASTER_PORT:-29500}" \
    --module mmd2v train "$@" --resume auto
