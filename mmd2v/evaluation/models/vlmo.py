"""``vlmo:FILE``: a public VLMo checkpoint, computed by our own layers.

Shapes: B images, N texts, D width, P patches a side, L tokens of the longest text of a batch, S sequences.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from timm.data.constants import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from tokenizers.processors import BertProcessing
from torch import nn

from mmd2v.config.schema import ImageTransformConfig, LayerConfig
from mmd2v.data.transforms import eval_transform
from mmd2v.errors import UserError
from mmd2v.evaluation.models.measured import MeasuredModel, places_and_options, whole_number
from mmd2v.inference import Precision
from mmd2v.models.biased_layer import BiasedLayer, BiasedLayout
from mmd2v.models.checkpoints.pickles import read_checkpoint
from mmd2v.models.checkpoints.vlmo import BETWEEN, CLS_DISTANCES, VLMoCheckpoint, read_vlmo
from mmd2v.models.images import Normalize
from mmd2v.models.timm_backbone import load_exactly

_OPTIONS = {"tokenizer": "FILE of BERT's words (vocab.txt)", "heads": "NUMBER", "image_size": "PIXELS"}
_EPS = 1e-6
_TEXT_EPS = 1e-12
MODALITIES = ("text", "image")


class VLMo(nn.Module):
    """The multiway transformer of one image or one text, with the projection of each.

    Of its experts it has those two; the third one sees pairs, which no embedding space has.
    """

    def __init__(self, checkpoint: VLMoCheckpoint, where: str) -> None:
        super().__init__()
        c = checkpoint
        side = c.image_size // c.patch_size
        rows = table_rows(side, c.text_distances) if c.relative else 0
        self.normalize = Normalize(IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD)
        self.proj = nn.Conv2d(3, c.width, c.patch_size, c.patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, c.width))
        self.words = nn.Embedding(c.vocab_size, c.width)
        self.text_kind = nn.Parameter(torch.zeros(c.width))
        self.text_norm = nn.LayerNorm(c.width, eps=_TEXT_EPS)
        self.kind = nn.ParameterDict({name: nn.Parameter(torch.zeros(c.width)) for name in MODALITIES})
        self.positions = None if c.relative else nn.Parameter(torch.zeros(c.max_length, c.width))
        self.image_positions = None if c.relative else nn.Parameter(torch.zeros(1, side * side + 1, c.width))
        layer = LayerConfig(kind="mome", eps=_EPS, mlp_ratio=c.mlp_ratio, layer_scale=1.0 if c.layer_scale else None)
        self.layers = nn.ModuleList(
            BiasedLayer(layer, c.width, c.heads, MODALITIES, table_rows=rows) for _ in range(c.depth)
        )
        self.norm = nn.LayerNorm(c.width, eps=_EPS)
        self.heads = nn.ModuleDict({name: nn.Linear(c.width, c.width, bias=False) for name in MODALITIES})
        load_exactly(self, c.state, f"{where}: its weights do not fit its sizes")
        self.register_buffer("image_index", image_index(side) if c.relative else None, persistent=False)
        index = text_index(c.max_length, side, c.text_distances) if c.relative else None
        self.register_buffer("text_index", index, persistent=False)

    def embed_images(self, images: torch.Tensor) -> torch.Tensor:
        """Return [B, D] of uint8 images [B, 3, H, W], not normalised."""
        x_BPD = self.proj(self.normalize(images)).flatten(2).transpose(1, 2)
        x_BPD = torch.cat([self.cls_token.expand(len(x_BPD), -1, -1).to(x_BPD.dtype), x_BPD], dim=1)
        if self.image_positions is not None:
            x_BPD = x_BPD + self.image_positions
        return self._embed(x_BPD + self.kind["image"], "image", None, self.image_index)

    def embed_texts(self, ids_NL: torch.Tensor, lengths_N: np.ndarray) -> torch.Tensor:
        """Return [N, D] of padded ids, of which the first ``lengths_N`` (on the host) are real; not normalised."""
        longest = ids_NL.shape[1]
        x_NLD = self.words(ids_NL) + self.text_kind
        if self.positions is not None:
            x_NLD = x_NLD + self.positions[:longest]
        index_LL = None if self.text_index is None else self.text_index[:longest, :longest]
        return self._embed(self.text_norm(x_NLD) + self.kind["text"], "text", lengths_N, index_LL)

    def run(self, x_TD: torch.Tensor, layout: BiasedLayout) -> torch.Tensor:
        """Return the rows after all layers and the norm, [T, D]."""
        for layer in self.layers:
            x_TD = layer(x_TD, layout)
        return self.norm(x_TD)

    def _embed(
        self, x_SLD: torch.Tensor, modality: str, keys_S: np.ndarray | None, index_LL: torch.Tensor | None
    ) -> torch.Tensor:
        sequences, tokens, _ = x_SLD.shape
        layout = BiasedLayout(
            {modality: np.full(sequences, tokens, np.int64)},
            x_SLD.device,
            {} if keys_S is None else {modality: keys_S},
            bias_index=index_LL,
        )
        rows_TD = self.run(x_SLD.flatten(0, 1), layout)
        return self.heads[modality](rows_TD[layout.first_rows(modality)])


def table_rows(side: int, text_distances: int) -> int:
    """Return the rows of the table: pairs of patches, the image's CLS, both ways between, pairs of words, their CLS."""
    return (2 * side - 1) ** 2 + CLS_DISTANCES + BETWEEN + 2 * text_distances


