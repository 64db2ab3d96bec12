"""R@1 of our models and the published ones as bars, a panel a set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmd2v.errors import UserError, nearest
from mmd2v.files import atomic_path, check_output
from mmd2v.report.published import Published
from mmd2v.report.results import Result
from mmd2v.report.results_table import RetrievalRow, missing, retrieval_rows

SUFFIXES = (".svg", ".png", ".pdf")
_COLOURS = {"i2t": ("#3b6fb6", "#a9bddb"), "t2i": ("#d9822b", "#ecc9a3")}  # ours, published
_LABELS = {"i2t": "image → text", "t2i": "text → image"}
_INK, _QUIET, _RULE = "#1f2328", "#6e7781", "#c4cad0"
_BAR, _LINE = 0.36, 0.42  # of a row's height; inches a row


def check_results_picture(flag: str, path: str | Path) -> None:
    """Raise a UserError that starts with ``flag`` if no picture can be written at ``path``; creates nothing."""
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(
            f"{flag}: {path} ends in '{suffix}', expected one of {', '.join(SUFFIXES)}.{nearest(suffix, SUFFIXES)}"
        )
    check_output(flag, path)


def write_results_picture(path: str | Path, results: Sequence[Result], known: Published) -> None:
    """Draw a panel for each published set; the format follows the ending of ``path``, whole or not at all.

    A hollow bar is the figure as the source prints it where that had to be corrected. The same numbers give the same
    bytes with the same matplotlib.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    panels = {name: retrieval_rows(results, known, name) for name in known.sets}
    height = _LINE * max(map(len, panels.values())) + 1.9
    with matplotlib.rc_context({"svg.hashsalt": "mmd2v", "font.size": 9, "text.color": _INK}):
        figure = Figure(figsize=(6.6 * len(panels), height), layout="constrained", dpi=160)
        figure.suptitle("Image–text retrieval, R@1 in percent", fontsize=12, fontweight="bold")
        for axes, (name, rows) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
            axes.set_title(known.sets[name].title, fontsize=10)
            _panel(axes, rows)
            if notes := list(missing(rows, name)):
                axes.set_xlabel("\n".join(note.replace("`", "") for note in notes), fontsize=7, color=_QUIET)
        legend = [
            Patch(color=colour, label=f"{_LABELS[direction]}, {whose}")
            for place, whose in enumerate(("ours", "published"))
            for direction, colour in ((direction, pair[place]) for direction, pair in _COLOURS.items())
        ]
        legend.append(
            Patch(
                facecolor="none", edgecolor=_QUIET, linestyle=":", label="as printed, one copy of the image a caption"
            )
        )
        figure.legend(handles=legend, loc="outside lower center", ncols=len(legend), frameon=False, fontsize=8)
        suffix = Path(path).suffix.lower()
        metadata = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(suffix)
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format=suffix[1:], metadata=metadata)


def _panel(axes: Any, rows: Sequence[RetrievalRow]) -> None:
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.spines["left"].set_color(_RULE)
    axes.tick_params(colors=_QUIET, length=0)
    axes.set_xlim(0, 108)
    axes.set_xticks([])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_yticks(range(len(rows)), [_label(row) for row in rows])
    for label, row in zip(axes.get_yticklabels(), rows, strict=True):
        label.set_color(_INK)
        label.set_fontweight("bold" if row.ours else "normal")
    for place, row in enumerate(rows):
        for offset, (direction, colours) in zip((-_BAR / 2, _BAR / 2), _COLOURS.items(), strict=True):
            key = f"{direction}_R@1"
            value = None if row.comparable is None else row.comparable.get(key)
            text = "no result" if value is None else f"{100 * value:.{1 if value >= 0.01 else 2}f}"
            if value is not None:
                axes.barh(place + offset, 100 * value, _BAR, color=colours[not row.ours])
            if row.corrected and row.printed is not None and key in row.printed:
                printed = 100 * row.printed[key]
                axes.barh(place + offset, printed, _BAR, facecolor="none", edgecolor=_QUIET, linestyle=":")
                text += f"  (printed {printed:.2f})"
            axes.annotate(
                text,
                (100 * (value or 0), place + offset),
                (3, 0),
                textcoords="offset points",
                va="center",
                size=7,
                color=_INK if row.ours else _QUIET,
            )


def _label(row: RetrievalRow) -> str:
    return row.model if row.ours or row.setting == "zero-shot" else f"{row.model} ({row.setting})"
