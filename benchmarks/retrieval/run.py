"""Time exact retrieval against bare matrix products of the same size, in one run, interleaved.

    python benchmarks/retrieval/run.py --out benchmarks/results/retrieval.csv

appends a row an operator: median and 20th and 80th percentile of its wall time, and the most memory it took beyond
its inputs. Data are random rows, L2-normalised, in fp32; each query leans on its positive so far that about half of
them are found first. `faiss` is the flat index of faiss-cpu, where that is installed. `matmul` is the product alone,
with all N × M scores in memory; `matmul_topk` takes the product in chunks of rows and keeps their k best in fp32,
which is not exact.
"""

from __future__ import annotations

import csv
import ctypes
import importlib.util
import io
import math
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from timeit import timeit

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

HEADER = "kernel,provider,dtype,shape,repeats,p50_ms,p20_ms,p80_ms,peak_extra_mb,"
HEADER += "processor,threads,python,torch,mmd2v,commit\n"
CHUNK = 1024  # query rows of `matmul_topk` at a time
LARGEST_MATRIX = 1 << 30  # scores that `matmul` holds at once, 4 GiB
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
    """Timed calls of each operator, after one that measures memory."""


def main(argv: Sequence[str]) -> int:
    """Measure and append the rows."""
    options = tyro.cli(Bench, args=list(argv), description=__doc__)
    if options.repeats < 2:
        raise UserError(f"--repeats: found {options.repeats}, expected at least 2 (percentiles need them)")
    check_output("--out", options.out)
    old = rows_so_far(options.out)
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
    operators: dict[tuple[str, str], Callable[[], object]] = {
        ("rank_count", "mmd2v"): lambda: rank_count(queries_ND, bank_MD, positives_P2),
        ("cosine_topk", "mmd2v"): lambda: cosine_topk(queries_ND, bank_MD, K),
        ("matmul", "torch"): lambda: queries_ND @ bank_MD.t(),
        ("matmul_topk", "torch"): lambda: [(rows @ bank_MD.t()).topk(K) for rows in queries_ND.split(CHUNK)],
    }
    if options.captions * options.images > LARGEST_MATRIX:
        del operators["matmul", "torch"]
    if importlib.util.find_spec("faiss"):
        operators["cosine_topk", "faiss"] = faiss_flat(queries_ND, bank_MD)
    memory = {name: peak_extra_megabytes(call) for name, call in operators.items()}
    times: dict[tuple[str, str], list[float]] = {name: [] for name in operators}
    with Progress("timing", len(operators) * options.repeats, unit="calls") as progress:
        for _ in range(options.repeats):
            for name, call in operators.items():
                times[name].append(1000 * timeit(call, number=1))
                progress.advance()
    shape = f"{options.captions}x{options.images}x{options.width}"
    machine = [processor(), torch.get_num_threads(), platform.python_version(), torch.__version__]
    machine += [mmd2v.__version__, code_version()]
    writer = csv.writer(new := io.StringIO(), lineterminator="\n")
    for (kernel, provider), taken in times.items():
        p20, _, _, p80 = quantiles(taken, n=5, method="inclusive")
        numbers = [f"{number:.3f}" for number in (median(taken), p20, p80, memory[kernel, provider])]
        print(f"{kernel:<12} {provider:<6} {numbers[0]:>12} ms  ({numbers[1]} to {numbers[2]})  {numbers[3]:>10} MB")
        writer.writerow([kernel, provider, "fp32", shape, options.repeats, *numbers, *machine])
    write_text(options.out, old + new.getvalue())
    return 0


def faiss_flat(queries_ND: torch.Tensor, bank_MD: torch.Tensor) -> Callable[[], object]:
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


def rows_so_far(path: Path) -> str:
    """Return the CSV text that rows are added to. Raises UserError if it has other columns."""
    old = path.read_text(encoding="utf-8") if path.exists() else HEADER
    if not old.startswith(HEADER):
        raise UserError(f"--out: {path} has other columns, expected {HEADER.rstrip()}")
    return old


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        sys.exit(f"error: {error}")
