"""The one error type a user is meant to read, and the nearest-name hint it carries."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input: the message names the file, key or flag, what was found and what was expected.

    The command line prints the message alone (no traceback) and exits with status 2.
    """


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the closest of ``valid`` to ``name``, or an empty string."""
    found = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f" Did you mean '{found[0]}'?" if found else ""


def unknown_name(what: str, name: str, valid: Iterable[str]) -> UserError:
    """Build the error for a name that is not among ``valid``: lists the valid names and the nearest one."""
    valid = sorted(valid)
    return UserError(f"{what}: unknown name '{name}'.{nearest(name, valid)} Valid: {', '.join(valid)}.")
