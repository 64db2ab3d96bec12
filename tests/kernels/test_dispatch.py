"""What runs, what the environment may ask for, and what is said about it."""

import subprocess
import sys

import pytest
import torch

from mmd2v_kernels import describe, dispatch, expert_mlp
from mmd2v_kernels.measured import Measurement, fastest

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def unset(monkeypatch):
    monkeypatch.delenv("MMD2V_KERNELS", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.parametrize("value", ["", "auto", "expert_mlp=auto"])
def test_the_cpu_runs_the_segmented_path(value, monkeypatch):
    monkeypatch.setenv("MMD2V_KERNELS", value)
    assert dispatch.choose("expert_mlp", CPU, torch.float32) == ("segmented", "on cpu")


def test_the_environment_overrides_all_operators_or_some(monkeypatch):
    monkeypatch.setenv("MMD2V_KERNELS", "reference")
    assert {dispatch.choose(name, CPU, torch.float32).path for name in dispatch.OFFERS} == {"reference"}
    monkeypatch.setenv("MMD2V_KERNELS", " distill_target = reference , expert_mlp=segmented")
    assert dispatch.choose("expert_mlp", CPU, torch.float32) == ("segmented", "MMD2V_KERNELS asks for it")
    assert dispatch.choose("distill_target", CPU, torch.float32) == ("reference", "MMD2V_KERNELS asks for it")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("segmentd", "found path 'segmentd', expected one of triton, segmented, reference, auto; did you mean 'segm"),
        ("expert_mlp=fast", "found path 'fast', expected one of"),
        ("expertmlp=triton", "found operator 'expertmlp', expected one of expert_mlp, .*did you mean 'expert_mlp'"),
    ],
)
def test_unknown_names_are_refused(value, message, monkeypatch):
    monkeypatch.setenv("MMD2V_KERNELS", value)
    with pytest.raises(ValueError, match=message):
        describe("cpu")


def test_a_path_that_an_operator_has_not_leaves_the_reference(monkeypatch):
    monkeypatch.setenv("MMD2V_KERNELS", "segmented")
    choice = dispatch.choose("distill_target", CPU, torch.float32)
    assert choice.path == "reference" and "has no path 'segmented'" in choice.reason


def test_triton_on_the_cpu_is_refused_not_replaced(monkeypatch):
    monkeypatch.setitem(dispatch.OFFERS, "expert_mlp", ("triton", "segmented", "reference"))
    monkeypatch.setenv("MMD2V_KERNELS", "triton")
    monkeypatch.setattr(dispatch, "triton_version", lambda: "3.8.0")
    with pytest.raises(RuntimeError, match="asks for expert_mlp by triton, but the tensors are on cpu"):
        dispatch.choose("expert_mlp", CPU, torch.float32)
    monkeypatch.setattr(dispatch, "triton_version", lambda: None)
    with pytest.raises(RuntimeError, match="Triton is not installed"):
        dispatch.choose("expert_mlp", CPU, torch.float32)


def test_kernels_wait_for_a_measurement_on_the_device(monkeypatch):
    """A device is only named here, none is needed."""
    cuda = torch.device("cuda")
    monkeypatch.setitem(dispatch.OFFERS, "expert_mlp", ("triton", "segmented", "reference"))
    monkeypatch.setattr(dispatch, "triton_version", lambda: "3.8.0")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    choice = dispatch.choose("expert_mlp", cuda, torch.bfloat16, rows=5000)
    assert choice == ("segmented", "nothing faster is measured on some GPU")
    table = (
        Measurement("expert_mlp", "some GPU", torch.bfloat16, 0, "segmented"),
        Measurement("expert_mlp", "some GPU", torch.bfloat16, 4096, "triton"),
    )
    monkeypatch.setattr(dispatch, "fastest", lambda *key: fastest(*key, table))
    assert dispatch.choose("expert_mlp", cuda, torch.bfloat16, rows=5000).path == "triton"
    assert dispatch.choose("expert_mlp", cuda, torch.bfloat16, rows=4000).path == "segmented"
    assert dispatch.choose("expert_mlp", cuda, torch.float32, rows=5000).path == "segmented"
    found = dispatch.choose("expert_mlp", cuda, torch.bfloat16, rows=5000, obstacles={"triton": "it has an inner norm"})
    assert found == ("segmented", "it has an inner norm")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert "capability 8.0" in dispatch.choose("expert_mlp", cuda, torch.bfloat16, rows=5000).reason


def test_what_runs_is_said_once(caplog):
    dispatch._log_once.cache_clear()
    from expert_samples import make_expert

    with caplog.at_level("INFO", logger="mmd2v_kernels.dispatch"):
        for _ in range(3):
            expert_mlp(torch.zeros(2, 4, dtype=torch.float64), [make_expert(4, 8)], [(0, 2)], norm="pre")
    assert [record.getMessage() for record in caplog.records] == ["expert_mlp on cpu in float64: segmented (on cpu)"]


def test_description_names_every_operator(monkeypatch):
    monkeypatch.setenv("MMD2V_KERNELS", "expert_mlp=reference")
    text = describe("cpu", torch.bfloat16)
    assert text.startswith("kernels on cpu in bfloat16: expert_mlp reference (MMD2V_KERNELS asks for it), ")
    assert all(name in text for name in dispatch.OFFERS) and "Triton" in text


def test_nothing_of_triton_is_needed():
    code = """
import sys
sys.modules["triton"] = None
import torch, mmd2v_kernels
x = torch.randn(2, 3, 4)
mmd2v_kernels.distill_target([x], final_layer_norm=True)
assert "Triton is not installed" in mmd2v_kernels.describe("cpu")
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)
