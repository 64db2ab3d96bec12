"""Captions → token ids, packed end to end. Three kinds of files behind one interface.

Every sequence starts with the CLS token (`[CLS]`, `<s>`, `<|startoftext|>`); with ``append_end`` it ends with the end
token, also when it was cut to ``max_length``.

Shapes: N captions, S tokens of all captions together.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mmd2v.config.schema import TokenizerConfig
from mmd2v.errors import UserError, nearest
from mmd2v.files import atomic_path, write_text

VocabularyKind = Literal["wordlevel", "wordpiece", "bpe"]

_CLS_NAMES = ("[CLS]", "<s>", "<cls>", "<|startoftext|>", "<start_of_text>", "[BOS]", "<bos>")
_END_NAMES = ("[SEP]", "</s>", "<sep>", "<|endoftext|>", "<end_of_text>", "[EOS]", "<eos>")
_SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]  # of the tokenizers trained here, ids 0 to 4
_PAD_NAMES = ("[PAD]", "<pad>", "<|padding|>", "<|pad|>")


class Tokenizer(ABC):
    """Text → ids.

    Attributes:
        vocab_size: number of rows an embedding table needs, the largest id + 1.
        max_length: longest sequence, special tokens included.
        append_end: whether sequences end with the end token.
        cls_id: id of the first token of every sequence.
        end_id: id of the end token; None if the files have none.
        pad_id: id for padded places (never in a packed batch); the end token's or ``cls_id`` if the files have none.
    """

    kind: str
    vocab_size: int
    cls_id: int
    end_id: int | None
    pad_id: int

    def __init__(self, config: TokenizerConfig) -> None:
        self.max_length = config.max_length
        self.append_end = config.append_end
        self._path = Path(config.path)

    @property
    @abstractmethod
    def files(self) -> list[Path]:
        """The files that decide which ids a text becomes."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hexadecimal) of the kind and the content of `files`: tokenizers of equal fingerprint are equal."""
        digest = hashlib.sha256(self.kind.encode())
        for file in self.files:
            content = file.read_bytes()
            digest.update(len(content).to_bytes(8, "little") + content)
        return digest.hexdigest()

    @property
    def specials(self) -> int:
        """Special tokens of every sequence."""
        return 1 + (self.append_end and self.end_id is not None)

    @abstractmethod
    def encode_text(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text alone: no special token, no truncation."""

    @abstractmethod
    def save(self, folder: str | Path) -> dict[str, Any]:
        """Copy what is needed into ``folder``; return a TokenizerConfig as a dict, its ``path`` relative to it."""

    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Encode captions.

        Returns:
            ids int32 [S] of all sequences end to end, and lengths int32 [N], special tokens included.
        """
        end = [self.end_id] if self.append_end and self.end_id is not None else []
        room = self.max_length - self.specials
        rows = [[self.cls_id, *ids[:room], *end] for ids in self.encode_text(texts)]
        lengths_N = np.fromiter(map(len, rows), np.int32, len(rows))
        ids_S = np.fromiter((token for row in rows for token in row), np.int32, int(lengths_N.sum()))
        return ids_S, lengths_N

    def _check(self) -> None:
        if self.append_end and self.end_id is None:
            raise UserError(
                f"data.tokenizer.append_end: {self._path} has no end token (looked for {', '.join(_END_NAMES)}); "
                "set it to false"
            )
        specials = 1 + self.append_end
        if self.max_length <= specials:
            raise UserError(
                f"data.tokenizer.max_length: found {self.max_length}, expected more than {specials}: "
                "the special tokens alone fill it"
            )

    def _saved(self, path: str) -> dict[str, Any]:
        return {"kind": self.kind, "path": path, "max_length": self.max_length, "append_end": self.append_end}


class HFTokenizer(Tokenizer):
    """A Hugging Face ``tokenizer.json``."""

    kind = "hf"

    def __init__(self, config: TokenizerConfig) -> None:
        """Raises UserError: file missing, not a tokenizer, or without a CLS token."""
        from tokenizers import Tokenizer as Backend

        super().__init__(config)
        self._file = path = _find_file(self._path, "tokenizer.json")
        try:
            self._backend = Backend.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises plain Exception
            raise UserError(f"data.tokenizer.path: {path} is no Hugging Face tokenizer: {error}") from None
        self._backend.no_truncation()
        self._backend.no_padding()
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        first, last = self._template()
        cls_id = first if first is not None else _first_known(_CLS_NAMES, vocabulary)
        if cls_id is None:
            raise UserError(
                f"data.tokenizer.path: {path} has no CLS token: no template puts one in front, and its vocabulary has "
                f"none of {', '.join(_CLS_NAMES)}"
            )
        self.cls_id = cls_id
        self.end_id = last if last is not None else _first_known(_END_NAMES, vocabulary)
        pad_id = _first_known(_PAD_NAMES, vocabulary)
        self.pad_id = pad_id if pad_id is not None else (self.cls_id if self.end_id is None else self.end_id)
        self._check()

    @property
    def files(self) -> list[Path]:
        """See `Tokenizer.files`."""
        return [self._file]

    def _template(self) -> tuple[int | None, int | None]:
        """The special tokens that the file's own template puts before and after a text."""
        encoding = self._backend.encode("a")
        special = encoding.special_tokens_mask
        first = encoding.ids[0] if special and special[0] else None
        last = encoding.ids[-1] if len(special) > 1 and special[-1] else None
        return first, last

    def encode_text(self, texts: Sequence[str]) -> list[list[int]]:
        """See `Tokenizer.encode_text`."""
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def save(self, folder: str | Path) -> dict[str, Any]:
        """Write ``tokenizer.json``; see `Tokenizer.save`."""
        write_text(Path(folder) / "tokenizer.json", self._backend.to_str(pretty=True))
        return self._saved("tokenizer.json")


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece ``.model`` with its own ids."""

    kind = "sentencepiece"

    def __init__(self, config: TokenizerConfig) -> None:
        """Raises UserError: file missing, no SentencePiece model, or without a begin token."""
        from sentencepiece import SentencePieceProcessor

        super().__init__(config)
        self._model = _find_file(self._path, "*.model")
        try:
            self._backend = SentencePieceProcessor(model_proto=self._model.read_bytes())
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"data.tokenizer.path: {self._model} is no SentencePiece model: {reason}") from None
        self.vocab_size = self._backend.get_piece_size()
        self.cls_id = self._backend.bos_id()
        if self.cls_id < 0:
            raise UserError(f"data.tokenizer.path: {self._model} has no begin token (<s>) to serve as CLS")
        end_id = self._backend.eos_id()
        self.end_id = end_id if end_id >= 0 else None
        pad_id = self._backend.pad_id()
        self.pad_id = pad_id if pad_id >= 0 else (self.cls_id if self.end_id is None else self.end_id)
        self._check()

    @property
    def files(self) -> list[Path]:
        """See `Tokenizer.files`."""
        return [self._model]

    def encode_text(self, texts: Sequence[str]) -> list[list[int]]:
        """See `Tokenizer.encode_text`."""
        # One thread: the default starts as many as there are cores, in every loader process.
        return self._backend.encode(list(texts), out_type=int, num_threads=1)

    def save(self, folder: str | Path) -> dict[str, Any]:
        """Copy the model file; see `Tokenizer.save`."""
        _copy(self._model, Path(folder) / "sentencepiece.model")
        return self._saved("sentencepiece.model")


class FairseqGPT2Tokenizer(Tokenizer):
    """GPT-2 byte pairs whose ids, as strings, are looked up in fairseq's ``dict.txt`` (RoBERTa, data2vec text).

    Ids: ``<s>`` 0, ``<pad>`` 1, ``</s>`` 2, ``<unk>`` 3, then the lines of dict.txt, ``<mask>`` last.
    """

    kind = "fairseq_gpt2"
    _FILES = ("dict.txt", "encoder.json", "vocab.bpe")
    _UNKNOWN = 3

    def __init__(self, config: TokenizerConfig) -> None:
        """Raises UserError: a file is missing or does not parse."""
        from tokenizers import Tokenizer as Backend
        from tokenizers import models, pre_tokenizers

        super().__init__(config)
        dictionary, encoder, merges = (_find_file(self._path, name) for name in self._FILES)
        try:
            vocabulary = json.loads(encoder.read_text(encoding="utf-8"))
            lines = merges.read_text(encoding="utf-8").splitlines()
            rules = [line.split(" ") for line in lines if line and not line.startswith("#version")]
            pairs = [(left, right) for left, right in rules]
            self._backend = Backend(models.BPE(vocab=vocabulary, merges=pairs))
        except Exception as error:  # the library raises plain Exception
            raise UserError(f"data.tokenizer.path: {encoder} and {merges} are no GPT-2 encoder: {error}") from None
        self._backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self._map, entries = _fairseq_ids(dictionary, max(vocabulary.values()) + 1)
        self.cls_id, self.pad_id, self.end_id = 0, 1, 2
        self.vocab_size = 4 + entries + 1
        self._check()

    @property
    def files(self) -> list[Path]:
        """See `Tokenizer.files`."""
        return [_find_file(self._path, name) for name in self._FILES]

    def encode_text(self, texts: Sequence[str]) -> list[list[int]]:
        """See `Tokenizer.encode_text`; surrounding white space is stripped, as the original does."""
        encodings = self._backend.encode_batch_fast([text.strip() for text in texts], add_special_tokens=False)
        return [self._map[encoding.ids].tolist() for encoding in encodings]

    def save(self, folder: str | Path) -> dict[str, Any]:
        """Copy the three files; see `Tokenizer.save`."""
        for name in self._FILES:
            _copy(self._path / name, Path(folder) / name)
        return self._saved(".")


def _fairseq_ids(dictionary: Path, size: int) -> tuple[np.ndarray, int]:
    """int32 [size]: GPT-2 id → dictionary id, and the number of entries of the dictionary."""
    table = np.full(size, FairseqGPT2Tokenizer._UNKNOWN, np.int32)
    entries = 0
    for number, line in enumerate(dictionary.read_text(encoding="utf-8").splitlines(), 1):
        name, _, count = line.rstrip().rpartition(" ")
        if not name or not count.isdigit():
            raise UserError(f"{dictionary}, line {number}: found {line!r}, expected 'TOKEN COUNT'")
        # Entries that are no number (madeupword0000) only fill the table to a round size.
        if name.isdigit() and int(name) < size:
            table[int(name)] = 4 + entries
        entries += 1
    return table, entries


_KINDS: dict[str, type[Tokenizer]] = {
    kind.kind: kind for kind in (HFTokenizer, SentencePieceTokenizer, FairseqGPT2Tokenizer)
}


def load_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """Open the tokenizer a configuration names.

    Raises:
        UserError: missing or unreadable files, no CLS or end token, or a ``max_length`` the special tokens fill.
    """
    return _KINDS[config.kind](config)


def check_ids(ids: np.ndarray, vocab_size: int, name: str) -> None:
    """Raise a UserError that names ``name`` if an id has no row in an embedding table of ``vocab_size`` rows."""
    if ids.size == 0:
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        bad = low if low < 0 else high
        raise UserError(
            f"{name}: found token id {bad}, expected ids in 0 … {vocab_size - 1}: "
            "the tokenizer is not the one the model was made for"
        )


def train_tokenizer(captions: Iterable[str], kind: VocabularyKind, vocab_size: int) -> Any:
    """Learn a lower-case vocabulary from captions; the same captions give the same file.

    Args:
        captions: the text; wordpiece keeps it in memory, as it goes through it twice.
        kind: wordlevel: whole words; wordpiece: BERT's pieces; bpe: byte pairs, which know no unknown word.
        vocab_size: most entries, special tokens included.

    Returns:
        A ``tokenizers.Tokenizer`` whose template puts ``[CLS]`` in front and ``[SEP]`` behind.

    Raises:
        UserError: fewer entries than the special tokens and single characters need, or no caption.
    """
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from tokenizers import Tokenizer as Backend

    smallest = len(_SPECIALS) + (256 if kind == "bpe" else 1)
    if vocab_size < smallest:
        raise UserError(f"--vocab-size: found {vocab_size}, expected at least {smallest} for {kind}")
    seen = 0

    def counted() -> Iterable[str]:
        nonlocal seen
        for caption in captions:
            seen += 1
            yield caption

    if kind == "bpe":
        backend = Backend(models.BPE())
        spaces = Regex(r"\s+")
        backend.normalizer = normalizers.Sequence(
            [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace(spaces, " "), normalizers.Strip()]
        )
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer: Any = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=_SPECIALS, initial_alphabet=alphabet, show_progress=False
        )
        backend.train_from_iterator(counted(), trainer)
    else:
        backend = Backend(models.WordLevel(unk_token="[UNK]") if kind == "wordlevel" else models.WordPiece())
        backend.normalizer = normalizers.BertNormalizer(lowercase=True)
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        if kind == "wordlevel":
            trainer = trainers.WordLevelTrainer(vocab_size=vocab_size, special_tokens=_SPECIALS, show_progress=False)
            backend.train_from_iterator(counted(), trainer)
        else:
            captions = list(counted())
            backend.model = models.WordPiece(
                _train_wordpiece(backend, captions, vocab_size), unk_token="[UNK]", max_input_chars_per_word=100
            )
            backend.decoder = decoders.WordPiece()
            backend.add_special_tokens(_SPECIALS)
    if seen == 0:
        raise UserError("tokenizer: found no caption to learn from")
    pair = [(name, backend.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=pair)
    return backend


def _train_wordpiece(backend: Any, captions: Sequence[str], vocab_size: int) -> dict[str, int]:
    """Learn WordPiece entries.

    The library numbers the continuing characters (``##a``) in the order of a randomly seeded hash table, and ties
    between merges follow those numbers. Handing them over as special tokens, sorted, makes the result repeatable.
    """
    from tokenizers import trainers

    characters = set().union(*(backend.normalizer.normalize_str(caption) for caption in captions))
    continuing = [f"##{character}" for character in sorted(characters) if not character.isspace()]
    smallest = len(_SPECIALS) + 2 * len(continuing)
    if vocab_size < smallest:
        raise UserError(
            f"--vocab-size: found {vocab_size}, expected at least {smallest}: "
            f"the captions have {len(continuing)} different characters"
        )
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=[*_SPECIALS, *continuing], show_progress=False
    )
    backend.train_from_iterator(captions, trainer)
    return backend.get_vocab(with_added_tokens=True)


def _find_file(path: Path, name: str) -> Path:
    """``path`` itself if it is a file, else the one file of that name (or wildcard) in the folder ``path``."""
    if path.is_dir():
        found = sorted(path.glob(name))
        if len(found) == 1:
            return found[0]
        listing = ", ".join(entry.name for entry in sorted(path.iterdir())[:10])
        what = f"found {len(found)} files {name} in {path}"
        raise UserError(f"data.tokenizer.path: {what}, expected one; the folder has: {listing}")
    if not path.is_file():
        names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = nearest(path.name, names)
        raise UserError(f"data.tokenizer.path: {path} not found, expected a file or a folder.{hint}")
    return path


def _first_known(names: Sequence[str], vocabulary: dict[str, int]) -> int | None:
    return next((vocabulary[name] for name in names if name in vocabulary), None)


def _copy(source: Path, target: Path) -> None:
    with atomic_path(target) as temporary:
        shutil.copyfile(source, temporary)
