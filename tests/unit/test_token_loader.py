"""Batches of tokens out of real shards: the loader gives what the order says, whoever loads."""

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from data_samples import write_tar
from text_runs import sentences, write_texts

from mmd2v.config.load import load_config
from mmd2v.config.schema import DataConfig
from mmd2v.data.stream import token_loader
from mmd2v.data.token_batches import ShardLengths, TokenOrder
from mmd2v.data.token_lengths import open_texts, write_lengths
from mmd2v.data.tokenizers import load_tokenizer, train_tokenizer
from mmd2v.errors import UserError

TEXTS = sentences(120)
BUDGET = 200


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    write_texts(folder / "set", TEXTS, shard_size=10, captions=2, labels=2)
    train_tokenizer(TEXTS, "wordlevel", 500).save(str(folder / "tokenizer.json"))
    write_lengths(str(folder / "set"), config(folder).tokenizer, workers=1)
    return folder


def config(folder: Path, shards: str = "set", **change) -> DataConfig:
    base = {
        "train": {"shards": str(folder / shards)},
        "tokenizer": {"path": str(folder / "tokenizer.json"), "max_length": 14},
        "batch_tokens": BUDGET,
        "labels": "vector",
        "shuffle_shards": 2,
        "workers": 0,
    }
    return DataConfig.model_validate({**base, **change})


def order_of(chosen: DataConfig) -> TokenOrder:
    tokenizer = load_tokenizer(chosen.tokenizer)
    shards, files = open_texts(chosen, tokenizer)
    lengths = ShardLengths(files, shards.counts, tokenizer.specials, tokenizer.max_length)
    return TokenOrder(lengths.totals(), lengths, budget=chosen.batch_tokens, window=chosen.shuffle_shards, seed=3)


def batches(chosen: DataConfig, count: int, *, rank=0, world_size=1, accumulation=1, start=0):
    loader = token_loader(
        chosen,
        seed=3,
        tokenizer=load_tokenizer(chosen.tokenizer),
        order=order_of(chosen),
        rank=rank,
        world_size=world_size,
        accumulation=accumulation,
        start_step=start,
        label_classes=2,
    )
    return list(itertools.islice(loader, count))


def rows(batch) -> list[tuple]:
    texts = (tuple(part.tolist()) for part in batch.text_ids.split(batch.text_lengths.tolist()))
    return list(zip(batch.sample_ids, texts, strict=True))


def test_an_epoch_has_every_text_once_with_the_tokens_that_were_counted(folder):
    chosen = config(folder)
    order, tokenizer = order_of(chosen), load_tokenizer(chosen.tokenizer)
    seen, sizes = Counter(), []
    for step, batch in enumerate(batches(chosen, order.epoch_steps)):
        assert batch.images.shape == (len(batch), 3, 0, 0) and batch.mean_over == len(batch) == len(batch.text_lengths)
        assert batch.caption_image.tolist() == list(range(len(batch)))
        assert int(batch.text_lengths.sum()) <= BUDGET
        lengths_of_order = [
            int(order._lengths(p.shard).lengths_N[order._lengths(p.shard).starts_R[p.row] + p.caption])
            for p in order.samples(step)
        ]
        assert batch.text_lengths.tolist() == lengths_of_order
        seen.update(row for _, row in rows(batch))
        sizes.append(int(batch.text_lengths.sum()))
    ids, lengths = tokenizer.encode_batch(TEXTS)
    expected = Counter(tuple(part.tolist()) for part in np.split(ids, np.cumsum(lengths)[:-1]))
    assert seen == expected
    assert max(lengths) == 14 and sum(sizes) == lengths.sum()


def test_ids_name_the_caption_and_labels_are_the_samples(folder):
    seen = [
        name for batch in batches(config(folder), order_of(config(folder)).epoch_steps) for name in batch.sample_ids
    ]
    assert len(set(seen)) == 120
    assert {name for name in seen if "#" in name} == {f"text-{n:05d}#1" for n in range(0, 120, 2)}
    (batch,) = batches(config(folder), 1)
    for name, vector in zip(batch.sample_ids, batch.labels.tolist(), strict=True):
        number = int(name.removeprefix("text-").partition("#")[0])
        assert vector == [float((number + a) % 3 == 0) for a in range(2)]


