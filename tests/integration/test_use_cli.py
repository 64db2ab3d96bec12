"""From a trained run to its use: export, eval, embed and search through the command line."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from export_samples import photo_folder, small_export
from mmd2v_process import run_mmd2v
from PIL import Image
from safetensors.torch import load_file

import mmd2v
from mmd2v.cli.main import main

CONFIG = """
name: tiny
run_dir: {folder}/run
steps: 2
data:
  train: {{shards: {folder}/scenes}}
  eval: {{shards: {folder}/scenes}}
  image: {{size: 32}}
  tokenizer: {{path: {folder}/words.json, max_length: 24}}
  workers: 0
model:
  width: 16
  heads: 2
  encoders:
    image: {{kind: patch, patch_size: 8}}
    text: {{kind: tokens}}
  layers: [{{kind: separate}}, {{kind: shared}}]
objectives: [{{kind: contrastive}}]
engine: {{device: cpu, batch_size: 4, precision: fp32}}
evaluation: {{batch_size: 8}}
logging: {{tensorboard: false}}
"""


def run(*arguments: object) -> subprocess.CompletedProcess:
    return run_mmd2v(arguments, env=os.environ)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of two steps on generated scenes, and its export."""
    folder = tmp_path_factory.mktemp("use")
    scenes = str(folder / "scenes")
    assert main(["data", "synth", "--out", scenes, "--split", "test", "--count", "20", "--size", "32"]) == 0
    assert main(["data", "tokenizer", scenes, "--out", str(folder / "words.json"), "--vocab-size", "300"]) == 0
    (folder / "tiny.yaml").write_text(CONFIG.format(folder=folder))
    trained = run("train", folder / "tiny.yaml")
    assert trained.returncode == 0, trained.stderr
    assert main(["export", str(folder / "run"), "--out", str(folder / "export")]) == 0
    photo_folder(folder / "photos")
    (folder / "photos" / "broken.jpg").write_bytes(b"no image")
    return folder


def test_export_has_the_recall_of_the_run_and_eval_finds_it_again(folder, capsys):
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    trained = {key.rpartition("/")[2]: value for row in rows for key, value in row.items() if "R@" in key}
    card = (folder / "export" / "README.md").read_text()
    assert "2 steps of 4 images" in card and "20 images, 100 captions" in card
    assert f"{100 * trained['i2t_R@10']:.2f}" in card
    assert str(folder) not in card + (folder / "export" / "config.yaml").read_text()

    out = folder / "results" / "recall.json"
    arguments = ["--shards", str(folder / "scenes"), "--json", str(out), "--device", "cpu"]
    expected = ["--expect-images", "20", "--expect-captions", "100"]
    assert main(["eval", "retrieval", str(folder / "export"), *arguments, *expected]) == 0
    printed, found = capsys.readouterr().out, json.loads(out.read_text())
    assert {key: found[key] for key in trained} == pytest.approx(trained)
    assert (found["images"], found["captions"], found["chance_t2i_R@1"]) == (20, 100, 0.05)
    lines = printed.splitlines()
    assert lines[0].endswith("20 images, 100 captions")
    assert lines[1] == found["preprocessing"] and "centre crop" in lines[1]
    assert any(line.startswith("chance") and "5.00" in line for line in lines)
    assert not torch.distributed.is_initialized()


