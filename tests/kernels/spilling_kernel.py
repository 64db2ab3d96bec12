"""A kernel that holds more in registers than there are, compiled: what `ahead_of_time.inspect` says of it, as JSON."""

import json
from pathlib import Path

import triton
import triton.language as tl
from ahead_of_time import inspect
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def kernel(
    a_ptr,  # fp16 [64, 64]
    b_ptr,  # fp16 [64, 64]
    out_ptr,  # fp32 [64, 64]
):
    row, column = tl.arange(0, 64), tl.arange(0, 64)
    a = tl.load(a_ptr + row[:, None] * 64 + column[None, :])
    b = tl.load(b_ptr + column[:, None] * 64 + column[None, :])
    at = out_ptr + row[:, None] * 64 + column[None, :]
    total = tl.dot(a, b)
    tl.store(at, tl.exp(total) + tl.dot(tl.exp(total).to(tl.float16), b))


if __name__ == "__main__":
    source = ASTSource(kernel, {"a_ptr": "*fp16", "b_ptr": "*fp16", "out_ptr": "*fp32"})
    made = triton.compile(source, target=GPUTarget("cuda", 80, 32), options={"num_warps": 1, "maxnreg": 48})
    print(json.dumps(inspect(made.asm["cubin"], Path(triton.__file__).parent / "backends/nvidia/bin")))
