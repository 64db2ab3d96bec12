"""Time the kernels on a GPU against what they replace, in one run, interleaved, with a backlog of work.

    python benchmarks/kernels/gpu.py --out FOLDER [--seconds 240] [--tiny]

writes kernels.csv, kernels.svg (where matplotlib is there) and measured.txt, the rows that `mmd2v_kernels.measured`
would need. Only torch and Triton are imported. Before anything is timed each provider's output is compared with
float64. The floors are arithmetic from two rates measured here: a large bf16 product and a large copy. `--tiny` is a
rehearsal that runs on a CPU too and whose figures mean nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measuring import (
    Row,
    append,
    machine,
    peak_extra_megabytes,
    percentiles,
    relative_error,
    saved_megabytes,
    times_ms,
)

from mmd2v_kernels import Expert, add_layer_norm, distill_loss, distill_target, expert_mlp, leave_out
from mmd2v_kernels.dispatch import OFFERS, PARTS

ROUNDS = 20


@dataclass
class Problem:
    """One kernel at one shape: what to call, and the least it could take."""

    kernel: str
    shape: str
    dtype: torch.dtype
    rows: int
    mode: str
    forward: dict[str, Callable[[], Any]]
    """Provider → forward pass; returns a tensor."""
    gradient: torch.Tensor | None
    inputs: Sequence[torch.Tensor]
    exact: Callable[[], torch.Tensor]
    operations: float
    """Of matrix products, forward and backward."""
    bytes: float
    """That must move, in what is no matrix product."""

    def step(self, provider: str) -> None:
        with path_of(provider):
            out = self.forward[provider]()
            if self.gradient is not None:
                torch.autograd.grad(out, self.inputs, self.gradient, allow_unused=True)


LIBRARY = "triton+library"
"""The Triton path with the library's matrix products."""
CHOSEN = "chosen"
"""What runs where nothing is forced."""


@contextmanager
def path_of(provider: str):
    """Providers named after a path force it."""
    os.environ["MMD2V_KERNELS"] = _forced(provider)
    try:
        yield
    finally:
        del os.environ["MMD2V_KERNELS"]


def _forced(provider: str) -> str:
    if provider.startswith(CHOSEN):
        return "auto"
    if provider not in ("triton", "segmented", LIBRARY):
        return "reference"
    if provider == "segmented":
        return "expert_mlp=segmented,distill_target=reference,add_layer_norm=reference"
    product = "triton" if provider == "triton" else "segmented"
    parts = [f"expert_mlp/{part}={product}" for part in PARTS["expert_mlp"]]
    return ",".join([f"{operator}=triton" for operator in OFFERS] + parts)


