#!/usr/bin/env bash
# Make the environment with what exact retrieval is set beside: faiss-cpu, CLIP_benchmark and open_clip.
#
#     benchmarks/retrieval/peer_environment.sh DIR [PYTHON]
#
# DIR/bin/python then runs `run.py` and `contrastive.py` beside this file. PYTHON (by default .venv/bin/python) lends
# its torch and everything else: all sides run on the same libraries, in one process. The peers' own requirements would
# take older versions of what mmd2v needs, hence --no-deps.
set -euo pipefail
. "$(dirname "$0")/../lent_environment.sh"
start_environment "$@"
put_tree_first
"$target/bin/python" -m pip install --quiet --no-deps \
    'faiss-cpu==1.15.1' 'clip_benchmark==1.6.2' 'open_clip_torch==3.3.0' ftfy regex wcwidth
"$target/bin/python" - <<'CHECK'
import clip_benchmark.metrics.zeroshot_retrieval, faiss, mmd2v, open_clip, torch
from open_clip_train.train import get_clip_metrics
print("faiss", faiss.__version__, "open_clip", open_clip.__version__, "torch", torch.__version__, mmd2v.__file__)
CHECK
