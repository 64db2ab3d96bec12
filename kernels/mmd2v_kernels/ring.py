"""Contrastive losses over several ranks of which none ever holds the embeddings of all: texts go round the ranks.

Every rank keeps its images, and its texts visit one rank after the other until they are at home again; with them goes
what is known of them: on the first round the log-sum-exps of their logits, on the second their gradient. Each logit
serves both directions and is computed twice, which is four products of the size of the logits; with gathered
embeddings it is three for each direction. The sigmoid loss needs no normaliser, and one round.

The gradient is summed in the forward pass, as the result is a scalar: the backward pass of a rank multiplies it, and
every rank must multiply by the same, as it does where a step's loss has the same weights on all of them.

Shapes: b images and n texts of a rank (as many on every one), r rows of a chunk, D width.
Source: Liu et al. 2023 (ring attention) for the normaliser; for the sigmoid loss Zhai et al. 2023.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch.autograd.function import once_differentiable

from mmd2v_kernels.contrastive import Terms, even_product, seen_sum
from mmd2v_kernels.logit_chunks import CHUNK, LogitChunks, Positives, RunningLogSumExp, Sigmoid, Softmax, check_rows
from mmd2v_kernels.pair_softmax import out_of_sight, part_of

__all__ = ["Ring", "ring_contrastive", "ring_siglip"]


class Ring(Protocol):
    """The ranks, each of which sends to the next and receives from the one before."""

    size: int

    def shift(self, tensors: Sequence[torch.Tensor]) -> Callable[[], list[torch.Tensor]]:
        """Begin to pass tensors on; what is returned waits for those of the rank before, which have the same shapes."""

    def summed(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum over ranks, differentiable: its gradient is the sum of theirs."""


def ring_contrastive(
    image_bD: torch.Tensor,
    text_nD: torch.Tensor,
    owner_n: torch.Tensor,
    scale: torch.Tensor,
    ring: Ring,
    label_smoothing: float = 0.0,
    weights: tuple[torch.Tensor, torch.Tensor] | None = None,
    chunk: int = CHUNK,
) -> torch.Tensor:
    """Return what `contrastive` does with the embeddings of all ranks, and the same gradients in total.

    ``image_bD`` and ``text_nD`` are this rank's L2-normalised embeddings; every rank must call it, with as many of
    each. ``owner_n`` (int64) is each caption's row among this rank's images: a caption lies on the rank of its image.
    ``weights`` are those of the b images and n captions. The gradient of the scale is this rank's part in all losses,
    not all parts in this rank's loss: over the ranks the sums are equal. Gradients are right where every rank
    multiplies its loss by the same. Raises ValueError without an image or without a caption.
    """
    check_rows(image_bD, text_nD)
    image_b, text_n = weights or (None, None)
    dtype = torch.promote_types(image_bD.dtype, torch.float32)
    with torch.autocast(image_bD.device.type, enabled=False):  # which would round logits to bf16
        terms = Terms.of(owner_n, len(image_bD), len(text_nD), image_b, text_n, label_smoothing)
        image_bD, text_nD, scale = image_bD.to(dtype), text_nD.to(dtype), scale.to(dtype).reshape(())
        seen_b, seen_n = (out_of_sight(seen, dtype) for seen in (image_b, text_n))
        positives = Positives(owner_n, (terms.image_positive_N + terms.text_positive_n).to(dtype), in_rows=False)
        of_images, of_texts = terms.image_lse_b.to(dtype), terms.text_n.to(dtype)
        loss = _RingSoftmax.apply(image_bD, text_nD, scale, positives, of_images, of_texts, seen_b, seen_n, ring, chunk)
        if label_smoothing:
            all_texts, all_images = (ring.summed(seen_sum(*side)) for side in ((text_nD, text_n), (image_bD, image_b)))
            even = even_product(terms.image_b, image_bD, all_texts) + even_product(terms.text_n, text_nD, all_images)
            loss = loss - label_smoothing * scale * even
        return loss / 2


