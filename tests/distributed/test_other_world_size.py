"""A run goes on with another number of ranks: two ranks, then one, then two again, at every ZeRO stage.

What is loaded is what was saved, to the bit; the losses are those of the run that was never interrupted.
"""

import contextlib
import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_distributed_test
from safetensors.torch import load_file
from training_runs import make_data, run_config

from mmd2v.config.schema import Config
from mmd2v.distributed.collectives import barrier, rank
from mmd2v.train import loop
from mmd2v.train.averages import AVERAGES_FILE, averages
from mmd2v.train.checkpoints.folders import complete_checkpoints
from mmd2v.train.checkpoints.saving import Checkpointer
from mmd2v.train.loop import train
from mmd2v.train.metrics import read_metrics

pytestmark = pytest.mark.timeout(4000)  # three starts of processes; a minute where nothing else runs

STEPS, FIRST, SECOND = 6, 2, 4
"""Two ranks write the first checkpoint, one rank goes on from it and writes the second, two go on from that."""

# Frozen parameters, several optimiser groups, one of which (two temperatures) leaves some ranks nothing, a bank, a
# layer that steps 3 and 4 drop (it must have a gradient before the first checkpoint).
CONTRASTIVE: dict[str, Any] = {
    "model__layers": [
        {"kind": "separate", "layer_drop": 0.5},
        {"kind": "mome", "layer_scale": 0.5},
        {"kind": "shared"},
    ],
    "model__freeze": ["encoders.text.*"],
    "objectives": [{"kind": "contrastive"}, {"kind": "contrastive_target", "teacher": "resnet", "bank_size": 20}],
    "optimizer__groups": [{"match": "*log_scale*", "lr_multiplier": 0.5}],
}
TRAINED_CNN: dict[str, Any] = {
    "model__encoders": {"image": {"kind": "timm", "name": "test_resnet", "frozen": False}, "text": {"kind": "tokens"}}
}
AVERAGE: dict[str, Any] = {
    "model__encoders": {"image": {"kind": "patch", "patch_size": 8}},
    "model__layers": [{"kind": "separate", "count": 2, "norm": "post"}],
    "model__masking": {"image": {"masks": 2, "ratio": 0.6, "block": 2}},
    "model__projection": {"kind": "none"},
    "model__final_norm": False,
    "teachers": {
        "ema": {
            "name": "ema:image",
            "modality": "image",
            "precision": "fp32",
            "ema": {"decay": 0.5, "decay_end": 0.9, "encoder": True},
        }
    },
    "objectives": [
        {
            "kind": "data2vec",
            "teacher": "ema",
            "modality": "image",
            "decoder": {"layers": 2, "groups": 4, "input_dropout": 0.0},
        }
    ],
}
CASES: dict[str, dict[str, Any]] = {
    **{f"stage{stage}": {**CONTRASTIVE, "engine__zero_stage": stage} for stage in (0, 1, 2, 3)},
    "stage3-batch-norm": {**TRAINED_CNN, "engine__zero_stage": 3},
    "stage1-bf16-average": {**AVERAGE, "engine__zero_stage": 1, "engine__precision": "bf16"},
}
SAME_LOSSES = [name for name in CASES if "batch-norm" not in name]
"""Statistics of a batch are over a rank's share of it: with another number of ranks they are others."""
LAST_STAGE = {"stage2": 1}
"""Case → ZeRO stage of the last part, where it is another one."""


def _config(folder: Path, data: Path, name: str, **changes: Any) -> Config:
    return run_config(
        folder / f"{name}.yaml",
        data,
        **{
            "steps": STEPS,
            "checkpoint__every": 2,
            "checkpoint__keep": 5,
            "engine__zero3_persistence_threshold": 300,  # some parameters stay whole, most do not
            "optimizer__lr": 5e-4,
            **CASES[name],
            **changes,
        },
    )


def _digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().float().contiguous().numpy().tobytes()).hexdigest()[:16]


