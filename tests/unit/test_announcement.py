"""What a run warns of before its first step."""

from __future__ import annotations

import pytest
import torch

from mmd2v.train import announcement

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("precision", ["bf16_autocast", "bf16", "fp16"])
def test_products_without_instructions_are_warned_of(precision, monkeypatch):
    monkeypatch.setattr(announcement, "multiplies", lambda device, dtype: dtype == torch.float32)
    monkeypatch.setattr(announcement, "half_of", lambda device: None if device == CPU else torch.bfloat16)
    (told,) = announcement._slow_products(precision, CPU)
    assert f"engine.precision: found {precision}, but this processor" in told and "--engine.precision fp32" in told
    assert announcement._slow_products("fp32", CPU) == []
    assert announcement._slow_products(precision, CUDA) == []


def test_bf16_of_a_processor_that_multiplies_it_in_fp32_is_warned_of(monkeypatch):
    monkeypatch.setattr(announcement, "multiplies", lambda device, dtype: True)
    monkeypatch.setattr(announcement, "half_of", lambda device: None)
    (told,) = announcement._slow_products("bf16_autocast", CPU)
    assert told.endswith("--engine.precision fp32 is faster here")
    monkeypatch.setattr(announcement, "half_of", lambda device: torch.bfloat16)
    assert announcement._slow_products("bf16_autocast", CPU) == []


@pytest.mark.parametrize(("precision", "warned"), [("bf16_autocast", 1), ("bf16", 1), ("fp16", 0), ("fp32", 0)])
def test_bf16_of_a_gpu_that_only_emulates_it_is_warned_of(precision, warned, monkeypatch):
    monkeypatch.setattr(announcement, "half_of", lambda device: torch.float16)
    told = announcement._slow_products(precision, CUDA)
    assert len(told) == warned and all("this GPU has no instructions" in line for line in told)
