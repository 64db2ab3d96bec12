"""mmd2v distils frozen image and text models into one small encoder for both.

``mmd2v.load(folder)`` returns an exported encoder; ``mmd2v.teachers.load(name)`` a frozen teacher. Both are imported
at first use, so that ``import mmd2v`` stays light.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmd2v import teachers
    from mmd2v.inference import load

try:
    __version__ = version("mmd2v")
except PackageNotFoundError:  # a source tree that is on the path but not installed
    __version__ = "0+unknown"

__all__ = ["__version__", "load", "teachers"]


def __getattr__(name: str) -> Any:
    if name == "load":
        return importlib.import_module("mmd2v.inference").load
    if name == "teachers":
        return importlib.import_module("mmd2v.teachers")
    raise AttributeError(f"module 'mmd2v' has no attribute '{name}'")