def _state(engine: Any) -> dict[str, Any]:
    """Digests of every parameter, buffer and moment, whole, and the counters of the optimiser."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    optimizer, found = engine.deepspeed.optimizer, {}
    inner = getattr(optimizer, "optimizer", optimizer)
    if engine.config.engine.zero_stage in (1, 2):
        # DeepSpeed links the moments of the first group alone.
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
    for name, parameter in engine.module.named_parameters():
        with engine.gathered([parameter]):
            found[name] = _digest(parameter)
        if parameter.requires_grad:
            if engine.config.engine.zero_stage == 0:
                parts = {key: inner.state[parameter][key] for key in ("exp_avg", "exp_avg_sq")}
            else:
                parts = {key: safe_get_full_optimizer_state(parameter, key) for key in ("exp_avg", "exp_avg_sq")}
                parts["fp32"] = safe_get_full_fp32_param(parameter)
            assert any(part.any() for part in parts.values())
            found |= {f"{name} {key}": _digest(part) for key, part in parts.items()}
    found |= {name: _digest(buffer) for name, buffer in engine.module.named_buffers()}
    if engine.config.engine.zero_stage in (1, 2):
        found["groups without a piece"] = sum(
            all(one._hp_mapping is None for one in group) for group in optimizer.bit16_groups
        )
    counters = [float(state["step"]) for state in inner.state.values()]
    # Which groups a rank has depends on their number; all have counted the same steps, each for itself.
    assert len({id(state["step"]) for state in inner.state.values()}) == len(counters)
    return {**found, "steps": set(counters)}


def _spoil(engine: Any) -> None:
    """Overwrite what is not trained, so that nothing but the checkpoint can have brought it."""
    import deepspeed

    with torch.no_grad():
        for parameter in engine.module.parameters():
            if not parameter.requires_grad:
                whole = engine.config.engine.zero_stage < 3
                with (
                    contextlib.nullcontext()
                    if whole
                    else deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)
                ):
                    parameter.fill_(7)
        for name, buffer in engine.module.named_buffers():
            if name in engine.module.state_dict():
                buffer.fill_(7)


class Watch:
    """Looks at the engine's state at every save and after every load of the runs of this process."""

    def __init__(self) -> None:
        self.saved: dict[int, dict] = {}
        self.loaded: dict[int, dict] = {}
        self.average: dict[str, str] = {}
        self.said = ""
        save, load, load_averages = Checkpointer.save, loop.load_checkpoint, loop.load_averages

        def watched_save(checkpointer: Any, engine: Any, manifest: Any, *rest: Any, **options: Any) -> Any:
            self.saved[manifest.step] = _state(engine)
            return save(checkpointer, engine, manifest, *rest, **options)

        def watched_load(engine: Any, path: Path, expected: Any) -> Any:
            _spoil(engine)
            manifest = load(engine, path, expected)
            self.loaded[manifest.step] = _state(engine)
            self.said = engine.converted
            return manifest

        def watched_averages(teachers: Any, folder: Path) -> None:
            load_averages(teachers, folder)
            for name, teacher in averages(teachers).items():
                self.average |= {f"{name}/{key}": _digest(value) for key, value in teacher.average().items()}

        Checkpointer.save = watched_save
        loop.load_checkpoint = watched_load
        loop.load_averages = watched_averages

    def take(self) -> dict[str, Any]:
        found = {"saved": self.saved, "loaded": self.loaded, "said": self.said, "average": self.average}
        self.saved, self.loaded, self.average, self.said = {}, {}, {}, ""
        return found


