"""The order of a training on texts in steps of a number of tokens: step → the texts of every micro-batch.

A sample is one text (a caption); an epoch has each once. In an epoch the shards are permuted and their texts laid end
to end, a line of T tokens. The line is cut into K equal steps, and these into windows of about ``window`` shards; a
text belongs to the window in which it starts. Inside a window the texts are sorted by length (ties as they are
permuted) and laid end to end once more; this line is cut into the window's steps, whose order is permuted.

K, the first step of every window and the epoch of a step follow from T alone. So a position is the number of a step,
and finding its texts takes the lengths of one window's shards, in O(shards + texts of a window). Neither ranks,
accumulation nor workers enter: they divide a step, `divide`.

No step has more than ``budget`` tokens: a cut moves to the next start of a text, at most the longest text further, at
both ends of a window and of a step, and K leaves room for that.

Shapes: S shards, N texts of a shard, R texts of a window, n texts of a step, P parts of a step.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mmd2v.data.addresses import display
from mmd2v.data.cursor import Position
from mmd2v.data.draws import permutation
from mmd2v.data.shards import ShardSet
from mmd2v.data.token_lengths import Counts, LengthFiles
from mmd2v.data.workers import worker_share
from mmd2v.errors import UserError

LEAST_TEXTS = 8
"""How many of the longest texts a step must have room for: with fewer, too much of the budget would stay empty."""


class Totals(NamedTuple):
    """What is known of all texts of a set: enough for every rank to agree on the steps."""

    texts_S: np.ndarray
    """int64 [S], texts of each shard."""
    tokens_S: np.ndarray
    """int64 [S], their tokens: with special tokens, cut to ``max_length``."""
    longest: int
    """Tokens of the longest text."""


@dataclass(frozen=True)
class ShardLengths:
    """Tokens of the texts of each shard, as a batch will have them.

    Attributes:
        files: where they are read from.
        rows_S: int64 [S], samples of each shard that are used.
        specials: special tokens of a text.
        max_length: longest text, special tokens included.
    """

    files: LengthFiles
    rows_S: np.ndarray
    specials: int
    max_length: int

    def __call__(self, shard: int) -> Counts:
        """Tokens int32 [N] of a shard's texts, and the first text of each row.

        Raises:
            UserError: its file is missing, damaged, or of fewer rows than are used.
        """
        lengths_N, starts_R = self.files.read(shard)
        rows = int(self.rows_S[shard])
        if len(starts_R) <= rows:
            raise UserError(
                f"{display(self.files.paths[shard])}: found the token lengths of {len(starts_R) - 1} samples, expected "
                f"{rows}: the shard was replaced; delete {self.files.find(shard) or self.files.target(shard)}"
            )
        starts_R = starts_R[: rows + 1]
        lengths_N = np.minimum(lengths_N[: starts_R[-1]] + np.int32(self.specials), np.int32(self.max_length))
        return Counts(lengths_N, starts_R)

    def totals(self) -> Totals:
        """Read all files; raises as ``__call__``."""
        texts_S = np.zeros(len(self.rows_S), np.int64)
        tokens_S = np.zeros(len(self.rows_S), np.int64)
        longest = 0
        for shard in np.flatnonzero(self.rows_S).tolist():
            lengths_N = self(shard).lengths_N
            texts_S[shard], tokens_S[shard] = len(lengths_N), lengths_N.sum(dtype=np.int64)
            longest = max(longest, int(lengths_N.max(initial=0)))
        return Totals(texts_S, tokens_S, longest)


class _Window(NamedTuple):
    """The texts of a window in the order of its steps."""

    shards_R: np.ndarray
    rows_R: np.ndarray
    captions_R: np.ndarray
    lengths_R: np.ndarray
    cuts: np.ndarray
    """int64 [steps + 1], the first text of each step; the last is R."""
    order: np.ndarray
    """int64 [steps], which step comes when."""


class TokenOrder:
    """The texts of every step, a pure function of (lengths, budget, window, seed, step).

    Attributes:
        budget: most tokens of a step.
        texts: texts of an epoch.
        tokens: tokens of an epoch, T.
        epoch_steps: steps of an epoch, K.
        longest: tokens of the longest text.
    """

    def __init__(
        self,
        totals: Totals,
        lengths: Callable[[int], Counts],
        *,
        budget: int,
        window: int,
        seed: int,
        fingerprint: str = "",
    ) -> None:
        """Describe the order.

        Args:
            totals: of the set.
            lengths: tokens of one shard's texts, see `ShardLengths`.
            budget: most tokens of a step.
            window: shards whose texts are sorted together, about.
            seed: of the order.
            fingerprint: of the tokenizer that counted.

        Raises:
            UserError: no text, or a budget of less than `LEAST_TEXTS` longest texts.
        """
        self.totals, self.budget, self.seed, self.fingerprint = totals, budget, seed, fingerprint
        self._lengths = lengths
        self.texts, self.tokens = int(totals.texts_S.sum()), int(totals.tokens_S.sum())
        self.longest = totals.longest
        if self.texts == 0:
            raise UserError("data: found no text to train on")
        if budget < LEAST_TEXTS * self.longest:
            raise UserError(
                f"data.batch_tokens: found {budget:,}, expected at least {LEAST_TEXTS * self.longest:,}: {LEAST_TEXTS} "
                f"times the longest text, which has {self.longest:,} tokens (data.tokenizer.max_length cuts texts)"
            )
        used = int(np.count_nonzero(totals.texts_S))
        fewest = math.ceil(self.tokens / budget)
        self.windows = min(max(1, math.ceil(used / window)), fewest)
        # How far a step may run over its share: see the top of this file. With one window there is nothing to spill.
        spill = math.ceil((self.longest - 1) / (fewest // self.windows)) if self.windows > 1 else 0
        self.epoch_steps = math.ceil(self.tokens / (budget - self.longest - spill))
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None
        self._cache: OrderedDict[tuple[int, int], _Window] = OrderedDict()

    def __str__(self) -> str:
        return (
            f"{self.texts:,} texts, {self.tokens:,} tokens, {self.epoch_steps:,} steps of at most {self.budget:,} "
            f"tokens, {100 * self.fill:.1f} % full"
        )

    @property
    def fill(self) -> float:
        """Mean tokens of a step as a fraction of the budget."""
        return self.tokens / (self.epoch_steps * self.budget)

    @property
    def fewest_texts(self) -> int:
        """A number of texts that every step has at least."""
        if self.epoch_steps == 1:
            return self.texts
        steps = self.epoch_steps // self.windows
        spill = self.longest / steps + 1 if self.windows > 1 else 0
        share = self.tokens / self.epoch_steps - spill - 1
        # A step's last text may reach over its end, its first begins at most one text after its start.
        return max(1, math.ceil((share - self.longest + 1) / self.longest))

    def check_parts(self, parts: int) -> None:
        """Raise a UserError when some micro-batch of a step might have no text; ``parts`` is ranks × accumulation."""
        if parts > self.fewest_texts:
            raise UserError(
                f"data.batch_tokens: a step of {self.budget:,} tokens may have as few as {self.fewest_texts:,} "
                f"texts (of up to {self.longest:,} tokens; an epoch: {self.texts:,} texts, {self.tokens:,} tokens), "
                f"expected one at least for each of the {parts} ranks × accumulation; raise it, or "
                "data.micro_batch_tokens"
            )

    def epochs(self, step: int) -> dict[str, float]:
        """Passes over the data before a step, as `TrainOrder.epochs` gives them."""
        return {"": step / self.epoch_steps}

    def samples(self, step: int) -> list[Position]:
        """The texts of a step, shortest first."""
        window, first, last = self._step(step)
        return self._positions(step, window, first, last, None)

    def micro_batch(self, step: int, part: int, parts: int) -> list[Position]:
        """One of ``parts`` shares of a step's texts, of about equal tokens and with neighbouring lengths.

        Raises:
            UserError: the step has fewer texts than parts.
        """
        window, first, last = self._step(step)
        cuts = first + divide(window.lengths_R[first:last], parts)
        return self._positions(step, window, int(cuts[part]), int(cuts[part + 1]), (last - first) / parts)

    def upcoming_shards(self, step: int, count: int) -> list[int]:
        """The shards that are read from a step on, at most ``count``."""
        epoch, window, _ = self._locate(step)
        order_S, ends_S = self._epoch_order(epoch)
        start, _ = self._span(window)
        begin = int(np.searchsorted(ends_S, start, side="right"))
        return [int(s) for s in order_S[begin:] if self.totals.texts_S[s]][:count]

    def _positions(self, step: int, window: _Window, first: int, last: int, mean_over: float | None) -> list[Position]:
        epoch = step // self.epoch_steps
        columns = (window.shards_R, window.rows_R, window.captions_R)
        places = zip(*(column[first:last].tolist() for column in columns), strict=True)
        return [Position(epoch, shard, row, 0, caption, mean_over) for shard, row, caption in places]

    def _locate(self, step: int) -> tuple[int, int, int]:
        """(epoch, window, which step of it) of a step."""
        epoch, within = divmod(step, self.epoch_steps)
        # Window v has the steps from v·K // V on.
        window = ((within + 1) * self.windows - 1) // self.epoch_steps
        return epoch, window, within - window * self.epoch_steps // self.windows

    def _span(self, window: int) -> tuple[int, int]:
        """The part of an epoch's line, in tokens, whose texts are a window's."""
        steps = (window * self.epoch_steps // self.windows, (window + 1) * self.epoch_steps // self.windows)
        start, end = (step * self.tokens // self.epoch_steps for step in steps)
        return start, end

    def _step(self, step: int) -> tuple[_Window, int, int]:
        """The window of a step, and the places in it of the step's first text and behind its last."""
        epoch, number, within = self._locate(step)
        window = self._window(epoch, number)
        place = int(window.order[within])
        return window, int(window.cuts[place]), int(window.cuts[place + 1])

    def _epoch_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """int64 [S] permuted shards, and int64 [S] where each of them ends on the line of the epoch's tokens."""
        if self._epoch is None or self._epoch[0] != epoch:
            order_S = permutation(len(self.totals.texts_S), "order of shards", self.seed, epoch)
            self._epoch = (epoch, order_S, np.cumsum(self.totals.tokens_S[order_S]))
        return self._epoch[1], self._epoch[2]

    def _window(self, epoch: int, number: int) -> _Window:
        key = (epoch, number)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        while len(self._cache) >= 2:  # a loader process may still be asked for the one before
            self._cache.popitem(last=False)
        self._cache[key] = window = self._build(epoch, number)
        return window

    def _build(self, epoch: int, number: int) -> _Window:
        start, end = self._span(number)
        order_S, ends_S = self._epoch_order(epoch)
        first = int(np.searchsorted(ends_S, start, side="right"))
        last = int(np.searchsorted(ends_S, end, side="left"))
        parts = [
            self._texts_of(int(order_S[place]), epoch, int(ends_S[place]), start, end)
            for place in range(first, last + 1)
            if self.totals.texts_S[order_S[place]]
        ]
        shards_R, rows_R, captions_R, lengths_R = (np.concatenate(column) for column in zip(*parts, strict=True))
        count = (number + 1) * self.epoch_steps // self.windows - number * self.epoch_steps // self.windows
        permuted_R = permutation(len(lengths_R), "order of texts", self.seed, epoch, number)
        sorted_R = permuted_R[np.argsort(lengths_R[permuted_R], kind="stable")]
        lengths_R = lengths_R[sorted_R]
        starts_R = np.cumsum(lengths_R, dtype=np.int64) - lengths_R
        bounds = np.arange(count + 1) * int(lengths_R.sum(dtype=np.int64)) // count
        return _Window(
            shards_R[sorted_R],
            rows_R[sorted_R],
            captions_R[sorted_R],
            lengths_R,
            np.searchsorted(starts_R, bounds, side="left"),
            permutation(count, "order of steps", self.seed, epoch, number),
        )

    def _texts_of(self, shard: int, epoch: int, shard_end: int, start: int, end: int) -> tuple[np.ndarray, ...]:
        """Shard, row, caption and tokens (int32) of the texts of a shard that start in [``start``, ``end``)."""
        lengths_N, starts_R = self._lengths(shard)
        if int(lengths_N.sum(dtype=np.int64)) != self.totals.tokens_S[shard]:
            raise UserError(f"shard {shard}: its token lengths have changed since the run was started; start it again")
        shard_start = shard_end - int(self.totals.tokens_S[shard])
        texts = np.arange(len(lengths_N))
        if shard_start < start or shard_end > end:  # a neighbouring window has some of them
            order_N = permutation(len(lengths_N), "order of a shard's texts", self.seed, epoch, shard)
            begins_N = shard_start + np.cumsum(lengths_N[order_N], dtype=np.int64) - lengths_N[order_N]
            texts = order_N[(begins_N >= start) & (begins_N < end)]
        rows = np.searchsorted(starts_R, texts, side="right") - 1
        columns = (np.full(len(texts), shard), rows, texts - starts_R[rows], lengths_N[texts])
        return tuple(column.astype(np.int32) for column in columns)


