"""k-NN classification against a dense reference, and labelled images in folders, tars and zips."""

import io
import json
import os
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from export_samples import photo, small_export
from hypothesis import given, settings
from hypothesis import strategies as st

import mmd2v
from mmd2v.cli.main import main
from mmd2v.data.class_folders import ClassFolders
from mmd2v.errors import UserError
from mmd2v.evaluation.features import image_features
from mmd2v.evaluation.knn import encode_class_folders, knn_accuracy, knn_classify, knn_of_folder


def reference(train: np.ndarray, labels: np.ndarray, queries: np.ndarray, k: int) -> list[int]:
    """Sort everything: by score, then index; by votes, then summed score, then class."""
    found = []
    for query in queries:
        scores = train @ query
        nearest = sorted(range(len(train)), key=lambda i: (-scores[i], i))[:k]
        votes: dict[int, list[float]] = {}
        for i in nearest:
            votes.setdefault(int(labels[i]), []).append(scores[i])
        found.append(min(votes, key=lambda c: (-len(votes[c]), -sum(votes[c]), c)))
    return found


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 9), st.integers(1, 4), st.data())
def test_votes_equal_a_dense_reference(seed, m, n, classes, data):
    k = data.draw(st.integers(1, m))
    draw = np.random.default_rng(seed)
    # Rows (±1, ±1, ±1, ±1) / 2 are unit, and their products are exact: many equal scores, votes and sums.
    train, queries = (draw.choice([-0.5, 0.5], (rows, 4)) for rows in (m, n))
    labels = draw.integers(0, classes, m)
    found = knn_classify(torch.tensor(train), torch.tensor(labels), torch.tensor(queries), k)
    assert found.tolist() == reference(train, labels, queries, k)


def test_ties_by_hand():
    bank = torch.tensor([[1.0, 0], [0, 1], [0.8, 0.6], [0.6, 0.8]])
    labels = torch.tensor([2, 1, 1, 2])
    # One vote each: 1.0 for class 2, 0.8 for class 1.
    assert knn_classify(bank, labels, torch.tensor([[1.0, 0]]), 2).tolist() == [2]
    # Two votes each, and equal sums: the first class.
    assert knn_classify(bank, labels, torch.tensor([[1.0, 1]]), 4).tolist() == [1]
    # The lengths of rows do not matter.
    assert knn_classify(7 * bank, labels, torch.tensor([[9.0, 0]]), 1).tolist() == [2]
    assert knn_accuracy(bank, labels, bank, torch.tensor([2, 1, 1, 1]), 1) == 0.75


def test_a_query_is_voted_on_alike_in_every_chunk(monkeypatch):
    draw = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(50, 8, generator=draw), torch.randn(30, 8, generator=draw)
    labels = torch.randint(0, 7, (50,), generator=draw)
    whole = knn_classify(bank, labels, queries, 5)
    monkeypatch.setattr("mmd2v.evaluation.knn._VOTES", 21)
    assert torch.equal(knn_classify(bank, labels, queries, 5), whole)


@pytest.mark.parametrize(
    ("train", "labels", "queries", "k", "message"),
    [
        (torch.eye(2), [0, 1], torch.eye(2), 3, r"--k: found 3, expected 1\.\.2"),
        (torch.eye(2), [0], torch.eye(2), 1, r"labels \[1\] for 2 images"),
        (torch.eye(2), [0, -1], torch.eye(2), 1, "expected one from 0 each"),
        (torch.eye(2), [0, 1], torch.eye(3), 1, "3 wide, but the bank is 2 wide"),
        (torch.eye(2), [0, 1], torch.tensor([[float("inf"), 0]]), 1, "NaN or infinity"),
    ],
)
def test_bad_embeddings_are_refused(train, labels, queries, k, message):
    with pytest.raises(UserError, match=message):
        knn_classify(train, torch.tensor(labels), queries, k)


# ------------------------------------------------------------------------------------- labelled images


def files(prefix: str = "", count: int = 3) -> dict[str, bytes]:
    """Images of two classes by path, one of them a folder deeper; and what is to be passed over."""
    found = {}
    for number in range(count):
        for place, name in enumerate(("cat", "dog/deep")):
            buffer = io.BytesIO()
            photo(10 * number + place).save(buffer, "PNG")
            found[f"{prefix}{name}/{number}.png"] = buffer.getvalue()
    found |= {f"{prefix}cat/._0.png": b"", f"{prefix}.hidden/a.jpg": b"", f"{prefix}cat/notes.txt": b"x"}
    return found | {"__MACOSX/cat/0.png": b"", "SOURCE.md": b""}


def write(content: dict[str, bytes], path: Path) -> Path:
    """A folder, tar, tar.gz or zip, by the name; archives in an order of their own."""
    if path.name.endswith((".tar", ".tar.gz")):
        with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as tar:
            for name, data in reversed(content.items()):
                info = tarfile.TarInfo(f"./{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    elif path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in content.items():
                archive.writestr(name, data)
    else:
        for name, data in content.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)
    return path


def means(images) -> torch.Tensor:
    return torch.stack([image.float().mean((1, 2)) - 128 for image in images])