def _train(
    folder: Path, data: Path, resume: str | None, keep: int | None, stages: dict[str, int]
) -> dict[str, dict[str, Any]]:
    """Train every case to its end, then leave only the checkpoints up to step ``keep``."""
    watch, results = Watch(), {}
    for name in CASES:
        changes = {"engine__zero_stage": stages[name]} if name in stages else {}
        config = _config(folder, data, name, **changes)
        train(config, resume)
        barrier()
        checkpoints = Path(config.run_dir) / "checkpoints"
        records = read_metrics(Path(config.run_dir) / "metrics.jsonl")
        results[name] = {
            **watch.take(),
            "losses": {r["step"]: r["loss"] for r in records if "loss" in r},
            "names": sorted(path.name for path in checkpoints.iterdir()),
        }
        for step in (FIRST, SECOND) if name == "stage1-bf16-average" else ():
            stored = load_file(checkpoints / f"step-{step:06d}" / AVERAGES_FILE)
            results[name][f"average {step}"] = {key: _digest(value) for key, value in stored.items()}
        barrier()
        if rank() == 0 and keep is not None:
            for step, path in complete_checkpoints(checkpoints):
                if step > keep:
                    shutil.rmtree(path)
        barrier()
    return results


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[dict[str, dict]]:
    """Results by case of: two ranks uninterrupted, one rank from step 2, (the second of) two ranks from step 4."""
    data = make_data(tmp_path_factory.mktemp("data"))
    folder = tmp_path_factory.mktemp("runs")
    runner: Callable[..., list] = run_distributed_test
    whole = runner(_train, 2, args=(folder, data, None, FIRST, {}))[0]
    alone = runner(_train, 1, args=(folder, data, "auto", SECOND, {}))[0]
    pair = runner(_train, 2, args=(folder, data, "auto", None, LAST_STAGE))[1]
    return [whole, alone, pair]


@pytest.mark.parametrize("name", CASES)
def test_what_is_loaded_is_what_was_saved_to_the_bit(runs, name):
    whole, alone, pair = (run[name] for run in runs)
    for saved, loaded, step in ((whole, alone, FIRST), (alone, pair, SECOND)):
        assert list(loaded["loaded"]) == [step]
        assert len(loaded["loaded"][step]) > 20
        states = [dict(run) for run in (loaded["loaded"][step], saved["saved"][step])]
        assert states[0]["steps"] == {step}
        empty = [state.pop("groups without a piece", 0) for state in states]
        # The second of two ranks has nothing of the temperatures.
        assert empty == [1 if run is pair and name in ("stage1", "stage2") else 0 for run in (loaded, saved)]
        assert states[0] == states[1]


@pytest.mark.parametrize("name", SAME_LOSSES)
def test_losses_are_those_of_the_uninterrupted_run(runs, name):
    whole, alone, pair = (run[name]["losses"] for run in runs)
    tolerance = 0.02 if "bf16" in name else 1e-4
    assert sorted(whole) == sorted(alone) == sorted(pair) == list(range(1, STEPS + 1))
    assert alone == pytest.approx(whole, abs=tolerance)
    assert pair == pytest.approx(whole, abs=tolerance)
    assert len(set(whole.values())) == STEPS


def test_the_average_of_the_student_follows_to_the_bit(runs):
    whole, alone, pair = (run["stage1-bf16-average"] for run in runs)
    assert alone["average"] == whole[f"average {FIRST}"] != {}
    assert pair["average"] == alone[f"average {SECOND}"] != alone["average"]


@pytest.mark.parametrize("name", CASES)
def test_what_was_done_is_said_and_nothing_is_left_of_it(runs, name):
    whole, alone, pair = (run[name] for run in runs)
    assert whole["said"] == ""
    assert alone["said"].startswith(", written by 2 ranks, resumed by 1")
    assert pair["said"].startswith(", written by 1 rank, resumed by 2")
    assert (", written at ZeRO-2, resumed at ZeRO-1:" in pair["said"]) == (name == "stage2")
    for run in (alone, pair):
        assert (": converted to a universal checkpoint in " in run["said"]) == (name != "stage0")
        assert run["names"] == [f"step-{step:06d}" for step in (2, 4, 6)]
