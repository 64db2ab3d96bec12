"""Time the contrastive losses on a GPU, forward and backward, against torch's plain forms, in one run, interleaved.

    export PYTHONPATH=kernels:benchmarks/kernels
    python benchmarks/retrieval/contrastive_gpu.py --out FOLDER [--seconds 25] [--tiny]

writes contrastive.csv, contrastive.svg (where matplotlib is there) and contrastive_measured.txt, the rows that
`mmd2v_kernels.measured` would need. Only torch and Triton are imported, and open_clip's losses measured beside them
where it is there. `triton` and `reference` take the logits in chunks; `torch` has all of them at once, from one product
for both directions, in fp32 as ours. `exact` is the share of losses within 1e-5 of float64. The floor is that of the
three fp32 products that no form can do without, at a rate measured here. `--tiny` is a rehearsal that runs on a CPU too
and whose figures mean nothing.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from gpu import Row, by_path, draw, options_of, proposals, write
from measuring import machine, peak_extra_megabytes, percentiles, times_ms

from mmd2v_kernels import contrastive, siglip

MATRICES = 7  # of all logits in fp32 that the plain forms hold at their highest

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(images, texts, inverse temperature, bias) → loss"""


def by_contrastive(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    owner = torch.arange(len(text), device=text.device)
    return contrastive(image, text, image, text, owner, owner, 0, scale)


def by_siglip(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return siglip(image, text, torch.arange(len(text), device=text.device), 0, scale, bias, len(text))


def plain_contrastive(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    logits, own = scale * image @ text.T, torch.arange(len(text), device=text.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def plain_siglip(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    sign = 2 * torch.eye(len(text), device=text.device) - 1
    return -F.logsigmoid(sign * (scale * image @ text.T + bias)).sum() / len(text)


def losses(ours: str) -> dict[tuple[str, str], Loss]:
    """Return the losses that can run here, by (loss, provider)."""
    found: dict[tuple[str, str], Loss] = {}
    for name, chunked, plain in (
        ("contrastive", by_contrastive, plain_contrastive),
        ("siglip", by_siglip, plain_siglip),
    ):
        for path in dict.fromkeys((ours, "reference")):
            found[name, path] = lambda *inputs, path=path, chunked=chunked: by_path(path, lambda: chunked(*inputs))()
        found[name, "torch"] = plain
    if importlib.util.find_spec("open_clip"):
        from open_clip.loss import ClipLoss, SigLipLoss

        found["contrastive", "open_clip"] = lambda image, text, scale, bias: ClipLoss()(image, text, scale)
        found["siglip", "open_clip"] = lambda image, text, scale, bias: SigLipLoss()(image, text, scale, bias)
    return found


def measure(batch: int, width: int, device: torch.device, speed: float, ours: str) -> list[Row]:
    generator = torch.Generator(device).manual_seed(0)
    image, noise = (F.normalize(torch.randn(batch, width, generator=generator, device=device), dim=1) for _ in range(2))
    text = F.normalize(image + 1.5 * noise, dim=1)
    scale, bias = (torch.tensor([value], device=device) for value in (20.0, -10.0))
    inputs = [tensor.requires_grad_() for tensor in (image, text, scale, bias)]
    exact = exact_losses(*(tensor.detach() for tensor in inputs))
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 1 << 31
    fits = MATRICES * 4 * batch * batch < free

    def step(loss: Loss) -> torch.Tensor:
        for tensor in inputs:
            tensor.grad = None
        value = loss(*inputs)
        value.backward()
        return value.detach()

    calls, share = {}, {}
    for name, loss in losses(ours).items():
        if name[1] in (ours, "reference") or fits:
            calls[name] = lambda loss=loss: step(loss)
            share[name] = float((calls[name]().double() - exact[name[0]]).abs() < 1e-5 * exact[name[0]].abs())
    start = time.perf_counter()
    peaks = {name: peak_extra_megabytes(call, device) for name, call in calls.items()}
    repeats = 2 if device.type != "cuda" else max(3, min(20, int(4 / (time.perf_counter() - start))))
    floor = 3e3 * 2 * batch * batch * width / speed
    rows = []
    for name, taken in times_ms(calls, repeats, device).items():
        p50, p20, p80 = percentiles(taken)
        numbers = (p50, p20, p80, peaks[name], floor, 100 * floor / p50, share[name])
        rows.append(Row(*name, "float32", f"{batch}x{width}", 0, repeats, *numbers, **machine(device)))
        print(
            f"{name[0]:<12} {name[1]:<12} {batch}x{width} {p50:10.3f} ms {peaks[name]:9.0f} MB "
            f"{100 * floor / p50:5.1f} % of the floor, {share[name]:.0f} exact",
            flush=True,
        )
    return rows


def exact_losses(
    image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Return each loss in float64, some rows at a time."""
    image, text, scale, bias = (tensor.double() for tensor in (image, text, scale, bias))
    total = {"contrastive": torch.zeros((), device=image.device).double()}
    total["siglip"] = total["contrastive"].clone()
    batch = len(image)
    for left, right in ((image, text), (text, image)):
        for own in torch.arange(batch, device=image.device).split(1024):
            logits = scale * left[own] @ right.T
            total["contrastive"] += (logits.logsumexp(1) - logits.gather(1, own[:, None])[:, 0]).sum() / (2 * batch)
            if left is image:
                sign = torch.ones_like(logits).scatter_(1, own[:, None], -1.0)
                total["siglip"] += F.softplus(sign * (logits + bias)).sum() / batch
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
    for batch, width in [(40, 16)] if options.tiny else [(16_384, 512), (4096, 512), (32_768, 512), (1024, 512)]:
        if time.monotonic() - start > options.seconds:
            print("out of time: the other sizes are left out")
            break
        done += measure(batch, width, device, speed, ours)
        write(options.out / "contrastive.csv", done)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    lines = proposals([row for row in done if row.kernel == "contrastive"], device)
    (options.out / "contrastive_measured.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    draw(options.out / "contrastive.svg", done)
    return 0


if __name__ == "__main__":
    sys.exit(main())
