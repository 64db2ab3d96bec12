"""Progress that a person can read: a bar on a terminal, plain lines elsewhere; with rate and time left."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from types import TracebackType
from typing import Any, TextIO, TypeVar

Item = TypeVar("Item")

_LINE_EVERY = 10.0  # seconds between plain lines


def duration(seconds: float) -> str:
    """Write seconds as ``45 s``, ``3:05`` or ``2:03:05``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Progress:
    """How far a piece of work is, on stderr. Use as a context manager and call `advance`.

    On a terminal: one bar that is redrawn. Elsewhere: a line every ten seconds and one at the end.
    """

    def __init__(
        self,
        what: str,
        total: int | None = None,
        *,
        unit: str = "items",
        stream: TextIO | None = None,
        every: float = _LINE_EVERY,
        done: int = 0,
    ) -> None:
        """Describe the work.

        Args:
            what: what is being done, such as ``packing``.
            total: how much there is to do; None: unknown, so no time left is shown.
            unit: what is counted, in the plural.
            stream: where to write; none: stderr.
            every: seconds between plain lines.
            done: how much an earlier attempt has done.
        """
        self.what = what
        self.total = total
        self.unit = unit
        self.done = done
        self._before = done
        self._stream = stream if stream is not None else sys.stderr
        self._every = every
        self._written: int | None = None
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        self._start = self._last = time.monotonic()
        if self._stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[status]}"))
            self._bar = Bar(*columns, console=Console(file=self._stream), transient=False)
            self._bar.start()
            self._task = self._bar.add_task(self.what, total=self.total, status=self.status())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, status=self.status())
            self._bar.stop()
        elif kind is None and self._written != self.done:  # the last line may have told all
            self._write_line()

    def advance(self, count: int = 1) -> None:
        """Count ``count`` more units as done."""
        self.done += count
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, status=self.status())
        elif time.monotonic() - self._last >= self._every:
            self._write_line()

    def status(self) -> str:
        """Counts, rate and time so far or left: ``1,200/6,000 images · 410/s · 12 s left``."""
        elapsed = time.monotonic() - self._start
        rate = (self.done - self._before) / elapsed if elapsed > 0 else 0.0
        of = f"/{self.total:,}" if self.total is not None else ""
        parts = [f"{self.done:,}{of} {self.unit}"]
        if rate > 0:
            parts.append(f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.2g}/s")
        if self.total is not None and rate > 0 and self.done < self.total:
            parts.append(f"{duration((self.total - self.done) / rate)} left")
        else:
            parts.append(duration(elapsed))
        return " · ".join(parts)

    def _write_line(self) -> None:
        self._last, self._written = time.monotonic(), self.done
        print(f"{self.what}: {self.status()}", file=self._stream, flush=True)


def track(items: Iterable[Item], what: str, total: int | None = None, *, unit: str = "items") -> Iterator[Item]:
    """Yield the items and show how many are done; ``total`` defaults to their length if they have one."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with Progress(what, total, unit=unit) as progress:
        for item in items:
            yield item
            progress.advance()
