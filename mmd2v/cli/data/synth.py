"""`mmd2v data synth`: generated scenes with captions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Synth:
    """Generate scenes of coloured, textured shapes with captions: deterministic by seed, nothing to download."""

    out: Path
    """Folder to create."""
    split: str = "train"
    """train; val: other scenes; test: combinations of attributes that training never shows."""
    count: int = 20_000
    """Scenes."""
    size: int = 64
    """Side of the images, in pixels."""
    seed: int = 0
    """Seed of the world."""
    captions: int = 5
    """Captions a scene."""
    shard_size: int = 1000
    """Samples a shard."""

    def run(self) -> int:
        """Generate and print what was written."""
        from mmd2v.data.generate import generate

        report = generate(
            self.out,
            split=self.split,
            count=self.count,
            size=self.size,
            seed=self.seed,
            captions_per_image=self.captions,
            shard_size=self.shard_size,
        )
        print(f"{self.out}: {report}")
        return 0
