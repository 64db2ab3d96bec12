"""Linear probe: L2-regularised logistic regression on frozen features, by full-batch L-BFGS, as CLIP's evaluation.

The strength of the regularisation is chosen on a part of the training set that is held out, over a logarithmic grid
that is refined around the best place; then the whole training set is fitted. Features are centred and divided by one
number, so that the grid suits every model. There is no chance in it: the same features give the same numbers.

Shapes: M training images, N test images, D width, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mmd2v.errors import UserError
from mmd2v.evaluation.knn import EncodeImages, encode_class_folders, train_and_test

GRID = tuple(10.0**exponent for exponent in range(1, -7, -1))
"""Strengths tried first, strongest first: each fit starts at the one before."""
_REFINEMENTS = (0.5, 0.25)  # of a decade
_HELD_OUT = 5  # one image in so many of each class
_ITERATIONS = 1000
_SEARCH_ITERATIONS = 200
_SMALL = 1 << 20  # numbers in the training features
_ROWS = 1 << 16  # logits [rows, C] held at once
_GRADIENT = 1e-7  # largest entry at which a fit is done


class Fit(NamedTuple):
    """A linear classifier."""

    weight_CD: torch.Tensor
    bias_C: torch.Tensor
    gradient: float
    """Norm of the loss's gradient there; 0 at the optimum."""


@dataclass(frozen=True)
class ProbeResult:
    """Accuracy and what it was measured on."""

    top1: float
    l2: float
    """Strength of the regularisation, see `fit_logistic`."""
    held_out_top1: float
    gradient: float
    classes: list[str]
    train_images: int
    test_images: int

    def record(self) -> dict[str, Any]:
        """Return what goes into a JSON file."""
        return {
            "linear_probe_top1": self.top1,
            "chance_top1": 1 / len(self.classes),
            "l2": self.l2,
            "held_out_top1": self.held_out_top1,
            "gradient_norm": self.gradient,
            "train_images": self.train_images,
            "test_images": self.test_images,
            "classes": len(self.classes),
        }

    def text(self) -> str:
        """Return what a person reads."""
        return (
            f"fitted to {self.train_images:,} images, {self.test_images:,} test images, {len(self.classes)} classes\n"
            f"linear probe top-1: {100 * self.top1:.2f} % (chance {100 / len(self.classes):.2f} %); L2 {self.l2:.3g}, "
            f"chosen at {100 * self.held_out_top1:.2f} % of a held-out fifth; gradient norm {self.gradient:.1e}"
        )


def probe_of_folder(
    encode: EncodeImages,
    train: str | Path,
    test: str | Path,
    device: torch.device | None = None,
    batch_size: int = 256,
) -> ProbeResult:
    """Fit the images of ``train`` and classify those of ``test``, both as `open_labelled` reads them.

    Every image is encoded once. Raises UserError for what cannot be read, embeddings that are not finite, or a class
    with a single training image.
    """
    known, queries = train_and_test(train, test)
    train_MD, labels_M = encode_class_folders(encode, known, known.classes, batch_size, "training images")
    test_ND, test_labels_N = encode_class_folders(encode, queries, known.classes, batch_size, "test images")
    place = device if device is not None else torch.device("cpu")
    # A CPU is as fast as it must be in float64, which ends nearer to the optimum.
    dtype = torch.float64 if place.type == "cpu" else torch.float32
    top1, l2, held_out, gradient = probe(
        train_MD.to(place, dtype), labels_M.to(place), test_ND.to(place, dtype), test_labels_N.to(place)
    )
    return ProbeResult(top1, l2, held_out, gradient, known.classes, len(known), len(queries))


def probe(
    train_MD: torch.Tensor, labels_M: torch.Tensor, test_ND: torch.Tensor, test_labels_N: torch.Tensor
) -> tuple[float, float, float, float]:
    """Return (top-1 of the test rows, strength chosen, top-1 of the held-out rows there, norm of the last gradient)."""
    for name, rows in (("training", train_MD), ("test", test_ND)):
        if not bool(rows.isfinite().all()):
            raise UserError(f"linear probe: {name} features hold NaN or infinity")
    mean_D = train_MD.mean(dim=0)
    scale = (train_MD - mean_D).square().mean().sqrt().clamp_min(torch.finfo(train_MD.dtype).tiny)
    train_MD, test_ND = ((rows - mean_D) / scale for rows in (train_MD, test_ND))
    held_M = held_out_rows(labels_M)
    with _few_threads(train_MD):
        l2, held_out = _choose(train_MD[~held_M], labels_M[~held_M], train_MD[held_M], labels_M[held_M])
        fit = fit_logistic(train_MD, labels_M, l2)
    return accuracy(fit, test_ND, test_labels_N), l2, held_out, fit.gradient


