"""Before a run in steps of tokens: the lengths of all texts, counted once if need be, and the order all ranks share."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

import numpy as np

from mmd2v.config.schema import Config
from mmd2v.data.addresses import display
from mmd2v.data.shards import ShardSet
from mmd2v.data.token_batches import ShardLengths, TokenOrder, Totals
from mmd2v.data.token_lengths import LengthFiles, command, make_lengths, missing_lengths, open_texts
from mmd2v.data.tokenizers import Tokenizer, load_tokenizer
from mmd2v.distributed.coordination import from_main_rank, on_every_rank
from mmd2v.distributed.environment import COLLECTIVE_TIMEOUT
from mmd2v.errors import UserError
from mmd2v.progress import Progress

_ROUND = COLLECTIVE_TIMEOUT.total_seconds() / 30
"""Seconds rank 0 counts between two signs of life: the others wait in a collective, which has a time-out."""


def prepare_token_order(config: Config, parts: int) -> TokenOrder | None:
    """The order of a run in steps of tokens; None of a run in steps of samples. Every rank must call it.

    Where the lengths of texts are missing, rank 0 counts them with progress. ``parts`` is ranks × accumulation.

    Raises UserError when the texts cannot be read, a step is too small for its parts, or a node does not see the files.
    """
    if config.data.batch_tokens is None:
        return None
    tokenizer, shards, lengths = on_every_rank(lambda: _open(config))
    work = _counting(config, tokenizer, shards, lengths.files)
    while not from_main_rank(lambda: _round(work)):
        pass
    totals: Totals = from_main_rank(lengths.totals)
    on_every_rank(lambda: _check_seen(config, shards, lengths.files))

    def order() -> TokenOrder:
        found = _order(config, lengths, totals)
        found.check_parts(parts)
        return found

    return on_every_rank(order)


def known_token_order(config: Config) -> TokenOrder:
    """The order of a run in steps of tokens, on this rank alone and without writing anything.

    Raises UserError, naming the command to run, when lengths of texts are missing.
    """
    _, shards, lengths = _open(config)
    _check_seen(config, shards, lengths.files)
    return _order(config, lengths, lengths.totals())


def _open(config: Config) -> tuple[Tokenizer, ShardSet, ShardLengths]:
    assert config.data.tokenizer is not None  # the schema's condition
    tokenizer = load_tokenizer(config.data.tokenizer)
    shards, files = open_texts(config.data, tokenizer)
    return tokenizer, shards, ShardLengths(files, shards.counts, tokenizer.specials, tokenizer.max_length)


def _order(config: Config, lengths: ShardLengths, totals: Totals) -> TokenOrder:
    assert config.data.batch_tokens is not None
    return TokenOrder(
        totals,
        lengths,
        budget=config.data.batch_tokens,
        window=config.data.shuffle_shards,
        seed=config.seed,
        fingerprint=lengths.files.fingerprint,
    )


def _counting(config: Config, tokenizer: Tokenizer, shards: ShardSet, files: LengthFiles) -> Iterator[None]:
    """Count what is missing, a shard between two items."""
    missing = missing_lengths(shards, files)
    if not missing:
        return
    settings = config.data.tokenizer
    assert settings is not None
    print(
        f"data.batch_tokens: counting the tokens of all texts, once (or before a run: {_command(config)})",
        file=sys.stderr,
    )
    with Progress("counting tokens", int(shards.counts[missing].sum()), unit="samples") as progress:
        for shard in make_lengths(shards, files, settings):
            progress.advance(int(shards.counts[shard]))
            yield


def _round(work: Iterator[None]) -> bool:
    """Go on for a while; return whether all is done."""
    end = time.monotonic() + _ROUND
    return all(time.monotonic() < end for _ in work)


def _check_seen(config: Config, shards: ShardSet, files: LengthFiles) -> None:
    missing = missing_lengths(shards, files)
    if missing:
        raise UserError(
            f"data.batch_tokens: found no token lengths of {len(missing)} of {np.count_nonzero(shards.counts)} shards, "
            f"the first of them {display(shards.paths[missing[0]])}; expected {files.target(missing[0])}. Make them "
            f"with `{_command(config)}`; on several nodes with --out FOLDER and data.lengths_dir: FOLDER, which all see"
        )


def _command(config: Config) -> str:
    assert config.data.tokenizer is not None
    return command(config.data.train.shards or "", config.data.tokenizer, config.data.lengths_dir)
