"""Time one student layer against torchscale's multiway layer on the CPU, in one run, interleaved.

    benchmarks/kernels/peer_environment.sh /tmp/peer      # once, some seconds
    /tmp/peer/bin/python benchmarks/kernels/expert_mlp.py --out benchmarks/results/expert_mlp.csv

Forward and backward of a whole layer (attention and MLP, both owned a modality, equal weights), image and text as
separate sequences, a caption an image; captions have lengths drawn from Flickr8k's. `torchscale` is its EncoderLayer as
it is, `torchscale_sdpa` the same with torch's fused attention, each with text padded to 64 as the source does;
`reference` is our layer with the plain form of the MLP; `products` are the bare fp32 or bf16 matrix products of the
packed rows, the floor. Outputs and gradients of all are compared before anything is timed.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import nan
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
import tyro
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
from torchscale_layer import TorchscaleLayer

from mmd2v.config.schema import LayerConfig
from mmd2v.models.layers import Layer
from mmd2v.models.packed import Layout

HERE = Path(__file__).parent
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
OURS = {"mmd2v": "auto", "reference": "reference"}
Provider = Literal["mmd2v", "reference", "torchscale", "torchscale_sdpa"]
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Bench:
    """Time a student layer against torchscale's."""

    out: Path
    """CSV file that rows are appended to."""
    images: int = 32
    """Images and captions of a batch."""
    image_tokens: tuple[int, ...] = (197, 26)
    padded: int = 64
    """Text tokens of torchscale's sequences."""
    width: int = 768
    heads: int = 12
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    """bf16: of weights, rows and products."""
    providers: tuple[Provider, ...] = get_args(Provider)
    """What to time; the others are left out. In bf16 torch's own products take minutes where a processor has none."""
    repeats: int = 10
    """Timed rounds, after one that counts for nothing."""


