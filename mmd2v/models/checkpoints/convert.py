"""From a public checkpoint file to a folder in our names."""

from __future__ import annotations

import hashlib
from pathlib import Path

from safetensors.torch import save_file

from mmd2v.errors import UserError, nearest
from mmd2v.files import atomic_path, write_json, write_text
from mmd2v.models.checkpoints.accounting import payload_of
from mmd2v.models.checkpoints.architecture import FAMILIES, Conversion
from mmd2v.models.checkpoints.beit2 import convert_beit2, is_beit2
from mmd2v.models.checkpoints.converted import CONFIG_FILE, WEIGHTS_FILE, ConvertedConfig, Ignored, Source
from mmd2v.models.checkpoints.data2vec2 import convert_data2vec2, modality_of
from mmd2v.models.checkpoints.inert import shown
from mmd2v.models.checkpoints.pickles import read_checkpoint

_LICENCES = {
    "data2vec2": "The published data2vec 2.0 weights are under CC-BY-NC 4.0: no commercial use, which may hold "
    "for what is distilled from them too.",
    "beit2": "The code of BEiT-2 is under the MIT licence; its authors' page says what holds for the weights.",
}
_USES = {
    "data2vec2": "teacher (`teachers.NAME.name`), source of blocks (`model.layers[].init`) or of an encoder "
    "(`model.encoders.NAME.weights`)",
    "beit2": "teacher (`teachers.NAME.name`) or source of blocks (`model.layers[].init`)",
}


def convert(source: str | Path, out: str | Path, heads: int | None = None) -> Conversion:
    """Write the folder ``out`` of the checkpoint file ``source``, whole or not at all; return what is in it.

    ``heads`` replaces what the file says. Raises UserError when ``out`` exists, ``source`` is damaged or asks for more
    than weights, or its keys are of no known family.
    """
    source, out = Path(source), Path(out)
    if out.exists() or out.is_symlink():
        raise UserError(f"--out: {out} exists; name a new folder or remove it")
    conversion = convert_content(source, heads)
    config = ConvertedConfig(
        family=conversion.family,  # type: ignore[arg-type]
        architecture=conversion.architecture,
        source=Source(file=source.name, sha256=_sha256(source)),
        ignored=[Ignored(keys=pattern, count=count) for pattern, count in conversion.ignored.items()],
    )
    with atomic_path(out) as folder:
        folder.mkdir()
        save_file(conversion.state, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        write_json(folder / CONFIG_FILE, config.model_dump(exclude_none=True))
        write_text(folder / "README.md", _readme(config))
    return conversion


def convert_content(source: Path, heads: int | None = None) -> Conversion:
    """Read ``source`` and return it in our names; the family is found by its keys."""
    content = read_checkpoint(source)
    payload = payload_of(content, source)
    if modality_of(payload) is not None:
        return convert_data2vec2(content, source, heads)
    if is_beit2(payload):
        return convert_beit2(content, source, heads)
    typical = ["modality_encoders.IMAGE.extra_tokens", "modality_encoders.TEXT.local_encoder.embed_tokens.weight"]
    typical += ["cls_token", "patch_embed.proj.weight", "blocks.0.gamma_1"]
    names = [shown(key) for key in sorted(payload)[:3]]
    close = next(filter(None, (nearest(key, payload) for key in typical)), "")
    raise UserError(
        f"{source}: its keys ({', '.join(names)} …) are of no known family; expected one of {', '.join(FAMILIES)}, "
        f"with a key as {typical[0]}, {typical[1]} or {typical[-1]}.{shown(close)}"
    )


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _readme(config: ConvertedConfig) -> str:
    family = config.family.partition("-")[0]
    sizes = config.architecture.model_dump(exclude_none=True)
    left_out = ", ".join(f"`{one.keys}` ({one.count})" for one in config.ignored) or "nothing"
    return f"""# {config.family}

Weights of `{config.source.file}` (SHA-256 `{config.source.sha256}`) in the names of mmd2v, fp32, written by
`mmd2v convert`. {_LICENCES[family]}

Sizes: {", ".join(f"{name} {value}" for name, value in sizes.items())}.
Left out: {left_out}.

In a config of `mmd2v train`, `{config.family}:THIS-FOLDER` is a {_USES[family]}.
"""
