"""The `mmd2v data` commands as a person types them."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from small import small_config

from mmd2v.cli.data import main
from mmd2v.cli.data.common import title
from mmd2v.config.load import dump_config
from mmd2v.config.schema import DataConfig
from mmd2v.data.stream import train_loader
from mmd2v.data.tokenizers import load_tokenizer
from mmd2v.errors import UserError


def test_from_nothing_to_a_batch(tmp_path, capsys):
    assert main(["synth", "--out", str(tmp_path / "w"), "--split", "train", "--count", "30", "--size", "32"]) == 0
    assert "30 images, 150 captions, 1 shards" in capsys.readouterr().out
    assert main(["check", str(tmp_path / "w")]) == 0
    assert "30 readable images, 150 captions (5 to 5 an image)" in capsys.readouterr().out
    words = ["tokenizer", str(tmp_path / "w"), "--out", str(tmp_path / "t.json"), "--kind", "wordlevel"]
    assert main([*words, "--vocab-size", "500"]) == 0
    assert "entries" in capsys.readouterr().out
    with pytest.raises(UserError, match="exists"):
        main(words)
    config = DataConfig.model_validate(
        {
            "train": {"shards": str(tmp_path / "w")},
            "tokenizer": {"path": str(tmp_path / "t.json")},
            "image": {"size": 32},
            "labels": "attributes",
            "workers": 1,
        }
    )
    tokenizer = load_tokenizer(config.tokenizer)
    loader = train_loader(
        config, seed=0, tokenizer=tokenizer, rank=0, world_size=1, micro_batch_size=8, label_classes=450
    )
    batch = next(iter(loader))
    assert batch.images.shape == (8, 3, 32, 32) and batch.labels.shape == (8, 450)
    assert set(batch.labels.unique().tolist()) == {0.0, 1.0}
    unknown = tokenizer.encode_batch(["xyzzy"])[0][1]
    assert not torch.isin(batch.text_ids, unknown).any()


def test_pack_and_a_damaged_shard(tmp_path, capsys, shared):
    source = shared / "flickr8k"
    entries = json.loads((source / "flickr8k_val.json").read_text())[:20]
    (tmp_path / "c.json").write_text(json.dumps(entries))
    tar = str(source / "flickr8k_val_images_160px.tar")
    command = ["pack", str(tmp_path / "c.json"), "--images", tar, "--out", str(tmp_path / "out"), "--shard-size", "8"]
    assert main([*command, "--resize", "64"]) == 0
    assert "20 images, 100 captions, 3 shards" in capsys.readouterr().out
    shard = tmp_path / "out/shard-000001.tar"
    data = bytearray(shard.read_bytes())
    data[600:1500] = bytes(900)
    shard.write_bytes(data)
    assert main(["check", str(tmp_path / "out"), "--show", "2"]) == 1
    out = capsys.readouterr().out
    assert "shard-000001.tar: found SHA-256 " in out and "2 right checksums, 2 problems" in out
    assert "shard-000001.tar: sample " in out


def test_errors_have_no_traceback(tmp_path):
    command = [sys.executable, "-m", "mmd2v", "data", "check", str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1


def test_text_from_books_to_a_sheet(tmp_path, capsys):
    (tmp_path / "books").mkdir()
    (tmp_path / "books/a.txt").write_text("Some words of a book. " * 40)
    out, numbers = str(tmp_path / "out"), tmp_path / "s.json"
    assert main(["pack", str(tmp_path / "books"), "--out", out, "--passage-words", "50", "--limit", "3"]) == 0
    assert "3 passages, 1 shards" in capsys.readouterr().out
    assert main(["check", out]) == 0
    assert "3 texts without image" in capsys.readouterr().out
    picture = tmp_path / "s.svg"
    assert main(["stats", out, "--json", str(numbers), "--picture", str(picture)]) == 0
    assert json.loads(numbers.read_text())["caption_words"]["max"] == 50 and picture.exists()
    assert "words a caption" in capsys.readouterr().out
    assert main(["show", out, "--out", str(tmp_path / "sheet.png"), "--count", "2", "--seed", "5"]) == 0
    assert "2 of 3 samples" in capsys.readouterr().out and (tmp_path / "sheet.png").exists()


def test_statistics_of_real_captions(tmp_path, capsys, shared):
    source = shared / "flickr8k"
    images = str(source / "flickr8k_val_images_160px.tar")
    command = ["pack", str(source / "flickr8k_val.json"), "--images", images, "--out", str(tmp_path / "val")]
    assert main([*command, "--limit", "200", "--max-captions", "2"]) == 0
    assert "200 images, 400 captions" in capsys.readouterr().out
    tokenizer = str(shared / "teachers/minilm_l6_v2")
    assert main(["stats", str(tmp_path / "val"), "--tokenizer", tokenizer, "--max-length", "16"]) == 0
    out = capsys.readouterr().out
    assert "tokens a caption" in out and "% of the captions are longer than 16 tokens" in out


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["stats", "X", "--picture", "p.bmp"], "--picture: p.bmp ends in '.bmp'"),
        (["stats", "X", "--max-length", "0"], "--max-length: found 0"),
        (["stats", "X", "--tokenizer", "none.json"], "none.json not found"),
        (["show", "X", "--out", "p.txt"], "--out: p.txt ends in '.txt'"),
        (["show", "X", "--out", "p.png", "--count", "0"], "--count: found 0"),
    ],
)
def test_bad_flags(tmp_path, command, message):
    main(["synth", "--out", str(tmp_path / "w"), "--count", "2", "--size", "16"])
    with pytest.raises(UserError) as caught:
        main([str(tmp_path / "w") if part == "X" else part for part in command])
    assert message in str(caught.value)


def test_how_addresses_are_fetched_comes_from_a_config(tmp_path, capsys):
    main(["synth", "--out", str(tmp_path / "w"), "--count", "6", "--size", "16"])
    config = small_config(data__source={"cache_dir": str(tmp_path / "cache"), "retries": 0})
    (tmp_path / "c.yaml").write_text(dump_config(config))
    fetched = ["file://" + str(tmp_path / "w/shard-000000.tar"), "--config", str(tmp_path / "c.yaml")]
    for command in (
        ["stats", *fetched],
        ["show", *fetched, "--out", str(tmp_path / "s.png")],
        ["tokenizer", *fetched, "--out", str(tmp_path / "t.json")],
        ["lengths", *fetched, "--tokenizer", str(tmp_path / "t.json"), "--out", str(tmp_path / "l"), "--workers", "1"],
        ["bench", *fetched, "--size", "16", "--batch", "2", "--seconds", "0.1", "--workers", "0"],
    ):
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        assert main(command) == 0
        assert any((tmp_path / "cache").rglob("*")), command
    assert "6 images" in capsys.readouterr().out


def test_titles_have_no_secrets():
    assert title(["https://user:word@host/set/a.tar?key=abc", "b"]) == "set/a.tar?… and 1 more"
