"""Time exact retrieval against bare matrix products and other libraries, in one run, interleaved.

    benchmarks/retrieval/peer_environment.sh /tmp/peer      # once, some seconds
    /tmp/peer/bin/python benchmarks/retrieval/run.py --out benchmarks/results/retrieval_cpu.csv

appends a row an operator: median and 20th and 80th percentile of its wall time, the most memory it took beyond its
inputs, and the share of queries whose nearest rows are those of float64 scores, by score, then lowest index. Data are
random rows, L2-normalised, in fp32; each query leans on its positive so far that about half of them are found first.

`rank_count` is all of recall in both directions. `clip_benchmark` computes R@1, 5 and 10 with CLIP_benchmark's
functions and `open_clip` its metrics (which know one caption an image: only where both sides have as many rows).
`faiss` is the flat index of faiss-cpu; building it is not timed. `matmul` is the product alone, with all N × M scores
in memory; `matmul_topk` takes the product in chunks of rows and keeps their k best. bf16 products are timed where the
processor has them. Peers that are not installed are left out. What takes longer than 20 s is timed once.
"""

from __future__ import annotations

import csv
import ctypes
import importlib.util
import io
import math
import os
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from timeit import timeit
from typing import NamedTuple

import psutil
import torch
import tyro

import mmd2v
from mmd2v.errors import UserError
from mmd2v.files import check_output, write_text
from mmd2v.progress import Progress
from mmd2v.report.machine import processor
from mmd2v.train.run_dir import code_version
from mmd2v_kernels import cosine_topk, rank_count

HEADER = "kernel,provider,dtype,shape,repeats,p50_ms,p20_ms,p80_ms,peak_extra_mb,exact_percent,"
HEADER += "processor,threads,python,torch,mmd2v,commit\n"
CHUNK = 1024  # query rows of `matmul_topk` at a time
LARGEST_MATRIX = 1 << 30  # scores that `matmul` holds at once, 4 GiB
CHECKED = 256  # queries whose nearest rows are compared with those of float64 scores
LONG = 20_000  # milliseconds; what takes longer is timed in its first call alone
K = 10  # nearest rows to find, as R@10 needs them


@dataclass(frozen=True)
class Bench:
    """Time rank_count and cosine_topk against bare fp32 matrix products."""

    out: Path
    """CSV file that rows are appended to."""
    captions: int = 25_010
    """Queries, N; each belongs to one image. The defaults are the sizes of COCO's test set."""
    images: int = 5_000
    """Rows of the bank, M."""
    width: int = 768
    """Width of an embedding, D."""
    repeats: int = 10
    """Timed calls of each operator, after a first one that measures memory."""


