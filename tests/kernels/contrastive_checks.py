"""Checks of the contrastive kernels for `device_checks`: as near to float64 as plain torch, the same every time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from mmd2v_kernels import ContrastiveWeights, contrastive, ring_contrastive, ring_siglip, siglip

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")

Check = Callable[[torch.dtype], None]
Results = dict[str, torch.Tensor]
Compare = Callable[[Callable[[torch.dtype], Results], torch.dtype], None]
"""Fails unless what runs by the kernels is as good as by plain torch in the dtype."""


@contextmanager
def small_tiles() -> Iterator[None]:
    """In the interpreter, tiles so small that tiny shapes have several; on a GPU those that are shipped."""
    from mmd2v_kernels import contrastive_triton

    shipped = contrastive_triton.SIZES
    if INTERPRETED:
        contrastive_triton.SIZES = contrastive_triton.Sizes(fold_rows=(2, 32), fold_columns=(16, 32), gradient=(16, 32))
    try:
        yield
    finally:
        contrastive_triton.SIZES = shipped


def embeddings(images: int, captions: int, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Unit rows of images and captions, and whose each caption is: some images have several, some none."""
    image, noise = (F.normalize(torch.randn(rows, width), dim=1) for rows in (images, captions))
    owner = torch.randint(images, (captions,))
    return image.to(DEVICE), F.normalize(image[owner] + noise, dim=1).to(DEVICE), owner.to(DEVICE)


def results(loss: torch.Tensor, scale: torch.Tensor, **inputs: torch.Tensor) -> Results:
    """The loss is a difference of numbers as large as the scale, and is compared beside it."""
    scalars = [scale, *(tensor for tensor in inputs.values() if tensor.ndim < 2)]
    rows = {name: tensor for name, tensor in inputs.items() if tensor.ndim == 2}
    gradients = torch.autograd.grad(3 * loss, [*rows.values(), *scalars])
    of_scalars = torch.cat([gradient.reshape(1) for gradient in gradients[len(rows) :]])
    found = dict(zip(rows, gradients, strict=False)) | {"loss": (loss + scale).detach()}
    # A scalar's gradient is a sum of numbers as large as those of the rows it comes from.
    return found | {"scalars": torch.cat([of_scalars, gradients[0].flatten().to(of_scalars.dtype)])}


def some_seen(rows: int) -> torch.Tensor:
    return (torch.rand(rows) > 0.3).float().to(DEVICE)


def check_contrastive(
    compare: Compare,
    images: int,
    captions: int,
    width: int = 24,
    scale: float = 20.0,
    ranks: int = 1,
    weighted: bool = False,
    smoothing: float = 0.0,
    chunk: int = 1,
) -> Check:
    """As rank 0 of ``ranks`` computes it; of the shipped chunk there is one, of the smallest several."""

    def check(dtype: torch.dtype) -> None:
        image, text, owner = embeddings(images, captions, width)
        image, text = image.to(dtype), text.to(dtype)
        own_images, own_captions = images // ranks, captions // ranks
        seen_image = some_seen(images)
        seen_text = seen_image[owner]
        weights = ContrastiveWeights(seen_image[:own_images], seen_text[:own_captions], seen_image, seen_text)

        def run(computed: torch.dtype) -> Results:
            factor = torch.tensor([scale], dtype=computed, device=DEVICE, requires_grad=True)
            all_image, all_text = (rows.to(computed).requires_grad_() for rows in (image, text))
            own_image, own_text = (
                (all_image, all_text) if ranks == 1 else (all_image[:own_images], all_text[:own_captions])
            )
            loss = contrastive(
                own_image,
                own_text,
                all_image,
                all_text,
                owner[:own_captions],
                owner,
                0,
                factor,
                smoothing,
                weights if weighted else None,
                chunk,
            )
            return results(loss, factor, image=all_image, text=all_text)

        with small_tiles():
            compare(run, dtype)

    return check


def check_siglip(
    compare: Compare, images: int, captions: int, width: int = 24, weighted: bool = False, bias: float = -10.0
) -> Check:
    def check(dtype: torch.dtype) -> None:
        image, text, owner = embeddings(images, captions, width)
        image, text = image.to(dtype), text.to(dtype)
        weights = (some_seen(images), some_seen(captions)) if weighted else None

        def run(computed: torch.dtype) -> Results:
            scalars = (
                torch.tensor([value], dtype=computed, device=DEVICE, requires_grad=True) for value in (10.0, bias)
            )
            factor, summand = scalars
            own_image, all_text = (rows.to(computed).requires_grad_() for rows in (image, text))
            loss = siglip(own_image, all_text, owner, 0, factor, summand, captions, weights, chunk=1)
            return results(loss, factor, image=own_image, text=all_text, bias=summand)

        with small_tiles():
            compare(run, dtype)

    return check


