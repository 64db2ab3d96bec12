"""What a run warns of before its first step."""

from __future__ import annotations

import pytest
import torch

from mmd2v.train import announcement


@pytest.mark.parametrize("precision", ["bf16_autocast", "bf16", "fp16"])
def test_products_without_instructions_are_warned_of(precision, monkeypatch):
    monkeypatch.setattr(announcement, "multiplies", lambda device, dtype: device != "cpu" or dtype == torch.float32)
    (told,) = announcement._slow_products(precision, torch.device("cpu"))
    assert f"engine.precision: found {precision}" in told and "--engine.precision fp32" in told
    assert announcement._slow_products("fp32", torch.device("cpu")) == []
    assert announcement._slow_products(precision, torch.device("cuda")) == []
