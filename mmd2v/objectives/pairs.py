"""Which rows of two modalities belong to one sample, on this rank and among all.

Shapes: b samples and n captions of this rank, B and N of all ranks. Rows of a text modality are captions, those of any
other are samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from mmd2v.data.batch import Batch
from mmd2v.distributed.collectives import all_gather_with_gradient, rank
from mmd2v.errors import UserError


@dataclass(frozen=True)
class Owners:
    """Of the second side of a pair, each row's row on the first side, where a row owns any number of them."""

    local_n: torch.Tensor
    """int64 [n], counted from this rank's first row: the two rows of a pair lie on one rank."""
    offset: int
    """Row among all ranks' of this rank's first row on the first side."""
    own_weights_b: torch.Tensor | None
    """0 for a damaged sample; None: all count."""

    @cached_property
    def of_own_n(self) -> torch.Tensor:
        """int64 [n], `local_n` as rows among all ranks'."""
        return self.local_n + self.offset

    @cached_property
    def of_all_N(self) -> torch.Tensor:
        """int64 [N], gathered when first asked for, which every rank must do then."""
        return all_gather_with_gradient(self.of_own_n)

    @cached_property
    def own_weights(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Weights of this rank's rows on the first and on the second side, which count as their owners do."""
        if self.own_weights_b is None:
            return None
        return self.own_weights_b, self.own_weights_b[self.local_n]

    @cached_property
    def all_weights(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Those of all ranks, [B] and [N], gathered when first asked for, which every rank must do then."""
        if self.own_weights_b is None:
            return None
        weights_B = all_gather_with_gradient(self.own_weights_b)
        return weights_B, weights_B[self.of_all_N]


class Pair:
    """Two modalities to be compared; a text comes second where the other is none."""

    def __init__(self, between: Sequence[str] | None, inputs: Mapping[str, str], where: str, kind: str) -> None:
        """``inputs`` is modality → what it sees. Raises UserError when the two modalities are not clear."""
        self.first, self.second = _named(between, inputs, where, kind)
        if inputs[self.first] == "text" and inputs[self.second] != "text":
            self.first, self.second = self.second, self.first
        self.inputs = [inputs[name] for name in (self.first, self.second)]
        self.texts = [one == "text" for one in self.inputs]

    @property
    def names(self) -> tuple[str, str]:
        """First and second."""
        return self.first, self.second

    def owners(self, batch: Batch) -> Owners:
        """Return which rows belong together; every rank must call it, with equally many samples and captions."""
        if self.texts == [False, True]:
            local_n, rows, weights = batch.caption_image, len(batch), batch.weights
        else:  # row by row: two views of a sample, or two encoders of one caption
            rows = len(batch.caption_image) if all(self.texts) else len(batch)
            local_n = torch.arange(rows, device=batch.images.device)
            weights = batch.caption_weights if all(self.texts) else batch.weights
        return Owners(local_n, rank() * rows, weights)


def _named(between: Sequence[str] | None, inputs: Mapping[str, str], where: str, kind: str) -> tuple[str, str]:
    if between is not None:
        first, second = between  # the schema has found both among the modalities
        return first, second
    by_kind = {wanted: [name for name, one in inputs.items() if one == wanted] for wanted in ("image", "text")}
    if not (by_kind["image"] and by_kind["text"]) and len(inputs) < 3:
        raise UserError(
            f"{where}: {kind} needs an image and a text modality, found {dict(inputs)}; name any two under `between`"
        )
    if len(inputs) != 2:
        raise UserError(
            f"{where}.between: missing, but there are {len(inputs)} modalities ({', '.join(inputs)}); expected two of "
            "them"
        )
    return by_kind["image"][0], by_kind["text"][0]


def paired(
    own: torch.Tensor, target: torch.Tensor, own_is_text: bool, target_is_text: bool, batch: Batch
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return rows of one sample side by side [q, …], and the weight of each (None: all count), all of this rank.

    A caption has its sample's target; a sample is repeated for each of its captions' targets. Rows are captions as
    soon as one of the two sides is text. Where the batch lacks one side, there are no rows.
    """
    if 0 in (len(own), len(target)):
        return own[:0], target[:0], None
    if not (own_is_text or target_is_text):
        return own, target, batch.weights
    own = own if own_is_text else own[batch.caption_image]
    target = target if target_is_text else target[batch.caption_image]
    return own, target, batch.caption_weights


def same_number_on_ranks(batch: Batch, kind: str, inputs: Iterable[str]) -> None:
    """Raise UserError where the ranks have different numbers of rows, which could not be gathered.

    ``inputs`` is what the modalities see whose rows are.
    """
    if batch.mean_over is not None:
        raise UserError(f"{kind}: the ranks must have equally many samples; data.batch_tokens does not give that")
    counts = {"image": batch.image_count, "text": len(batch.text_lengths)}
    for name in inputs:
        if counts.get(name, 1) == 0:
            raise UserError(
                f"{kind}: the ranks must have equally many samples, and a micro-batch of rank {rank()} has no {name}"
            )
