"""Write what every form of the kernels needs into kernel_resources.json, under the version of Triton that runs this.

python tests/kernels/kernel_resources.py

For a version that is not installed, an environment of its own, which also runs the tests with it:

    python -m venv DIR
    python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > DIR/lib/python3.*/site-packages/zz_lent.pth
    DIR/bin/pip install --no-deps triton==3.6.0
    PYTHONPATH=kernels DIR/bin/python tests/kernels/kernel_resources.py
    MMD2V_TRITON_PYTHON=DIR/bin/python python -m pytest tests/kernels/test_triton_kernels.py
"""

import json
import sys
from pathlib import Path

import triton
from ahead_of_time import ARCHITECTURES, compile_all

TABLE = Path(__file__).with_suffix(".json")

if __name__ == "__main__":
    table = json.loads(TABLE.read_text(encoding="utf-8")) if TABLE.exists() else {}
    table[triton.__version__] = compile_all(ARCHITECTURES)
    temporary = TABLE.with_name(f".{TABLE.name}.tmp")
    temporary.write_text(json.dumps(dict(sorted(table.items())), indent=1, sort_keys=True) + "\n", encoding="utf-8")
    temporary.replace(TABLE)
    sys.exit(0)