@contextmanager
def _few_threads(features_MD: torch.Tensor) -> Iterator[None]:
    """Compute a small problem in one thread: on a busy machine each of its many short sums would wait for a second."""
    threads = torch.get_num_threads()
    if features_MD.device.type == "cpu" and features_MD.numel() < _SMALL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def held_out_rows(labels_M: torch.Tensor) -> torch.Tensor:
    """Return bool [M]: of each class one row in five, at least one, drawn with a fixed seed.

    Raises UserError for a class of one row: none would be left to learn from.
    """
    held_M = torch.zeros(len(labels_M), dtype=torch.bool)
    draw = torch.Generator().manual_seed(0)
    for label in labels_M.unique().tolist():
        rows = (labels_M == label).nonzero().flatten().cpu()
        if len(rows) < 2:
            raise UserError("linear probe: --train has a class of one image, expected at least two of each")
        held_M[rows[torch.randperm(len(rows), generator=draw)[: max(1, len(rows) // _HELD_OUT)]]] = True
    return held_M.to(labels_M.device)


def fit_logistic(
    features_MD: torch.Tensor,
    labels_M: torch.Tensor,
    l2: float,
    start: Fit | None = None,
    iterations: int = _ITERATIONS,
) -> Fit:
    """Minimise mean cross-entropy + ``l2`` / 2 · ‖weight‖² over weight and bias; the bias is free.

    In the words of scikit-learn ``C`` is 1 / (M · ``l2``).
    """
    classes = int(labels_M.max()) + 1
    width = features_MD.shape[1]
    if start is None:
        flat = features_MD.new_zeros(classes * (width + 1))
    else:
        flat = torch.cat([start.weight_CD, start.bias_C[:, None]], dim=1).flatten().clone()
    flat.requires_grad_()
    optimizer = torch.optim.LBFGS(
        [flat],
        max_iter=iterations,
        history_size=10,
        tolerance_grad=_GRADIENT,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )
    loss_and_gradient = _objective(features_MD, labels_M, l2, classes)

    def closure() -> torch.Tensor:
        loss, flat.grad = loss_and_gradient(flat.detach())
        return loss

    optimizer.step(closure)
    _, gradient = loss_and_gradient(flat.detach())
    table = flat.detach().view(classes, width + 1)
    return Fit(table[:, :width].contiguous(), table[:, width].contiguous(), gradient.norm().item())


def accuracy(fit: Fit, features_ND: torch.Tensor, labels_N: torch.Tensor) -> float:
    """Return the share of rows whose own class has the highest logit."""
    right = [
        torch.addmm(fit.bias_C, rows, fit.weight_CD.t()).argmax(dim=1) == labels
        for rows, labels in zip(features_ND.split(_ROWS), labels_N.split(_ROWS), strict=True)
    ]
    return torch.cat(right).double().mean().item()


def _choose(
    train_MD: torch.Tensor, labels_M: torch.Tensor, held_ND: torch.Tensor, held_labels_N: torch.Tensor
) -> tuple[float, float]:
    """Return (strength, accuracy of the held-out rows); of equal ones the strongest."""
    tried: dict[float, tuple[float, Fit]] = {}

    def attempt(l2: float) -> None:
        if l2 not in tried:
            start = tried[min(tried, key=lambda other: abs(other - l2))][1] if tried else None
            fit = fit_logistic(train_MD, labels_M, l2, start, _SEARCH_ITERATIONS)
            tried[l2] = accuracy(fit, held_ND, held_labels_N), fit

    def best() -> float:
        return max(tried, key=lambda l2: (tried[l2][0], l2))

    for l2 in GRID:
        attempt(l2)
    for step in _REFINEMENTS:
        middle = best()
        for l2 in (middle * 10**step, middle / 10**step):
            attempt(l2)
    return best(), tried[best()][0]


def _objective(
    features_MD: torch.Tensor, labels_M: torch.Tensor, l2: float, classes: int
) -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    rows, width = features_MD.shape

    def loss_and_gradient(flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        table = flat.view(classes, width + 1)
        weight_CD, bias_C = table[:, :width], table[:, width]
        gradient = torch.zeros_like(table)
        loss = flat.new_zeros(())
        for x_RD, y_R in zip(features_MD.split(_ROWS), labels_M.split(_ROWS), strict=True):
            log_p_RC = torch.addmm(bias_C, x_RD, weight_CD.t()).log_softmax(dim=1)
            loss -= log_p_RC.gather(1, y_R[:, None]).sum() / rows
            error_RC = log_p_RC.exp_()
            error_RC.scatter_add_(1, y_R[:, None], -torch.ones_like(error_RC[:, :1]))
            gradient[:, :width] += error_RC.t() @ x_RD / rows
            gradient[:, width] += error_RC.sum(dim=0) / rows
        gradient[:, :width] += l2 * weight_CD
        return loss + l2 / 2 * weight_CD.square().sum(), gradient.flatten()

    return loss_and_gradient
