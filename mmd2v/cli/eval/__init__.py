"""`mmd2v eval`: measure an exported encoder. One file a subcommand."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import tyro

from mmd2v.cli.eval.accuracy import Accuracy
from mmd2v.cli.eval.knn import Knn
from mmd2v.cli.eval.linear_probe import LinearProbe
from mmd2v.cli.eval.pairs import Pairs
from mmd2v.cli.eval.retrieval import Retrieval
from mmd2v.cli.eval.zero_shot import ZeroShot

SUBCOMMANDS = {
    "retrieval": Retrieval,
    "pairs": Pairs,
    "knn": Knn,
    "linear-probe": LinearProbe,
    "zero-shot": ZeroShot,
    "accuracy": Accuracy,
}


def main(argv: Sequence[str]) -> int:
    """Run ``mmd2v eval ARGV`` and return the exit status."""
    command = tyro.extras.subcommand_cli_from_dict(
        SUBCOMMANDS, args=list(argv), prog="mmd2v eval", description=sys.modules[__name__].__doc__
    )
    return command.run()
