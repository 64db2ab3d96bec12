"""What comes before a run in steps of tokens: counting in rounds, and files that every rank must see."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from text_runs import sentences, write_text_config, write_texts

from mmd2v.config.load import load_config
from mmd2v.config.schema import Config
from mmd2v.data import token_lengths
from mmd2v.data.token_lengths import Counts, LengthFiles
from mmd2v.data.tokenizers import load_tokenizer, train_tokenizer
from mmd2v.errors import UserError
from mmd2v.train import token_batches
from mmd2v.train.token_batches import known_token_order, prepare_token_order


@pytest.fixture
def config(tmp_path) -> Config:
    texts = sentences(120)
    write_texts(tmp_path / "train", texts, shard_size=30)
    train_tokenizer(texts, "wordlevel", 500).save(str(tmp_path / "tokenizer.json"))
    return load_config(write_text_config(tmp_path / "run.yaml", tmp_path))


def test_counting_gives_a_sign_of_life_between_shards(config, monkeypatch):
    """The other ranks wait in a collective, whose time-out must not bound the counting."""
    signs = []

    def from_main_rank(decide):
        signs.append(decide())
        return signs[-1]

    monkeypatch.setattr(token_batches, "from_main_rank", from_main_rank)
    monkeypatch.setattr(token_batches, "_ROUND", -1.0)
    order = prepare_token_order(config, 1)
    assert signs[:5] == [False, False, False, False, True]  # four shards
    assert order.texts == 120


def test_the_order_is_the_same_whoever_counted(config, capsys):
    with pytest.raises(UserError, match=r"found no token lengths of 4 of 4 shards, the first of them .*shard-000000"):
        known_token_order(config)
    orders = [prepare_token_order(config, 1), known_token_order(config), prepare_token_order(config, 2)]
    assert capsys.readouterr().err.count("counting the tokens of all texts, once") == 1
    steps = [[order.samples(step) for step in range(order.epoch_steps)] for order in orders]
    assert steps[0] == steps[1] == steps[2]


def test_runs_in_steps_of_samples_have_none(config):
    engine = config.engine.model_copy(update={"batch_size": 8})
    data = config.data.model_copy(update={"batch_tokens": None})
    assert prepare_token_order(config.model_copy(update={"data": data, "engine": engine}), 1) is None


def test_too_many_ranks_are_refused_before_anything_is_built(config):
    with pytest.raises(UserError, match=r"expected one at least for each of the 100 ranks × accumulation"):
        prepare_token_order(config, 100)


def test_files_that_a_node_does_not_see_are_an_error_with_advice(config, monkeypatch):
    monkeypatch.setattr(token_batches, "make_lengths", lambda *_: iter(()))  # counted, but where this rank cannot look
    monkeypatch.setattr(token_batches.ShardLengths, "totals", lambda self: None)
    with pytest.raises(UserError, match=r"Make them with `mmd2v data lengths .*`; on several nodes with --out FOLDER"):
        prepare_token_order(config, 1)


def test_advice_keeps_the_secrets_of_an_address(config):
    address = "http://me:hunter2@127.0.0.1/set/0.tar?sign=hunter2"
    train = config.data.train.model_copy(update={"shards": address})
    config = config.model_copy(update={"data": config.data.model_copy(update={"train": train})})
    tokenizer = load_tokenizer(config.data.tokenizer)
    files = LengthFiles.of([address], tokenizer, None, config.data.source)
    shards = SimpleNamespace(paths=[address], counts=np.array([3]))  # nothing is read before the files are found
    with pytest.raises(UserError, match=r"the first of them http://127\.0\.0\.1/set/0\.tar\?…; ") as error:
        token_batches._check_seen(config, shards, files)
    lengths = token_batches.ShardLengths(
        SimpleNamespace(read=lambda _: Counts(np.zeros(2), np.arange(3)), paths=[address], find=lambda _: "file"),
        shards.counts,
        0,
        9,
    )
    with pytest.raises(UserError, match=r"^http://127\.0\.0\.1/set/0\.tar\?…: found the token lengths of 2") as other:
        lengths(0)
    assert "hunter2" not in f"{error.value}{other.value}"


def test_an_interrupted_count_goes_on(config, monkeypatch):
    counted = []

    def count(shards, shard, tokenizer):
        if shard == 2 and not counted.count("stopped"):
            counted.append("stopped")
            raise UserError("the disk is full")
        counted.append(shard)
        return real(shards, shard, tokenizer)

    real = token_lengths.count_shard
    monkeypatch.setattr(token_lengths, "count_shard", count)
    with pytest.raises(UserError, match="the disk is full"):
        prepare_token_order(config, 1)
    assert prepare_token_order(config, 1).texts == 120
    assert counted == [0, 1, "stopped", 2, 3]
    assert len(list(Path(config.data.train.shards).glob("*.lengths"))) == 4
