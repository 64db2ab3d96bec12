"""What a person sees of a check of several nodes: a line a node, then everything that is not as it should be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmd2v.doctor.finding import LEVELS, Named, worst

_COLUMNS = ("GPUs", "memory", "run folder", "shared folder", "clock", "link", "NCCL link")
_MARKS = {"ok": "", "warning": "? ", "error": "! "}


@dataclass(frozen=True)
class Node:
    """A node with its ranks, and all that was found on it."""

    name: str
    ranks: list[int]
    found: list[Named]

    @property
    def level(self) -> str:
        """The worst of its findings."""
        return worst(named.finding for named in self.found)

    def __str__(self) -> str:
        ranks = ", ".join(map(str, self.ranks))
        return f"{self.name} (rank{'s' * (len(self.ranks) > 1)} {ranks})"


@dataclass(frozen=True)
class Outcome:
    """The outcome of a check of all nodes."""

    nodes: list[Node]

    @property
    def bad(self) -> list[Node]:
        """Nodes with an error."""
        return [node for node in self.nodes if node.level == "error"]

    @property
    def fit(self) -> bool:
        """Whether a run may start."""
        return not self.bad

    def as_dict(self) -> dict[str, Any]:
        """What JSON holds of it."""
        nodes = [
            {"node": node.name, "ranks": node.ranks, "level": node.level, "found": [f.as_dict() for f in node.found]}
            for node in self.nodes
        ]
        return {"fit": self.fit, "bad": [node.name for node in self.bad], "nodes": nodes}


def by_node(names: Sequence[str], said: Sequence[Sequence[Named]]) -> list[Node]:
    """Put the findings of ranks on the same node together; ``names`` are the nodes of the ranks."""
    nodes = []
    for name in dict.fromkeys(names):
        ranks = [rank for rank, own in enumerate(names) if own == name]
        several = len(ranks) > 1
        found = [_of_rank(named, rank, several) for rank in ranks for named in said[rank]]
        nodes.append(Node(name, ranks, found))
    return nodes


def render(outcome: Outcome) -> str:
    """Write the table and what is behind its marks."""
    columns = [name for name in _COLUMNS if any(_cell(node, name) for node in outcome.nodes)]
    rows = [["node", "ranks", *columns, ""]]
    for node in outcome.nodes:
        cells = [_cell(node, name) for name in columns]
        rows.append([node.name, ", ".join(map(str, node.ranks)), *cells, node.level])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    for node in outcome.nodes:
        wrong = [named for named in node.found if named.finding.level != "ok"]
        if wrong:
            lines += ["", f"{node}:", *(named.lines(max(len(n.check) for n in wrong)) for named in wrong)]
    total = f"{len(outcome.nodes)} node{'s' * (len(outcome.nodes) != 1)}"
    last = f"{total}: fit" if outcome.fit else f"bad: {'; '.join(map(str, outcome.bad))} (of {total})"
    return "\n".join([*lines, "", last])


def _cell(node: Node, check: str) -> str:
    """The worst finding of a check in a word; of several that are equal, the first."""
    own = [named.finding for named in node.found if named.check == check and named.finding.short]
    if not own:
        return ""
    shown = max(own, key=lambda finding: LEVELS.index(finding.level))
    return _MARKS[shown.level] + shown.short


def _of_rank(named: Named, rank: int, several: bool) -> Named:
    """Say whose it is, where a node has more than one and it is not good."""
    if not several or named.finding.level == "ok":
        return named
    finding = named.finding
    return Named(named.check, type(finding)(finding.level, f"rank {rank}: {finding.what}", finding.hint, finding.short))
