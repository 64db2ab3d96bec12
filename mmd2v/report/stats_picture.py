"""Histograms of what a data set holds: lengths of captions, sizes of images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmd2v.data.stats import Distribution, Stats
from mmd2v.errors import UserError, nearest
from mmd2v.files import atomic_path, check_output

SUFFIXES = (".png", ".svg", ".pdf")
_BINS = 40
_BLUE, _ORANGE, _INK, _QUIET, _RULE = "#3b6fb6", "#d9822b", "#1f2328", "#6e7781", "#c4cad0"
_TAIL = 99.5  # percent; longer ones are drawn in the last bin


def check_stats_picture(flag: str, path: str | Path) -> None:
    """Raise a UserError that starts with ``flag`` if no picture can be written at ``path``; creates nothing."""
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(
            f"{flag}: {path} ends in '{suffix}', expected one of {', '.join(SUFFIXES)}.{nearest(suffix, SUFFIXES)}"
        )
    check_output(flag, path)


def write_stats_picture(path: str | Path, stats: Stats, title: str) -> None:
    """Draw a row of histograms; the format follows the ending of ``path``, whole or not at all.

    The same numbers give the same bytes with the same matplotlib.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    # A single bar tells nothing that the title cannot.
    panels = [_captions_each] if len(stats.captions_each) > 1 else []
    panels += [_words]
    panels += [_tokens] if stats.tokens else []
    panels += [_sizes] if len(stats.widths) > 1 or len(stats.heights) > 1 else []
    with matplotlib.rc_context({"svg.hashsalt": "mmd2v", "font.size": 9, "text.color": _INK}):
        figure = Figure(figsize=(3.6 * len(panels), 3.3), layout="constrained", dpi=160)
        figure.suptitle(_heading(title, stats), fontsize=11, fontweight="bold")
        for axes, draw in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            axes.spines[["top", "right"]].set_visible(False)
            axes.spines[["left", "bottom"]].set_color(_RULE)
            axes.tick_params(colors=_QUIET)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
            draw(axes, stats)
        suffix = Path(path).suffix.lower()
        metadata = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(suffix)
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format=suffix[1:], metadata=metadata)


def _heading(title: str, stats: Stats) -> str:
    parts = [f"{stats.images:,} images" if stats.images else f"{stats.texts:,} texts"]
    if len(stats.widths) == len(stats.heights) == 1:
        parts[0] += f" of {next(iter(stats.widths))} × {next(iter(stats.heights))} pixels"
    parts.append(f"{stats.captions:,} captions")
    return f"{title}: {', '.join(parts)}"


def _captions_each(axes: Any, stats: Stats) -> None:
    _histogram(axes, [stats.captions_each], [_BLUE])
    axes.set(
        xlabel=f"captions {'an image' if stats.images else 'a text'}", ylabel="images" if stats.images else "texts"
    )


def _words(axes: Any, stats: Stats) -> None:
    _histogram(axes, [stats.words], [_BLUE])
    _mark_median(axes, stats.words)
    axes.set(xlabel="words a caption", ylabel="captions")


def _tokens(axes: Any, stats: Stats) -> None:
    shown = stats.max_length if stats.max_length is not None and stats.longer else 0
    _histogram(axes, [stats.tokens], [_BLUE], least=shown)
    _mark_median(axes, stats.tokens)
    axes.set(xlabel="tokens a caption, special ones included", ylabel="captions")
    if stats.max_length is not None and stats.longer is not None:
        text = f"{100 * stats.longer:.1f} % longer than {stats.max_length}"
        axes.set_title(text, fontsize=9, color=_ORANGE if stats.longer else _QUIET)
        if axes.get_xlim()[1] >= stats.max_length:
            axes.axvline(stats.max_length + 0.5, color=_ORANGE, linewidth=1.2)


def _sizes(axes: Any, stats: Stats) -> None:
    _histogram(axes, [stats.widths, stats.heights], [_BLUE, _ORANGE], labels=["width", "height"])
    axes.set(xlabel="size of an image, pixels", ylabel="images")
    axes.legend(frameon=False, fontsize=8)


def _mark_median(axes: Any, numbers: Distribution) -> None:
    median = numbers.percentile(50)
    axes.margins(y=0.1)
    axes.axvline(median, color=_QUIET, linewidth=1, linestyle=(0, (3, 2)))
    label = {"textcoords": "offset points", "va": "top", "color": _QUIET, "size": 8}
    paper = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # over the line of max_length, should it be near
    axes.annotate(f"median {median}", (median, axes.get_ylim()[1]), (4, -2), bbox=paper, zorder=5, **label)


def _histogram(
    axes: Any,
    series: Sequence[Distribution],
    colours: Sequence[str],
    labels: Sequence[str] = ("",),
    least: int = 0,
) -> None:
    """Draw distributions of whole numbers over bins of whole numbers; the last bin takes what is beyond it."""
    low = min(min(numbers) for numbers in series)
    high = max(max(numbers.percentile(_TAIL) for numbers in series), low, least)
    step = -(-(high - low + 1) // _BINS)  # of whole numbers, rounded up
    count = -(-(high - low + 1) // step)
    for numbers, colour, label in zip(series, colours, labels, strict=False):
        heights = [0] * count
        for value, often in numbers.items():
            heights[min((value - low) // step, count - 1)] += often
        edges = [low + step * place - 0.5 for place in range(count)]
        alpha = 0.9 if len(series) == 1 else 0.6
        axes.bar(edges, heights, width=step * 0.92, align="edge", color=colour, alpha=alpha, label=label)
        if max(numbers) > high and heights[-1]:
            at = (low + step * (count - 0.5) - 0.5, heights[-1])
            text = f"{low + step * (count - 1)}+"
            axes.annotate(text, at, (0, 2), textcoords="offset points", ha="center", color=_QUIET, size=7)