def divide(lengths_n: np.ndarray, parts: int) -> np.ndarray:
    """Cut a sequence of texts into parts of about equal tokens, none empty.

    Args:
        lengths_n: tokens of each text, all positive.
        parts: P.

    Returns:
        int64 [P + 1], the first text of each part; the last is n. A part has at most tokens / P plus one text.

    Raises:
        UserError: fewer texts than parts.
    """
    if len(lengths_n) < parts:
        raise UserError(
            f"data.batch_tokens: a step has {len(lengths_n)} texts, expected one at least for each of the {parts} "
            "ranks × accumulation; raise it"
        )
    ends_n = np.cumsum(lengths_n, dtype=np.int64)
    bounds = np.arange(parts + 1) * int(ends_n[-1]) // parts
    cuts = np.searchsorted(ends_n - lengths_n, bounds, side="left")
    # A text longer than a share would leave the parts that lie inside it empty: they get one text each of their own.
    places = np.arange(parts + 1)
    cuts = np.maximum.accumulate(cuts - places) + places
    return np.minimum(cuts, len(lengths_n) - parts + places)


@dataclass(frozen=True)
class TokenPositions:
    """First stage of a pipeline: where the texts of one rank's micro-batches lie, without end.

    Micro-batch i of a rank with a micro-batches a step is part (i mod a) · W + rank of step ``start_step`` + i // a.
    """

    order: TokenOrder
    shards: ShardSet
    start_step: int
    rank: int
    world_size: int
    accumulation: int
    ahead: int
    """Shards that are fetched ahead, where they are remote."""

    def __call__(self) -> Iterator[list[Position]]:
        """Yield this worker's share of the micro-batches."""
        number, workers = worker_share()
        while True:
            steps, turn = divmod(number, self.accumulation)
            step = self.start_step + steps
            if self.shards.is_remote:
                self.shards.prefetch(self.order.upcoming_shards(step, self.ahead))
            yield self.order.micro_batch(step, turn * self.world_size + self.rank, self.world_size * self.accumulation)
            number += workers