def main(argv: Sequence[str]) -> int:
    """Measure and append the rows."""
    options = tyro.cli(Bench, args=list(argv), description=__doc__)
    if options.repeats < 2:
        raise UserError(f"--repeats: found {options.repeats}, expected at least 2 (percentiles need them)")
    check_output("--out", options.out)
    old = rows_so_far(options.out, HEADER)
    generator = torch.Generator().manual_seed(0)
    noise_ND, bank_MD = (
        torch.nn.functional.normalize(torch.randn(rows, options.width, generator=generator), dim=1)
        for rows in (options.captions, options.images)
    )
    captions_N = torch.arange(options.captions)
    positives_P2 = torch.stack([captions_N, captions_N * options.images // options.captions], dim=1)
    lean = min(0.9, math.sqrt(2 * math.log(options.images) / options.width))  # the best of that many random cosines
    queries_ND = lean * bank_MD[positives_P2[:, 1]] + math.sqrt(1 - lean * lean) * noise_ND
    queries_ND = torch.nn.functional.normalize(queries_ND, dim=1)
    del noise_ND
    problem = Problem(queries_ND, bank_MD, positives_P2)
    operators = chosen(problem)
    first = {name: first_call(problem, name, call) for name, call in operators.items()}
    times = {name: [one.milliseconds] if one.milliseconds > LONG else [] for name, one in first.items()}
    short = [name for name in operators if not times[name]]
    with Progress("timing", len(short) * options.repeats, unit="calls") as progress:
        for _ in range(options.repeats):
            for name in short:
                times[name].append(1000 * timeit(operators[name], number=1))
                progress.advance()
    shape = f"{options.captions}x{options.images}x{options.width}"
    machine = [processor(), torch.get_num_threads(), platform.python_version(), torch.__version__]
    machine += [mmd2v.__version__, code_version()]
    writer = csv.writer(new := io.StringIO(), lineterminator="\n")
    for name, taken in times.items():
        kernel, provider, dtype = name
        p20, _, _, p80 = quantiles(taken, n=5, method="inclusive") if len(taken) > 1 else taken * 4
        numbers = [f"{number:.3f}" for number in (median(taken), p20, p80, first[name].megabytes)]
        share = "" if first[name].exact_percent is None else f"{first[name].exact_percent:.2f}"
        print(
            f"{kernel:<12} {provider:<14} {dtype} {numbers[0]:>12} ms  ({numbers[1]} to {numbers[2]})"
            f"  {numbers[3]:>10} MB" + (f"  {share} % exact" if share else "")
        )
        writer.writerow([kernel, provider, dtype, shape, len(taken), *numbers, share, *machine])
    write_text(options.out, old + new.getvalue())
    return 0


@dataclass(frozen=True)
class Problem:
    """What is searched."""

    queries_ND: torch.Tensor
    bank_MD: torch.Tensor
    positives_P2: torch.Tensor

    def exact_percent(self, found: object) -> float:
        """Return the share of the first queries whose nearest rows are the exact ones, in order."""
        index = torch.as_tensor(found[-1]) if isinstance(found, tuple) else torch.cat([part.indices for part in found])
        number = min(CHECKED, len(self.queries_ND))
        os.environ["MMD2V_KERNELS"] = "cosine_topk=reference"
        try:
            exact = cosine_topk(self.queries_ND[:number], self.bank_MD, K)[1]
        finally:
            del os.environ["MMD2V_KERNELS"]
        return 100 * (index[:number] == exact).all(1).double().mean().item()


class FirstCall(NamedTuple):
    """What the first call of an operator tells."""

    milliseconds: float
    megabytes: float
    exact_percent: float | None


def first_call(problem: Problem, name: tuple[str, str, str], call: Callable[[], object]) -> FirstCall:
    """Call once: for memory, for what is found, and for the time where it is long."""
    results: list[object] = []
    times: list[float] = []
    megabytes = peak_extra_megabytes(lambda: times.append(1000 * timeit(lambda: results.append(call()), number=1)))
    exact = problem.exact_percent(results[0]) if name[0] in _NEAREST else None
    return FirstCall(times[0], megabytes, exact)


_NEAREST = ("cosine_topk", "matmul_topk")


def chosen(problem: Problem) -> dict[tuple[str, str, str], Callable[[], object]]:
    """Return what is timed, by (kernel, provider, dtype)."""
    queries_ND, bank_MD, positives_P2 = problem.queries_ND, problem.bank_MD, problem.positives_P2
    scores = len(queries_ND) * len(bank_MD)
    calls: dict[tuple[str, str, str], Callable[[], object]] = {
        ("rank_count", "mmd2v", "fp32"): lambda: rank_count(queries_ND, bank_MD, positives_P2),
        ("cosine_topk", "mmd2v", "fp32"): lambda: cosine_topk(queries_ND, bank_MD, K),
        ("matmul_topk", "torch", "fp32"): lambda: matmul_topk(queries_ND, bank_MD),
    }
    if scores <= LARGEST_MATRIX:
        calls["matmul", "torch", "fp32"] = lambda: queries_ND @ bank_MD.t()
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        half_ND, half_MD = queries_ND.bfloat16(), bank_MD.bfloat16()
        calls["matmul_topk", "torch", "bf16"] = lambda: matmul_topk(half_ND, half_MD)
        if scores <= LARGEST_MATRIX:
            calls["matmul", "torch", "bf16"] = lambda: half_ND @ half_MD.t()
    if importlib.util.find_spec("faiss"):
        calls["cosine_topk", "faiss", "fp32"] = faiss_flat(queries_ND, bank_MD)
    if importlib.util.find_spec("clip_benchmark") and scores <= LARGEST_MATRIX:
        calls["rank_count", "clip_benchmark", "fp32"] = clip_benchmark_recall(problem)
    if importlib.util.find_spec("open_clip_train") and len(queries_ND) == len(bank_MD):
        from open_clip_train.train import get_clip_metrics

        calls["rank_count", "open_clip", "fp32"] = lambda: get_clip_metrics(bank_MD, queries_ND, torch.tensor(1.0))
    return calls


def matmul_topk(queries_ND: torch.Tensor, bank_MD: torch.Tensor) -> list[torch.return_types.topk]:
    """Return scores and indices of the K best, in chunks of queries: not exact in fp32, and ties in any order."""
    return [(rows @ bank_MD.t()).topk(K) for rows in queries_ND.split(CHUNK)]


def clip_benchmark_recall(problem: Problem) -> Callable[[], object]:
    """Return what CLIP_benchmark's evaluation does with the embeddings, at 1, 5 and 10."""
    from clip_benchmark.metrics.zeroshot_retrieval import batchify, recall_at_k

    def recall() -> list[float]:
        scores_NM = problem.queries_ND @ problem.bank_MD.t()
        positive_NM = torch.zeros_like(scores_NM, dtype=torch.bool)
        positive_NM[problem.positives_P2[:, 0], problem.positives_P2[:, 1]] = True
        sides = (scores_NM, positive_NM), (scores_NM.T, positive_NM.T)
        return [
            (batchify(recall_at_k, *side, 64, "cpu", k=k) > 0).float().mean().item()
            for k in (1, 5, 10)
            for side in sides
        ]

    return recall


def faiss_flat(queries_ND: torch.Tensor, bank_MD: torch.Tensor) -> Callable[[], tuple[object, object]]:
    """Return the search in an index that holds the bank; building it is not timed."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(bank_MD.shape[1])
    index.add(bank_MD.numpy())
    return lambda: index.search(queries_ND.numpy(), K)


def peak_extra_megabytes(call: Callable[[], object]) -> float:
    """Call once and return how far the process's memory rose meanwhile (Linux, glibc)."""
    ctypes.CDLL(None).malloc_trim(0)  # what earlier calls freed would otherwise serve this one uncounted
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back to the present
    before = psutil.Process().memory_info().rss
    call()
    kibibytes = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
    return max(0, 1024 * kibibytes - before) / 1e6


def rows_so_far(path: Path, header: str) -> str:
    """Return the CSV text that rows are added to. Raises UserError if it has other columns."""
    old = path.read_text(encoding="utf-8") if path.exists() else header
    if not old.startswith(header):
        raise UserError(f"--out: {path} has other columns, expected {header.rstrip()}")
    return old


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        sys.exit(f"error: {error}")
