"""``beit3:FILE``: a public BEiT-3 retrieval checkpoint, computed by our own layers.

Shapes: B images, N texts, D width, E width of an embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from timm.data.constants import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from torch import nn

from mmd2v.config.schema import (
    ImageTransformConfig,
    LayerConfig,
    ModelConfig,
    PatchEncoderConfig,
    ProjectionConfig,
    TokenEncoderConfig,
    TokenizerConfig,
)
from mmd2v.data.batch import Batch
from mmd2v.data.tokenizers import SentencePieceTokenizer
from mmd2v.data.transforms import eval_transform
from mmd2v.errors import UserError
from mmd2v.evaluation.models.measured import MeasuredModel, places_and_options, whole_number
from mmd2v.inference import Precision
from mmd2v.models.checkpoints.beit3 import FIRST_POSITION, BEiT3Checkpoint, read_beit3
from mmd2v.models.checkpoints.pickles import read_checkpoint
from mmd2v.models.encoders import EncoderContext
from mmd2v.models.student import Student
from mmd2v.models.timm_backbone import load_exactly

_OPTIONS = {"tokenizer": "FILE of the SentencePiece model (beit3.spm)", "heads": "NUMBER", "max_length": "TOKENS"}
_EPS = 1e-5  # of every norm of torchscale
_USUAL_LENGTH = 64  # tokens of a text in its fine-tuning


class BEiT3(nn.Module):
    """The multiway encoder with a norm and a head a modality."""

    def __init__(self, checkpoint: BEiT3Checkpoint, max_length: int, where: str) -> None:
        super().__init__()
        c = checkpoint
        context = EncoderContext(
            width=c.width,
            image_size=c.image_size,
            image_mean=IMAGENET_INCEPTION_MEAN,
            image_std=IMAGENET_INCEPTION_STD,
            vocab_size=c.vocab_size,
            max_length=max_length,
            pretrained=False,
        )
        config = ModelConfig(
            width=c.width,
            heads=c.heads,
            encoders={
                "image": PatchEncoderConfig(patch_size=c.patch_size),
                "text": TokenEncoderConfig(first_position=FIRST_POSITION, position_rows=c.position_rows),
            },
            layers=[
                LayerConfig(kind="separate", count=c.depth, sub_norm=True, eps=_EPS, mlp_ratio=c.mlp_ratio),
            ],
            final_norm=False,
            projection=ProjectionConfig(kind="none"),
        )
        self.trunk = Student(config, context)
        load_exactly(self.trunk, c.state, f"{where}: its weights do not fit its sizes")
        self.norms = nn.ModuleDict()
        self.heads = nn.ModuleDict()
        for name, projection_ED in c.projections.items():
            self.norms[name] = nn.LayerNorm(c.width, eps=_EPS)
            self.norms[name].load_state_dict(c.norms[name])
            self.heads[name] = nn.Linear(c.width, c.embedding_width, bias=False)
            self.heads[name].load_state_dict({"weight": projection_ED})

    def forward(self, batch: Batch, modality: str) -> torch.Tensor:
        """Return [B or N, E] of the CLS, not normalised."""
        cls_BD = self.trunk(batch, (modality,)).pooled[modality]
        return self.heads[modality](self.norms[modality](cls_BD))


class XLMRobertaPieces(SentencePieceTokenizer):
    """A SentencePiece model under the ids of XLM-R's tokenizer: four special tokens first, `<mask>` last."""

    _SHIFT = 1  # the file's <unk>, <s>, </s> become <s>, <pad>, </s>, <unk>
    _UNKNOWN = 3

    def __init__(self, config: TokenizerConfig) -> None:
        """Raises UserError as `SentencePieceTokenizer`."""
        super().__init__(config)
        self.cls_id, self.pad_id, self.end_id = 0, 1, 2
        self.vocab_size = self._backend.get_piece_size() + self._SHIFT + 1

    def encode_text(self, texts: Sequence[str]) -> list[list[int]]:
        """See `Tokenizer.encode_text`."""
        shift, unknown = self._SHIFT, self._UNKNOWN
        return [[piece + shift if piece else unknown for piece in row] for row in super().encode_text(texts)]


