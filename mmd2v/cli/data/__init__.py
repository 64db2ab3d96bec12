"""`mmd2v data`: pack, generate and check shards, build a tokenizer, measure how fast they load."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

import tyro

from mmd2v.cli.data.annotate import FLAGS, Annotate
from mmd2v.cli.data.bench import Bench
from mmd2v.cli.data.check import Check
from mmd2v.cli.data.labelled import Labelled
from mmd2v.cli.data.lengths import Lengths
from mmd2v.cli.data.pack import Pack
from mmd2v.cli.data.show import Show
from mmd2v.cli.data.stats import Stats
from mmd2v.cli.data.synth import Synth
from mmd2v.cli.data.tokenizer import Tokenizer
from mmd2v.config.overrides import split_overrides

_Commands = (
    Annotated[Pack, tyro.conf.subcommand("pack")]
    | Annotated[Labelled, tyro.conf.subcommand("labelled")]
    | Annotated[Synth, tyro.conf.subcommand("synth")]
    | Annotated[Check, tyro.conf.subcommand("check")]
    | Annotated[Stats, tyro.conf.subcommand("stats")]
    | Annotated[Show, tyro.conf.subcommand("show")]
    | Annotated[Tokenizer, tyro.conf.subcommand("tokenizer")]
    | Annotated[Lengths, tyro.conf.subcommand("lengths")]
    | Annotated[Annotate, tyro.conf.subcommand("annotate")]
    | Annotated[Bench, tyro.conf.subcommand("bench")]
)


def main(argv: Sequence[str]) -> int:
    """Run ``mmd2v data ARGV`` and return the exit status."""
    own, overrides = split_overrides(argv, FLAGS) if argv[:1] == ["annotate"] else (list(argv), [])
    command = tyro.cli(_Commands, args=own, prog="mmd2v data", description=sys.modules[__name__].__doc__)
    if overrides:
        command = replace(command, overrides=tuple(overrides))
    return command.run()