@pytest.mark.parametrize("prefix", ["", "wrapped/in/"])
@pytest.mark.parametrize("name", ["images", "images.tar", "images.tar.gz", "images.zip"])
def test_every_form_gives_the_same_rows(tmp_path, prefix, name):
    folders = ClassFolders(write(files(prefix), tmp_path / name))
    assert folders.classes == ["cat", "dog"] and len(folders) == 6
    rows, labels = encode_class_folders(means, folders, folders.classes, batch_size=4)
    plain = ClassFolders(write(files(), tmp_path / "plain"))
    expected, expected_labels = encode_class_folders(means, plain, plain.classes)
    assert torch.equal(rows, expected) and torch.equal(labels, expected_labels)
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_a_set_inside_an_archive(tmp_path):
    both = {**files("set/train/"), **files("set/test/", 1)}
    archive = write(both, tmp_path / "set.tar.gz")
    result = knn_of_folder(means, archive / "set" / "train", archive / "set/test", k=1, batch_size=2)
    assert result.top1 == 1.0 and (result.train_images, result.test_images) == (6, 2)
    assert result.record()["chance_top1"] == 0.5 and "100.00 %" in result.text()
    message = f"holds the splits test, train and no classes; name one of them: {archive}/set/test"
    with pytest.raises(UserError, match=message):
        ClassFolders(archive)
    with pytest.raises(UserError, match="Did you mean 'set/train'"):
        ClassFolders(archive / "set/trein")


def test_one_class_may_be_tested_alone(tmp_path):
    train = write(files(), tmp_path / "train")
    one = write({"only/cat/a.png": files()["cat/0.png"]}, tmp_path / "one")
    assert ClassFolders(one).classes == ["cat"]
    assert knn_of_folder(means, train, one, k=1).top1 == 1.0


def test_what_is_wrong_is_named(tmp_path):
    good = write(files(), tmp_path / "good")
    other = write({"cot/a.png": files()["cat/0.png"], "dog/b.png": files()["cat/0.png"]}, tmp_path / "other")
    bad = write({**files(), "cat/bad.png": b"no image"}, tmp_path / "bad.tar")
    flat = write({"a.png": b"", "cat/b.png": b""}, tmp_path / "flat")
    (tmp_path / "text.zip").write_bytes(b"no archive at all")
    (tmp_path / "empty").mkdir()
    for train, test, message in [
        (good, other, "class 'cot' of .* is not among the 2 of --train .*Did you mean 'cat'"),
        (good, bad, "bad.tar/cat/bad.png: the image does not decode"),
        (tmp_path / "goud", good, "--train: .*has no 'goud'.*Did you mean 'good'"),
        (flat, good, "has 1 images in no class folder"),
        (tmp_path / "text.zip", good, "--train: .*text.zip: no readable tar"),
        (tmp_path / "empty", good, "--train: .* holds no image"),
        (write({"a/b/x.png": b""}, tmp_path / "single"), good, "has the class b alone"),
    ]:
        with pytest.raises(UserError, match=message):
            knn_of_folder(means, train, test, k=1)
    with pytest.raises(UserError, match=r"--k: found 7, expected 1\.\.6"):
        knn_of_folder(means, good, good, k=7)


# ----------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    return small_export(tmp_path_factory.mktemp("knn"), model__projection={"kind": "linear", "dim": 8})


def test_pooled_features_are_those_before_the_projection(export):
    encoder = mmd2v.load(export)
    images = [photo(i) for i in range(5)]
    pooled = image_features(encoder, images, "pooled", batch_size=2)
    assert pooled.shape == (5, 16) and torch.allclose(pooled.norm(dim=1), torch.ones(5), atol=1e-6)
    embedding = image_features(encoder, images)
    projected = encoder.student.projection(pooled, "image")
    assert torch.allclose(torch.nn.functional.normalize(projected, dim=-1), embedding, atol=1e-5)
    with pytest.raises(UserError, match="Did you mean 'pooled'"):
        image_features(encoder, images, "poled")


@pytest.mark.parametrize("features", ["embedding", "pooled"])
def test_command(export, tmp_path, capsys, features):
    data = write(files(), tmp_path / "data")
    out = tmp_path / "out" / "knn.json"
    arguments = ["--train", str(data), "--test", str(data), "--k", "1", "--device", "cpu", "--json", str(out)]
    assert main(["eval", "knn", str(export), *arguments, "--features", features]) == 0
    found = json.loads(out.read_text())
    assert found["knn_top1"] == 1.0 and found["features"] == features and found["train_images"] == 6
    printed = capsys.readouterr().out
    assert "1-NN top-1: 100.00 % (chance 50.00 %)" in printed and found["preprocessing"] in printed


def test_command_refuses_bad_input(export, tmp_path, capsys):
    arguments = ["--train", str(tmp_path / "nothing"), "--test", str(tmp_path), "--device", "cpu"]
    assert main(["eval", "knn", str(export), *arguments]) == 2
    assert "error: --train: " in capsys.readouterr().err
    assert main(["eval", "knn", str(export), *arguments, "--json", str(tmp_path)]) == 2
    assert "--json: " in capsys.readouterr().err and os.listdir(tmp_path) == []


# ------------------------------------------------------------------------------------------- real data


@pytest.mark.slow
def test_cifar10_by_mobilenet(shared):
    """63.5 % was measured with another resize of the images."""
    import timm
    from safetensors.torch import load_file

    from mmd2v.data.transforms import resize

    model = timm.create_model("mobilenetv2_100", pretrained=False, num_classes=1000, pad_type="same").eval()
    model.load_state_dict(load_file(shared / "teachers/mobilenetv2_100/model.safetensors"))
    model = model.to(memory_format=torch.channels_last)

    def encode(images) -> torch.Tensor:
        pixels = torch.stack([resize(image, 96, 96, "bicubic") for image in images])
        scaled = ((pixels.float() - 128) / 128).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            return model.forward_head(model.forward_features(scaled), pre_logits=True)

    archive = shared / "cifar10/cifar10_500x100.tar.gz"
    found = knn_of_folder(encode, archive / "cifar10_jpg/train", archive / "cifar10_jpg/test", k=10, batch_size=64)
    assert (found.train_images, found.test_images, len(found.classes)) == (5000, 1000, 10)
    assert found.top1 == pytest.approx(0.635, abs=0.005)
