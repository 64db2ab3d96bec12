"""What the subcommands of `mmd2v eval` share: opening the model, printing and writing the result."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from mmd2v.inference import Encoder


@dataclass(frozen=True, kw_only=True)
class OfExport:
    """What every command has that encodes with an export by itself."""

    json: Path | None = None
    """File to write the numbers to."""
    batch_size: int = 128
    """Inputs a forward pass."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA when there is one."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of matrix products."""

    def load(self, model: Path) -> Encoder:
        """Open the export once it is sure that the numbers can be written."""
        from mmd2v.errors import UserError
        from mmd2v.files import check_output
        from mmd2v.inference import load

        if self.batch_size < 1:
            raise UserError(f"--batch-size: found {self.batch_size}, expected at least 1")
        if self.json is not None:
            check_output("--json", self.json)
        return load(model, self.device, self.precision)

    def report(self, encoder: Encoder, described: dict[str, str], text: str, record: dict[str, Any]) -> int:
        """Print the result, and write it with what it was measured with."""
        from mmd2v.files import write_json

        how = ", ".join(f"{key} {value}" for key, value in described.items())
        print(f"{encoder.config.name}: {how}\n{encoder.preprocessing()}\n{text}")
        if self.json is not None:
            measured = {"model": encoder.config.name, **described, "preprocessing": encoder.preprocessing()}
            write_json(self.json, {**measured, **record})
        return 0
