#!/usr/bin/env bash
# Make the environment of open_clip's loader, which pins an old webdataset that mmd2v cannot use.
#
#     benchmarks/data/peer_environment.sh DIR [PYTHON]
#
# DIR/bin/python is then what `benchmarks/data/run.py --peer-python` wants. PYTHON (by default .venv/bin/python) lends its
# torch and torchvision: both loaders decode with the same libraries, and it takes seconds instead of gigabytes.
set -euo pipefail
. "$(dirname "$0")/../lent_environment.sh"
start_environment "$@"
# pip notes that mmd2v wants a newer webdataset: true, and why this environment exists.
"$target/bin/python" -m pip install --quiet 'open_clip_torch[training]>=3.3,<4'
"$target/bin/python" - <<'CHECK'
import open_clip, torch, torchvision, webdataset
from open_clip_train.data import get_wds_dataset
print("open_clip", open_clip.__version__, "webdataset", webdataset.__version__, "torch", torch.__version__)
CHECK