@pytest.mark.parametrize("workers", [1, 2])
def test_loader_processes_do_not_change_a_batch(folder, workers):
    alone = batches(config(folder), 9, accumulation=2)
    found = batches(config(folder, workers=workers), 9, accumulation=2)
    for a, b in zip(alone, found, strict=True):
        assert rows(a) == rows(b) and a.mean_over == b.mean_over and torch.equal(a.labels, b.labels)


@pytest.mark.parametrize(("world_size", "accumulation"), [(2, 1), (1, 3), (2, 2)])
def test_ranks_and_accumulation_share_the_step_of_one_rank(folder, world_size, accumulation):
    steps = 5
    whole = batches(config(folder), steps)
    by_rank = [
        batches(config(folder), steps * accumulation, rank=r, world_size=world_size, accumulation=accumulation)
        for r in range(world_size)
    ]
    for step in range(steps):
        parts = [by_rank[r][step * accumulation + i] for i in range(accumulation) for r in range(world_size)]
        assert [row for part in parts for row in rows(part)] == rows(whole[step])
        for part in parts:
            assert part.mean_over * world_size * accumulation == pytest.approx(len(whole[step]))
            assert 0 < part.text_lengths.sum() <= BUDGET / len(parts) + 14


def test_a_loader_starts_at_any_step(folder):
    chosen = config(folder)
    last = 2 * order_of(chosen).epoch_steps + 1
    whole = [rows(batch) for batch in batches(chosen, last + 2)]
    for start in (1, order_of(chosen).epoch_steps, last):
        resumed = batches(config(folder, workers=2 if start == last else 0), 2, start=start)
        assert [rows(batch) for batch in resumed] == whole[start : start + 2]


def test_a_limit_leaves_the_rest_of_the_set_out(folder):
    chosen = config(folder, train={"shards": str(folder / "set"), "limit": 33})
    order = order_of(chosen)
    seen = {name for batch in batches(chosen, order.epoch_steps) for name in batch.sample_ids}
    assert order.texts == 66
    assert seen == {f"text-{n:05d}{end}" for n in range(0, 66, 2) for end in ("", "#1")}


def test_a_damaged_text_keeps_its_slot_with_weight_0(folder, tmp_path):
    good = [(f"t{n}.txt", text.encode()) for n, text in enumerate(TEXTS[:60])]
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    write_tar(tmp_path / "set.tar", [*good[:20], ("bad.json", b"{"), *good[20:]])
    chosen = config(tmp_path, "set.tar", labels=None, damage={"limit": 0.1})
    write_lengths(str(tmp_path / "set.tar"), chosen.tokenizer, workers=1)
    order = order_of(chosen)
    found = batches(chosen, order.epoch_steps)
    assert order.texts == 61 and sum(map(len, found)) == 61
    assert [d.kind.value for batch in found for d in batch.damaged] == ["bad_meta"]
    assert sum(float(batch.weights.sum()) for batch in found) == 60
    assert sum(int(batch.text_lengths.sum()) for batch in found) == order.tokens
    with pytest.raises(UserError, match=r"bad: its \.json does not parse"):
        batches(config(tmp_path, "set.tar", labels=None, damage={"limit": 0}), order.epoch_steps)


def test_too_few_texts_for_the_ranks_is_an_error_before_the_first_batch(folder):
    with pytest.raises(UserError, match=r"data\.batch_tokens: a step of 200 tokens may have as few as \d+ texts"):
        batches(config(folder), 1, world_size=64)


def test_a_missing_file_of_lengths_is_named(folder):
    chosen = config(folder, lengths_dir=str(folder / "nowhere"))
    with pytest.raises(
        UserError, match=r"shard-000000\.tar: its file of token lengths is gone, or of another tar; expected .*nowhere"
    ):
        order_of(chosen)


# ------------------------------------------------------------------------------------------- configs


