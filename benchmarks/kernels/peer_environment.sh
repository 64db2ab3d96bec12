#!/usr/bin/env bash
# Make the environment with torchscale, whose requirements are older than what mmd2v needs.
#
#     benchmarks/kernels/peer_environment.sh DIR [PYTHON]
#
# DIR/bin/python then runs `benchmarks/kernels/expert_mlp.py`. PYTHON (by default .venv/bin/python) lends its torch and
# everything else: both sides run on the same libraries, in one process.
set -euo pipefail
. "$(dirname "$0")/../lent_environment.sh"
start_environment "$@"
put_tree_first
"$target/bin/python" -m pip install --quiet --no-deps 'torchscale==0.3.0'
cd "$root/benchmarks/kernels"
"$target/bin/python" - <<'CHECK'
import mmd2v, torch
from torchscale_layer import TorchscaleLayer
print("torchscale 0.3.0, torch", torch.__version__, "mmd2v", mmd2v.__version__, "of", mmd2v.__file__)
CHECK
