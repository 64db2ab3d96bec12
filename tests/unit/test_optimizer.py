"""Parameter groups, and the optimiser that a name stands for."""

import sys
import types

import pytest
import torch
from small import StubTokenizer, small_config
from torch import nn

from mmd2v.config.schema import OptimizerConfig
from mmd2v.errors import UserError
from mmd2v.models.student import build_student
from mmd2v.objectives import build_objectives
from mmd2v.train.module import TrainModule
from mmd2v.train.optimizer import build_optimizer, parameter_groups

CPU = torch.device("cpu")


def _module(**changes) -> nn.Module:
    config = small_config(**changes)
    student = build_student(config, StubTokenizer())
    return TrainModule(student, build_objectives(config, student, {}), autocast=False)


def _groups(config: OptimizerConfig, module: nn.Module | None = None):
    return parameter_groups(config, (module or _module()).named_parameters())


def test_every_trainable_parameter_is_in_exactly_one_group():
    module = _module(model__freeze=["layers.0.*"])
    groups = _groups(OptimizerConfig(), module)
    ids = [id(p) for group in groups for p in group.parameters]
    assert len(ids) == len(set(ids))
    assert set(ids) == {id(p) for p in module.parameters() if p.requires_grad}
    assert not any(name.startswith("layers.0.") for group in groups for name in group.names)


def test_vectors_cls_positions_and_embeddings_are_not_decayed():
    by_decay = {group.weight_decay: group.names for group in _groups(OptimizerConfig(weight_decay=0.1))}
    assert set(by_decay) == {0.0, 0.1}
    assert all(name.endswith("weight") and "norm" not in name and "embedding" not in name for name in by_decay[0.1])
    for word in ("cls_token", "positions", "embedding", "bias", "norm", "log_scale"):
        assert any(word in name for name in by_decay[0.0])


def test_all_are_decayed_when_asked():
    (group,) = _groups(OptimizerConfig(decay_all=True, weight_decay=0.1))
    assert group.weight_decay == 0.1


def test_first_wildcard_that_matches_wins():
    settings = OptimizerConfig(
        weight_decay=0.1,
        groups=[
            {"match": "layers.*.text.*", "lr_multiplier": 0.1},
            {"match": "layers.*", "lr_multiplier": 0.5, "weight_decay": 0.3},
        ],
    )
    seen = {}
    for group in _groups(settings):
        for name in group.names:
            seen[name] = (group.lr_multiplier, group.weight_decay)
    assert seen["layers.0.mlp.text.fc1.weight"] == (0.1, 0.1)
    assert seen["layers.0.mlp.image.fc1.weight"] == (0.5, 0.3)
    assert seen["layers.0.mlp.image.fc1.bias"] == (0.5, 0.0)
    assert seen["projection.maps.image.1.weight"] == (1.0, 0.1)


def test_wildcard_that_matches_nothing_names_the_nearest():
    settings = OptimizerConfig(groups=[{"match": "layers.*"}, {"match": "layer.0.mlp.text.fc1.weight"}])
    with pytest.raises(UserError, match=r"optimizer.groups.1.match.*Did you mean 'layers.0.mlp.text.fc1.weight'"):
        _groups(settings)


def test_wildcard_over_frozen_parameters_matches_nothing():
    with pytest.raises(UserError, match=r"optimizer.groups.0.match .trainable parameters.*matches no parameter"):
        _groups(OptimizerConfig(groups=[{"match": "layers.0.*"}]), _module(model__freeze=["layers.0.*"]))


def test_nothing_to_train():
    module = _module()
    module.requires_grad_(False)
    with pytest.raises(UserError, match=r"every parameter is frozen"):
        _groups(OptimizerConfig(), module)


def _build(name: str, device: torch.device = CPU):
    config = small_config(optimizer__name=name, optimizer__groups=[{"match": "layers.*", "lr_multiplier": 0.5}])
    return build_optimizer(config, _groups(config.optimizer), device)


def test_adamw_is_torchs_fused_one_with_the_groups_settings():
    optimizer, description = _build("adamw")
    assert type(optimizer) is torch.optim.AdamW
    assert description == "torch.optim.AdamW (fused), named in the config"
    assert {group["lr"] for group in optimizer.param_groups} == {5e-4, 2.5e-4}
    assert all(group["betas"] == (0.9, 0.98) and group["eps"] == 1e-6 for group in optimizer.param_groups)


def test_auto_says_why():
    optimizer, description = _build("auto")
    assert type(optimizer) is torch.optim.AdamW
    assert "chosen because it is fused on the CPU and needs no compiler" in description


def test_apex_needs_cuda():
    with pytest.raises(UserError, match=r"'apex_adam' cannot be used here: apex's FusedAdam runs on CUDA only"):
        _build("apex_adam")


def test_apex_that_is_absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "apex", None)
    with pytest.raises(UserError, match="apex"):
        _build("apex_adam", torch.device("cuda"))


def test_other_package_named_apex_is_told_apart(monkeypatch):
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    with pytest.raises(UserError, match="is not NVIDIA's"):
        _build("apex_adam", torch.device("cuda"))


def test_learning_rates_fall_with_the_distance_from_the_top():
    """Three layers, decay 0.5: the last has 0.5, the first 0.125, what comes before them 0.0625."""
    module = _module(model__token_types="input", model__freeze=["layers.1.*"])
    groups = _groups(OptimizerConfig(layer_decay=0.5), module)
    rate = {name: group.lr_multiplier for group in groups for name in group.names}
    expected = {"encoders": 0.0625, "token_types": 0.0625, "layers.0": 0.125, "layers.2": 0.5}
    expected |= {"norm": 1.0, "projection": 1.0, "objectives": 1.0}
    for part, multiplier in expected.items():
        assert {own for name, own in rate.items() if name.startswith(f"{part}.")} == {multiplier}
    # One a rate and decay: positions, biases, norms and the temperature are not decayed, nor are token types.
    assert len(groups) == 2 * 4
    assert {group.label for group in groups} >= {"* × 0.125", "* × 0.0625 (no decay)", "*", "* (no decay)"}


def test_layer_decay_multiplies_a_groups_own_rate():
    settings = OptimizerConfig(
        layer_decay=0.8, groups=[{"match": "*.text.*", "lr_multiplier": 0.1}, {"match": "norm.*", "lr_multiplier": 3}]
    )
    rate = {name: group.lr_multiplier for group in _groups(settings) for name in group.names}
    assert rate["layers.1.mlp.text.fc1.weight"] == pytest.approx(0.1 * 0.8**2)
    assert rate["layers.1.mlp.image.fc1.weight"] == pytest.approx(0.8**2)
    assert rate["encoders.text.embedding.weight"] == pytest.approx(0.1 * 0.8**4)
    assert rate["norm.weight"] == 3


def test_without_layer_decay_there_are_two_groups():
    groups = _groups(OptimizerConfig())
    assert {group.label for group in groups} == {"*", "* (no decay)"} and len(groups) == 2
    assert {group.lr_multiplier for group in groups} == {1.0}


def test_the_optimiser_gets_the_decayed_rates():
    config = small_config(optimizer__name="adamw", optimizer__layer_decay=0.5, optimizer__lr=0.01)
    optimizer, _ = build_optimizer(config, _groups(config.optimizer), CPU)
    assert {round(group["lr"], 8) for group in optimizer.param_groups} == {0.01, 0.005, 0.0025, 0.00125, 0.000625}
