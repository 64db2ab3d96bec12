"""Layer results of a library's model: the outputs of its blocks' MLPs, caught on the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


class ResultHooks:
    """Keeps the outputs of ``modules`` (the last map of each block's MLP) of one forward pass."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._found: list[torch.Tensor] = []
        for module in modules:
            module.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        self._found.append(output)

    def take(self) -> list[torch.Tensor]:
        """Return the outputs since the last call, in order."""
        found, self._found = self._found, []
        return found
