"""What a run measures of the student while it is inside the engine, on all ranks together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F

from mmd2v.config.schema import Config
from mmd2v.data.batch import Batch
from mmd2v.data.class_folders import ClassFolders
from mmd2v.data.pair_files import TextPairs, read_pairs
from mmd2v.data.stream import eval_loader
from mmd2v.distributed.collectives import gather_variable, rank, world_size
from mmd2v.distributed.coordination import on_every_rank
from mmd2v.distributed.environment import World
from mmd2v.errors import UserError, nearest, unknown_name
from mmd2v.evaluation import retrieval
from mmd2v.evaluation.knn import knn_classify
from mmd2v.evaluation.text_pairs import DIRECTIONS, PAIR_RECALL_AT, pair_metrics
from mmd2v.models.student import Student, StudentOutput
from mmd2v.train.parts import Parts
from mmd2v.train.sliced import SlicedEncoder

KNN = "knn_top1"
PAIRS = "pairs/"


def measures_anything(config: Config) -> bool:
    """Whether an evaluation has anything to measure."""
    return config.data.eval is not None or config.evaluation.knn is not None or bool(config.evaluation.pairs)


def metric_names(config: Config) -> list[str]:
    """Names of the numbers that an evaluation gives and by which a checkpoint can be the best."""
    names = []
    if config.data.eval is not None:
        measures = [*(f"R@{k}" for k in retrieval.RECALL_AT), "median_rank", "MRR"]
        names += [f"{direction}_{measure}" for direction in ("i2t", "t2i") for measure in measures]
    if config.evaluation.knn is not None:
        names.append(KNN)
    for name in config.evaluation.pairs:
        recalls = [f"{direction}_R@{k}" for direction in DIRECTIONS for k in PAIR_RECALL_AT]
        names += [f"{PAIRS}{name}/{measure}" for measure in ("mean", *recalls)]
    return names


def check_evaluation(config: Config, student: Student) -> None:
    """Raise UserError when the config asks for what the student cannot give, or for data that cannot be read."""
    evaluation, best = config.evaluation, config.checkpoint.best
    kinds = [kind for kind in student.inputs.values() if kind in ("image", "text")]
    if config.data.eval is not None and sorted(kinds) != ["image", "text"]:
        raise UserError(f"data.eval: recall needs one image and one text modality; model.encoders has {student.inputs}")
    if not measures_anything(config):
        if evaluation.every or evaluation.at_start:
            raise UserError(
                "evaluation: asks for recall during training, but data.eval names no held-out set (nor is there "
                "evaluation.knn or evaluation.pairs)"
            )
        if best is not None:
            raise UserError("checkpoint.best: nothing is measured; expected data.eval, evaluation.knn or .pairs")
        return
    if best is not None and best.metric not in metric_names(config):
        raise unknown_name("checkpoint.best.metric", best.metric, metric_names(config))
    if evaluation.knn is not None:
        _modality(student, "image", "evaluation.knn")
        _open_knn(config)
    for name in evaluation.pairs:
        _modality(student, "text", f"evaluation.pairs.{name}")
        _open_pairs(config, name)


def evaluate(config: Config, parts: Parts, world: World) -> dict[str, float]:
    """Return all that the config asks to measure, the same on every rank; every rank must call it."""
    metrics: dict[str, float] = {}
    with _at_rest(parts):
        if config.data.eval is not None:
            metrics |= _retrieval(config, parts, world)
        if config.evaluation.knn is not None:
            metrics |= _knn(config, parts, world)
        for name in config.evaluation.pairs:
            metrics |= {f"{PAIRS}{name}/{key}": value for key, value in _pairs(config, parts, world, name).items()}
    return metrics


@contextmanager
def _at_rest(parts: Parts) -> Iterator[None]:
    parts.module.eval()
    try:
        yield
    finally:
        parts.module.train()


def _retrieval(config: Config, parts: Parts, world: World) -> dict[str, float]:
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

    return retrieval.evaluate(encode, loader, world, image=names["image"], text=names["text"])


class _KnnData(NamedTuple):
    bank: ClassFolders
    queries: ClassFolders


def _open_knn(config: Config) -> _KnnData:
    where, knn = "evaluation.knn", config.evaluation.knn
    assert knn is not None  # the caller's condition
    bank, queries = ClassFolders(knn.train, f"{where}.train"), ClassFolders(knn.test, f"{where}.test")
    unknown = [name for name in queries.classes if name not in bank.classes]
    if unknown:
        hint = nearest(unknown[0], bank.classes)
        raise UserError(f"{where}.test: class '{unknown[0]}' of {knn.test} is not among those of {knn.train}.{hint}")
    if knn.k > len(bank):
        raise UserError(f"{where}.k: found {knn.k}, expected 1..{len(bank)} (the images of the memory bank)")
    return _KnnData(bank, queries)


def _knn(config: Config, parts: Parts, world: World) -> dict[str, float]:
    knn = config.evaluation.knn
    assert knn is not None  # the caller's condition
    data = on_every_rank(lambda: _open_knn(config))
    encoder = SlicedEncoder(
        parts.module, _modality(parts.student, "image", "evaluation.knn"), knn.features, world.device
    )
    (bank_MD, labels_M), (queries_ND, expected_N) = (
        encoder.images(folders, data.bank.classes, config.data.image, config.evaluation.batch_size) for folders in data
    )
    first, last = (len(queries_ND) * r // world_size() for r in (rank(), rank() + 1))
    own = on_every_rank(
        lambda: knn_classify(bank_MD, labels_M, queries_ND[first:last], knn.k) if last > first else None
    )
    found = torch.zeros(0, dtype=torch.int64) if own is None else own
    right = (gather_variable(found.to(world.device)).cpu() == expected_N).double().mean().item()
    return {KNN: right, "chance_knn_top1": 1 / len(data.bank.classes)}


def _open_pairs(config: Config, name: str) -> TextPairs:
    pairs = config.evaluation.pairs[name]
    return read_pairs(pairs.file, pairs.format, pairs.limit)


def _pairs(config: Config, parts: Parts, world: World, name: str) -> dict[str, float]:
    where = f"evaluation.pairs.{name}"
    data = on_every_rank(lambda: _open_pairs(config, name))
    encoder = SlicedEncoder(
        parts.module, _modality(parts.student, "text", where), config.evaluation.pairs[name].features, world.device
    )
    texts = list(dict.fromkeys([*data.first, *data.second]))
    assert parts.tokenizer is not None  # the schema's condition: there is a text modality
    table_UD = encoder.texts(texts, parts.tokenizer, config.evaluation.batch_size)
    place = {text: number for number, text in enumerate(texts)}
    first, second = (
        torch.tensor([place[text] for text in side], device=table_UD.device) for side in (data.first, data.second)
    )
    return on_every_rank(lambda: pair_metrics(F.normalize(table_UD[first]), F.normalize(table_UD[second])))


def _modality(student: Student, kind: str, where: str) -> str:
    names = [name for name, of_kind in student.inputs.items() if of_kind == kind]
    if len(names) != 1:
        raise UserError(f"{where}: needs one {kind} modality; model.encoders has {student.inputs}")
    return names[0]


def result_line(metrics: Mapping[str, float]) -> str:
    """Write what was measured in percent, chance level beside it."""
    parts = []
    if "i2t_R@1" in metrics:
        parts.append(f"recall  {recall_line(metrics)}")
    if KNN in metrics:
        parts.append(f"k-NN top-1 {100 * metrics[KNN]:.1f} (chance {100 * metrics['chance_knn_top1']:.1f})")
    for key, value in metrics.items():
        if key.startswith(PAIRS) and key.endswith("/mean"):
            parts.append(f"pairs {key.removeprefix(PAIRS).removesuffix('/mean')} {100 * value:.1f}")
    return "  ".join(parts)


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
