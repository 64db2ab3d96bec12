"""Time and memory of the contrastive losses against open_clip's, forward and backward, in one run, interleaved.

    benchmarks/retrieval/peer_environment.sh /tmp/peer      # once, some seconds
    /tmp/peer/bin/python benchmarks/retrieval/contrastive.py --out benchmarks/results/contrastive_cpu.csv

appends a row a loss and batch size: median and 20th and 80th percentile of the wall time of forward and backward, and
the most memory beyond the embeddings. `mmd2v` are `contrastive` and `siglip`, which take the logits in chunks;
`open_clip` are its ClipLoss and SigLipLoss, `torch` the plain form of the first with the logits of both directions from
one product. A batch is left out of a form whose logits would not fit into the memory that is free.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from timeit import timeit

import psutil
import torch
import torch.nn.functional as F
import tyro
from run import peak_extra_megabytes, rows_so_far

import mmd2v
from mmd2v.errors import UserError
from mmd2v.files import check_output, write_text
from mmd2v.report.machine import processor
from mmd2v.train.run_dir import code_version
from mmd2v_kernels import contrastive, siglip

HEADER = "loss,provider,batch,width,repeats,p50_ms,p20_ms,p80_ms,peak_extra_mb,loss_value,"
HEADER += "processor,threads,python,torch,mmd2v,commit\n"
MATRICES = 7  # of all logits in fp32 that the plain forms hold at their highest

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(images, texts, inverse temperature, bias) → loss"""


@dataclass(frozen=True)
class Bench:
    """Time contrastive losses."""

    out: Path
    """CSV file that rows are appended to."""
    batches: tuple[int, ...] = (1024, 4096, 16_384, 32_768)
    """Pairs."""
    width: int = 512
    """Width of an embedding."""
    repeats: int = 3
    """Timed calls of each loss, after one that measures memory."""


def main(argv: Sequence[str]) -> int:
    """Measure and append the rows."""
    options = tyro.cli(Bench, args=list(argv), description=__doc__)
    if options.repeats < 2:
        raise UserError(f"--repeats: found {options.repeats}, expected at least 2 (percentiles need them)")
    check_output("--out", options.out)
    old = rows_so_far(options.out, HEADER)
    writer = csv.writer(new := io.StringIO(), lineterminator="\n")
    machine = [processor(), torch.get_num_threads(), platform.python_version(), torch.__version__]
    machine += [mmd2v.__version__, code_version()]
    for batch in options.batches:
        for (loss, provider), (times, memory, value) in measure(batch, options.width, options.repeats).items():
            p20, _, _, p80 = quantiles(times, n=5, method="inclusive")
            numbers = [f"{number:.3f}" for number in (median(times), p20, p80, memory)]
            print(f"{batch:6} {loss:<12} {provider:<10} {numbers[0]:>12} ms {numbers[3]:>10} MB  loss {value:.6f}")
            writer.writerow([loss, provider, batch, options.width, options.repeats, *numbers, f"{value:.7f}", *machine])
        write_text(options.out, old + new.getvalue())
    return 0


def measure(batch: int, width: int, repeats: int) -> dict[tuple[str, str], tuple[list[float], float, float]]:
    """Return times in milliseconds, memory in megabytes and the value of each loss."""
    generator = torch.Generator().manual_seed(0)
    image_BD = F.normalize(torch.randn(batch, width, generator=generator), dim=1)
    text_BD = F.normalize(image_BD + 1.5 * F.normalize(torch.randn(batch, width, generator=generator), dim=1), dim=1)
    scale, bias = torch.tensor([20.0], requires_grad=True), torch.tensor([-10.0], requires_grad=True)
    inputs = image_BD.requires_grad_(), text_BD.requires_grad_(), scale, bias
    values: dict[tuple[str, str], float] = {}

    def step(name: tuple[str, str], loss: Loss) -> None:
        for tensor in inputs:
            tensor.grad = None
        value = loss(*inputs)
        value.backward()
        values[name] = value.item()

    fits = MATRICES * 4 * batch * batch < psutil.virtual_memory().available
    chosen = {name: loss for name, loss in losses().items() if name[1] == "mmd2v" or fits}
    memory = {}
    for name, loss in chosen.items():
        for tensor in inputs:
            tensor.grad = None
        memory[name] = peak_extra_megabytes(lambda name=name, loss=loss: step(name, loss))
    times: dict[tuple[str, str], list[float]] = {name: [] for name in chosen}
    for _ in range(repeats):
        for name, loss in chosen.items():
            times[name].append(1000 * timeit(lambda name=name, loss=loss: step(name, loss), number=1))
    return {name: (times[name], memory[name], values[name]) for name in chosen}


def losses() -> dict[tuple[str, str], Loss]:
    """Return the losses that are installed, by (loss, provider)."""
    found: dict[tuple[str, str], Loss] = {
        ("contrastive", "mmd2v"): _contrastive,
        ("siglip", "mmd2v"): lambda image, text, scale, bias: siglip(
            image, text, torch.arange(len(text)), 0, scale, bias, len(text)
        ),
        ("contrastive", "torch"): _plain,
    }
    if importlib.util.find_spec("open_clip"):
        from open_clip.loss import ClipLoss, SigLipLoss

        found["contrastive", "open_clip"] = lambda image, text, scale, bias: ClipLoss()(image, text, scale)
        found["siglip", "open_clip"] = lambda image, text, scale, bias: SigLipLoss()(image, text, scale, bias)
    return found


def _contrastive(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    owner = torch.arange(len(text))
    return contrastive(image, text, image, text, owner, owner, 0, scale)


def _plain(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    logits, own = scale * image @ text.T, torch.arange(len(text))
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        sys.exit(f"error: {error}")
