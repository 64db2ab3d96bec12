"""Time the contrastive losses on a GPU, forward and backward, against torch's plain forms, in one run, interleaved.

    export PYTHONPATH=kernels:benchmarks/kernels
    python benchmarks/retrieval/contrastive_gpu.py --out FOLDER [--seconds 25] [--tiny]

writes contrastive.csv, contrastive.svg (where matplotlib is there) and contrastive_measured.txt, the rows that
`mmd2v_kernels.measured` would need. Only torch and Triton are imported, and open_clip's losses measured beside them
where it is there. `triton` and `reference` take the logits in chunks; `torch` has all of them at once, from one product
for both directions, in fp32 as ours. `exact` is the share of losses within 1e-5 of float64. The floor is that of the
fp32 products that no form can do without (three, of several ranks' contrastive loss three a direction), at a rate
measured here. `--tiny` is a rehearsal that runs on a CPU too and whose figures mean nothing.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from gpu import Row, by_path, draw, options_of, proposals, write, write_lines
from measuring import machine, peak_extra_megabytes, percentiles, times_ms

from mmd2v_kernels import contrastive, siglip

MATRICES = 7  # of all logits in fp32 that the plain forms hold at their highest

RANKS = 8
"""Each batch is measured as one rank has it, and as one of so many does, with the embeddings of all gathered."""

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]
"""(images, texts, inverse temperature, bias, pairs of this rank: the first ones) → loss"""


def by_contrastive(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor, _: object, own: int) -> torch.Tensor:
    owner = torch.arange(len(text), device=text.device)
    here = (image, text) if own == len(image) else (image[:own], text[:own])
    return contrastive(*here, image, text, owner[:own], owner, 0, scale)


def by_siglip(
    image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, own: int
) -> torch.Tensor:
    return siglip(image[:own], text, torch.arange(len(text), device=text.device), 0, scale, bias, own)


def plain_contrastive(
    image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor, _: object, own: int
) -> torch.Tensor:
    labels, logits = torch.arange(own, device=text.device), scale * image[:own] @ text.T
    of_texts = logits.T if own == len(image) else scale * text[:own] @ image.T
    return (F.cross_entropy(logits, labels) + F.cross_entropy(of_texts, labels)) / 2


def plain_siglip(
    image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, own: int
) -> torch.Tensor:
    sign = 2 * torch.eye(own, len(text), device=text.device) - 1
    return -F.logsigmoid(sign * (scale * image[:own] @ text.T + bias)).sum() / own


def losses(ours: str, ranks: int) -> dict[tuple[str, str], Loss]:
    """Return the losses that can run here, by (loss, provider)."""
    found: dict[tuple[str, str], Loss] = {}
    for name, chunked, plain in (
        ("contrastive", by_contrastive, plain_contrastive),
        ("siglip", by_siglip, plain_siglip),
    ):
        for path in dict.fromkeys((ours, "reference")):
            found[name, path] = lambda *inputs, path=path, chunked=chunked: by_path(path, lambda: chunked(*inputs))()
        found[name, "torch"] = plain
    if ranks == 1 and importlib.util.find_spec("open_clip"):
        from open_clip.loss import ClipLoss, SigLipLoss

        found["contrastive", "open_clip"] = lambda image, text, scale, bias, own: ClipLoss()(image, text, scale)
        found["siglip", "open_clip"] = lambda image, text, scale, bias, own: SigLipLoss()(image, text, scale, bias)
    return found


def measure(batch: int, width: int, ranks: int, device: torch.device, speed: float, ours: str) -> list[Row]:
    generator = torch.Generator(device).manual_seed(0)
    image, noise = (F.normalize(torch.randn(batch, width, generator=generator, device=device), dim=1) for _ in range(2))
    text = F.normalize(image + 1.5 * noise, dim=1)
    scale, bias = (torch.tensor([value], device=device) for value in (20.0, -10.0))
    inputs, own = [tensor.requires_grad_() for tensor in (image, text, scale, bias)], batch // ranks
    exact = exact_losses(*(tensor.detach() for tensor in inputs), own)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 1 << 31
    fits = MATRICES * 4 * own * batch < free

    def step(loss: Loss) -> torch.Tensor:
        for tensor in inputs:
            tensor.grad = None
        value = loss(*inputs, own)
        value.backward()
        return value.detach()

    calls, share = {}, {}
    for name, loss in losses(ours, ranks).items():
        if name[1] in (ours, "reference") or fits:
            calls[name] = lambda loss=loss: step(loss)
            share[name] = float((calls[name]().double() - exact[name[0]]).abs() < 1e-5 * exact[name[0]].abs())
    start = time.perf_counter()
    peaks = {name: peak_extra_megabytes(call, device) for name, call in calls.items()}
    repeats = 2 if device.type != "cuda" else max(3, min(20, int(4 / (time.perf_counter() - start))))
    product = 2e3 * own * batch * width / speed
    rows = []
    for name, taken in times_ms(calls, repeats, device).items():
        p50, p20, p80 = percentiles(taken)
        floor = product * (3 if ranks == 1 or name[0] == "siglip" else 6)
        numbers = (p50, p20, p80, peaks[name], floor, 100 * floor / p50, share[name])
        rows.append(Row(*name, "float32", f"{own}x{batch}x{width}", 0, repeats, *numbers, **machine(device)))
        print(
            f"{name[0]:<12} {name[1]:<12} {own}x{batch}x{width} {p50:10.3f} ms {peaks[name]:9.0f} MB "
            f"{100 * floor / p50:5.1f} % of the floor, {share[name]:.0f} exact",
            flush=True,
        )
    return rows


def exact_losses(
    image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, own: int
) -> dict[str, torch.Tensor]:
    """Return each loss of the first ``own`` pairs in float64, some rows at a time."""
    image, text, scale, bias = (tensor.double() for tensor in (image, text, scale, bias))
    total = {name: torch.zeros((), device=image.device).double() for name in ("contrastive", "siglip")}
    for left, right in ((image, text), (text, image)):
        for chosen in torch.arange(own, device=image.device).split(1024):
            logits = scale * left[chosen] @ right.T
            total["contrastive"] += (logits.logsumexp(1) - logits.gather(1, chosen[:, None])[:, 0]).sum() / (2 * own)
            if left is image:
                sign = torch.ones_like(logits).scatter_(1, chosen[:, None], -1.0)
                total["siglip"] += F.softplus(sign * (logits + bias)).sum() / own
    return total


def fp32_rate(device: torch.device, tiny: bool) -> float:
    """Return operations a second of a large fp32 product."""
    side = 256 if tiny else 8192
    a, b = (torch.randn(side, side, device=device) for _ in range(2))
    return 2e3 * side**3 / percentiles(times_ms({"product": lambda: a @ b}, 10, device)["product"])[0]


def main() -> int:
    options = options_of(__doc__, seconds=25)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    start, speed = time.monotonic(), fp32_rate(device, options.tiny)
    print(f"fp32 products {speed / 1e12:.1f} TFLOP/s")
    ours = "triton" if device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1" else "reference"
    done: list[Row] = []
    lines: list[str] = []
    batches = [(40, 16)] if options.tiny else [(16_384, 512), (4096, 512), (32_768, 512), (1024, 512)]
    for (batch, width), ranks in itertools.product(batches, (1, RANKS)):
        if time.monotonic() - start > options.seconds:
            print("out of time: the other sizes are left out")
            break
        rows = measure(batch, width, ranks, device, speed, ours)
        done += rows
        if ranks == 1:  # `measured` knows the rows alone, and one rank's are those of all
            lines += proposals(rows, device)
        write(options.out / "contrastive.csv", done)
        write_lines(options.out / "contrastive_measured.txt", lines)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    draw(options.out / "contrastive.svg", done)
    return 0


if __name__ == "__main__":
    sys.exit(main())
