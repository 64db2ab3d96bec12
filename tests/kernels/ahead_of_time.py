"""Compile every shipped form of the Triton kernels without a GPU and print what each needs, as JSON.

    python tests/kernels/ahead_of_time.py [ARCHITECTURE ...]

The compiler, assembler and disassembler are in Triton's wheel. Not under TRITON_INTERPRET, which compiles nothing.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

MODULES = (
    "add_layer_norm_triton",
    "contrastive_triton",
    "cosine_topk_triton",
    "distill_target_triton",
    "expert_mlp_triton",
    "rank_count_triton",
    "retrieval_triton",
)
ARCHITECTURES = (80, 90)
TENSOR_CORES = re.compile(r"\b(?:HMMA|HGMMA|IMMA|DMMA)\b")


def compile_all(architectures: tuple[int, ...]) -> dict[str, dict[str, int]]:
    """Return configuration and architecture → registers, shared, stack, spills, matrix and special instructions."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    found = {}
    for module in MODULES:
        for one in importlib.import_module(f"mmd2v_kernels.{module}").configurations():
            source = ASTSource(one.kernel, dict(one.signature), dict(one.constants), one.attributes())
            for architecture in architectures:
                options = {"num_warps": one.warps, "num_stages": one.stages}
                made = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
                resources = inspect(made.asm["cubin"], tools) | {"shared": made.metadata.shared}
                found[f"{one.name}/sm_{architecture}"] = resources | {"expects_tensor_cores": int(one.tensor_cores)}
    return found


def inspect(cubin: bytes, tools: Path) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run(str(tools / "cuobjdump"), "-res-usage", file.name)
        code = _run(str(tools / "nvdisasm"), "-c", file.name)
    registers, stack = (int(re.search(rf"{field}:(\d+)", usage).group(1)) for field in ("REG", "STACK"))
    opcodes = re.findall(r"^\s+(?:/\*[0-9a-f]+\*/)?\s*(?:@!?U?P\d+\s+)?([A-Z][A-Z0-9_]*)", code, re.MULTILINE)
    if len(opcodes) < 10:
        raise RuntimeError(f"nvdisasm: read {len(opcodes)} instructions, expected more")
    return {
        "registers": registers,
        "stack": stack,
        "spills": sum(opcode in ("LDL", "STL") for opcode in opcodes),
        "tensor_cores": sum(bool(TENSOR_CORES.match(opcode)) for opcode in opcodes),
        "special": opcodes.count("MUFU"),
    }


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=600).stdout


if __name__ == "__main__":
    import triton

    chosen = tuple(int(name) for name in sys.argv[1:]) or ARCHITECTURES
    json.dump({"triton": triton.__version__, "resources": compile_all(chosen)}, sys.stdout, indent=1)
