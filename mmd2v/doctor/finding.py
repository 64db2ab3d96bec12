"""What a check found, and the checks that need no other node."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

Level = Literal["ok", "warning", "error"]
LEVELS: tuple[Level, ...] = ("ok", "warning", "error")  # from good to bad
Result = TypeVar("Result")


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    ``what`` says what was found; ``hint`` what to do about it, empty where nothing is to be done; ``short`` is the
    same in a word or two, for a table.
    """

    level: Level
    what: str
    hint: str = ""
    short: str = ""


@dataclass(frozen=True)
class Subject:
    """What is asked of a machine.

    ``gpus`` are those a node should have, None when nobody said; ``ranks`` those that run on this node.
    """

    run_dir: Path | None = None
    gpus: int | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    ranks: int = 1


class Check(NamedTuple):
    """A named question to a machine."""

    name: str
    ask: Callable[[Subject], Finding]


class Named(NamedTuple):
    """A finding with the name of its check."""

    check: str
    finding: Finding

    def lines(self, width: int = 0) -> str:
        """Write it as one line, with the hint in one below it."""
        found = f"{self.finding.level:<7}  {self.check:<{width}}  {self.finding.what}"
        return found + (f"\n{'':<7}  {'':<{width}}  → {self.finding.hint}" if self.finding.hint else "")

    def as_dict(self) -> dict[str, Any]:
        """What JSON holds of it."""
        return {"check": self.check, **vars(self.finding)}


def worst(findings: Iterable[Finding]) -> Level:
    """Return the worst level; ``ok`` of nothing."""
    return max((finding.level for finding in findings), key=LEVELS.index, default="ok")


class TooSlow(Exception):
    """Something has not come to an end in the time it was given."""


def within(seconds: float, action: Callable[[], Result]) -> Result:
    """Return what ``action`` returns; raise TooSlow after ``seconds``.

    A folder of a server that is gone, or a broken GPU driver, can hold a call for ever; its thread is left behind.
    """
    outcome: list[tuple[bool, Any]] = []

    def run() -> None:
        try:
            outcome.append((True, action()))
        except Exception as error:  # raised again where it is waited for
            outcome.append((False, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TooSlow(f"no answer within {seconds:.0f} s")
    fine, value = outcome[0]
    if not fine:
        raise value
    return value


def ask_all(checks: Sequence[Check], subject: Subject, seconds: float) -> list[Named]:
    """Ask everything; what takes longer than ``seconds`` in all, or fails, is an error of its own."""
    found: list[Named] = []

    def run() -> None:
        for check in checks:
            try:
                finding = check.ask(subject)
            except Exception as error:  # a check that fails must not hide what the others find
                finding = Finding("error", f"could not be checked: {type(error).__name__}: {error}")
            found.append(Named(check.name, finding))

    try:
        within(seconds, run)
    except TooSlow:
        done = list(found)
        stuck = checks[len(done)].name
        hint = "a network folder or a driver that does not answer holds it"
        return [*done, Named(stuck, Finding("error", f"no answer within {seconds:.0f} s", hint, "no answer"))]
    return found
