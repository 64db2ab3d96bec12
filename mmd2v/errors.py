"""The one error type a user is meant to read, the nearest-name hint it carries, and what a failed write means."""

from __future__ import annotations

import difflib
import errno
import os
from collections.abc import Iterable

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UserError(Exception):
    """Bad input: the message names the file, key or flag, what was found and what was expected.

    The command line prints the message alone (no traceback) and exits with status 2.
    """


_LIKENESS = 0.6  # of two names, from 0 to 1, below which a suggestion would be silly
_MOST_NAMES = 30  # a longer list scrolls the message away


class ReportedByMainRank(UserError):
    """The copy of a UserError that another rank tells the user: its own rank exits without a word."""


def told_once_a_node(error: UserError) -> UserError:
    """Return what this rank raises when every rank of a node must have found the same ``error``.

    For what happens before the ranks have met; the launcher's LOCAL_RANK is known by then.
    """
    return error if os.environ.get("LOCAL_RANK", "0") == "0" else ReportedByMainRank(str(error))


def disk_message(error: OSError) -> str:
    """Say what a failed write means to the user."""
    if error.errno in _DISK_FULL:
        return f"the disk is full or a quota is reached ({error.strerror})"
    return f"{error.strerror or error}"


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the closest of ``valid`` to ``name``, or an empty string."""
    found = difflib.get_close_matches(name, list(valid), n=1, cutoff=_LIKENESS)
    return f" Did you mean '{found[0]}'?" if found else ""


def unknown_name(what: str, name: str, valid: Iterable[str]) -> UserError:
    """Build the error for a name that is not among ``valid``: the nearest one, and all of them unless they are many."""
    valid = sorted(valid)
    if len(valid) > _MOST_NAMES:
        close = difflib.get_close_matches(name, valid, n=5, cutoff=_LIKENESS)
        listing = f"{len(valid)} names are valid" + (f", close to it: {', '.join(close)}" if close else "")
        return UserError(f"{what}: unknown name '{name}'.{nearest(name, valid)} {listing}.")
    return UserError(f"{what}: unknown name '{name}'.{nearest(name, valid)} Valid: {', '.join(valid)}.")
