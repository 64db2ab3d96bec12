"""Time exact retrieval on a GPU against chunked matmul + topk, in one run, interleaved, with a backlog of work.

    PYTHONPATH=kernels:benchmarks/kernels python benchmarks/retrieval/gpu.py --out FOLDER [--seconds 100] [--tiny]

writes retrieval.csv, retrieval.svg (where matplotlib is there) and measured.txt, the rows that
`mmd2v_kernels.measured` would need. Only torch and Triton are imported. Embeddings are random unit rows; each query
leans on its positive so far that about half of them are found first. `exact` is the share of some rows whose indices
(for `rank_count`: rank) are those of float64. `matmul_topk` finds the k best in one direction, from chunks of the
scores in fp32, tf32 or bf16; `rank_count` gives the ranks in both. The floor is that of one 16-bit product or of
reading the embeddings once, whichever is longer, at rates measured here. `--tiny` is a rehearsal that runs on a CPU
too and whose figures mean nothing.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from measuring import machine, peak_extra_megabytes, percentiles, times_ms

from mmd2v_kernels import cosine_topk, rank_count

SCORES = 1 << 28
"""Scores that `matmul_topk` has in memory at once: 1 GiB in fp32."""
SAMPLED = 64
OPERATORS = ("rank_count", "cosine_topk", "contrastive", "siglip")


@dataclass(frozen=True)
class Row:
    """One line of the CSV."""

    kernel: str
    provider: str
    dtype: str
    """Of the embeddings."""
    shape: str
    k: int
    repeats: int
    p50_ms: float
    p20_ms: float
    p80_ms: float
    peak_extra_mb: float
    floor_ms: float
    percent_of_floor: float
    exact: float
    device: str
    threads: int
    python: str
    torch: str
    triton: str
    commit: str


@dataclass(frozen=True)
class Shape:
    """Queries, bank rows, width, k; the dtype of the embeddings; what is timed besides the kernels."""

    n: int
    m: int
    width: int
    k: int = 10
    dtype: torch.dtype = torch.float32
    peers: tuple[str, ...] = ("fp32", "tf32", "bf16")
    host: bool = False
    """The bank lies in host memory."""


def shapes(tiny: bool) -> list[Shape]:
    """The most telling first."""
    if tiny:
        return [Shape(20, 600, 32, 3, peers=("fp32", "bf16", "reference")), Shape(3, 900, 16, 2, peers=("fp32",))]
    return [
        Shape(25_010, 5_000, 768, peers=("fp32", "tf32", "bf16", "reference")),
        Shape(25_000, 1_000_000, 768),
        Shape(64, 1_000_000, 768, peers=("fp32", "tf32", "bf16", "reference")),
        Shape(25_000, 250_000, 768),
        Shape(25_000, 1_000_000, 768, dtype=torch.bfloat16, peers=("bf16",)),
        Shape(64, 1_000_000, 768, dtype=torch.bfloat16, peers=("bf16",)),
        Shape(25_000, 250_000, 768, k=100),
        Shape(25_000, 1_000_000, 512),
        Shape(25_010, 5_000, 512),
        Shape(64, 1_000_000, 768, peers=(), host=True),
    ]


def embeddings(shape: Shape, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Query i belongs to bank row i % M; its score there is about the best of all the others."""
    generator = torch.Generator(device).manual_seed(0)
    bank_MD = torch.empty(shape.m, shape.width, dtype=shape.dtype, device=device)
    for rows in bank_MD.split(1 << 16):  # so that no second bank is in memory
        rows.copy_(F.normalize(torch.randn(rows.shape, generator=generator, device=device), dim=1))
    lean = min(0.9, math.sqrt(2 * math.log(shape.m) / shape.width))
    own_N = torch.arange(shape.n, device=device) % shape.m
    noise_ND = F.normalize(torch.randn(shape.n, shape.width, generator=generator, device=device), dim=1)
    queries_ND = F.normalize(lean * bank_MD[own_N].float() + math.sqrt(1 - lean * lean) * noise_ND, dim=1)
    return queries_ND.to(shape.dtype), bank_MD