class Twins:
    """A ring of two ranks with the same rows, as one of them sees it."""

    size = 2

    def shift(self, tensors: Sequence[torch.Tensor]) -> Callable[[], list[torch.Tensor]]:
        received = [tensor.clone() for tensor in tensors]
        return lambda: received

    def summed(self, tensor: torch.Tensor) -> torch.Tensor:
        return 2 * tensor


def check_ring(
    compare: Compare, images: int, captions: int, weighted: bool = False, smoothing: float = 0.0, sigmoid: bool = False
) -> Check:
    def check(dtype: torch.dtype) -> None:
        image, text, owner = embeddings(images, captions, 24)
        image, text, seen = image.to(dtype), text.to(dtype), some_seen(images)
        weights = (seen, seen[owner]) if weighted else None

        def run(computed: torch.dtype) -> Results:
            factor, summand = (
                torch.tensor([value], dtype=computed, device=DEVICE, requires_grad=True) for value in (20.0, -5.0)
            )
            own = [rows.to(computed).requires_grad_() for rows in (image, text)]
            if sigmoid:
                loss = ring_siglip(*own, owner, factor, summand, captions, Twins(), weights, chunk=1)
                return results(loss, factor, image=own[0], text=own[1], bias=summand)
            loss = ring_contrastive(*own, owner, factor, Twins(), smoothing, weights, chunk=1)
            return results(loss, factor, image=own[0], text=own[1])

        with small_tiles():
            compare(run, dtype)

    return check


@contextmanager
def by_triton() -> Iterator[None]:
    os.environ["MMD2V_KERNELS"] = "contrastive=triton,siglip=triton"
    try:
        with small_tiles():
            yield
    finally:
        del os.environ["MMD2V_KERNELS"]


def check_nan(dtype: torch.dtype) -> None:
    """One embedding that is none makes the loss none, so that the step is left out."""
    image, text, owner = embeddings(20, 40, 24)
    image[3, 5] = torch.nan
    rows = [tensor.to(dtype).requires_grad_() for tensor in (image, text)]
    scale, bias = torch.tensor(9.0, device=DEVICE), torch.tensor(-5.0, device=DEVICE)
    with by_triton():
        for loss in (
            contrastive(*rows, *rows, owner, owner, 0, scale),
            siglip(*rows, owner, 0, scale, bias, 40),
            ring_contrastive(*rows, owner, scale, Twins()),
        ):
            (gradient,) = torch.autograd.grad(loss, rows[:1])
            assert loss.isnan() and gradient[3].isnan().all()


def check_hidden(dtype: torch.dtype) -> None:
    """Nothing counts: no loss, and gradients of 0."""
    image, text, owner = embeddings(20, 40, 24)
    rows = [tensor.to(dtype).requires_grad_() for tensor in (image, text)]
    scale, bias = torch.tensor(9.0, device=DEVICE), torch.tensor(-5.0, device=DEVICE)
    none = torch.zeros(20, device=DEVICE), torch.zeros(40, device=DEVICE)
    with by_triton():
        for loss in (
            contrastive(*rows, *rows, owner, owner, 0, scale, 0.1, ContrastiveWeights(*none, *none)),
            siglip(*rows, owner, 0, scale, bias, 40, none),
            ring_contrastive(*rows, owner, scale, Twins(), 0.1, none),
        ):
            assert float(loss.detach()) == 0
            assert all(not gradient.any() for gradient in torch.autograd.grad(loss, rows))


def check_without_gradient(compare: Compare) -> Check:
    def check(dtype: torch.dtype) -> None:
        image, text, owner = embeddings(150, 70, 24)

        def run(computed: torch.dtype) -> Results:
            rows = image.to(dtype).to(computed), text.to(dtype).to(computed)
            scale, bias = torch.tensor(9.0, device=DEVICE), torch.tensor(-5.0, device=DEVICE)
            with torch.no_grad():
                found = contrastive(*rows, *rows, owner, owner, 0, scale, chunk=1)
                return {"contrastive": found, "siglip": siglip(*rows, owner, 0, scale, bias, 70, chunk=1)}

        with small_tiles():
            compare(run, dtype)

    return check


