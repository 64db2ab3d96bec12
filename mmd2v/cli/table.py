"""`mmd2v table`: our results beside the published figures."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional, arg

MARKDOWN, CSV, PICTURE = "table.md", "table.csv", "table.svg"


@dataclass(frozen=True)
class Table:
    """Print results of `mmd2v eval … --json` beside published ones as Markdown; also write CSV and a picture."""

    results: Positional[Annotated[tuple[Path, ...], arg(metavar="RESULTS")]] = ()
    """Files written by `mmd2v eval … --json`, or folders of them; none: the published figures alone."""
    out: Annotated[Path | None, arg(metavar="DIR")] = None
    """Folder to write table.md, table.csv and table.svg to."""
    csv: Annotated[Path | None, arg(metavar="FILE")] = None
    """File for the numbers, one a line, each with its source."""
    picture: Annotated[Path | None, arg(metavar="FILE")] = None
    """File for the picture: .svg, .png or .pdf."""


def main(argv: Sequence[str]) -> int:
    """Run ``mmd2v table ARGV`` and return the exit status."""
    command = tyro.cli(Table, args=list(argv), prog="mmd2v table", description=sys.modules[__name__].__doc__)
    from mmd2v.files import check_output, write_text
    from mmd2v.report.published import published
    from mmd2v.report.results import read_results
    from mmd2v.report.results_picture import check_results_picture, write_results_picture
    from mmd2v.report.results_table import csv_text, markdown

    folder = command.out
    texts = [] if folder is None else [("--out", folder / MARKDOWN)]
    tables = [("--csv", command.csv), ("--out", None if folder is None else folder / CSV)]
    pictures = [("--picture", command.picture), ("--out", None if folder is None else folder / PICTURE)]
    for flag, path in (*texts, *tables):
        if path is not None:
            check_output(flag, path)
    for flag, path in pictures:
        if path is not None:
            check_results_picture(flag, path)
    known = published()
    results = read_results(command.results, known)
    text = markdown(results, known)
    print(text, end="")
    for _, path in texts:
        write_text(path, text)
    for _, path in tables:
        if path is not None:
            write_text(path, csv_text(results, known))
    for _, path in pictures:
        if path is not None:
            write_results_picture(path, results, known)
    return 0
