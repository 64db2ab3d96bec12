"""Recall as a text table in percent."""

from __future__ import annotations

from collections.abc import Mapping

from mmd2v.evaluation.retrieval import RECALL_AT

_DIRECTIONS = {"i2t": "image → text", "t2i": "text → image"}
_CELL = 7  # "100.00" and a space
_GAP = "   "


def recall_table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Render metrics by row name as aligned columns: R@1, R@5, R@10 in both directions.

    The metrics hold fractions under ``i2t_R@1`` … ``t2i_R@10``; an absent one is printed as a dash.
    """
    width = max([0, *map(len, rows)])
    group = _CELL * len(RECALL_AT)
    lines = [
        " " * width + "".join(f"{_GAP}{title:^{group}}" for title in _DIRECTIONS.values()).rstrip(),
        " " * width + (_GAP + "".join(f"{f'R@{k}':>{_CELL}}" for k in RECALL_AT)) * len(_DIRECTIONS),
    ]
    for name, metrics in rows.items():
        cells = "".join(
            _GAP + "".join(_percent(metrics.get(f"{direction}_R@{k}")) for k in RECALL_AT) for direction in _DIRECTIONS
        )
        lines.append(f"{name:<{width}}{cells}")
    return "\n".join(lines)


def chance_row(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the chance levels inside ``metrics`` as a row of their own."""
    prefix = "chance_"
    return {key.removeprefix(prefix): value for key, value in metrics.items() if key.startswith(prefix)}


def _percent(fraction: float | None) -> str:
    return f"{'–':>{_CELL}}" if fraction is None else f"{100 * fraction:>{_CELL}.2f}"