def test_eval_of_the_first_images(folder, capsys):
    arguments = ["--shards", str(folder / "scenes"), "--limit", "7", "--batch-size", "3", "--device", "cpu"]
    assert main(["eval", "retrieval", str(folder / "export"), *arguments]) == 0
    assert "7 images, 35 captions" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shards", "{folder}/scene"], "not found"),
        (["--shards", "{folder}/scenes", "--limit", "0"], "--limit: found 0"),
        (["--shards", "{folder}/scenes", "--expect-images", "5000"], "found 20 images, expected 5000"),
        (["--shards", "{folder}/scenes", "--expect-captions", "25010"], "found 100 captions, expected 25010"),
    ],
)
def test_eval_refuses_bad_input(folder, capsys, arguments, message):
    texts = [argument.format(folder=folder) for argument in arguments]
    assert main(["eval", "retrieval", str(folder / "export"), "--device", "cpu", *texts]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not torch.distributed.is_initialized()


def test_eval_of_a_run_points_to_export(folder, capsys):
    assert main(["eval", "retrieval", str(folder / "run"), "--shards", str(folder / "scenes"), "--device", "cpu"]) == 2
    assert "first `mmd2v export" in capsys.readouterr().err


def test_export_of_another_architecture_leaves_nothing(folder, tmp_path, capsys):
    import shutil

    copy = tmp_path / "run"
    shutil.copytree(folder / "run", copy)
    config = copy / "config.yaml"
    config.write_text(config.read_text().replace("width: 16", "width: 32"))
    assert main(["export", str(copy), "--out", str(tmp_path / "out")]) == 2
    assert "another architecture than its config" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_search_by_text_prints_and_draws(folder):
    """A process of its own, as a person would start it."""
    picture, cache = folder / "found.png", folder / "cache"
    arguments = ["search", folder / "export", "--images", folder / "photos", "--cache", cache]
    found = run(*arguments, "--text", "a red circle", "--top", 3, "--picture", picture)
    assert found.returncode == 0, found.stderr
    lines = [line.split(maxsplit=2) for line in found.stdout.splitlines()]
    assert [line[0] for line in lines] == ["1", "2", "3"]
    assert sorted((float(line[1]) for line in lines), reverse=True) == [float(line[1]) for line in lines]
    assert all(Path(line[2]).is_file() for line in lines)
    assert "skipped" in found.stderr and "broken.jpg: the image does not decode" in found.stderr
    assert found.stderr.rstrip().endswith("1 of 7 images skipped: unreadable")
    with Image.open(picture) as page:
        assert page.width > page.height
    assert len(list(cache.iterdir())) == 1


def test_search_by_image_finds_itself_and_more_than_there_are_is_all(folder, capsys):
    arguments = ["search", str(folder / "export"), "--images", str(folder / "photos"), "--cache", str(folder / "cache")]
    query = str(folder / "photos" / "photo4.png")
    assert main([*arguments, "--image", query, "--top", "50"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and lines[0].split() == ["1", "1.000", query]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either --text SENTENCE or --image FILE"),
        (["--text", "a", "--image", "b"], "either --text SENTENCE or --image FILE"),
        (["--text", "a", "--top", "0"], "--top: found 0"),
        (["--text", " "], "item 0 is ' '"),
        (["--image", "none.jpg"], "none.jpg: No such file"),
    ],
)
def test_search_refuses_bad_input(folder, capsys, arguments, message):
    photos = str(folder / "photos")
    assert main(["search", str(folder / "export"), "--images", photos, "--cache", photos, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_embed_writes_rows_and_their_names(folder, tmp_path, capsys):
    (folder / "photos" / "broken.jpg").rename(folder / "broken.jpg")
    try:
        photos = str(folder / "photos")
        out = tmp_path / "images.safetensors"
        assert main(["embed", str(folder / "export"), "--images", photos, "--out", str(out), "--batch-size", "4"]) == 0
    finally:
        (folder / "broken.jpg").rename(folder / "photos" / "broken.jpg")
    assert "6 embeddings of width 16" in capsys.readouterr().out
    names = json.loads((tmp_path / "images.ids.json").read_text())["ids"]
    encoder = mmd2v.load(folder / "export")
    expected = encoder.encode_image([folder / "photos" / name for name in names])
    assert torch.allclose(load_file(out)["embeddings"], expected, atol=1e-6)

    (tmp_path / "texts.txt").write_text("a red circle\ntwo blue squares\n")
    out = tmp_path / "texts.safetensors"
    assert main(["embed", str(folder / "export"), "--texts", str(tmp_path / "texts.txt"), "--out", str(out)]) == 0
    assert json.loads((tmp_path / "texts.ids.json").read_text())["ids"] == ["a red circle", "two blue squares"]
    expected = encoder.encode_text(["a red circle", "two blue squares"])
    assert torch.allclose(load_file(out)["embeddings"], expected, atol=1e-6)


def test_embed_replaces_no_file_and_writes_both_or_neither(folder, tmp_path, capsys, monkeypatch):
    source, out = tmp_path / "s.json", tmp_path / "s.safetensors"
    source.write_text("a red circle\n")
    arguments = ["embed", str(folder / "export"), "--texts", str(source), "--out", str(out)]

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("mmd2v.embed.write_json", full)
        assert main(arguments) == 2
    assert "s.safetensors cannot be written: [Errno 28] No space left" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["s.json"]

    assert main(arguments) == 0
    assert source.read_text() == "a red circle\n"
    written = out.read_bytes()
    assert main(arguments) == 2
    assert "s.safetensors exists; name a new file or remove it" in capsys.readouterr().err
    assert out.read_bytes() == written
    out.unlink()
    assert main(arguments) == 2
    assert "s.ids.json exists; name a new file or remove it" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["eval", "retrieval", "none", "--shards", "none", "--device", "cpu", "--json", "{out}"],
            "--json: {out} cannot",
        ),
        (
            ["search", "none", "--images", "none", "--text", "a", "--picture", "{out}.png"],
            "--picture: {out}.png cannot",
        ),
        (
            ["search", "none", "--images", "none", "--text", "a", "--picture", "a.doc"],
            "--picture: a.doc ends in '.doc'",
        ),
        (["data", "tokenizer", "none", "--out", "{out}"], "--out: {out} cannot"),
    ],
)
def test_outputs_are_checked_before_anything_is_read(tmp_path, capsys, arguments, message):
    (tmp_path / "file").touch()
    out = str(tmp_path / "file" / "out")
    assert main([argument.format(out=out) for argument in arguments]) == 2
    assert message.format(out=out) in capsys.readouterr().err


def test_embed_refuses_bad_input_and_leaves_nothing(folder, tmp_path, capsys):
    (tmp_path / "texts.txt").write_text("a red circle\n\ntwo\n")
    (tmp_path / "none.txt").touch()
    texts = str(tmp_path / "good.txt")
    (tmp_path / "good.txt").write_text("a red circle\n")
    out = tmp_path / "out" / "rows.safetensors"
    cases = [
        (["--out", str(out)], "either --images FOLDER or --texts FILE"),
        (["--out", "rows.npy", "--texts", "a"], "ends in .safetensors"),
        (["--out", str(tmp_path / "none.txt" / "a.safetensors"), "--texts", texts], "none.txt is no folder"),
        (["--out", str(out), "--texts", str(tmp_path / "texts.txt")], "line 2 is empty"),
        (["--out", str(out), "--texts", str(tmp_path / "none.txt")], "is empty, expected a text a line"),
        (["--out", str(out), "--texts", str(tmp_path / "absent.txt")], "does not read"),
        (["--out", str(out), "--images", str(folder / "photos")], "broken.jpg: the image does not decode"),
    ]
    for arguments, message in cases:
        assert main(["embed", str(folder / "export"), *arguments]) == 2
        assert message in capsys.readouterr().err
    assert not out.parent.exists()


def test_an_untrained_student_exports_too(tmp_path, capsys):
    out = small_export(tmp_path)
    assert main(["search", str(out), "--images", str(tmp_path / "no"), "--text", "red"]) == 2
    assert "is no folder" in capsys.readouterr().err
