"""``data2vec2:IMAGE,TEXT``: two unimodal models set side by side, which never saw one another.

Each of the two is a public checkpoint or a folder that ``mmd2v convert`` wrote. Shapes: B images, N texts, E width.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from mmd2v.config.schema import ImageTransformConfig, TokenizerConfig
from mmd2v.data.tokenizers import load_tokenizer
from mmd2v.data.transforms import eval_transform
from mmd2v.errors import UserError, unknown_name
from mmd2v.evaluation.models.measured import MeasuredModel, places_and_options, whole_number
from mmd2v.inference import Precision
from mmd2v.models.checkpoints.architecture import Architecture
from mmd2v.models.checkpoints.convert import convert_content
from mmd2v.models.checkpoints.student import FAIRSEQ_FIRST_POSITION, converted_student, student_of
from mmd2v.models.student import Student
from mmd2v.models.timm_backbone import load_exactly

_OPTIONS = {
    "tokenizer": "FOLDER with dict.txt, encoder.json and vocab.bpe",
    "resize": "center_crop or squash",
    "max_length": "TOKENS",
    "heads": "NUMBER, of both models",
}
_RESIZES = ("center_crop", "squash")
_USUAL_LENGTH = 64


class Data2Vec2Pair(MeasuredModel):
    """The last CLS of each model."""

    def __init__(
        self,
        name: str,
        image: Student,
        text: Student,
        transform: ImageTransformConfig,
        tokenizer: TokenizerConfig,
        device: torch.device,
        precision: Precision,
    ) -> None:
        super().__init__(name, image.embedding_width, device, precision)
        self.image = image.eval().requires_grad_(False).to(device)
        self.text = text.eval().requires_grad_(False).to(device)
        self.transform = transform
        self.tokenizer = load_tokenizer(tokenizer)

    def prepare_image(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return uint8 [3, S, S]."""
        return eval_transform(pixels, self.transform)

    def embed_images(self, prepared: torch.Tensor) -> torch.Tensor:
        """Return [B, E] of uint8 images."""
        return self.image.encode_image(prepared)

    def tokenize(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return packed ids and the lengths of the texts."""
        return self.tokenizer.encode_batch(texts)

    def embed_texts(self, tokens: tuple[np.ndarray, np.ndarray]) -> torch.Tensor:
        """Return [N, E]."""
        ids_S, lengths_N = (torch.from_numpy(array) for array in tokens)
        return self.text.encode_text(ids_S.to(self.device), lengths_N)

    def image_preprocessing(self) -> str:
        """Say how images are resized and normalised."""
        size = self.transform.size
        squash = self.transform.eval_resize == "squash"
        shape = f"squashed to {size} × {size} px" if squash else f"shortest side to {size} px, centre crop"
        return f"{shape}, {self.transform.interpolation}, antialiased, mean and std of ImageNet"

    def text_preprocessing(self) -> str:
        """Say what tokens there are."""
        return f"{self.tokenizer.kind} tokens, at most {self.tokenizer.max_length}"


def open_data2vec2(rest: str, device: torch.device, precision: Precision) -> Data2Vec2Pair:
    """Open the pair. Raises UserError for files that are of another kind, or widths that differ."""
    where = f"model 'data2vec2:{rest}'"
    (image_path, text_path), options = places_and_options("data2vec2", rest, _OPTIONS, places=2)
    resize = options.get("resize", "center_crop")
    if resize not in _RESIZES:
        raise unknown_name(f"{where}, resize", resize, _RESIZES)
    heads, length = (whole_number("data2vec2", options, name) for name in ("heads", "max_length"))
    image, image_sizes = _model("data2vec2-image", image_path, where, heads)
    text, text_sizes = _model("data2vec2-text", text_path, where, heads)
    if image_sizes.width != text_sizes.width:
        raise UserError(
            f"{where}: the image model is {image_sizes.width} wide, the text model {text_sizes.width}; expected equal "
            "widths: their vectors are compared"
        )
    assert image_sizes.image_size is not None and text_sizes.positions is not None
    longest = text_sizes.positions - FAIRSEQ_FIRST_POSITION
    length = length or min(_USUAL_LENGTH, longest)
    if length > longest:
        raise UserError(f"{where}: found max_length={length}, the text model has {longest} positions")
    folder = text_path if text_path.is_dir() else text_path.parent
    tokenizer = Path(options.get("tokenizer", folder))
    if "tokenizer" not in options and not (folder / "dict.txt").is_file():
        raise UserError(
            f"{where}: found no dict.txt, encoder.json and vocab.bpe in {folder}; put them there, or name their folder "
            "with ,tokenizer=FOLDER"
        )
    pair = Data2Vec2Pair(
        "data2vec2 pair",
        image,
        text,
        ImageTransformConfig(size=image_sizes.image_size, eval_resize=resize),
        TokenizerConfig(kind="fairseq_gpt2", path=str(tokenizer), max_length=length),
        device,
        precision,
    )
    if text_sizes.vocab_size is not None and pair.tokenizer.vocab_size > text_sizes.vocab_size:
        raise UserError(
            f"{where}: the tokenizer in {tokenizer} has {pair.tokenizer.vocab_size} ids, but the text model's table "
            f"{text_sizes.vocab_size} rows: they do not belong together"
        )
    return pair


def _model(family: str, path: Path, where: str, heads: int | None) -> tuple[Student, Architecture]:
    """Return the model of a converted folder, or of the public file itself."""
    if not path.is_file():
        return converted_student(family, str(path), where)
    found = convert_content(path, heads)
    if found.family != family:
        raise UserError(
            f"{where}: {path} is a {found.family} checkpoint, expected {family}; the image model comes first"
        )
    student = student_of(family, found.architecture, where)
    load_exactly(student, found.state, f"{where}: the weights in {path} do not fit")
    return student.eval(), found.architecture
