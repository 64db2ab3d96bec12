"""Which precision `engine.precision: auto` is, by what devices and checkpoints say."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import pytest
import torch
from run_checkpoints import ALONE, write_checkpoint
from small import small_config

from mmd2v.config.schema import EngineConfig
from mmd2v.distributed.environment import World
from mmd2v.errors import UserError
from mmd2v.train import precision
from mmd2v.train.checkpoints.manifest import MANIFEST
from mmd2v_kernels import half_products
from mmd2v_kernels.half_products import half_of

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
GPU_ALONE = World(0, 1, 0, CUDA, "nccl")


def auto(**changes):
    return small_config(engine__precision="auto", **changes)


def checkpoint_in(name: str, folder: Path) -> Path:
    path = write_checkpoint(folder, 4)
    manifest = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps({**manifest, "precision": name}))
    return path


# ------------------------------------------------------------------------------------------- devices


@pytest.mark.parametrize(
    ("machine", "avx512_bf16", "takes_bf16", "expected"),
    [
        ("x86_64", True, True, torch.bfloat16),
        ("x86_64", False, True, None),  # AVX-512 alone: taken, but multiplied in fp32
        ("x86_64", False, False, None),
        ("aarch64", False, True, torch.bfloat16),
        ("aarch64", False, False, None),
    ],
)
def test_half_of_a_processor(machine, avx512_bf16, takes_bf16, expected, monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(half_products, "multiplies", lambda device, dtype: takes_bf16)
    assert half_of(CPU) == expected


@pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, torch.float16)])
def test_half_of_a_gpu_is_none_that_it_emulates(native, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    assert half_of(CUDA) == expected


@pytest.mark.parametrize(
    ("world", "half", "expected", "why"),
    [
        (ALONE, torch.bfloat16, "bf16_autocast", "this processor has instructions"),
        (ALONE, None, "fp32", "this processor has no instructions"),
        (GPU_ALONE, torch.bfloat16, "bf16_autocast", "this GPU has instructions"),
        (GPU_ALONE, torch.float16, "fp32", "this GPU has no instructions for products of bf16; fp16"),
    ],
)
def test_a_new_run_takes_what_the_device_has(world, half, expected, why, monkeypatch):
    monkeypatch.setattr(precision, "half_of", lambda device: half)
    config = auto(engine__zero_stage=2)
    resolved, said = precision.resolve_precision(config, world)
    assert resolved.engine.precision == expected and f"auto is {expected} here: {why}" in said
    assert resolved == small_config(engine__precision=expected, engine__zero_stage=2)
    assert config.engine.precision == "auto"


@pytest.mark.parametrize("name", ["fp32", "bf16", "bf16_autocast", "fp16"])
def test_a_precision_by_name_is_taken_as_it_is(name, monkeypatch, tmp_path):
    monkeypatch.setattr(precision, "half_of", lambda device: pytest.fail("nobody asked"))
    config = small_config(engine__precision=name)
    assert precision.resolve_precision(config, ALONE, tmp_path / "no checkpoint") == (config, "")


def test_it_is_left_to_the_devices_where_a_config_says_nothing():
    assert EngineConfig().precision == "auto"


def test_all_ranks_take_what_the_least_able_has():
    able, unable = ("bf16_autocast", "has"), ("fp32", "has not")
    assert precision._agreed([able, able]) == able
    assert precision._agreed([unable, unable]) == unable
    assert precision._agreed([able, unable, able]) == ("fp32", "has not (rank 1 of 3; all compute alike)")
    assert precision._agreed([unable, able, unable]) == ("fp32", "has not (ranks 0, 2 of 3; all compute alike)")


# --------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize(
    ("name", "half"), [("fp32", torch.bfloat16), ("bf16_autocast", None), ("bf16", None), ("bf16", torch.bfloat16)]
)
def test_a_run_keeps_the_precision_of_its_checkpoint(name, half, monkeypatch, tmp_path):
    monkeypatch.setattr(precision, "half_of", lambda device: half)
    path = checkpoint_in(name, tmp_path)
    resolved, said = precision.resolve_precision(auto(), ALONE, path)
    assert resolved.engine.precision == name and said == f"engine.precision: auto is {name} here: as in {path}"


def test_fp16_of_a_checkpoint_needs_the_gpu_it_came_from(tmp_path):
    path = checkpoint_in("fp16", tmp_path)
    with pytest.raises(UserError, match=r"step-000004 is of a run in fp16, which needs CUDA.*go on with it on a GPU"):
        precision.resolve_precision(auto(), ALONE, path)
    assert precision.resolve_precision(auto(), GPU_ALONE, path)[0].engine.precision == "fp16"


def test_a_checkpoint_of_no_precision_of_ours_is_named(tmp_path):
    path = checkpoint_in("bf16_autcast", tmp_path)
    with pytest.raises(UserError, match=r"mmd2v\.json: precision: found 'bf16_autcast'.*Did you mean 'bf16_autocast'"):
        precision.resolve_precision(auto(), ALONE, path)
