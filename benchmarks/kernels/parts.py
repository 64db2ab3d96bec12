"""Time each matrix product of `expert_mlp` by our kernel, in several tile sizes, and by the library's, on a GPU.

    python benchmarks/kernels/parts.py --out FOLDER [--seconds 120] [--tiny]

writes parts.csv and parts.txt: the rows that `mmd2v_kernels.measured` would need. What is timed is the part with what
happens to its result, as `mmd2v_kernels.expert_mlp_products` runs it. `--tiny` is a rehearsal in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from measuring import Row, append, machine, percentiles, relative_error, times_ms

from mmd2v_kernels.dispatch import PARTS
from mmd2v_kernels.expert_mlp_configurations import Tiles
from mmd2v_kernels.expert_mlp_product_kernels import GELU, GELU_GRADIENT, PLAIN, RESIDUAL
from mmd2v_kernels.expert_mlp_products import multiply, weight_gradient

ROUNDS = 15
PRODUCTS = [
    Tiles(),
    Tiles(stages=3),
    Tiles(columns=128, gelu_columns=256),
    Tiles(columns=128, gelu_columns=128, warps=4),
    Tiles(rows=256, columns=128, gelu_columns=64, stages=3),
]
WEIGHT_GRADIENTS = [
    Tiles(),
    Tiles(stages=3),
    Tiles(chunk=16384),
    Tiles(wgrad=(128, 128, 64), chunk=16384),
    Tiles(wgrad=(128, 256, 64), wgrad_warps=8, chunk=16384),
]
FLAT = [
    Tiles(),
    Tiles(flat=2048),
    Tiles(flat=2048, epilogue_warps=8),
    Tiles(flat=512, epilogue_warps=2),
]
EPILOGUES = [
    Tiles(),
    Tiles(step=64),
    Tiles(step=32),
    Tiles(step=8),
    Tiles(epilogue=(64, 64)),
    Tiles(epilogue=(64, 128), epilogue_warps=8),
    Tiles(epilogue=(128, 128), epilogue_warps=8),
]


def name_of(tiles: Tiles) -> str:
    """What differs from the sizes that are shipped."""
    shipped = asdict(Tiles())
    return " ".join(f"{k}={v}" for k, v in asdict(tiles).items() if v != shipped[k]).replace(", ", "x") or "shipped"


@contextmanager
def products_by(path: str):
    """Force the path of all parts."""
    os.environ["MMD2V_KERNELS"] = ",".join(f"expert_mlp/{part}={path}" for part in PARTS["expert_mlp"])
    try:
        yield
    finally:
        del os.environ["MMD2V_KERNELS"]


class Operands:
    """Two experts' rows and weights, and the memory of every result."""

    def __init__(self, counts: tuple[int, int], width: int, device: torch.device, dtype: torch.dtype) -> None:
        torch.manual_seed(0)

        def new(*shape: int, scale: float = 1.0) -> torch.Tensor:
            return (scale * torch.randn(shape, device=device)).to(dtype)

        total, hidden = sum(counts), 4 * width
        self.rows = [(0, counts[0]), (counts[0], total)]
        self.x, self.u = new(total, width), new(total, width)
        self.h, self.g, self.dh = (new(total, hidden) for _ in range(3))
        self.out_D, self.out_F, self.out_F2 = (
            torch.empty_like(self.x),
            torch.empty_like(self.h),
            torch.empty_like(self.h),
        )
        self.fc1 = [new(hidden, width, scale=width**-0.5) for _ in counts]
        self.fc2 = [new(width, hidden, scale=hidden**-0.5) for _ in counts]
        self.b1, self.b2, self.scale = ([new(n) for _ in counts] for n in (hidden, width, width))

    def part(self, name: str, tiles: Tiles) -> Callable[[], torch.Tensor]:
        """Return a call that runs the part and returns its result."""
        if name == "fc1":

            def call() -> torch.Tensor:
                multiply(GELU, self.x, self.fc1, self.rows, self.out_F, tiles, biases=self.b1, h_RN=self.out_F2)
                return self.out_F
        elif name == "fc2":

            def call() -> torch.Tensor:
                multiply(
                    RESIDUAL,
                    self.g,
                    self.fc2,
                    self.rows,
                    self.out_D,
                    tiles,
                    biases=self.b2,
                    scales=self.scale,
                    x=self.x,
                )
                return self.out_D
        elif name == "dgrad2":

            def call() -> torch.Tensor:
                multiply(
                    GELU_GRADIENT,
                    self.u,
                    self.fc2,
                    self.rows,
                    self.out_F,
                    tiles,
                    transposed=True,
                    h_RN=self.h,
                    x=self.out_F2,
                )
                return self.out_F
        elif name == "dgrad1":

            def call() -> torch.Tensor:
                multiply(PLAIN, self.dh, self.fc1, self.rows, self.out_D, tiles, transposed=True)
                return self.out_D
        else:

            def call() -> torch.Tensor:
                return weight_gradient(self.dh, self.x, self.rows, tiles)[0]

        return call


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=120, help="nothing is begun after these")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type != "cuda" and not (options.tiny and os.environ.get("TRITON_INTERPRET") == "1"):
        print("error: no CUDA device; TRITON_INTERPRET=1 and --tiny rehearse on the CPU", file=sys.stderr)
        return 1
    options.out.mkdir(parents=True, exist_ok=True)
    start, rows, lines = time.monotonic(), [], []
    tiny = options.tiny
    dtype, width = (torch.float32, 32) if tiny else (torch.bfloat16, 768)
    for counts in [(40, 24)] if tiny else [(65536, 16384), (8192, 2048), (1536, 512)]:
        total = sum(counts)
        operands = Operands(counts, width, device, dtype)
        for part in PARTS["expert_mlp"]:
            if time.monotonic() - start > options.seconds:
                print("out of time: the others are left out")
                break
            own = WEIGHT_GRADIENTS if part == "wgrad" else PRODUCTS
            after = {"fc1": FLAT, "fc2": EPILOGUES, "dgrad2": EPILOGUES}.get(part, [Tiles()])
            if tiny:
                small = Tiles(32, 32, 16, 16, wgrad=(16, 32, 16), chunk=32, norm=16, epilogue=(16, 32))
                own = after = [small]
            if total < 80000:
                own, after = own[:4], after[:2]
            rows += measure(operands, part, own, after, device, lines, f"{counts[0]}+{counts[1]}x{width}", total)
        del operands
    append(options.out / "parts.csv", rows)
    (options.out / "parts.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0


def measure(
    operands: Operands,
    part: str,
    own: list[Tiles],
    after: list[Tiles],
    device: torch.device,
    lines: list[str],
    shape: str,
    total: int,
) -> list[Row]:
    """Time all forms of a part in turn."""
    forms = {f"triton {name_of(t)}": ("triton", t) for t in own}
    forms |= {f"segmented {name_of(t)}": ("segmented", t) for t in after}
    calls, errors, exact = {}, {}, None
    for name, (path, tiles) in list(forms.items()):
        call = operands.part(part, tiles)

        def run(path: str = path, call: Callable[[], torch.Tensor] = call) -> torch.Tensor:
            with products_by(path):
                return call()

        try:
            found = run()[:512].float().clone()
        except Exception as error:  # too large for this device, say: told, and the others go on
            print(f"{part} {name}: {type(error).__name__}: {str(error).splitlines()[0][:150]}")
            continue
        exact = found if exact is None else exact
        errors[name] = relative_error(found, exact)
        calls[name] = run
    taken = times_ms(calls, ROUNDS if device.type == "cuda" else 2, device)
    rows, middle = [], {}
    hidden, width = operands.h.shape[1], operands.x.shape[1]
    for name in calls:
        p50, p20, p80 = percentiles(taken[name])
        middle[name] = p50
        rate = 2 * total * width * hidden / p50 / 1e9
        print(f"{part:<7} {shape:<18} {name:<45} {p50:8.4f} ms {rate:7.1f} TFLOP/s  differs by {errors[name]:.1e}")
        dtype = str(operands.x.dtype).removeprefix("torch.")
        numbers = (p50, p20, p80, 0.0, 0.0, 0.0, 0.0, errors[name])
        rows.append(Row(f"expert_mlp/{part}", name, "part", dtype, shape, ROUNDS, *numbers, **machine(device)))
    best = {
        path: min((v for k, v in middle.items() if k.startswith(path)), default=float("inf"))
        for path in ("triton", "segmented")
    }
    chosen = min(best, key=lambda path: best[path])
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    lines.append(f'    Measurement("expert_mlp/{part}", "{device_name}", {operands.x.dtype}, {total}, "{chosen}"),')
    return rows


if __name__ == "__main__":
    sys.exit(main())
