"""`mmd2v data annotate`: outputs of the frozen teachers, stored."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional, arg

from mmd2v.config.load import load_config
from mmd2v.errors import UserError


@dataclass(frozen=True)
class Annotate:
    """Run the frozen teachers of a run over its training shards once and store their outputs, so that training replays
    them (teachers.NAME.outputs: OUT) instead of loading and running the teachers; the losses are the same.

    One file a shard and epoch, of every crop, flip and choice of captions that the run will draw; a single one for all
    epochs where nothing is drawn: for images crop_scale (1, 1) and flip 0 or 1, for text captions_per_image equal to
    (or a multiple of) the captions of each image. A run with other teachers, images, captions or seed runs its
    teachers itself and says what differs.

    Interrupted (Ctrl-C, kill), the same command goes on behind the last finished file. Runs alone, or under a launcher:
    deepspeed --num_accelerators 2 --module mmd2v data annotate CONFIG.yaml --out OUT. Any key of the config can be set
    as in `mmd2v train`: --data.workers 4. A rank holds the outputs of one shard in memory.
    """

    config: Annotated[Positional[str], arg(metavar="CONFIG.yaml")]
    """YAML file that describes the run."""
    out: Path
    """Folder to write to; the outputs of a teacher go to OUT/NAME."""
    epochs: Annotated[int | None, arg(metavar="N")] = None
    """Epochs to store; by default what the run reads: of an epoch that it does not finish, the shards it gets to."""
    teacher: Annotated[tuple[str, ...], arg(metavar="NAME ...")] = ()
    """Teachers to run; by default all of the config."""
    tokens: tyro.conf.FlagCreatePairsOff[bool] = False
    """Store the tokens too, not the CLS alone; of teachers of images."""
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Of the stored numbers; fp32 keeps them exactly, the others halve the files."""
    batch_size: Annotated[int | None, arg(metavar="N")] = None
    """Samples of a rank's forward pass; by default the run's micro-batch on as many ranks. Arithmetic rounds by it:
    with the training's micro-batch (and as many threads) the losses are the same to the last bit, else to rounding."""
    overrides: tyro.conf.Suppress[tuple[str, ...]] = ()

    def run(self) -> int:
        """Store the outputs and print what was written."""
        from mmd2v.distributed.environment import shutdown
        from mmd2v.errors import told_once_a_node

        try:
            config = load_config(self.config, self.overrides)
        except UserError as error:
            raise told_once_a_node(error) from None
        from mmd2v.train.annotate import Options, annotate

        options = Options(self.out, self.epochs, self.teacher, self.tokens, self.dtype, self.batch_size)
        if summary := annotate(config, options):
            print(summary)
        shutdown()
        return 0


FLAGS = {
    "--out": True,
    "--epochs": True,
    "--teacher": True,
    "--tokens": False,
    "--dtype": True,
    "--batch-size": True,
    "--help": False,
}
"""Flags of `mmd2v data annotate` itself → whether a value follows; every other one overrides a key of the config."""
