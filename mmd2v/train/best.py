"""Which checkpoint of a run is the best by a number of its evaluations.

Nothing is remembered but what the run has written anyway: the best is the best among the evaluations in
``metrics.jsonl`` whose step still has a checkpoint. So it survives a kill at any time and a run that goes back.
``best.json`` tells it to people and other programs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from mmd2v.config.training import BestConfig
from mmd2v.files import write_json
from mmd2v.train.checkpoints.folders import complete_checkpoints
from mmd2v.train.metrics import METRICS_FILE, read_metrics

BEST_FILE = "best.json"


@dataclass(frozen=True)
class Best:
    """The best checkpoint and why it is."""

    metric: str
    mode: str
    value: float
    step: int

    def beats(self, other: Best | None) -> bool:
        """Whether it is better than another; the earlier of equal ones stays."""
        if other is None:
            return True
        return self.value > other.value if self.mode == "max" else self.value < other.value

    def said(self) -> str:
        """Return what a person reads."""
        return f"step {self.step} is the best by {self.metric} so far ({self.value:.4g}); its checkpoint is kept"


def best_of(settings: BestConfig | None, metrics: Mapping[str, float], step: int) -> Best | None:
    """Return what the metrics of an evaluation would be as the best; None without settings."""
    if settings is None:
        return None
    return Best(settings.metric, settings.mode, metrics[settings.metric], step)


def find_best(settings: BestConfig | None, run_dir: Path) -> Best | None:
    """Return the best checkpoint there is, by what the run has recorded."""
    path = run_dir / METRICS_FILE
    if settings is None or not path.exists():
        return None
    steps = {step for step, _ in complete_checkpoints(run_dir / "checkpoints")}
    key, best = f"evaluation/{settings.metric}", None
    for record in read_metrics(path):
        if record["step"] in steps and key in record:
            found = Best(settings.metric, settings.mode, record[key], record["step"])
            best = found if found.beats(best) else best
    return best


def write_best(run_dir: Path, best: Best | None) -> None:
    """Write ``best.json``; without a best checkpoint there is no such file."""
    if best is None:
        (run_dir / BEST_FILE).unlink(missing_ok=True)
        return
    write_json(run_dir / BEST_FILE, {**asdict(best), "checkpoint": f"checkpoints/step-{best.step:06d}"})
