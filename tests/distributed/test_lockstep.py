"""Ranks that see different modalities, frozen parts, dropped layers: no rank waits for another, no weight is lost."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import run_distributed_test
from safetensors.torch import load_file
from training_runs import make_data, run_config

from mmd2v.cli import export as export_command
from mmd2v.config.load import load_config
from mmd2v.config.schema import Config
from mmd2v.data.batch import Batch
from mmd2v.data.tokenizers import load_tokenizer
from mmd2v.distributed.collectives import barrier, rank
from mmd2v.models.layer_drop import dropped_layers
from mmd2v.models.student import build_student
from mmd2v.train import loop
from mmd2v.train.consolidate import consolidate
from mmd2v.train.metrics import read_metrics
from mmd2v.train.seeds import position_seed

STEPS = 6
STAGES = (0, 2, 3)
SEED = 3
LAYER_DROP = (0.5, 0.5, 0.5)
FROZEN = "encoders.image."
LOSSES = {"cls_regression_loss/image", "cls_regression_loss/text", "cls_regression_loss/text_2"}


@dataclass
class Mixed:
    """A loader whose micro-batches lack the images, on this rank always or in turn, or the texts."""

    loader: Any

    def __iter__(self) -> Iterator[Batch]:
        for step, batch in enumerate(self.loader):
            yield _text_alone(batch) if rank() == 1 else _images_alone(batch) if step % 3 == 2 else batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)


def _text_alone(batch: Batch) -> Batch:
    return replace(batch, images=batch.images[:, :, :0, :0])


def _images_alone(batch: Batch) -> Batch:
    return replace(
        batch,
        text_ids=batch.text_ids[:0],
        text_lengths=batch.text_lengths[:0],
        caption_image=batch.caption_image[:0],
    )


def _config(file: Path, data: Path, **changes: Any) -> Config:
    objectives = [
        {"kind": "cls_regression", "teacher": "resnet"},
        {"kind": "cls_regression", "teacher": "bert", "modalities": ["text"]},
    ]
    resnet = {"name": f"timm:test_resnet@{data / 'teacher.safetensors'}", "precision": "fp32", "image_size": 32}
    bert = {"name": f"hf:{data / 'bert'}", "modality": "text", "precision": "fp32"}
    kinds = ("separate", "mome", "shared")
    layers = [{"kind": kind, "layer_drop": drop} for kind, drop in zip(kinds, LAYER_DROP, strict=True)]
    return run_config(
        file,
        data,
        seed=SEED,
        steps=STEPS,
        objectives=objectives,
        teachers={"resnet": resnet, "bert": bert},
        model__encoders={
            "image": {"kind": "patch", "patch_size": 8, "frozen": True},
            "text": {"kind": "tokens"},
        },
        model__layers=layers,
        optimizer__lr=1e-3,
        engine__zero3_persistence_threshold=0,
        engine__micro_batch_size=2,
        evaluation__every=None,
        checkpoint__every=3,
        **changes,
    )


def _train(config: Config) -> dict[str, np.ndarray]:
    """Train with the mixed loader; return this rank's weights, whole."""
    parts = []
    with pytest.MonkeyPatch.context() as patch:
        load, build = loop.train_loader, loop.build_parts
        patch.setattr(loop, "train_loader", lambda *args, **options: Mixed(load(*args, **options)))

        def remembered(*args: Any) -> Any:
            parts.append(build(*args))
            return parts[-1]

        patch.setattr(loop, "build_parts", remembered)
        loop.train(config)
    named = dict(parts[0].module.named_parameters())
    if config.engine.zero_stage < 3:
        return {name: p.detach().numpy().copy() for name, p in named.items()}
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(named.values())):
        return {name: p.detach().numpy().copy() for name, p in named.items()}


def _runs(data: Path, folder: Path) -> list[dict[str, np.ndarray]]:
    found = []
    for stage in STAGES:
        found.append(_train(_config(folder / f"zero{stage}.yaml", data, engine__zero_stage=stage)))
        barrier()
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    from transformers import BertConfig, BertModel

    folder = make_data(tmp_path_factory.mktemp("data"))
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=2000, max_position_embeddings=24, **sizes)).save_pretrained(folder / "bert")
    return folder


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory) -> tuple[Path, list[list[dict[str, np.ndarray]]]]:
    """Folder of the runs, and by rank and stage the weights."""
    folder = tmp_path_factory.mktemp("runs")
    return folder / "runs", run_distributed_test(_runs, 2, args=(data, folder))


@pytest.mark.parametrize("stage", STAGES)
def test_every_loss_is_a_number_and_that_of_zero_0(runs, stage):
    folder, _ = runs
    found, expected = (
        [r for r in read_metrics(folder / f"zero{one}" / "metrics.jsonl") if "loss" in r] for one in (stage, 0)
    )
    assert len(found) == STEPS
    for record, reference in zip(found, expected, strict=True):
        terms = {key: value for key, value in record.items() if key.startswith("loss")}
        assert {key.removeprefix("loss/") for key in terms} == {"loss", *LOSSES}
        assert terms == pytest.approx({key: reference[key] for key in terms}, abs=1e-5)
    drawn = {dropped_layers(position_seed(SEED, step), LAYER_DROP) for step in range(STEPS)}
    assert len(drawn) > 2  # steps differ in what they skip
    # Rank 0 has no text in every third micro-batch alone, and two of them make a step.
    assert all(record[f"loss/{name}"] > 0 for record in found for name in LOSSES)


@pytest.mark.parametrize("stage", STAGES)
def test_ranks_end_with_the_same_weights_at_every_stage(runs, stage):
    _, weights = runs
    of_stage = STAGES.index(stage)
    for name, value in weights[0][of_stage].items():
        assert np.array_equal(value, weights[1][of_stage][name]), name
        np.testing.assert_allclose(value, weights[0][0][name], rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("stage", STAGES)
def test_no_weight_is_lost_in_checkpoint_and_export(runs, tmp_path, stage):
    folder, weights = runs
    run = folder / f"zero{stage}"
    trained = weights[0][STAGES.index(stage)]
    state = consolidate(run / "checkpoints" / f"step-{STEPS:06d}")
    for name, value in trained.items():
        assert torch.equal(state[name], torch.from_numpy(value)), name

    assert export_command.main([str(run), "--out", str(tmp_path / "export")]) == 0
    exported = load_file(tmp_path / "export" / "model.safetensors")
    config = load_config(run / "config.yaml")
    assert config.data.tokenizer is not None
    initial = build_student(config, load_tokenizer(config.data.tokenizer)).state_dict()
    assert exported.keys() == initial.keys()
    for name, value in exported.items():
        assert torch.equal(value, torch.from_numpy(trained[f"student.{name}"])), name
        assert torch.equal(value, initial[name]) == name.startswith(FROZEN), name
