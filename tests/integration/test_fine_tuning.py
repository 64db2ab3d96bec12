"""Fine-tuning by config, as a user does it: labelled images or sentences packed, trained on, and measured."""

import json
import os

import numpy as np
import pytest
from mmd2v_process import run_mmd2v
from PIL import Image
from text_runs import write_text_config
from training_runs import write_config

from mmd2v.cli.main import main
from mmd2v.data.labelled_packing import pack_images, pack_sentences
from mmd2v.data.shards import ShardSet
from mmd2v.data.tokenizers import train_tokenizer
from mmd2v.errors import UserError
from mmd2v.train.metrics import read_metrics

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
WORDS = [f"word{n}" for n in range(12)]


def write_pairs(path, count, seed):
    """Pairs that begin with the same word or not: the class needs both sentences."""
    draw = np.random.default_rng(seed)
    lines = ["index\tfirst\tsecond\tgold"]
    for number in range(count):
        label = number % 2
        one = draw.choice(["good", "bad"])
        other = one if label else {"good": "bad", "bad": "good"}[one]
        lines.append(
            f"{number}\t{one} {draw.choice(WORDS)}\t{other} {draw.choice(WORDS)}\t{'same' if label else 'other'}"
        )
    path.write_text("\n".join(lines) + "\n")
    return path


def write_colours(folder, count, seed):
    draw = np.random.default_rng(seed)
    for name, base in {"red": (200, 40, 40), "green": (40, 200, 40), "dark_blue": (40, 40, 200)}.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = np.clip(np.array(base) + draw.integers(-40, 40, (36, 32, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


def test_sentence_pairs(tmp_path, capsys):
    for split, count, seed in (("train", 400, 0), ("test", 60, 1)):
        file = write_pairs(tmp_path / f"{split}.tsv", count, seed)
        arguments = ["--out", str(tmp_path / split), "--text", "first", "second", "--label", "gold"]
        assert main(["data", "labelled", str(file), *arguments]) == 0
    assert "60 samples, 2 classes: 0 other, 1 same" in capsys.readouterr().out
    shards = ShardSet(str(tmp_path / "test"))
    assert shards.read(0, 1, images=False).meta["label"] == 1
    texts = [texts[0] for texts in shards.captions()]
    assert all(text.split()[2] == "[SEP]" for text in texts)
    tokenizer = train_tokenizer(texts, "wordlevel", 100)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert tokenizer.encode("good [SEP]").ids[-1] == tokenizer.token_to_id("[SEP]")
    config = write_text_config(
        tmp_path / "pairs.yaml",
        tmp_path,
        steps=150,
        data__batch_tokens=None,
        data__labels="label",
        teachers={},
        model__width=32,
        objectives=[{"kind": "classification", "modality": "text", "classes": 2}],
        engine__batch_size=32,
        optimizer__lr=0.005,
        logging__every=10,
    )
    ended = run_mmd2v(["train", str(config)], env=ENVIRONMENT)
    assert ended.returncode == 0, ended.stderr
    run = tmp_path / "runs" / "pairs"
    records = read_metrics(run / "metrics.jsonl")
    assert any("classification_accuracy" in key for record in records for key in record)
    out = tmp_path / "accuracy.json"
    assert (
        main(["eval", "accuracy", str(run), "--shards", str(tmp_path / "test"), "--json", str(out), "--device", "cpu"])
        == 0
    )
    found = json.loads(out.read_text())
    assert found["samples"] == 60 and np.array(found["confusion"]).sum(1).tolist() == [30, 30]
    assert found["accuracy"] == np.trace(found["confusion"]) / 60
    assert found["accuracy"] > 0.9, records[-1]
    capsys.readouterr()
    assert main(["table", str(out)]) == 0
    assert "| **pairs** | fine-tuned |" in capsys.readouterr().out


def test_images(tmp_path, capsys):
    for split, count, seed in (("train", 12, 0), ("test", 5, 1)):
        pack_images(write_colours(tmp_path / "images" / split, count, seed), tmp_path / split, 20)
    assert ShardSet(str(tmp_path / "test")).read(0, 0).captions == ("dark blue",)
    config = write_config(
        tmp_path / "colours.yaml",
        tmp_path,
        steps=30,
        data__tokenizer=None,
        data__labels="label",
        model__encoders={"image": {"kind": "patch", "patch_size": 8}},
        teachers={},
        objectives=[{"kind": "classification", "classes": 3, "label_smoothing": 0.1}],
        optimizer__layer_decay=0.8,
    )
    ended = run_mmd2v(["train", str(config)], env=ENVIRONMENT)
    assert ended.returncode == 0, ended.stderr
    out = tmp_path / "accuracy.json"
    run = tmp_path / "runs" / "colours"
    assert (
        main(["eval", "accuracy", str(run), "--shards", str(tmp_path / "test"), "--json", str(out), "--device", "cpu"])
        == 0
    )
    found = json.loads(out.read_text())
    assert found["samples"] == 15 and found["accuracy"] > 0.9 and found["macro_f1"] > 0.9
    assert "always the largest class: 33.33 %" in capsys.readouterr().out


def test_what_is_wrong_is_named(tmp_path):
    file = write_pairs(tmp_path / "pairs.tsv", 6, 0)
    (tmp_path / "broken.tsv").write_text("first\tgold\na\tx\nb\n")
    for arguments, message in [
        ((file, tmp_path / "out", ["frist"], "gold"), "--text: .* no column 'frist'.*Did you mean 'first'"),
        ((file, tmp_path / "out", ["first"], "label"), "--label: .* no column 'label'"),
        ((tmp_path / "broken.tsv", tmp_path / "out", ["first"], "gold"), "row 3 lacks a sentence or its label"),
        ((file, tmp_path / "out", ["first"] * 3, "gold"), "found 3 columns, expected one or two"),
    ]:
        with pytest.raises(UserError, match=message):
            pack_sentences(*arguments)
    with pytest.raises(UserError, match="holds 'other', expected one of same, different"):
        pack_sentences(file, tmp_path / "out", ["first"], "gold", classes=["same", "different"])
    found = pack_sentences(file, tmp_path / "out", ["first"], "gold", classes=["same", "other"])
    assert found.classes[0] == "same" and found.report.unit == "sentences"
