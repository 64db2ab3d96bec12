#!/usr/bin/env bash
# A run by torchrun: start it on every node, each with its own NODE_RANK (0 on the node that HEAD names).
#   NODES=2 NODE_RANK=0 HEAD=ADDRESS RANKS_PER_NODE=8 launch/torchrun.sh CONFIG.yaml [--a.b VALUE …]
# On one node HEAD, NODES and NODE_RANK can be left out. MASTER_PORT sets another port than 29500, where the ranks meet.
set -euo pipefail
if [ $# -lt 1 ]; then
    sed -n '2,4s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
exec torchrun --nnodes "${NODES:-1}" --node-rank "${NODE_RANK:-0}" --nproc-per-node "${RANKS_PER_NODE:-1}" \
    --master-addr "${HEAD:-127.0.0.1}" --master-port "${MASTER_PORT:-29500}" --max-restarts 0 \
    --module mmd2v train "$@" --resume auto
