"""Zero-shot classification: prompts, names of classes, accuracy by a dense reference, and the command."""

import json

import numpy as np
import pytest
import torch
from export_samples import small_export
from PIL import Image

from mmd2v.cli.main import main
from mmd2v.errors import UserError
from mmd2v.evaluation.zero_shot import (
    DEFAULT_TEMPLATES,
    class_embeddings,
    class_names,
    read_templates,
    zero_shot_metrics,
    zero_shot_of,
)

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


def encode_images(images):
    return torch.stack([image.float().mean((1, 2)) / 255 for image in images])


def encode_texts(texts):
    """The colour a text names; a text of none is grey."""
    grey = torch.full((3,), 0.3)
    return torch.stack(
        [sum((torch.tensor(c) / 255.0 for n, c in COLOURS.items() if n in text), grey) for text in texts]
    )


@pytest.fixture
def data(tmp_path):
    for label, colour in zip("xyz", COLOURS.values(), strict=True):
        (tmp_path / "data" / label).mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (8, 6), colour).save(tmp_path / "data" / label / f"{number}.png")
    return tmp_path / "data"


def test_accuracy_equals_a_dense_reference():
    draw = np.random.default_rng(0)
    images, classes = draw.standard_normal((40, 6)), draw.standard_normal((9, 6))
    labels = draw.integers(0, 9, 40)
    order = np.argsort(-(images @ classes.T) / np.linalg.norm(classes, axis=1), axis=1)
    found = zero_shot_metrics(torch.tensor(images), torch.tensor(classes), torch.tensor(labels))
    for k in (1, 5):
        assert found[f"zero_shot_top{k}"] == pytest.approx(np.mean([l in o[:k] for l, o in zip(labels, order)]))  # noqa: B905, E741
        assert found[f"chance_top{k}"] == pytest.approx(k / 9)
    few = zero_shot_metrics(torch.tensor(images), torch.tensor(classes[:3]), torch.tensor(labels % 3))
    assert few["zero_shot_top5"] == few["chance_top5"] == 1.0
    with pytest.raises(UserError, match="NaN or infinity"):
        zero_shot_metrics(torch.full((2, 6), torch.nan), torch.tensor(classes), torch.tensor([0, 1]))


def test_a_class_is_the_mean_of_its_normalised_prompts():
    table = {"a cat": [3.0, 0.0], "the cat": [0.0, 0.1], "a dog": [-1.0, 0.0], "the dog": [-1.0, 0.0]}
    rows = class_embeddings(lambda texts: torch.tensor([table[t] for t in texts]), ["cat", "dog"], ["a {}", "the {c}"])
    half = 0.5**0.5
    assert torch.allclose(rows, torch.tensor([[half, half], [-1.0, 0.0]]))


def test_names_from_a_file_and_by_default(data, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("red\ngreen\nblue\n")
    found = zero_shot_of(encode_images, encode_texts, data, names)
    assert found.metrics["zero_shot_top1"] == 1.0 and found.metrics["chance_top1"] == pytest.approx(1 / 3)
    assert found.classes == {"x": "red", "y": "green", "z": "blue"} and found.images == 6
    assert found.templates == DEFAULT_TEMPLATES and "top-1: 100.00 % (chance 33.33 %)" in found.text()
    # Names that are wrong by one: nothing is right.
    names.write_text("green\nblue\nred\n")
    assert zero_shot_of(encode_images, encode_texts, data, names).metrics["zero_shot_top1"] == 0.0
    # A file of more classes makes it harder: all of them are candidates.
    more = tmp_path / "names.json"
    more.write_text(json.dumps({"x": "red", "y": "green", "z": "blue", "w": ["n0", "grey"]}))
    found = zero_shot_of(encode_images, encode_texts, data, more)
    assert found.metrics["chance_top1"] == 0.25 and found.classes["w"] == "grey"
    assert class_names(["red_fox", "cat"]) == {"red_fox": "red fox", "cat": "cat"}


def test_numbers_are_places_in_a_list(tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("a\nb\nc\nd\n")
    assert class_names(["3", "1"], names) == {"0": "a", "1": "b", "2": "c", "3": "d"}
    assert class_names(["003", "001"], names) == {"0": "a", "001": "b", "2": "c", "003": "d"}


def test_imagenet_names_come_from_timm():
    labels = ["n01440764", "n02012849", "n03126707"]
    names = class_names(labels)
    assert names["n01440764"] == "tench"
    # Two classes have the one name crane: the bird and the machine are told apart.
    assert names["n02012849"].startswith("crane: ") and names["n03126707"].startswith("crane: ")
    assert names["n02012849"] != names["n03126707"]
    with pytest.raises(UserError, match="'n99999999' is none of ImageNet's"):
        class_names(["n01440764", "n99999999"])


def test_templates_and_their_faults(data, tmp_path):
    file = tmp_path / "templates.txt"
    file.write_text("a photo of a {}.\n\n the {c} {0} in {braces}\n")
    assert read_templates(file) == ("a photo of a {}.", "the {c} {0} in {braces}")
    (tmp_path / "templates.json").write_text(json.dumps(["{} one", "two {}"]))
    assert read_templates(tmp_path / "templates.json") == ("{} one", "two {}")
    assert all(template.count("{}") == 1 for template in DEFAULT_TEMPLATES)
    prompts: list[str] = []
    class_embeddings(lambda texts: prompts.extend(texts) or torch.ones(len(texts), 2), ["cat"], read_templates(file))
    assert prompts == ["a photo of a cat.", "the cat {0} in {braces}"]
    (tmp_path / "none.txt").write_text("a photo\n")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "bad.json").write_text("[")
    (tmp_path / "three.json").write_text('{"x": "red", "y": "green", "zz": "blue"}')
    for read, message in [
        (lambda: read_templates(tmp_path / "none.txt"), "'a photo' has no {} or {c}"),
        (lambda: read_templates(tmp_path / "empty.txt"), "holds no template"),
        (lambda: read_templates(tmp_path / "bad.json"), "is no JSON"),
        (lambda: read_templates(tmp_path / "tempIates.txt"), "--templates: .* not found. Did you mean 'templates.txt'"),
        (lambda: class_names(["a", "b"], file), "holds 3 names, expected 2"),
        (lambda: class_names(["x", "y", "z"], tmp_path / "three.json"), "no name for 1 of 3 classes.*'z'"),
    ]:
        with pytest.raises(UserError, match=message):
            read()


def test_command(data, tmp_path, capsys):
    export = small_export(tmp_path, model__projection={"kind": "linear", "dim": 8})
    (tmp_path / "templates.txt").write_text("two {} squares\n")
    out = tmp_path / "zero.json"
    arguments = ["--data", str(data), "--templates", str(tmp_path / "templates.txt"), "--json", str(out)]
    assert main(["eval", "zero-shot", str(export), *arguments, "--device", "cpu"]) == 0
    found = json.loads(out.read_text())
    assert found["classes"] == 3 and found["templates"] == ["two {} squares"] and found["zero_shot_top5"] == 1.0
    assert "zero-shot top-1" in capsys.readouterr().out
    assert main(["table", str(out)]) == 0
    assert "| **small** | zero-shot |" in capsys.readouterr().out