class Case:
    """One layer of every provider, with the same weights, rows and gradients."""

    def __init__(self, options: Bench, image_tokens: int, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        n, width = options.images, options.width
        self.dtype = dtype
        self.captions = caption_lengths(n, options.padded)
        self.layout = Layout.build({"image": [image_tokens] * n, "text": self.captions}, CPU)
        ours = Layer(LayerConfig(kind="separate"), width, options.heads, ("image", "text"))
        self.x_TD, self.dout_TD = torch.randn(2, self.layout.total, width).to(dtype)
        self.exact = ours
        self.ours = Layer(LayerConfig(kind="separate"), width, options.heads, ("image", "text"))
        self.ours.load_state_dict(ours.state_dict())
        self.ours.to(dtype)
        self.theirs = {
            name: TorchscaleLayer(ours, width, fused).to(dtype)
            for name, fused in (("torchscale", False), ("torchscale_sdpa", True))
        }
        is_token = np.arange(options.padded)[None, :] < self.captions[:, None]
        self.is_pad = torch.from_numpy(~is_token)
        self.inputs = self._padded(self.x_TD)
        self.gradients = self._padded(self.dout_TD)

    def _padded(self, x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        parts = self.layout.split(x_TD)
        image = parts["image"].unflatten(0, (len(self.captions), -1)).clone()
        text = x_TD.new_zeros(*self.is_pad.shape, x_TD.shape[1])
        text[~self.is_pad] = parts["text"]
        return image, text

    def forward(self, provider: str) -> tuple[torch.Tensor, ...]:
        if provider in OURS:
            with kernels(OURS[provider]):
                return (self.ours(self.x_TD.requires_grad_(), self.layout),)
        for x in self.inputs:
            x.requires_grad_()
        return self.theirs[provider](*self.inputs, self.is_pad)

    def step(self, provider: str) -> None:
        """Forward and backward; gradients are left in the tensors."""
        self.clear()
        out = self.forward(provider)
        torch.autograd.backward(out, (self.dout_TD,) if provider in OURS else self.gradients)

    def clear(self) -> None:
        for module in (self.ours, *self.theirs.values()):
            module.zero_grad(set_to_none=True)
        for tensor in (self.x_TD, *self.inputs):
            tensor.grad = None

    def packed(self, provider: str) -> dict[str, torch.Tensor]:
        """Output and gradients of a step, of real tokens alone and under our names."""
        self.step(provider)
        with torch.no_grad():
            if provider in OURS:
                out_TD, dx_TD, weights = self.forward(provider)[0], self.x_TD.grad, self.ours.mlp
                own = {f"fc1 of {name}": weights[name].fc1.weight.grad for name in ("image", "text")}
            else:
                out_TD, dx_TD = (self._rows(*pair) for pair in (self.forward(provider), [x.grad for x in self.inputs]))
                parameters = dict(self.theirs[provider].layer.named_parameters())
                names = {"image": "ffn.A.fc1.weight", "text": "ffn.B.fc1.weight"}
                own = {f"fc1 of {name}": parameters[theirs].grad for name, theirs in names.items()}
        return {"output": out_TD, "gradient of the rows": dx_TD, **own}

    def _rows(self, image_BLD: torch.Tensor, text_BLD: torch.Tensor) -> torch.Tensor:
        return torch.cat([image_BLD.flatten(0, 1), text_BLD[~self.is_pad]])

    def products(self) -> Callable[[], object]:
        """Return the matrix products of the packed rows alone: forward, and twice as many backward."""
        calls = []
        for rows in (part.stop - part.start for part in self.layout.rows.values()):
            width = self.x_TD.shape[1]
            for wide, deep in ((3 * width, width), (width, width), (4 * width, width), (width, 4 * width)):
                x, w, d = (torch.randn(shape).to(self.dtype) for shape in ((rows, deep), (wide, deep), (rows, wide)))
                calls += [partial(torch.mm, x, w.t()), partial(torch.mm, d, w), partial(torch.mm, d.t(), x)]
        return lambda: [None for call in calls if call() is None]

    def exact_output(self) -> torch.Tensor:
        with kernels("reference"), torch.no_grad():
            return self.exact.double()(self.x_TD.detach().double(), self.layout)


def main(argv: Sequence[str]) -> int:
    """Compare, measure and append the rows."""
    options = tyro.cli(Bench, args=list(argv), description=__doc__)
    for name in options.dtypes:
        for image_tokens in options.image_tokens:
            append(options.out, measure(options, image_tokens, name))
    return 0


def measure(options: Bench, image_tokens: int, dtype: str) -> list[Row]:
    case = Case(options, image_tokens, DTYPES[dtype])
    providers = [name for name in (*OURS, *case.theirs) if name in options.providers]
    errors = check(case, providers)
    shape = f"{options.images}x{image_tokens}+{int(case.captions.sum())}of{options.padded}x{options.width}"
    calls: dict[str, Callable[[], object]] = {name: partial(case.step, name) for name in providers}
    taken = times_ms({**calls, "products": case.products()}, options.repeats, CPU)
    floor = percentiles(taken["products"])[0]
    own = {tensor.untyped_storage().data_ptr() for tensor in case_tensors(case)}
    rows, speed = [], {}
    for name in providers:
        case.clear()
        peak = peak_extra_megabytes(calls[name], CPU)
        case.clear()
        saved = saved_megabytes(partial(case.forward, name), own)
        p50, p20, p80 = percentiles(taken[name])
        speed[name] = p50
        numbers = (p50, p20, p80, peak, saved, floor, 100 * floor / p50, errors[name])
        rows.append(Row("student layer", name, "fwd+bwd", dtype, shape, options.repeats, *numbers, **machine(CPU)))
    for row in rows:
        times = speed.get("torchscale", nan) / row.p50_ms
        print(
            f"{shape} {dtype} {row.provider:<16} {row.p50_ms:9.1f} ms ({row.p20_ms:.1f} to {row.p80_ms:.1f})"
            f"  {times:5.2f} x torchscale  {row.percent_of_floor:5.1f} % of the floor"
            f"  {row.peak_extra_mb:7.0f} MB at most, {row.saved_mb:6.0f} MB kept"
        )
    return rows


def check(case: Case, providers: Sequence[str]) -> dict[str, float]:
    """Return each provider's error against float64. Raises ValueError where two do not compute the same."""
    limit = 50 * torch.finfo(case.dtype).eps
    found = {name: case.packed(name) for name in providers}
    last = providers[-1]
    for name, results in found.items():
        for part, tensor in results.items():
            distance = relative_error(tensor, found[last][part])
            if not distance <= limit:
                raise ValueError(f"{name} and {last} differ: {part} by {distance:.2g}, expected at most {limit:.2g}")
    exact = case.exact_output()
    return {name: relative_error(results["output"], exact) for name, results in found.items()}


def case_tensors(case: Case) -> Iterator[torch.Tensor]:
    """Tensors that are there anyway: weights and rows."""
    for module in (case.ours, *case.theirs.values()):
        yield from module.parameters()
    yield from (case.x_TD, *case.inputs)


def caption_lengths(count: int, longest: int) -> np.ndarray:
    """Draw lengths, int64 [count], as often as Flickr8k's captions have them."""
    table = json.loads((HERE / "caption_lengths.json").read_text(encoding="utf-8"))["captions_of_length"]
    lengths = np.array([int(length) for length in table])
    shares = np.array(list(table.values())) / sum(table.values())
    # The same lengths for every batch size but for rounding: evenly spaced places of the distribution, shuffled.
    places = np.searchsorted(np.cumsum(shares), (np.arange(count) + 0.5) / count)
    return np.random.default_rng(0).permutation(np.minimum(lengths[places], longest))


@contextmanager
def kernels(choice: str) -> Iterator[None]:
    """Ask for a path of the kernels."""
    before = os.environ.get("MMD2V_KERNELS")
    os.environ["MMD2V_KERNELS"] = choice
    try:
        yield
    finally:
        del os.environ["MMD2V_KERNELS"]
        if before is not None:
            os.environ["MMD2V_KERNELS"] = before


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ValueError as error:
        sys.exit(f"error: {error}")
