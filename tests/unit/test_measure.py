"""Measurements of the benchmarks' tables are those of `mmd2v eval`, also where rows share a modality encoder."""

from pathlib import Path

import pytest
import torch
from export_samples import photo, small_export
from test_run_table import module  # noqa: F401 - a fixture

import mmd2v
from mmd2v.evaluation.features import image_features, text_features
from mmd2v.evaluation.knn import knn_of_folder
from mmd2v.evaluation.text_pairs import pairs_of_file


@pytest.fixture
def classes(tmp_path) -> tuple[Path, Path]:
    """A memory bank and test images of three classes that are drawn alike: what is found depends on the vectors."""
    for part, count in (("bank", 6), ("queries", 4)):
        for i in range(3 * count):
            folder = tmp_path / part / "abc"[i % 3]
            folder.mkdir(parents=True, exist_ok=True)
            photo(i + 100 * count).save(folder / f"{i}.png")
    return tmp_path / "bank", tmp_path / "queries"


def test_knn_is_that_of_eval_and_a_shared_encoder_changes_nothing(module, tmp_path, classes, monkeypatch):  # noqa: F811
    export = small_export(tmp_path)
    encoders = [mmd2v.load(export), mmd2v.load(export)]
    student = mmd2v.load(export).student
    # The same modality encoder under other blocks.
    with torch.no_grad():
        for name, parameter in encoders[1].student.named_parameters():
            if name.startswith("layers."):
                parameter.mul_(-1)
    want = [image_features(encoder, [photo(i) for i in range(6)], "pooled") for encoder in encoders]
    assert not torch.equal(*want)

    measure = module("measure")
    kept, calls = {}, []
    for encoder in encoders:
        inner = encoder.student.encoders["image"]
        monkeypatch.setattr(inner, "forward", lambda *rest, f=inner.forward: calls.append(1) or f(*rest))
        measure.share_encoder(encoder.student, "image", kept)
    for encoder, expected in zip(encoders, want, strict=True):
        assert torch.equal(image_features(encoder, [photo(i) for i in range(6)], "pooled"), expected)
    assert len(calls) == 1

    with torch.no_grad():
        next(student.encoders["image"].parameters()).add_(1)
    measure.share_encoder(student, "image", kept)
    assert len(kept) == 1 and not next(iter(kept.values()))  # other weights: nothing of the former is left

    found = measure.Measurement("knn", classes, 3)(export)
    direct = knn_of_folder(lambda images: image_features(mmd2v.load(export), images, "pooled"), *classes, 3)
    assert found == ({"knn_top1": direct.top1}, 12)


def test_pairs_are_those_of_eval(module, tmp_path):  # noqa: F811
    export = small_export(tmp_path)
    file = tmp_path / "pairs.txt"
    sentences = ["a red circle", "two blue squares", "a green star", "one dog", "a cat"]
    rows = [f"1\t{i}\t{i + 9}\t{text}\t{text} again\n" for i, text in enumerate(sentences)]
    file.write_text("Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n" + "".join(rows), encoding="utf-8")
    measure = module("measure")
    found = measure.Measurement("pairs", (file,), 4)(export)
    direct = pairs_of_file(lambda texts: text_features(mmd2v.load(export), texts, "mean"), file, limit=4)
    recalls = [f"{way}_R@{k}" for way in ("second_to_first", "first_to_second") for k in (1, 5)]
    assert list(found.numbers) == ["mean", *recalls] and found.queries == 4
    assert found.numbers == {key: direct.metrics[key] for key in found.numbers}
    said = measure.Measurement("pairs", (file,), 4).words()
    assert said == "eval pairs EXPORT --pairs pairs.txt --limit 4 --pooling mean"
