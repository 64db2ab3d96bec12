"""Layers that keep their input alone: the same gradients, computed with a second pass over each layer."""

from dataclasses import replace

import pytest
import torch
from small import StubTokenizer, random_batch, small_config

from mmd2v.models import layers
from mmd2v.models.student import build_student
from mmd2v.objectives import build_objectives
from mmd2v.train.dry_run import estimate_memory
from mmd2v.train.module import TrainModule
from mmd2v.train.parts import Parts

NOISY = [
    {"kind": "separate", "dropout": 0.3},
    {"kind": "mome", "drop_path": 0.3},
    {"kind": "shared", "layer_drop": 0.5, "dropout": 0.1},
]


def build(checkpointing: bool, **changes) -> tuple[TrainModule, Parts]:
    config = small_config(
        model__layers=NOISY, model__activation_checkpointing=checkpointing, engine__precision="fp32", **changes
    )
    student = build_student(config, StubTokenizer())
    module = TrainModule(student, build_objectives(config, student, {}), autocast=False).train()
    return module, Parts(StubTokenizer(), {}, module)


@pytest.fixture
def passes(monkeypatch) -> list[int]:
    """Rows of every call of attention."""
    found = []

    def counted(q_THK, *others):
        found.append(len(q_THK))
        return attend(q_THK, *others)

    attend = layers.attend
    monkeypatch.setattr(layers, "attend", counted)
    return found


@pytest.mark.parametrize("seed", range(4))
def test_gradients_are_the_same_to_the_bit(passes, seed):
    found = []
    for checkpointing in (False, True):
        module, _ = build(checkpointing)
        torch.manual_seed(7)
        passes.clear()
        losses = module(replace(random_batch(), draw_seed=seed), {})
        assert len(passes) == len(NOISY)
        forward = list(passes)
        losses["loss"].backward()
        assert passes[len(NOISY) :] == (forward[::-1] if checkpointing else [])
        found.append({name: p.grad for name, p in module.named_parameters()})
    kept, recomputed = found
    for name, gradient in kept.items():
        assert torch.equal(gradient, recomputed[name]), name


def test_nothing_is_kept_for_a_backward_pass_that_will_not_come(passes):
    module, _ = build(True)
    batch = random_batch()
    expected = module.eval()(batch, {})["loss"]
    with torch.no_grad():
        assert torch.equal(module(batch, {})["loss"], expected)
    expected.backward()
    assert len(passes) == 2 * len(NOISY)


def test_the_estimate_of_memory_knows_it():
    estimates = []
    for checkpointing in (False, True):
        config = small_config(model__layers=[{"kind": "shared", "count": 12}])
        config = config.model_copy(
            update={"model": config.model.model_copy(update={"activation_checkpointing": checkpointing})}
        )
        student = build_student(config, StubTokenizer())
        module = TrainModule(student, build_objectives(config, student, {}), autocast=False)
        estimates.append(estimate_memory(config, Parts(StubTokenizer(), {}, module), random_batch(), ranks=1))
    kept, recomputed = estimates
    assert recomputed.activations == pytest.approx(kept.activations * (12 + 16) / (12 * 16))
    assert recomputed.weights == kept.weights
