"""A path that DeepSpeed's patterns find: it puts folders into `glob` and `re` as they are."""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

_PLAIN = re.compile(r"[\w./-]*")


@contextlib.contextmanager
def plain_path(folder: Path) -> Iterator[Path]:
    """Yield an absolute path of ``folder`` without characters that mean something in a pattern.

    It is the folder's own where that has none, else a link in a temporary folder of this process: with a run directory
    such as ``runs/lr[1]`` DeepSpeed would find no file.
    """
    folder = folder.absolute()
    if _PLAIN.fullmatch(str(folder)):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="mmd2v-") as temporary:
        link = Path(temporary) / "checkpoint"
        link.symlink_to(folder, target_is_directory=True)
        yield link
