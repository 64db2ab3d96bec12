import json
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmd2v.config.schema import TokenizerConfig
from mmd2v.data.tokenizers import check_ids, load_tokenizer, train_tokenizer
from mmd2v.errors import UserError

TEXTS = ["A dog runs.", "Two dogs run on the wet grass, chasing a red ball!", "", "Ünïcode 狗 🐶"]
CORPUS = ["a red circle above a blue square", "two dogs run", "the dog is small"] * 20


def rows(tokenizer, texts):
    ids_S, lengths_N = tokenizer.encode_batch(texts)
    assert ids_S.dtype == lengths_N.dtype == np.int32
    assert ids_S.shape == (lengths_N.sum(),) and len(lengths_N) == len(texts)
    return [row.tolist() for row in np.split(ids_S, np.cumsum(lengths_N)[:-1])]


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    for kind in ("wordlevel", "wordpiece", "bpe"):
        train_tokenizer(CORPUS, kind, 300).save(str(folder / f"{kind}.json"))
    return folder


@pytest.mark.parametrize("kind", ["wordlevel", "wordpiece", "bpe"])
def test_trained_tokenizers_start_with_cls_and_end_with_sep(trained, kind):
    tokenizer = load_tokenizer(TokenizerConfig(path=str(trained / f"{kind}.json"), max_length=16))
    assert (tokenizer.pad_id, tokenizer.cls_id, tokenizer.end_id) == (0, 2, 3)
    same, upper, other = rows(tokenizer, ["a red dog", "A RED  dog", "a blue dog"])
    assert same == upper != other
    assert same[0] == 2 and same[-1] == 3
    assert max(same) < tokenizer.vocab_size <= 300


def test_training_a_tokenizer_twice_gives_the_same_file(trained, tmp_path):
    for kind in ("wordlevel", "wordpiece", "bpe"):
        train_tokenizer(CORPUS, kind, 300).save(str(tmp_path / "again.json"))
        assert (tmp_path / "again.json").read_bytes() == (trained / f"{kind}.json").read_bytes(), kind


@given(st.lists(st.text(max_size=60), min_size=1, max_size=4), st.integers(3, 20), st.booleans())
def test_length_and_special_tokens_hold_for_any_text(trained, texts, max_length, append_end):
    config = TokenizerConfig(path=str(trained / "bpe.json"), max_length=max_length, append_end=append_end)
    tokenizer = load_tokenizer(config)
    for row in rows(tokenizer, texts):
        assert 1 + append_end <= len(row) <= max_length
        assert row[0] == tokenizer.cls_id
        assert (row[-1] == tokenizer.end_id) == append_end or not append_end


def test_truncation_keeps_cls_and_end(trained):
    path = str(trained / "wordlevel.json")
    (whole,) = rows(load_tokenizer(TokenizerConfig(path=path, max_length=64)), CORPUS[:1])
    (cut,) = rows(load_tokenizer(TokenizerConfig(path=path, max_length=5)), CORPUS[:1])
    (open_end,) = rows(load_tokenizer(TokenizerConfig(path=path, max_length=5, append_end=False)), CORPUS[:1])
    assert cut == [*whole[:4], whole[-1]]
    assert open_end == whole[:5]


def test_no_text_gives_empty_arrays(trained):
    ids_S, lengths_N = load_tokenizer(TokenizerConfig(path=str(trained / "bpe.json"))).encode_batch([])
    assert ids_S.shape == lengths_N.shape == (0,)


def test_minilm_is_transformers(shared):
    from transformers import AutoTokenizer

    folder = shared / "teachers" / "minilm_l6_v2"
    reference = AutoTokenizer.from_pretrained(folder)
    for max_length in (64, 8):
        tokenizer = load_tokenizer(TokenizerConfig(path=str(folder), max_length=max_length))
        assert rows(tokenizer, TEXTS) == reference(TEXTS, truncation=True, max_length=max_length)["input_ids"]
    assert (tokenizer.vocab_size, tokenizer.pad_id, tokenizer.cls_id, tokenizer.end_id) == (30522, 0, 101, 102)