class _RingSoftmax(torch.autograd.Function):
    """Σ w log Σ exp of this rank's images and of its texts over those of all ranks, less its positives."""

    @staticmethod
    def forward(
        ctx: Any,
        image_bD: torch.Tensor,
        text_nD: torch.Tensor,
        scale: torch.Tensor,
        positives: Positives,
        image_weight_b: torch.Tensor,
        text_weight_n: torch.Tensor,
        image_offset_b: torch.Tensor | None,
        text_offset_n: torch.Tensor | None,
        ring: Ring,
        chunk: int,
    ) -> torch.Tensor:
        chunks = LogitChunks("contrastive", len(image_bD), len(text_nD), image_bD, chunk)
        total = image_bD.new_zeros(())
        of_images, of_texts = RunningLogSumExp.of_nothing(image_bD), RunningLogSumExp.of_nothing(text_nD)
        hidden = [] if text_offset_n is None else [text_offset_n]
        for step, (visiting_nD, *offset) in _round(ring, [text_nD, *hidden]):
            for rows in chunks.rows():
                logits_rn = chunks.logits(image_bD[rows], visiting_nD, scale)
                if step == 0:
                    row, column, weight = positives.of(rows).places(logits_rn.shape)
                    total -= weight @ logits_rn[row, column]
                chunks.fold(of_images.part(rows), logits_rn, *(offset or [None]), dim=1)
                chunks.fold(of_texts, logits_rn, part_of(image_offset_b, rows), dim=0)
            of_texts = RunningLogSumExp(*ring.shift(of_texts)())
        total += image_weight_b @ of_images.value() + text_weight_n @ of_texts.value()
        if not any(ctx.needs_input_grad[:3]):
            return total
        image_gradient_bD, gradient = torch.zeros_like(image_bD), _Travelling(ring, torch.zeros_like(text_nD))
        own_softmax = Softmax.of(of_texts, text_weight_n, None)
        visitor = [text_nD, own_softmax.largest_Q, own_softmax.factor_Q, *hidden]
        for step, (visiting_nD, largest_n, factor_n, *offset) in _round(ring, visitor):
            for rows in chunks.rows():
                logits_rn = chunks.logits(image_bD[rows], visiting_nD, scale)
                of_rows = Softmax.of(of_images.part(rows), image_weight_b[rows], *(offset or [None]))
                of_columns = Softmax(largest_n, factor_n, part_of(image_offset_b, rows))
                own = positives.of(rows) if step == 0 else None
                gradient_rn = chunks.softmax_gradient_(logits_rn, of_rows, of_columns, own)
                image_gradient_bD[rows].addmm_(gradient_rn, visiting_nD)
                gradient.here().addmm_(gradient_rn.t(), image_bD[rows])
            gradient.leave()
        scale_gradient = torch.linalg.vecdot(image_gradient_bD, image_bD).sum()
        ctx.save_for_backward(image_gradient_bD.mul_(scale), gradient.here().mul_(scale), scale_gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = gradients
        return *(gradient * saved for saved in ctx.saved_tensors), None, None, None, None, None, None, None


def ring_siglip(
    image_bD: torch.Tensor,
    text_nD: torch.Tensor,
    owner_n: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    mean_over: float,
    ring: Ring,
    weights: tuple[torch.Tensor, torch.Tensor] | None = None,
    chunk: int = CHUNK,
) -> torch.Tensor:
    """Return what `siglip` does with the texts of all ranks, and the same gradients.

    ``image_bD`` and ``text_nD`` are this rank's L2-normalised embeddings; every rank must call it, with as many of
    each. ``owner_n`` (int64) is each caption's row among this rank's images: a caption lies on the rank of its image.
    ``weights`` are those of the b images and n captions. Gradients are right where every rank multiplies its loss by
    the same. Raises ValueError without an image or without a caption.
    """
    check_rows(image_bD, text_nD)
    dtype = torch.promote_types(image_bD.dtype, torch.float32)
    weight_b, weight_n = (None, None) if weights is None else (weight.to(dtype) for weight in weights)
    with torch.autocast(image_bD.device.type, enabled=False):  # which would round logits to bf16
        scalars = scale.to(dtype).reshape(()), bias.to(dtype).reshape(())
        rows = image_bD.to(dtype), text_nD.to(dtype)
        return _RingSigmoid.apply(*rows, *scalars, owner_n, weight_b, weight_n, ring, chunk) / mean_over


class _RingSigmoid(torch.autograd.Function):
    """Σ weight · softplus(∓logit) over the pairs of this rank's images and all ranks' texts."""

    @staticmethod
    def forward(
        ctx: Any,
        image_bD: torch.Tensor,
        text_nD: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor,
        owner_n: torch.Tensor,
        weight_b: torch.Tensor | None,
        weight_n: torch.Tensor | None,
        ring: Ring,
        chunk: int,
    ) -> torch.Tensor:
        chunks = LogitChunks("siglip", len(image_bD), len(text_nD), image_bD, chunk)
        needs_gradient = any(ctx.needs_input_grad[:4])
        total, bias_gradient = torch.zeros_like(scale), torch.zeros_like(scale)
        image_gradient_bD, gradient = torch.zeros_like(image_bD), _Travelling(ring, torch.zeros_like(text_nD))
        nobody_n = torch.full_like(owner_n, -1)
        visitor = [text_nD] if weight_n is None else [text_nD, weight_n]
        for step, (visiting_nD, *weight) in _round(ring, visitor):
            sigmoid = Sigmoid(bias, owner_n if step == 0 else nobody_n, weight_b, *(weight or [None]))
            for rows in chunks.rows():
                logits_rn = chunks.logits(image_bD[rows], visiting_nD, scale)
                loss, by_bias, gradient_rn = chunks.sigmoid_gradient_(logits_rn, sigmoid.of(rows))
                total += loss
                if not needs_gradient:
                    continue
                bias_gradient += by_bias
                image_gradient_bD[rows].addmm_(gradient_rn, visiting_nD)
                gradient.here().addmm_(gradient_rn.t(), image_bD[rows])
            if needs_gradient:
                gradient.leave()
        if needs_gradient:
            scale_gradient = torch.linalg.vecdot(image_gradient_bD, image_bD).sum()
            ctx.save_for_backward(
                image_gradient_bD.mul_(scale), gradient.here().mul_(scale), scale_gradient, bias_gradient
            )
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = gradients
        return *(gradient * saved for saved in ctx.saved_tensors), None, None, None, None, None


class _Travelling:
    """A tensor that goes on to the next rank after each step, and is waited for when it is first wanted there."""

    def __init__(self, ring: Ring, own: torch.Tensor) -> None:
        self._ring, self._here, self._coming = ring, own, None

    def here(self) -> torch.Tensor:
        """Return what has come from the rank before."""
        if self._coming is not None:
            (self._here,), self._coming = self._coming(), None
        return self._here

    def leave(self) -> None:
        """Begin to send it to the next."""
        self._coming = self._ring.shift([self.here()])


def _round(ring: Ring, own: Sequence[torch.Tensor]) -> Iterator[tuple[int, list[torch.Tensor]]]:
    """Yield (0, those of this rank), then what the others send, while the next is on its way."""
    visiting = list(own)
    for step in range(ring.size):
        coming = ring.shift(visiting) if step + 1 < ring.size else None
        yield step, visiting
        if coming is not None:
            visiting = coming()