def image_index(side: int) -> torch.Tensor:
    """Return int64 [1 + side², 1 + side²]: the table's row for what one token of an image sees of another."""
    rows, columns = (axis.flatten() for axis in torch.meshgrid(*[torch.arange(side)] * 2, indexing="ij"))
    down = rows[:, None] - rows[None, :] + side - 1
    across = columns[:, None] - columns[None, :] + side - 1
    return _with_cls(down * (2 * side - 1) + across, (2 * side - 1) ** 2)


def text_index(length: int, side: int, text_distances: int) -> torch.Tensor:
    """Return int64 [length, length]: the same of a text, whose rows follow the image's; its first token is the CLS."""
    start = (2 * side - 1) ** 2 + CLS_DISTANCES + BETWEEN
    place = torch.arange(length - 1)
    further = place[None, :] - place[:, None] + text_distances - 2
    return _with_cls(start + further, table_rows(side, text_distances) - CLS_DISTANCES)


def _with_cls(index_PP: torch.Tensor, first: int) -> torch.Tensor:
    """Put a CLS in front, whose three rows begin with ``first``: what it sees, what sees it, itself."""
    index_LL = torch.full((len(index_PP) + 1, len(index_PP) + 1), first)
    index_LL[1:, 1:] = index_PP
    index_LL[1:, 0] = first + 1
    index_LL[0, 0] = first + 2
    return index_LL


class VLMoModel(MeasuredModel):
    """A VLMo with its tokenizer."""

    def __init__(
        self, name: str, model: VLMo, size: int, tokenizer: Tokenizer, device: torch.device, precision: Precision
    ) -> None:
        super().__init__(name, model.norm.normalized_shape[0], device, precision)
        self.model = model.eval().requires_grad_(False).to(device)
        self.transform = ImageTransformConfig(size=size, eval_resize="squash")
        self.tokenizer = tokenizer

    def prepare_image(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return uint8 [3, S, S]."""
        return eval_transform(pixels, self.transform)

    def embed_images(self, prepared: torch.Tensor) -> torch.Tensor:
        """Return [B, D] of uint8 images."""
        return self.model.embed_images(prepared)

    def tokenize(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return ids [N, L] padded to the longest, and the lengths [N]."""
        encodings = self.tokenizer.encode_batch(texts)
        ids_NL = np.array([encoding.ids for encoding in encodings], np.int64)
        return ids_NL, np.array([sum(encoding.attention_mask) for encoding in encodings], np.int64)

    def embed_texts(self, tokens: tuple[np.ndarray, np.ndarray]) -> torch.Tensor:
        """Return [N, D]."""
        ids_NL, lengths_N = tokens
        return self.model.embed_texts(torch.from_numpy(ids_NL).to(self.device), lengths_N)

    def image_preprocessing(self) -> str:
        """Say how images are resized and normalised."""
        size = self.transform.size
        return f"squashed to {size} × {size} px, bicubic, antialiased, mean 0.5, std 0.5"

    def text_preprocessing(self) -> str:
        """Say what tokens there are."""
        return f"BERT's lower-case word pieces, at most {self.tokenizer.truncation['max_length']}"


def open_vlmo(rest: str, device: torch.device, precision: Precision) -> VLMoModel:
    """Open ``FILE[,tokenizer=FILE][,heads=N][,image_size=PIXELS]``; nothing in the file is run.

    Raises UserError for a file that is no VLMo with the projections of its contrastive loss, or words that are missing
    or not its own.
    """
    where = f"model 'vlmo:{rest}'"
    (path,), options = places_and_options("vlmo", rest, _OPTIONS)
    heads, image_size = (whole_number("vlmo", options, name) for name in ("heads", "image_size"))
    checkpoint = read_vlmo(read_checkpoint(path), path, heads=heads, image_size=image_size)
    words = Path(options.get("tokenizer", path.parent / "vocab.txt"))
    if words.is_dir():
        words = words / "vocab.txt"
    tokenizer = word_pieces(words, checkpoint.max_length, where)
    if tokenizer.get_vocab_size() > checkpoint.vocab_size:
        raise UserError(
            f"{where}: {words} has {tokenizer.get_vocab_size()} words, but the embedding table of {path} has "
            f"{checkpoint.vocab_size} rows: they do not belong together"
        )
    return VLMoModel(path.stem, VLMo(checkpoint, where), checkpoint.image_size, tokenizer, device, precision)


def word_pieces(words: Path, max_length: int, where: str) -> Tokenizer:
    """Return BERT's lower-case tokenizer of a ``vocab.txt``, padding to the longest of a batch.

    Raises UserError for a file that is missing or lacks BERT's special tokens.
    """
    if not words.is_file():
        raise UserError(
            f"{where}: found no {words}, expected the vocab.txt of bert-base-uncased; put it beside the checkpoint, or "
            "name it with ,tokenizer=FILE"
        )
    try:
        # Not splitlines: some of the words are separators of lines to it.
        entries = words.read_text(encoding="utf-8").rstrip("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where}: {words} cannot be read as a list of words: {error}") from error
    vocabulary = {entry: row for row, entry in enumerate(entries)}
    missing = [name for name in ("[PAD]", "[UNK]", "[CLS]", "[SEP]") if name not in vocabulary]
    if missing:
        raise UserError(f"{where}: {words} has no {', '.join(missing)}, expected the vocab.txt of bert-base-uncased")
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = BertProcessing(("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"]))
    tokenizer.enable_truncation(max_length)
    tokenizer.enable_padding(pad_id=vocabulary["[PAD]"], pad_token="[PAD]")
    return tokenizer
