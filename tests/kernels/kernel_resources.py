"""Write what every form of the kernels needs into kernel_resources.json, under the version of Triton that runs this.

python tests/kernels/kernel_resources.py
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