CONFIG = """
name: texts
run_dir: runs/texts
steps: 2
data: {{train: {{shards: set}}, tokenizer: {{path: t.json}}, batch_tokens: {tokens}{data}}}
model: {{width: 16, heads: 2, encoders: {{{encoders}}}, layers: [{{kind: shared}}]}}
teachers: {{bert: {{name: "hf:bert", modality: {teacher}}}}}
objectives: [{objective}]
{engine}
"""
TEXT = "text: {kind: tokens}"
REGRESSION = "{kind: cls_regression, teacher: bert, modalities: [text]}"


def loaded(tmp_path, tokens="4096", data="", encoders=TEXT, teacher="text", objective=REGRESSION, engine=""):
    file = tmp_path / "run.yaml"
    file.write_text(
        CONFIG.format(tokens=tokens, data=data, encoders=encoders, teacher=teacher, objective=objective, engine=engine)
    )
    return load_config(file)


def test_tokens_take_the_place_of_the_batch_size(tmp_path):
    from mmd2v.config.batch_plan import plan_batches, total_steps
    from mmd2v.config.deepspeed import deepspeed_config
    from mmd2v.config.load import dump_config

    config = loaded(tmp_path, data=", micro_batch_tokens: 600", engine="engine: {precision: fp32}")
    assert config.engine.batch_size is None and not config.uses_images
    plan = plan_batches(config, 2)
    assert (plan.global_batch, plan.micro_batch, plan.accumulation) == (4096, 512, 4)
    assert str(plan) == "2 ranks × about 512 tokens × 4 accumulation, at most 4,096 tokens a step"
    options = deepspeed_config(config, 2)
    assert [options[key] for key in ("train_batch_size", "gradient_accumulation_steps")] == [8, 4]
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.yaml") == config
    in_epochs = config.model_copy(update={"steps": None, "epochs": 1.5})
    assert total_steps(in_epochs, plan, None, 11) == 17
    with pytest.raises(UserError, match=r"epochs: .* lengths of the texts"):
        total_steps(in_epochs, plan, 100, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"engine": "engine: {batch_size: 8}"}, r"engine\.batch_size: found 8 beside data\.batch_tokens 4096"),
        ({"engine": "engine: {micro_batch_size: 8}"}, r"engine\.micro_batch_size: found 8 .*data\.micro_batch_tokens"),
        ({"encoders": TEXT + ", image: {kind: patch}"}, r"data\.batch_tokens: this run uses images"),
        ({"teacher": "image"}, r"data\.batch_tokens: this run uses images"),
        ({"objective": "{kind: contrastive}"}, r"data\.batch_tokens: the contrastive objective"),
        ({"data": ", lanes: 2"}, r"batch_tokens: found lanes: 2, expected 1"),
        ({"data": ", last_batch: drop"}, r"batch_tokens: found last_batch: drop, expected wrap"),
        ({"data": ", captions_per_image: 2"}, r"batch_tokens: found captions_per_image: 2, expected 1"),
        ({"data": ", micro_batch_tokens: 5000"}, r"micro_batch_tokens: found 5000, expected at most batch_tokens 4096"),
    ],
)
def test_what_does_not_go_with_tokens_is_named(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        loaded(tmp_path, **change)


def test_keys_of_token_batches_need_token_batches():
    base = {"train": {"shards": "set"}}
    with pytest.raises(ValueError, match=r"micro_batch_tokens: found 5, which needs batch_tokens"):
        DataConfig.model_validate({**base, "micro_batch_tokens": 5})
    with pytest.raises(ValueError, match=r"lengths_dir: found x, which needs batch_tokens"):
        DataConfig.model_validate({**base, "lengths_dir": "x"})
    with pytest.raises(ValueError, match=r"batch_tokens: found a mixture"):
        DataConfig.model_validate({"train": {"sets": {"a": {"shards": "x"}}}, "batch_tokens": 100})


def test_one_of_the_two_is_needed(tmp_path):
    with pytest.raises(UserError, match=r"engine\.batch_size: missing; expected a number of samples, or data\.batch"):
        loaded(tmp_path, "null", engine="engine: {batch_size: null}")
