"""Sigmoid loss over all pairs of images and captions (Zhai et al. 2023), several captions an image allowed.

Shapes: b images of this rank, B images and N captions of all ranks, D width of the embeddings.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from mmd2v_kernels.logit_chunks import CHUNK, LogitChunks, Sigmoid, check_rows

__all__ = ["siglip"]


def siglip(
    image_bD: torch.Tensor,
    text_ND: torch.Tensor,
    owner_N: torch.Tensor,
    image_offset: int,
    scale: torch.Tensor,
    bias: torch.Tensor,
    mean_over: float,
    weights: tuple[torch.Tensor, torch.Tensor] | None = None,
    chunk: int = CHUNK,
) -> torch.Tensor:
    """Return the scalar loss of this rank's images with all ranks' captions.

    ``image_bD`` are L2-normalised embeddings of this rank, ``text_ND`` those of all ranks (gathered with gradient; the
    same tensor on one rank): of the B × N pairs a rank holds its b × N. ``owner_N`` (int64) gives the row of each
    caption's image among the B, ``image_offset`` that of this rank's first. Every caption of an image is a positive of
    it, every other pair a negative. The sum over pairs is divided by ``mean_over``, the number of captions of a rank
    (in the source, which has one caption an image, the number of images): the mean over ranks is then the sum over
    all pairs divided by N. ``weights`` are those of the b images and the N captions, 0 for what is in no pair; the
    divisor stays, so that the loss is the same however the rows lie on ranks. Logits are computed in fp32, or fp64
    where the embeddings are, about ``chunk`` at once. Raises ValueError without an image or without a text.
    """
    check_rows(image_bD, text_ND)
    dtype = torch.promote_types(image_bD.dtype, torch.float32)
    weight_b, weight_N = (None, None) if weights is None else (weight.to(dtype) for weight in weights)
    with torch.autocast(image_bD.device.type, enabled=False):  # which would round logits to bf16
        return (
            _PairSigmoid.apply(
                image_bD.to(dtype),
                text_ND.to(dtype),
                scale.to(dtype).reshape(()),
                bias.to(dtype).reshape(()),
                owner_N - image_offset,
                weight_b,
                weight_N,
                chunk,
            )
            / mean_over
        )


class _PairSigmoid(torch.autograd.Function):
    """Σ weight · softplus(∓logit) over all pairs; its gradient is summed in the forward pass, as it is a scalar."""

    @staticmethod
    def forward(
        ctx: Any,
        image_bD: torch.Tensor,
        text_ND: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor,
        owner_N: torch.Tensor,
        weight_b: torch.Tensor | None,
        weight_N: torch.Tensor | None,
        chunk: int,
    ) -> torch.Tensor:
        needs_gradient = any(ctx.needs_input_grad[:4])
        chunks = LogitChunks("siglip", len(image_bD), len(text_ND), image_bD, chunk)
        sigmoid = Sigmoid(bias, owner_N, weight_b, weight_N)
        total, bias_gradient = torch.zeros_like(scale), torch.zeros_like(scale)
        image_gradient_bD = torch.empty_like(image_bD) if needs_gradient else image_bD
        text_gradient_ND = torch.zeros_like(text_ND) if needs_gradient else text_ND
        for rows in chunks.rows():
            logits_nN = chunks.logits(image_bD[rows], text_ND, scale)
            loss, by_bias, gradient_nN = chunks.sigmoid_gradient_(logits_nN, sigmoid.of(rows))
            total += loss
            if not needs_gradient:
                continue
            bias_gradient += by_bias
            torch.mm(gradient_nN, text_ND, out=image_gradient_bD[rows])
            text_gradient_ND.addmm_(gradient_nN.t(), image_bD[rows])
        if needs_gradient:
            scale_gradient = torch.linalg.vecdot(image_gradient_bD, image_bD).sum()
            ctx.save_for_backward(
                image_gradient_bD.mul_(scale), text_gradient_ND.mul_(scale), scale_gradient, bias_gradient
            )
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = gradients
        return *(gradient * saved for saved in ctx.saved_tensors), None, None, None, None
