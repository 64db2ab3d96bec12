"""Recall of the student while it is inside the engine."""

from __future__ import annotations

from collections.abc import Mapping

from mmd2v.config.schema import Config
from mmd2v.data.batch import Batch
from mmd2v.data.stream import eval_loader
from mmd2v.distributed.environment import World
from mmd2v.errors import UserError
from mmd2v.evaluation import retrieval
from mmd2v.models.student import Student, StudentOutput
from mmd2v.train.parts import Parts


def check_evaluation(config: Config, student: Student) -> None:
    """Raise UserError when the config asks for recall that the student cannot give."""
    kinds = [kind for kind in student.inputs.values() if kind in ("image", "text")]
    if config.data.eval is not None and sorted(kinds) != ["image", "text"]:
        raise UserError(f"data.eval: recall needs one image and one text modality; model.encoders has {student.inputs}")
    if config.data.eval is None and (config.evaluation.every or config.evaluation.at_start):
        raise UserError("evaluation: asks for recall during training, but data.eval names no held-out set")


def evaluate(config: Config, parts: Parts, world: World) -> dict[str, float]:
    """Return the recall on ``data.eval``, the same on every rank; every rank must call it."""
    assert config.data.eval is not None  # the caller's condition
    loader = eval_loader(
        config.data,
        shards=config.data.eval,
        tokenizer=parts.tokenizer,
        batch_size=config.evaluation.batch_size,
        rank=world.rank,
        world_size=world.size,
    )
    # The set may lack what further modalities see: they are not run.
    names = {kind: name for name, kind in parts.student.inputs.items() if kind in ("image", "text")}
    modalities = tuple(names.values())

    def encode(batch: Batch) -> StudentOutput:
        return parts.module(batch, None, modalities)

    parts.module.eval()
    try:
        return retrieval.evaluate(encode, loader, world, image=names["image"], text=names["text"])
    finally:
        parts.module.train()


def recall_line(metrics: Mapping[str, float]) -> str:
    """Write recall in percent, chance level beside it."""
    parts = []
    for direction, label in (("i2t", "image→text"), ("t2i", "text→image")):
        recall, chance = (
            "/".join(f"{100 * metrics[f'{prefix}{direction}_R@{k}']:.1f}" for k in retrieval.RECALL_AT)
            for prefix in ("", "chance_")
        )
        parts.append(f"{label} R@1/5/10 {recall} (chance {chance})")
    return "  ".join(parts)
