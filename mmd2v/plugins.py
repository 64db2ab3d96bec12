"""Modules of other packages that register kinds of their own, such as encoders.

They are named by who runs mmd2v, never by a config or an export: those are data, and naming a module is running code.
An installed package is found by its entry point in the group ``mmd2v.plugins``; a module of one's own is named in
``MMD2V_PLUGINS``, several divided by commas.
"""

from __future__ import annotations

import importlib
import os
from importlib.metadata import entry_points

from mmd2v.errors import UserError

GROUP = "mmd2v.plugins"
VARIABLE = "MMD2V_PLUGINS"


def load_plugins() -> None:
    """Import every plugin. Raises UserError naming the one that cannot be imported."""
    for point in entry_points(group=GROUP):
        try:
            point.load()
        except Exception as error:  # whatever the other package does at import
            raise UserError(f"entry point {GROUP}: '{point.value}' cannot be loaded: {error}") from error
    for name in filter(None, (name.strip() for name in os.environ.get(VARIABLE, "").split(","))):
        try:
            importlib.import_module(name)
        except (ImportError, ValueError, TypeError) as error:  # relative names raise the latter two
            raise UserError(
                f"{VARIABLE}: found '{name}', expected a Python module that can be imported (installed, or in a folder "
                f"of PYTHONPATH): {error}"
            ) from None