def test_bert_vocabulary_without_template(shared, tmp_path):
    """A bare WordPiece file has no template: CLS and end are found by their names."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    lines = (shared / "tokenizers/bert_uncased/vocab.txt").read_text().splitlines()
    backend = Tokenizer(models.WordPiece({word: i for i, word in enumerate(lines)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(TokenizerConfig(path=str(tmp_path), max_length=64))
    minilm = load_tokenizer(TokenizerConfig(path=str(shared / "teachers/minilm_l6_v2"), max_length=64))
    assert rows(tokenizer, TEXTS) == rows(minilm, TEXTS)


def test_sentencepiece_is_the_library(shared):
    from sentencepiece import SentencePieceProcessor

    path = shared / "tokenizers/kosmos2_spm64k/sentencepiece.bpe.model"
    reference = SentencePieceProcessor(model_file=str(path))
    tokenizer = load_tokenizer(TokenizerConfig(kind="sentencepiece", path=str(path), max_length=64))
    expected = [[reference.bos_id(), *reference.encode(text), reference.eos_id()] for text in TEXTS]
    assert rows(tokenizer, TEXTS) == expected
    assert tokenizer.vocab_size == 64_000
    folder = load_tokenizer(TokenizerConfig(kind="sentencepiece", path=str(path.parent), max_length=64))
    assert rows(folder, TEXTS) == expected


def test_fairseq_gpt2_is_the_original(shared):
    golden = json.loads((shared / "golden/tokenize.json").read_text())
    path = str(shared / "tokenizers/gpt2_fairseq")
    texts = [entry["text"] for entry in golden["captions"]]

    def encode(**kwargs):
        return rows(load_tokenizer(TokenizerConfig(kind="fairseq_gpt2", path=path, **kwargs)), texts)

    tokenizer = load_tokenizer(TokenizerConfig(kind="fairseq_gpt2", path=path))
    assert tokenizer.vocab_size == golden["vocab_size"]
    assert (tokenizer.cls_id, tokenizer.pad_id, tokenizer.end_id) == (0, 1, 2)
    assert encode(max_length=1000) == [entry["full"] for entry in golden["captions"]]
    assert encode(max_length=1000, append_end=False) == [entry["full"][:-1] for entry in golden["captions"]]
    for length in (16, 64):
        padded = [entry[f"bos_eos_kept_{length}"] for entry in golden["captions"]]
        real = [[i for i, pad in zip(e["ids"], e["padding_mask"], strict=True) if not pad] for e in padded]
        assert encode(max_length=length) == real


@pytest.mark.parametrize("kind", ["hf", "sentencepiece", "fairseq_gpt2"])
def test_saved_tokenizer_is_the_same(shared, tmp_path, kind):
    paths = {
        "hf": "teachers/minilm_l6_v2",
        "sentencepiece": "tokenizers/kosmos2_spm64k/sentencepiece.bpe.model",
        "fairseq_gpt2": "tokenizers/gpt2_fairseq",
    }
    tokenizer = load_tokenizer(
        TokenizerConfig(kind=kind, path=str(shared / paths[kind]), max_length=9, append_end=False)
    )
    saved = tokenizer.save(tmp_path)
    assert not saved["path"].startswith("/")
    again = load_tokenizer(TokenizerConfig(**{**saved, "path": str(tmp_path / saved["path"])}))
    assert rows(again, TEXTS) == rows(tokenizer, TEXTS) == rows(pickle.loads(pickle.dumps(tokenizer)), TEXTS)
    assert again.vocab_size == tokenizer.vocab_size
    # Saving once more from the saved copy must work too: an export of an export.
    again.save(tmp_path / "second")


def test_bad_files_are_clear_errors(tmp_path, trained):
    def error(**kwargs):
        with pytest.raises(UserError) as caught:
            load_tokenizer(TokenizerConfig(**kwargs))
        return str(caught.value)

    assert "Did you mean 'bpe.json'" in error(path=str(trained / "bpee.json"))
    assert "expected one" in error(path=str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    assert "no Hugging Face tokenizer" in error(path=str(tmp_path))
    (tmp_path / "x.model").write_bytes(b"nonsense")
    assert "no SentencePiece model" in error(kind="sentencepiece", path=str(tmp_path))
    assert "found 0 files dict.txt" in error(kind="fairseq_gpt2", path=str(tmp_path))
    for name, text in {"dict.txt": "12 x y\n", "encoder.json": '{"a": 0}', "vocab.bpe": "#version\n"}.items():
        (tmp_path / name).write_text(text)
    assert "line 1" in error(kind="fairseq_gpt2", path=str(tmp_path))
    (tmp_path / "vocab.bpe").write_text("a b c\n")
    assert "no GPT-2 encoder" in error(kind="fairseq_gpt2", path=str(tmp_path))
    assert "max_length: found 2" in error(path=str(trained / "bpe.json"), max_length=2)


def test_tokenizer_without_cls_or_end(tmp_path):
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")).save(str(tmp_path / "none.json"))
    with pytest.raises(UserError, match="no CLS token"):
        load_tokenizer(TokenizerConfig(path=str(tmp_path / "none.json")))
    Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1, "[CLS]": 5}, unk_token="[UNK]")).save(str(tmp_path / "cls.json"))
    with pytest.raises(UserError, match="append_end"):
        load_tokenizer(TokenizerConfig(path=str(tmp_path / "cls.json")))
    tokenizer = load_tokenizer(TokenizerConfig(path=str(tmp_path / "cls.json"), append_end=False))
    assert (tokenizer.vocab_size, tokenizer.pad_id) == (6, 5)


def test_training_needs_room_and_text():
    with pytest.raises(UserError, match="--vocab-size: found 100"):
        train_tokenizer(CORPUS, "bpe", 100)
    with pytest.raises(UserError, match="no caption"):
        train_tokenizer([], "wordlevel", 100)


def test_check_ids_names_the_bad_id():
    check_ids(np.array([0, 9]), 10, "text")
    check_ids(np.zeros(0, np.int32), 10, "text")
    for ids, bad in (([3, 10], 10), ([-1, 3], -1)):
        with pytest.raises(UserError, match=f"text: found token id {bad}, expected ids in 0 … 9"):
            check_ids(np.array(ids), 10, "text")
