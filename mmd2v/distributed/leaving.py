"""What the error with which a rank leaves a run says of how it leaves."""

from __future__ import annotations

import re

import torch.distributed as dist

from mmd2v.distributed.verdict import Left

_TORN = re.compile(r"gloo|nccl|connection (closed|reset)|broken pipe", re.IGNORECASE)


def how_left(error: BaseException | None, peaceful: tuple[type[BaseException], ...]) -> Left:
    """Return how a rank leaves with an error or none; with ``peaceful`` ones it leaves as if it had finished."""
    if error is None or isinstance(error, peaceful):
        return Left.DONE
    if isinstance(error, SystemExit):
        return Left.RAISED if error.code else Left.DONE
    return Left.TORN if is_torn(error) else Left.RAISED


def is_torn(error: BaseException) -> bool:
    """Whether an error is that of a collective operation, which another rank's end may have caused."""
    return isinstance(error, dist.DistError) or (type(error) is RuntimeError and bool(_TORN.search(str(error))))


def first_line(error: BaseException) -> str:
    """Return an error's type and the first line of what it says."""
    told = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {told}" if told else type(error).__name__