class BEiT3Model(MeasuredModel):
    """A BEiT-3 with its tokenizer."""

    def __init__(
        self,
        name: str,
        model: BEiT3,
        size: int,
        tokenizer: XLMRobertaPieces,
        device: torch.device,
        precision: Precision,
    ) -> None:
        super().__init__(name, model.heads["image"].out_features, device, precision)
        self.model = model.eval().requires_grad_(False).to(device)
        self.transform = ImageTransformConfig(size=size, eval_resize="squash")
        self.tokenizer = tokenizer

    def prepare_image(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return uint8 [3, S, S]."""
        return eval_transform(pixels, self.transform)

    def embed_images(self, prepared: torch.Tensor) -> torch.Tensor:
        """Return [B, E] of uint8 images."""
        nothing = torch.zeros(0, dtype=torch.int64, device=self.device)
        return self.model(Batch(prepared, nothing.int(), torch.zeros(0, dtype=torch.int32), nothing), "image")

    def tokenize(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return packed ids and the lengths of the texts."""
        return self.tokenizer.encode_batch(texts)

    def embed_texts(self, tokens: tuple[np.ndarray, np.ndarray]) -> torch.Tensor:
        """Return [N, E]."""
        ids_S, lengths_N = (torch.from_numpy(array) for array in tokens)
        images = torch.zeros(0, 3, 1, 1, dtype=torch.uint8, device=self.device)
        owner_N = torch.zeros(len(lengths_N), dtype=torch.int64, device=self.device)
        return self.model(Batch(images, ids_S.to(self.device), lengths_N, owner_N), "text")

    def image_preprocessing(self) -> str:
        """Say how images are resized and normalised."""
        size = self.transform.size
        return f"squashed to {size} × {size} px, bicubic, antialiased, mean 0.5, std 0.5"

    def text_preprocessing(self) -> str:
        """Say what tokens there are."""
        return f"SentencePiece tokens with XLM-R's ids, at most {self.tokenizer.max_length}"


def open_beit3(rest: str, device: torch.device, precision: Precision) -> BEiT3Model:
    """Open ``FILE[,tokenizer=FILE][,heads=N][,max_length=N]``; nothing in the file is run.

    Raises UserError for a file that is no BEiT-3 with the heads of retrieval, or a tokenizer that is missing or not
    its own.
    """
    where = f"model 'beit3:{rest}'"
    (path,), options = places_and_options("beit3", rest, _OPTIONS)
    heads, length = (whole_number("beit3", options, name) for name in ("heads", "max_length"))
    checkpoint = read_beit3(read_checkpoint(path), path, heads)
    longest = checkpoint.position_rows - FIRST_POSITION
    length = length or min(_USUAL_LENGTH, longest)
    if length > longest:
        raise UserError(f"{where}: found max_length={length}, {path} has {longest} positions")
    pieces = Path(options["tokenizer"]) if "tokenizer" in options else _tokenizer_beside(path, where)
    tokenizer = XLMRobertaPieces(TokenizerConfig(kind="sentencepiece", path=str(pieces), max_length=length))
    if tokenizer.vocab_size > checkpoint.vocab_size:
        raise UserError(
            f"{where}: {pieces} has {tokenizer.vocab_size} ids, but the embedding table of {path} has "
            f"{checkpoint.vocab_size} rows: they do not belong together"
        )
    model = BEiT3(checkpoint, length, where)
    return BEiT3Model(path.stem, model, checkpoint.image_size, tokenizer, device, precision)


def _tokenizer_beside(path: Path, where: str) -> Path:
    found = sorted([*path.parent.glob("*.spm"), *path.parent.glob("*.model")])
    if len(found) != 1:
        listing = f" ({', '.join(file.name for file in found)})" if found else ""
        raise UserError(
            f"{where}: found {len(found)} SentencePiece models beside {path}{listing}, expected one (beit3.spm of its "
            "authors' page); put it there, or name it with ,tokenizer=FILE"
        )
    return found[0]