def check_repeated(dtype: torch.dtype) -> None:
    """To the last bit: a race would show sooner or later."""
    images, captions = (40, 50) if INTERPRETED else (700, 3000)
    image, text, owner = embeddings(images, captions, 64)
    image, text = image.to(dtype).requires_grad_(), text.to(dtype).requires_grad_()
    scale, bias = (torch.tensor([value], device=DEVICE, requires_grad=True) for value in (20.0, -5.0))

    def run() -> list[torch.Tensor]:
        first = results(contrastive(image, text, image, text, owner, owner, 0, scale), scale, image=image, text=text)
        second = results(siglip(image, text, owner, 0, scale, bias, captions), scale, image=image, text=text, bias=bias)
        return [*first.values(), *second.values()]

    with by_triton():
        expected = run()
        for _ in range(1 if INTERPRETED else 20):
            assert all(torch.equal(*pair) for pair in zip(expected, run(), strict=True))


def fold_arguments(dtype: torch.dtype) -> tuple:
    from mmd2v_kernels import contrastive_triton  # noqa: F401

    largest, total = torch.zeros(3, device=DEVICE), torch.ones(3, device=DEVICE)
    return largest, total, torch.randn(3, 5, device=DEVICE), torch.randn(5, device=DEVICE), 1


def softmax_arguments(dtype: torch.dtype) -> tuple:
    from mmd2v_kernels import contrastive_triton  # noqa: F401

    largest, factor, column_offset = torch.randn(3, device=DEVICE), torch.rand(3, device=DEVICE), None
    of_columns = torch.randn(5, device=DEVICE), torch.rand(5, device=DEVICE), torch.randn(3, device=DEVICE)
    index, weight = torch.tensor([4, -1, 0], device=DEVICE), torch.rand(3, device=DEVICE)
    return torch.randn(3, 5, device=DEVICE), largest, factor, column_offset, *of_columns, index, weight, True


def sigmoid_arguments(dtype: torch.dtype) -> tuple:
    from mmd2v_kernels import contrastive_triton  # noqa: F401

    logits, bias = torch.randn(3, 5, device=DEVICE), torch.randn(1, device=DEVICE)
    return logits, bias, torch.tensor([0, 2, 1, 7, -1], device=DEVICE), None, None


OPERATORS = {
    "fold_logits": fold_arguments,
    "softmax_gradient_": softmax_arguments,
    "sigmoid_gradient_": sigmoid_arguments,
}
"""Custom operator → arguments to check it with."""

SLOW_IN_THE_INTERPRETER = (
    "several_chunks",
    "ring_several_chunks",
    "ring_siglip_several_chunks",
    "ranks",
    "weighted",
    "smoothing",
    "repeated",
    "without_gradient",
    "hidden",
)
"""Run there in fp32 alone."""


def all_checks(compare: Compare, interpreted: bool) -> dict[str, Check]:
    found = {
        "contrastive/one": check_contrastive(compare, 1, 1),
        "contrastive/tile_edges": check_contrastive(compare, 33, 31),
        "contrastive/whole_tiles": check_contrastive(compare, 32, 32),
        "contrastive/several_chunks": check_contrastive(compare, 40, 150),
        "contrastive/sharp": check_contrastive(compare, 20, 30, scale=100.0),
        "contrastive/ranks": check_contrastive(compare, 60, 80, ranks=2),
        "contrastive/weighted": check_contrastive(compare, 40, 150, weighted=True),
        "contrastive/weighted_ranks": check_contrastive(compare, 40, 60, ranks=2, weighted=True),
        "contrastive/smoothing": check_contrastive(compare, 30, 40, smoothing=0.1),
        "contrastive/without_gradient": check_without_gradient(compare),
        "contrastive/siglip": check_siglip(compare, 33, 31),
        "contrastive/siglip_several_chunks": check_siglip(compare, 150, 40, bias=0.0),
        "contrastive/siglip_weighted": check_siglip(compare, 40, 50, weighted=True),
        "contrastive/ring": check_ring(compare, 33, 31),
        "contrastive/ring_weighted": check_ring(compare, 40, 50, weighted=True, smoothing=0.1),
        "contrastive/ring_siglip": check_ring(compare, 33, 31, sigmoid=True),
        "contrastive/ring_siglip_weighted": check_ring(compare, 20, 40, weighted=True, sigmoid=True),
        "contrastive/ring_several_chunks": check_ring(compare, 150, 30, weighted=True),
        "contrastive/ring_siglip_several_chunks": check_ring(compare, 150, 30, sigmoid=True),
        "contrastive/nan": check_nan,
        "contrastive/hidden": check_hidden,
        "contrastive/repeated": check_repeated,
    }
    if not interpreted:
        found |= {
            "contrastive/shipped": check_contrastive(compare, 2048, 2048, 768, chunk=1 << 22),
            "contrastive/odd": check_contrastive(compare, 1001, 3003, 511, chunk=1 << 20),
            "contrastive/shipped_ranks": check_contrastive(compare, 4096, 4096, 512, ranks=8, chunk=1 << 22),
            "contrastive/siglip_shipped": check_siglip(compare, 1001, 3003, 512),
        }
    return found
