"""What only shows when nodes are compared: other versions, other GPUs, a rank that falls silent."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from mmd2v.doctor.finding import Finding, Level


def odd_ones(values: Sequence[Any]) -> tuple[Any, list[int]]:
    """Return the value of most ranks, and the ranks with another; of a draw, the first rank's side counts."""
    usual = Counter(values).most_common(1)[0][0]
    return usual, [rank for rank, value in enumerate(values) if value != usual]


def compare_versions(versions: Sequence[dict[str, str]]) -> dict[int, Finding]:
    """Return rank → finding for those whose packages differ from most ranks'; one dictionary a rank."""
    differing: dict[int, list[str]] = {}
    for name in dict.fromkeys(name for own in versions for name in own):
        usual, odd = odd_ones([own.get(name, "absent") for own in versions])
        for rank in odd:
            differing.setdefault(rank, []).append(f"{name} {versions[rank].get(name, 'absent')} (others {usual})")
    hint = "start all nodes from the same environment or container"
    return {rank: Finding("error", "; ".join(texts), hint, "differ") for rank, texts in differing.items()}


def compare_gpus(models: Sequence[Sequence[str]]) -> dict[int, Finding]:
    """Return rank → finding for nodes with another number or other models of GPUs than most; one list a rank."""
    usual, odd = odd_ones([tuple(own) for own in models])
    found: dict[int, Finding] = {}
    for rank in odd:
        level: Level = "error" if len(models[rank]) != len(usual) else "warning"  # other models work, at another speed
        hint = "leave the node out, or say with --gpus what a node should have" if level == "error" else ""
        shown = f"{_kinds(models[rank])}, others have {_kinds(usual)}"
        found[rank] = Finding(level, shown, hint or "ask the scheduler for nodes of one kind", f"{len(models[rank])}")
    return found


def silent(phase: str) -> Finding:
    """The finding for a rank of which nothing was heard after it began ``phase``."""
    return Finding("error", f"nothing more is heard of it since it began: {phase}", "look at its own output", "silent")


def count_of_ranks(size: int, expected: int | None) -> Finding:
    """Judge how many ranks the launcher has started."""
    if expected is not None and size != expected:
        hint = "look at the launcher's number of nodes and tasks"
        return Finding("error", f"{size} started, expected {expected}", hint)
    return Finding("ok", str(size))


def _kinds(models: Sequence[str]) -> str:
    return ", ".join(f"{models.count(model)} × {model}" for model in dict.fromkeys(models)) or "none"