def expert_problem(
    device: torch.device, dtype: torch.dtype, counts: Sequence[int], width: int, dropped: float = 0.0
) -> Problem:
    """A layer's MLP with two experts, contiguous rows, layer scale; some rows dropped by stochastic depth."""
    torch.manual_seed(0)
    hidden, total = 4 * width, sum(counts)

    def new(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (scale * torch.randn(shape, device=device)).to(dtype).requires_grad_()

    experts = [
        Expert(
            new(width),
            new(width),
            new(hidden, width, scale=width**-0.5),
            new(hidden),
            new(width, hidden, scale=hidden**-0.5),
            new(width),
            new(width),
        )
        for _ in counts
    ]
    x, gradient = new(total, width), torch.randn(total, width, device=device).to(dtype)
    stops = [sum(counts[: i + 1]) for i in range(len(counts))]
    rows = list(zip([0, *stops[:-1]], stops, strict=True))

    keep = torch.rand(total) >= dropped
    scale = None if not dropped else (keep / (1 - dropped)).to(dtype).to(device)

    def ours() -> torch.Tensor:
        return expert_mlp(x, experts, rows, norm="pre", row_scale_T=scale)

    forward: dict[str, Callable[[], Any]] = {"reference": ours, "segmented": ours, CHOSEN: ours}
    if triton_runs(device, dtype):
        forward["triton"] = forward[LIBRARY] = ours
    peers: list[torch.Tensor] = []
    if dropped:
        plan = leave_out(rows, keep.numpy(), device)

        def left_out() -> torch.Tensor:
            return expert_mlp(x, experts, plan.rows, norm="pre", row_scale_T=scale, index_R=plan.index_R)

        forward = {CHOSEN: ours, f"{CHOSEN}, left out": left_out, "compiled": torch.compile(ours)}
    elif len(counts) == 2 and importlib.util.find_spec("torchscale"):
        from torchscale_mlp import torchscale_mlp

        forward["torchscale"], peers = torchscale_mlp(x, experts, rows)
    if device.type == "cuda" and not dropped:
        forward["compiled"] = torch.compile(ours)
        if "torchscale" in forward:
            forward["torchscale compiled"] = torch.compile(forward["torchscale"])
        if hasattr(F, "grouped_mm"):
            offsets = torch.tensor(stops, dtype=torch.int32, device=device)
            forward["grouped_mm"] = lambda: grouped(x, experts, rows, offsets)

    def exact() -> torch.Tensor:
        wide = [Expert(*[t.detach().double() if isinstance(t, torch.Tensor) else t for t in e]) for e in experts]
        few = slice(None, None, max(1, total // 4096))
        of_few = None if scale is None else scale[few].double()
        return expert_mlp(x.detach()[few].double(), wide, sampled(rows, total), norm="pre", row_scale_T=of_few)

    tensors = [t for e in experts for t in e if isinstance(t, torch.Tensor)]
    operations = 3 * 2 * 2 * total * width * hidden
    shape = "+".join(map(str, counts)) + f"x{width}x{hidden}" + (f" {dropped:.0%} dropped" if dropped else "")
    return Problem(
        "expert_mlp", shape, dtype, total, "fwd+bwd", forward, gradient, [x, *tensors, *peers], exact, operations, 0.0,
    )  # fmt: skip


def sampled(rows: Sequence[tuple[int, int]], total: int) -> list[tuple[int, int]]:
    """The ranges of every n-th row."""
    step = max(1, total // 4096)
    return [(-(-start // step), -(-stop // step)) for start, stop in rows]


def grouped(
    x_TD: torch.Tensor, experts: Sequence[Expert], rows: Sequence[tuple[int, int]], offsets_E: torch.Tensor
) -> torch.Tensor:
    """torch's grouped product with plain elementwise operations around it."""
    sizes = [stop - start for start, stop in rows]

    def by_expert(place: str) -> list[torch.Tensor]:
        return [getattr(expert, place) for expert in experts]

    def spread(place: str) -> torch.Tensor:
        return torch.cat([t.expand(n, -1) for t, n in zip(by_expert(place), sizes, strict=True)])

    width = x_TD.shape[1:]
    parts = [
        F.layer_norm(x, width, e.norm_weight, e.norm_bias, e.eps)
        for x, e in zip(x_TD.split(sizes), experts, strict=True)
    ]
    fc1_EDF, fc2_EFD = (torch.stack(by_expert(p)).transpose(1, 2) for p in ("fc1_weight", "fc2_weight"))
    h_TF = F.gelu(F.grouped_mm(torch.cat(parts), fc1_EDF, offs=offsets_E) + spread("fc1_bias"))
    return x_TD + spread("layer_scale") * (F.grouped_mm(h_TF, fc2_EFD, offs=offsets_E) + spread("fc2_bias"))


def norm_problem(device: torch.device, dtype: torch.dtype, rows: int, width: int) -> Problem:
    torch.manual_seed(0)
    x, branch = (torch.randn(rows, width, device=device).to(dtype).requires_grad_() for _ in range(2))
    weight, bias = (torch.randn(width, device=device).to(dtype).requires_grad_() for _ in range(2))

    def ours() -> torch.Tensor:
        return add_layer_norm(x, branch, weight, bias)[1]

    forward: dict[str, Callable[[], Any]] = {"reference": ours, CHOSEN: ours}
    if triton_runs(device, dtype):
        forward["triton"] = ours
    if device.type == "cuda":
        forward["compiled"] = torch.compile(ours)

    def exact() -> torch.Tensor:
        step = max(1, rows // 4096)
        return add_layer_norm(*(t.detach().double() for t in (x[::step], branch[::step], weight, bias)))[1]

    return Problem(
        "add_layer_norm", f"{rows}x{width}", dtype, rows, "fwd+bwd", forward,
        torch.randn(rows, width, device=device).to(dtype), [x, branch, weight, bias], exact, 0.0,
        8.0 * rows * width * dtype.itemsize,
    )  # fmt: skip


def distill_problem(
    device: torch.device, dtype: torch.dtype, samples: int, tokens: int, width: int, layers: int, loss: bool
) -> Problem:
    torch.manual_seed(0)
    results = [torch.randn(samples, tokens, width, device=device).to(dtype) for _ in range(layers)]
    prediction = torch.randn(samples, tokens, width, device=device).to(dtype).requires_grad_()

    def ours() -> torch.Tensor:
        if loss:
            return distill_loss(results, prediction, final_layer_norm=True)
        return distill_target(results, final_layer_norm=True)

    forward: dict[str, Callable[[], Any]] = {"reference": ours, CHOSEN: ours}
    if triton_runs(device, dtype):
        forward["triton"] = ours
    if device.type == "cuda":
        forward["compiled"] = torch.compile(ours)

    def exact() -> torch.Tensor:
        few = [result[:2].double() for result in results]
        if loss:
            return distill_loss(few, prediction.detach()[:2].double(), final_layer_norm=True)
        return distill_target(few, final_layer_norm=True)

    elements = samples * tokens * width
    each = layers * dtype.itemsize  # once: what is read a second time may still be in the cache
    moved = elements * (each + (4 * dtype.itemsize if loss else 4))
    gradient = torch.rand(samples, tokens, device=device) if loss else None
    return Problem(
        "distill_loss" if loss else "distill_target", f"{layers}x{samples}x{tokens}x{width}", dtype, samples * tokens,
        "fwd+bwd" if loss else "fwd", forward, gradient, [prediction], exact, 0.0, moved,
    )  # fmt: skip


def triton_runs(device: torch.device, dtype: torch.dtype) -> bool:
    from mmd2v_kernels.dispatch import _no_triton

    return _no_triton(device, dtype) is None


def rates(device: torch.device, tiny: bool) -> tuple[float, float]:
    """Return operations a second of a large bf16 product and bytes a second of a large copy."""
    side, length = (256, 1 << 16) if tiny else (8192, 1 << 29)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    source, target = (torch.zeros(length, dtype=torch.uint8, device=device) for _ in range(2))
    taken = times_ms({"product": lambda: a @ b, "copy": lambda: target.copy_(source)}, 10, device)
    return 2e3 * side**3 / percentiles(taken["product"])[0], 2e3 * length / percentiles(taken["copy"])[0]


def measure(problem: Problem, device: torch.device, speed: tuple[float, float]) -> list[Row]:
    exact = problem.exact()
    errors = {}
    for provider, call in problem.forward.items():
        with path_of(provider), torch.no_grad():
            out = call()
        of_rows = problem.kernel in ("expert_mlp", "add_layer_norm")  # else of samples
        few = out[:: max(1, problem.rows // 4096)] if of_rows else out[:2]
        errors[provider] = relative_error(few, exact)
        limit = 50 * torch.finfo(problem.dtype).eps
        if not errors[provider] <= limit:
            raise ValueError(
                f"{problem.kernel} by {provider}: error {errors[provider]:.2g}, expected at most {limit:.2g}"
            )
    calls = {name: lambda name=name: problem.step(name) for name in problem.forward}
    rounds = ROUNDS if device.type == "cuda" else 2
    taken = times_ms(calls, rounds, device)
    floor = 1e3 * (problem.operations / speed[0] + problem.bytes / speed[1])
    own = {t.untyped_storage().data_ptr() for t in problem.inputs}
    rows = []
    for name in problem.forward:
        p50, p20, p80 = percentiles(taken[name])
        peak = peak_extra_megabytes(calls[name], device)

        def forward(name: str = name) -> Any:
            with path_of(name):
                return problem.forward[name]()

        saved = saved_megabytes(forward, own) if problem.gradient is not None else 0.0
        dtype = str(problem.dtype).removeprefix("torch.")
        numbers = (p50, p20, p80, peak, saved, floor, 100 * floor / p50, errors[name])
        rows.append(Row(problem.kernel, name, problem.mode, dtype, problem.shape, rounds, *numbers, **machine(device)))
        share = 100 * floor / p50
        print(f"{problem.kernel:<15} {problem.shape:<24} {name:<10} {p50:9.3f} ms  {share:5.1f} % of the floor")
    return rows


def problems(device: torch.device, tiny: bool) -> list[Callable[[], Problem]]:
    """Made one at a time, so that only one is in memory; the most telling first."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if tiny:
        return [
            lambda: expert_problem(device, dtype, (48, 16), 32),
            lambda: expert_problem(device, dtype, (48, 16), 32, dropped=0.1),
            lambda: norm_problem(device, dtype, 12, 32),
            lambda: distill_problem(device, dtype, 2, 5, 32, 2, False),
            lambda: distill_problem(device, dtype, 2, 5, 32, 2, True),
        ]
    return [
        lambda: expert_problem(device, dtype, (65536, 16384), 768),
        lambda: distill_problem(device, dtype, 256, 197, 768, 12, False),
        lambda: distill_problem(device, dtype, 256, 197, 768, 12, True),
        lambda: norm_problem(device, dtype, 81920, 768),
        lambda: expert_problem(device, dtype, (65536, 16384), 768, dropped=0.1),
        lambda: expert_problem(device, dtype, (8192, 2048), 768),
        lambda: expert_problem(device, dtype, (1536, 512), 768),
    ]


def proposal(rows: Sequence[Row], problem: Problem, device: torch.device) -> str:
    """The line of `measured` that these rows speak for."""
    ours = [row for row in rows if row.provider in ("triton", LIBRARY, "segmented", "reference")]
    if not ours:
        return ""
    best = min(ours, key=lambda row: row.p50_ms).provider.removesuffix("+library")
    operator = "distill_target" if problem.kernel == "distill_loss" else problem.kernel
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f'    Measurement("{operator}", "{name}", {problem.dtype}, {problem.rows}, "{best}"),'


def draw(path: Path, rows: Sequence[Row]) -> None:
    """Bars of the percentage of the floor."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 0.3 * len(rows) + 1))
    axes.barh([f"{r.kernel} {r.shape} {r.provider}" for r in rows], [r.percent_of_floor for r in rows])
    axes.invert_yaxis()
    axes.set_xlabel(f"% of the floor ({rows[0].device})")
    figure.savefig(path, bbox_inches="tight")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=240, help="no problem is begun after these")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type != "cuda" and not options.tiny:
        print("error: no CUDA device; --tiny rehearses on the CPU", file=sys.stderr)
        return 1
    start, speed = time.monotonic(), rates(device, options.tiny)
    print(f"products {speed[0] / 1e12:.1f} TFLOP/s, copy {speed[1] / 1e9:.0f} GB/s")
    done: list[Row] = []
    lines = []
    for make in problems(device, options.tiny):
        if time.monotonic() - start > options.seconds:
            print("out of time: the other problems are left out")
            break
        problem = make()
        rows = measure(problem, device, speed)
        append(options.out / "kernels.csv", rows)
        done += rows
        lines.append(proposal(rows, problem, device))
        del problem
        if device.type == "cuda":
            torch.cuda.empty_cache()
    (options.out / "measured.txt").write_text("\n".join(filter(None, lines)) + "\n", encoding="utf-8")
    draw(options.out / "kernels.svg", done)
    return 0


if __name__ == "__main__":
    sys.exit(main())
