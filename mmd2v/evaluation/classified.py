"""Accuracy of a fine-tuned run: its own head on labelled shards that it did not see.

Shapes: R rows of the modality, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from mmd2v.config.load import load_config
from mmd2v.config.schema import ShardsConfig
from mmd2v.data.stream import eval_loader
from mmd2v.data.tokenizers import load_tokenizer
from mmd2v.errors import UserError
from mmd2v.export import Which, checkpoint_of
from mmd2v.inference import Precision, resolve_device
from mmd2v.models.exported import CONFIG_FILE
from mmd2v.models.student import build_student
from mmd2v.models.timm_backbone import load_exactly
from mmd2v.objectives.classification import Classification
from mmd2v.progress import track
from mmd2v.train.consolidate import consolidate

_STUDENT = "student."


@dataclass(frozen=True)
class AccuracyResult:
    """Accuracy and what it was measured on."""

    model: str
    accuracy: float
    classes: int
    samples: int
    confusion_CC: list[list[int]]
    """Rows: the right class; columns: the one given."""

    def record(self) -> dict[str, Any]:
        """Return what goes into a JSON file."""
        return {
            "model": self.model,
            "accuracy": self.accuracy,
            "chance_top1": 1 / self.classes,
            "largest_class": max(map(sum, self.confusion_CC)) / self.samples,
            "macro_f1": self.macro_f1,
            "samples": self.samples,
            "confusion": self.confusion_CC,
        }

    @property
    def macro_f1(self) -> float:
        """The mean of the classes' F1; a class that neither occurs nor is given counts 0."""
        total = 0.0
        for place, row in enumerate(self.confusion_CC):
            given = sum(other[place] for other in self.confusion_CC)
            total += 2 * row[place] / max(1, sum(row) + given)
        return total / self.classes

    def text(self) -> str:
        """Return what a person reads."""
        largest = max(map(sum, self.confusion_CC)) / self.samples
        return (
            f"{self.model}: {self.samples:,} samples, {self.classes} classes\n"
            f"accuracy: {100 * self.accuracy:.2f} % (always the largest class: {100 * largest:.2f} %), "
            f"macro F1 {100 * self.macro_f1:.2f} %"
        )


def accuracy_of_run(
    source: str | Path,
    shards: list[str],
    *,
    limit: int | None = None,
    batch_size: int = 64,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    precision: Precision = "fp32",
    which: Which = "newest",
) -> AccuracyResult:
    """Measure a run (its checkpoint ``which``) or a checkpoint with its `classification` objective.

    Raises UserError for a run without that objective or checkpoint, unreadable shards, or samples without its label.
    """
    checkpoint = checkpoint_of(Path(source), which)
    config = load_config(checkpoint.resolve().parent.parent / CONFIG_FILE)
    place = next((i for i, one in enumerate(config.objectives) if one.kind == "classification"), None)
    if place is None:
        kinds = ", ".join(one.kind for one in config.objectives)
        raise UserError(f"{source}: the run has the objectives {kinds}, expected one of kind classification")
    target = resolve_device(device)
    tokenizer = None if config.data.tokenizer is None else load_tokenizer(config.data.tokenizer)
    student = build_student(config, tokenizer, pretrained=False)
    head = Classification(config.objectives[place], student, {}, f"objectives.{place}")
    state = consolidate(checkpoint)
    for module, prefix in ((student, _STUDENT), (head, f"objectives.terms.{place}.")):
        weights = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        load_exactly(module, weights, f"{checkpoint}: its weights are of another architecture than its config")
        module.eval().requires_grad_(False).to(target)
    modality = head.config.modality
    loader = eval_loader(
        config.data,
        shards=ShardsConfig(shards=shards, limit=limit),
        tokenizer=tokenizer,
        batch_size=batch_size,
        label_classes=head.config.classes,
        images="image" in student.inputs.values(),
    )
    classes = head.config.classes
    confusion_CC = torch.zeros(classes * classes, dtype=torch.int64, device=target)
    autocast = torch.autocast(target.type, dtype=torch.bfloat16, enabled=precision == "bf16")
    for batch in track(loader, "classifying", unit="batches"):
        moved = batch.to(target)
        with torch.no_grad(), autocast:
            logits_RC = head.logits(student(moved, (modality,)))
        right_R = head.labels(moved).argmax(dim=1)
        confusion_CC += torch.bincount(right_R * classes + logits_RC.argmax(dim=1), minlength=classes * classes)
    table = confusion_CC.view(classes, classes)
    samples = int(table.sum())
    return AccuracyResult(config.name, int(table.diagonal().sum()) / samples, classes, samples, table.tolist())