def by_path(path: str, call: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        os.environ["MMD2V_KERNELS"] = ",".join(f"{operator}={path}" for operator in OPERATORS)
        try:
            return call()
        finally:
            del os.environ["MMD2V_KERNELS"]

    return run


def matmul_topk(
    queries_ND: torch.Tensor, bank_MD: torch.Tensor, k: int, precision: str
) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    """Take chunks of rows that keep the scores within `SCORES`, in fp32, tf32, or bf16 with bf16 scores."""
    wanted = torch.bfloat16 if precision == "bf16" else torch.float32
    queries_ND, bank_MD = queries_ND.to(wanted), bank_MD.to(wanted)

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        rows = max(1, min(len(queries_ND), SCORES // len(bank_MD)))
        found = [(chunk @ bank_MD.t()).topk(k) for chunk in queries_ND.split(rows)]
        torch.backends.cuda.matmul.allow_tf32 = False
        return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])

    return run


def exact_rows(
    queries_ND: torch.Tensor, bank_MD: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return some rows, their k best in float64 and the rank of their positive."""
    chosen = torch.linspace(0, len(queries_ND) - 1, min(SAMPLED, len(queries_ND))).long().to(queries_ND.device)
    queries_sD = queries_ND[chosen].double()
    scores_sM = torch.cat([queries_sD @ rows.to(queries_ND.device).double().t() for rows in bank_MD.split(1 << 16)], 1)
    own_s1 = (chosen % len(bank_MD))[:, None]
    rank_s = (scores_sM > scores_sM.gather(1, own_s1)).sum(1)
    return chosen, scores_sM.topk(k).indices, rank_s


def measure(shape: Shape, device: torch.device, speed: tuple[float, float], ours: str) -> list[Row]:
    queries_ND, bank_MD = embeddings(shape, device)
    own_N = torch.arange(shape.n, device=device)
    positives = torch.stack([own_N, own_N % shape.m], 1)
    chosen, index_sk, rank_s = exact_rows(queries_ND, bank_MD, shape.k)
    searched_MD = bank_MD.cpu() if shape.host else bank_MD

    def nearest() -> object:
        return cosine_topk(queries_ND, searched_MD, shape.k)

    def ranks() -> object:
        return rank_count(queries_ND, bank_MD, positives)

    calls: dict[tuple[str, str], Callable[[], object]] = {
        ("cosine_topk", ours + (" from host memory" if shape.host else "")): by_path(ours, nearest)
    }
    if not shape.host:
        calls["rank_count", ours] = by_path(ours, ranks)
    for peer in shape.peers:
        if peer == "reference":
            calls["cosine_topk", peer] = by_path(peer, nearest)
            calls["rank_count", peer] = by_path(peer, ranks)
        else:
            calls["matmul_topk", peer] = matmul_topk(queries_ND, bank_MD, shape.k, peer)
    share = {}
    for name, call in calls.items():
        found = call()
        same = found[0][chosen] == rank_s if name[0] == "rank_count" else (found[1][chosen] == index_sk).all(1)
        share[name] = float(same.double().mean())
        del found
    start = time.perf_counter()
    peaks = {name: peak_extra_megabytes(call, device) for name, call in calls.items()}
    round_s = time.perf_counter() - start
    repeats = 2 if device.type != "cuda" else max(3, min(20, int(8 / round_s)))
    taken = times_ms(calls, repeats, device)
    itemsize = shape.dtype.itemsize
    floor = 1e3 * max(
        2 * shape.n * shape.m * shape.width / speed[0], (shape.n + shape.m) * shape.width * itemsize / speed[1]
    )
    text, dtype = f"{shape.n}x{shape.m}x{shape.width}", str(shape.dtype).removeprefix("torch.")
    rows = []
    for (kernel, provider), times in taken.items():
        p50, p20, p80 = percentiles(times)
        name = (kernel, provider)
        numbers = (p50, p20, p80, peaks[name], floor, 100 * floor / p50, share[name])
        rows.append(Row(kernel, provider, dtype, text, shape.k, repeats, *numbers, **machine(device)))
        print(
            f"{kernel:<12} {provider:<24} {dtype:<9} {text:<18} k={shape.k:<4} {p50:10.3f} ms {peaks[name]:9.0f} MB "
            f"{100 * floor / p50:5.1f} % of the floor, {share[name]:.3f} exact",
            flush=True,
        )
    return rows


def rates(device: torch.device, tiny: bool) -> tuple[float, float]:
    """Return operations a second of a large fp16 product and bytes a second of a large copy."""
    side, length = (256, 1 << 16) if tiny else (8192, 1 << 29)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    source, target = (torch.zeros(length, dtype=torch.uint8, device=device) for _ in range(2))
    taken = times_ms({"product": lambda: a @ b, "copy": lambda: target.copy_(source)}, 10, device)
    return 2e3 * side**3 / percentiles(taken["product"])[0], 2e3 * length / percentiles(taken["copy"])[0]


def write(path: Path, rows: Sequence[Row]) -> None:
    """Write the whole CSV anew, by a temporary file."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([field.name for field in fields(Row)])
        for row in rows:
            writer.writerow([f"{value:.4g}" if isinstance(value, float) else value for value in asdict(row).values()])
    temporary.replace(path)


def write_lines(path: Path, lines: Sequence[str]) -> None:
    """Write them by a temporary file."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    temporary.replace(path)


def proposals(rows: Sequence[Row], device: torch.device) -> list[str]:
    """Return the lines of `measured` that rows of one shape speak for, where there are both paths."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    lines = []
    for kernel in OPERATORS:
        paths = [row for row in rows if row.kernel == kernel and row.provider in ("triton", "reference")]
        if len(paths) > 1:
            best = min(paths, key=lambda row: row.p50_ms)
            queries = best.shape.split("x")[0]
            lines.append(f'    Measurement("{kernel}", "{name}", torch.{best.dtype}, {queries}, "{best.provider}"),')
    return lines


def draw(path: Path, rows: Sequence[Row]) -> None:
    """Bars of the time, with the floor."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 0.3 * len(rows) + 1))
    names = [f"{r.shape} {r.dtype} k={r.k} {r.kernel} {r.provider}" for r in rows]
    axes.barh(names, [r.p50_ms for r in rows], label="median")
    axes.plot([r.floor_ms for r in rows], range(len(rows)), "k|", label="floor")
    axes.set_xscale("log")
    axes.invert_yaxis()
    axes.legend()
    axes.set_xlabel(f"ms ({rows[0].device})")
    figure.savefig(path, bbox_inches="tight")


def options_of(about: str | None, seconds: float) -> argparse.Namespace:
    """Return --out, --seconds and --tiny of the command line; without a CUDA device only the last runs."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=seconds, help="no shape is begun after these")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.tiny:
        parser.exit(1, "error: no CUDA device; --tiny rehearses on the CPU\n")
    options.out.mkdir(parents=True, exist_ok=True)
    return options


def main() -> int:
    options = options_of(__doc__, seconds=100)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    start, speed = time.monotonic(), rates(device, options.tiny)
    print(f"products {speed[0] / 1e12:.1f} TFLOP/s, copy {speed[1] / 1e9:.0f} GB/s")
    ours = "triton" if device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1" else "reference"
    done: list[Row] = []
    lines: list[str] = []
    for shape in shapes(options.tiny):
        if time.monotonic() - start > options.seconds:
            print("out of time: the other shapes are left out")
            break
        rows = measure(shape, device, speed, ours)
        done += rows
        lines += proposals(rows, device)
        write(options.out / "retrieval.csv", done)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    write_lines(options.out / "measured.txt", lines)
    draw(options.out / "retrieval.svg", done)
    return 0


if __name__ == "__main__":
    sys.exit(main())
