"""The terms of the loss.

An objective is a module (it may own heads) whose forward returns named scalars. Adding one is a file here and a line
in ``OBJECTIVES``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from operator import or_

import torch
from torch import nn

from mmd2v.config.schema import Config
from mmd2v.data.batch import Batch
from mmd2v.models.initialisation import init_random
from mmd2v.models.student import Student, StudentOutput, Wanted
from mmd2v.models.teachers import Needs, Targets, Teacher
from mmd2v.objectives.attributes import Attributes
from mmd2v.objectives.base import Objective
from mmd2v.objectives.classification import Classification
from mmd2v.objectives.cls_regression import CLSRegression
from mmd2v.objectives.contrastive import Contrastive
from mmd2v.objectives.contrastive_target import ContrastiveTarget
from mmd2v.objectives.data2vec import Data2Vec
from mmd2v.objectives.layer_results import LayerResults
from mmd2v.objectives.matching import Matching
from mmd2v.objectives.siglip import SigLIP
from mmd2v.objectives.token_regression import TokenRegression

OBJECTIVES: dict[str, type[Objective]] = {
    "cls_regression": CLSRegression,
    "layer_results": LayerResults,
    "token_regression": TokenRegression,
    "contrastive": Contrastive,
    "siglip": SigLIP,
    "contrastive_target": ContrastiveTarget,
    "matching": Matching,
    "data2vec": Data2Vec,
    "attributes": Attributes,
    "classification": Classification,
}


class Objectives(nn.Module):
    """All terms of a run."""

    def __init__(self, terms: list[Objective], weights: list[float]) -> None:
        super().__init__()
        self.terms = nn.ModuleList(terms)
        self.weights = weights

    @property
    def wanted(self) -> Wanted:
        """What the terms want the student to keep of a forward pass."""
        return reduce(or_, (term.wanted for term in self.terms), Wanted())

    @property
    def needs(self) -> dict[str, Needs]:
        """Teacher → what the terms need of it besides CLS and tokens."""
        needs: dict[str, Needs] = {}
        for term in self.terms:
            for name, one in term.needs.items():
                needs[name] = needs.get(name, Needs()) | one
        return needs

    def forward(self, output: StudentOutput, targets: Mapping[str, Targets], batch: Batch) -> dict[str, torch.Tensor]:
        """Return every term unweighted, by name, and their weighted sum under ``loss``."""
        found: list[dict[str, torch.Tensor]] = []
        total = torch.zeros((), device=batch.images.device)
        for term, weight in zip(self.terms, self.weights, strict=True):
            losses = term(output, targets, batch)
            total = total + weight * torch.stack([v.float() for v in losses.values()]).sum()
            found.append(losses)
        return {"loss": total, **numbered(found)}

    def rank_state(self) -> dict[str, torch.Tensor]:
        """Return what this rank alone must keep of every term, see `Objective.rank_state`."""
        return {f"{i}.{name}": value for i, term in enumerate(self.terms) for name, value in term.rank_state().items()}

    def load_rank_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Hand every term its part of what `rank_state` returned."""
        for i, term in enumerate(self.terms):
            if term.rank_state():
                term.load_rank_state(_of_term(i, state))

    def dealt_state(self, states: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Return this rank's share of what `rank_state` returned on all ranks of another number of them.

        See `Objective.dealt_state`.
        """
        return {
            f"{i}.{name}": value
            for i, term in enumerate(self.terms)
            if term.rank_state()
            for name, value in term.dealt_state([_of_term(i, state) for state in states]).items()
        }

    def metrics(self) -> dict[str, torch.Tensor]:
        """Return what a person may want to follow beside the losses, such as the temperature."""
        return numbered(term.metrics() for term in self.terms)


def _of_term(index: int, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return what of a rank's state belongs to one term, by the names it gave."""
    return {name.removeprefix(f"{index}."): value for name, value in state.items() if name.startswith(f"{index}.")}


def numbered(found: Iterable[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Join the scalars of the terms; a name that several of them use has a number from the second on: ``x``, ``x_2``.

    A number is left out where the name it makes is another scalar's (a modality may be called ``image_2``).
    """
    joined: dict[str, torch.Tensor] = {}
    used: Counter[str] = Counter()
    for scalars in found:
        for name, value in scalars.items():
            used[name] += 1
            key = name if used[name] == 1 else f"{name}_{used[name]}"
            while key in joined:
                used[name] += 1
                key = f"{name}_{used[name]}"
            joined[key] = value
    return joined


def build_objectives(config: Config, student: Student, teachers: Mapping[str, Teacher]) -> Objectives:
    """Build the terms of a run with randomly drawn heads (from ``config.seed`` alone)."""
    terms = [OBJECTIVES[o.kind](o, student, teachers, f"objectives.{i}") for i, o in enumerate(config.objectives)]
    init_random(nn.ModuleList(terms), config.seed, "objectives", config.model.init_deviation)
    return Objectives(terms, [o.weight for o in config.objectives])
