"""The student of a config as it starts, as an export."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mmd2v.config.load import load_config
from mmd2v.data.tokenizers import load_tokenizer
from mmd2v.export import write_export
from mmd2v.models.student import build_student


def export_untrained(path: Path, overrides: Sequence[str], out: Path, scale: str | None = None) -> None:
    """Write the student that training would start from to ``out``."""
    config = load_config(path, list(overrides), scale)
    tokenizer = load_tokenizer(config.data.tokenizer) if config.data.tokenizer else None
    write_export(out, build_student(config, tokenizer), config, tokenizer)
