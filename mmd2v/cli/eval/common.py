"""What the subcommands of `mmd2v eval` share: opening the model, printing and writing the result."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from mmd2v.evaluation.models import RetrievalModel


@dataclass(frozen=True, kw_only=True)
class OfModel:
    """What every command has that encodes with a model by itself."""

    json: Path | None = None
    """File to write the numbers to."""
    batch_size: int = 128
    """Inputs a forward pass."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA when there is one."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of matrix products."""

    def load(self, model: str) -> RetrievalModel:
        """Open the model once it is sure that the numbers can be written."""
        from mmd2v.errors import UserError
        from mmd2v.evaluation.models import open_model
        from mmd2v.evaluation.text_models import KIND, HFTextModel
        from mmd2v.files import check_output

        if self.batch_size < 1:
            raise UserError(f"--batch-size: found {self.batch_size}, expected at least 1")
        if self.json is not None:
            check_output("--json", self.json)
        if model.startswith(f"{KIND}:"):
            return HFTextModel(model.removeprefix(f"{KIND}:"), self.device, self.precision)
        return open_model(model, self.device, self.precision)

    def report(self, model: RetrievalModel, described: dict[str, str], text: str, record: dict[str, Any]) -> int:
        """Print the result, and write it with what it was measured with."""
        from mmd2v.files import write_json

        how = ", ".join(f"{key} {value}" for key, value in described.items())
        print(f"{model.name}: {how}\n{model.preprocessing()}\n{text}")
        if self.json is not None:
            measured = {"model": model.name, **described, "preprocessing": model.preprocessing()}
            write_json(self.json, {**measured, **record})
        return 0


def short(path: Path) -> str:
    """Name data without the machine's folders: the last two parts of a path, all parts from an archive on."""
    archives = [place for place, part in enumerate(path.parts) if part.endswith((".tar", ".tar.gz", ".tgz", ".zip"))]
    return "/".join(path.parts[archives[0] if archives else -2 :])
