"""The rows of all modalities on their way through the layers, and what is kept of them.

Shapes: T rows of all sequences ordered by modality, R of one modality, D width.
"""

from __future__ import annotations

import torch

from mmd2v.models.layers import Layer
from mmd2v.models.packed import Layout
from mmd2v.models.student_output import Wanted


class Rows:
    """Rows of each modality between layers, joined only where a layer needs several and kept joined while it can.

    A modality that passes through frozen layers alone stays out of the others' gradient graph in this way: joined to
    trainable rows, its frozen layers would be differentiated for nothing.
    """

    def __init__(self, parts: dict[str, torch.Tensor]) -> None:
        self._parts = parts
        self._joint: tuple[tuple[str, ...], torch.Tensor] | None = None

    def take(self, layout: Layout) -> torch.Tensor:
        """Return the rows of the layout's modalities, [T, D]."""
        if self._joint is not None and self._joint[0] == layout.modalities:
            return self._joint[1]
        parts = [self._parts[name] for name in layout.modalities]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def parts(self, layout: Layout) -> dict[str, torch.Tensor]:
        """Return each modality's rows at this point."""
        return {name: self._parts[name] for name in layout.modalities}

    def put(self, layout: Layout, x_TD: torch.Tensor) -> None:
        """Replace the rows of the layout's modalities."""
        self._joint = (layout.modalities, x_TD)
        self._parts.update(layout.split(x_TD))


class Trace:
    """What is kept while the layers run."""

    def __init__(self, wanted: Wanted) -> None:
        self.wanted = wanted
        self.results: dict[str, list[torch.Tensor]] = {name: [] for name in wanted.results}
        self.layer_cls: dict[int, dict[str, torch.Tensor]] = {}
        self.cls_attention: dict[str, torch.Tensor] = {}
        self.before_joint: dict[str, torch.Tensor] | None = None

    def see_result(self, result_TD: torch.Tensor, layout: Layout) -> None:
        """Keep a layer's result [T, D] of the modalities that are wanted."""
        for name, result_RD in layout.split(result_TD).items():
            if name in self.wanted.results:
                self.results[name].append(result_RD)

    def see_cls(self, index: int, rows: Rows, layout: Layout) -> None:
        """Keep every modality's CLS after layer ``index``, if it is wanted."""
        if index in self.wanted.layers:
            parts = rows.parts(layout)
            self.layer_cls[index] = {name: x_RD[layout.first_rows(name)] for name, x_RD in parts.items()}

    def see_attention(self, layer: Layer, x_TD: torch.Tensor, layout: Layout, last_of: list[str]) -> None:
        """Keep the CLS attention of the modalities that ``layer`` is the last of; ``x_TD`` are the rows before it."""
        for name in self.wanted.cls_attention.intersection(last_of):
            self.cls_attention[name] = layer.cls_attention(x_TD, layout, name)
