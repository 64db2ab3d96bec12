"""The linear probe reaches the optimum of a convex loss, and says what separable and inseparable data are worth."""

import json
import tarfile

import pytest
import torch
import torch.nn.functional as F
from export_samples import photo, small_export

from mmd2v.cli.main import main
from mmd2v.errors import UserError
from mmd2v.evaluation.linear_probe import GRID, accuracy, fit_logistic, held_out_rows, probe, probe_of_folder


def blobs(count, classes, width, spread, seed=0):
    draw = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    labels = torch.arange(count) % classes
    return centres[labels] + spread * torch.randn(count, width, generator=draw, dtype=torch.float64), labels


def loss(weight, bias, features, labels, l2):
    return F.cross_entropy(features @ weight.t() + bias, labels) + l2 / 2 * weight.square().sum()


@pytest.mark.parametrize("l2", [1.0, 1e-2, 1e-4])
def test_the_fit_is_the_optimum(l2, monkeypatch):
    features, labels = blobs(300, 4, 6, spread=1.5)
    fit = fit_logistic(features, labels, l2)
    # By autograd, which knows nothing of the gradient the fit computes; strongly convex in the weight, so that the
    # distance from the only optimum is at most the gradient over l2.
    weight, bias = fit.weight_CD.clone().requires_grad_(), fit.bias_C.clone().requires_grad_()
    loss(weight, bias, features, labels, l2).backward()
    assert torch.cat([weight.grad.flatten(), bias.grad]).norm() < 1e-6 and fit.gradient < 1e-6
    draw = torch.Generator().manual_seed(3)
    here = loss(fit.weight_CD, fit.bias_C, features, labels, l2)
    for size in (1e-3, 1e-1):
        moved = fit.weight_CD + size * torch.randn(fit.weight_CD.shape, generator=draw, dtype=torch.float64)
        assert loss(moved, fit.bias_C, features, labels, l2) > here
    # The rows held at once change nothing.
    monkeypatch.setattr("mmd2v.evaluation.linear_probe._ROWS", 7)
    chunked = fit_logistic(features, labels, l2)
    assert torch.allclose(chunked.weight_CD, fit.weight_CD, atol=1e-5 / l2**0.5)
    assert accuracy(chunked, features, labels) == accuracy(fit, features, labels)


def test_an_optimum_by_hand():
    """Two points at ±1: the weights are ±w with 2 w l2 = σ(−2 w), and the bias vanishes."""
    fit = fit_logistic(torch.tensor([[-1.0], [1.0]], dtype=torch.float64), torch.tensor([0, 1]), 0.1)
    w = fit.weight_CD[1, 0]
    assert fit.weight_CD[0, 0] == pytest.approx(-w.item(), abs=1e-6)
    assert 0.1 * w.item() == pytest.approx(torch.sigmoid(-2 * w).item(), abs=1e-6)
    assert fit.bias_C.abs().max() < 1e-6


def test_separable_and_inseparable_data():
    train, labels = blobs(400, 5, 16, spread=0.3)
    test, test_labels = blobs(200, 5, 16, spread=0.3, seed=1)
    top1, _, held_out, gradient = probe(train, labels, test, test_labels)
    assert top1 == held_out == 1.0 and gradient < 1e-6
    draw = torch.Generator().manual_seed(4)
    noise, noise_test = (torch.randn(rows, 16, generator=draw, dtype=torch.float64) for rows in (400, 1000))
    top1, l2, _, _ = probe(noise, labels, noise_test, torch.arange(1000) % 5)
    assert top1 == pytest.approx(0.2, abs=0.05)
    assert l2 > 1e-3  # noise is best held down
    # The same numbers again, whatever the scale and the place of the features.
    again = probe(train, labels, test, test_labels)
    assert again == probe(train, labels, test, test_labels)
    assert probe(50 * train + 3, labels, 50 * test + 3, test_labels)[0] == 1.0


def test_the_strength_is_chosen_on_held_out_rows():
    """Few rows of many columns: with hardly any regularisation they are learnt by heart."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 2
    features = torch.randn(60, 200, generator=draw, dtype=torch.float64)
    features[:, 0] += 2.0 * labels
    held = held_out_rows(labels)
    assert held.sum() == 12 and labels[held].sum() == 6
    assert torch.equal(held, held_out_rows(labels))
    _, l2, best, _ = probe(features, labels, features, labels)
    mean = features.mean(0)
    scaled = (features - mean) / (features - mean).square().mean().sqrt()
    rivals = {
        other: accuracy(fit_logistic(scaled[~held], labels[~held], other), scaled[held], labels[held])
        for other in (l2, *GRID)
    }
    assert best == pytest.approx(rivals[l2]) and best == max(rivals.values())
    with pytest.raises(UserError, match="a class of one image"):
        held_out_rows(torch.tensor([0, 0, 1]))
    with pytest.raises(UserError, match="training features hold NaN"):
        probe(features * torch.nan, labels, features, labels)


@pytest.fixture(scope="module")
def slice_of_cifar(shared, tmp_path_factory):
    """Real images: 20 of each of three classes to learn from, 10 to test."""
    folder = tmp_path_factory.mktemp("cifar")
    taken: dict[tuple[str, str], int] = {}
    with tarfile.open(shared / "cifar10/cifar10_500x100.tar.gz") as tar:
        for member in tar:
            *_, split, name, file = ["", "", *member.name.split("/")]
            key = (split, name)
            wanted = member.isfile() and name in ("airplane", "automobile", "frog")
            if wanted and taken.get(key, 0) < {"train": 20, "test": 10}[split]:
                taken[key] = taken.get(key, 0) + 1
                (folder / split / name).mkdir(parents=True, exist_ok=True)
                (folder / split / name / file).write_bytes(tar.extractfile(member).read())
    assert len(taken) == 6
    return folder


def coarse_colours(images):
    return torch.stack([F.adaptive_avg_pool2d(image.float() / 255, 3).flatten() for image in images])


def test_real_images(slice_of_cifar):
    """Even nine patches of colour tell a plane from a frog."""
    found = probe_of_folder(coarse_colours, slice_of_cifar / "train", slice_of_cifar / "test", batch_size=32)
    assert (found.train_images, found.test_images, found.classes) == (60, 30, ["airplane", "automobile", "frog"])
    assert found.top1 > 0.5 and found.gradient < 1e-6
    assert "chance 33.33 %" in found.text()
    assert probe_of_folder(coarse_colours, slice_of_cifar / "train", slice_of_cifar / "test") == found


def test_command(tmp_path, capsys):
    export = small_export(tmp_path, model__projection={"kind": "linear", "dim": 8})
    for split, seeds in (("train", (0, 1, 2)), ("test", (3,))):
        for name, offset in (("cat", 0), ("dog", 50)):
            (tmp_path / split / name).mkdir(parents=True)
            for seed in seeds:
                photo(seed + offset).save(tmp_path / split / name / f"{seed}.png")
    data = ["--train", str(tmp_path / "train"), "--test", str(tmp_path / "test"), "--device", "cpu"]
    out = tmp_path / "probe.json"
    assert main(["eval", "linear-probe", str(export), *data, "--json", str(out), "--features", "pooled"]) == 0
    found = json.loads(out.read_text())
    assert 0 <= found["linear_probe_top1"] <= 1 and found["chance_top1"] == 0.5 and found["train_images"] == 6
    assert "linear probe top-1" in capsys.readouterr().out
    assert main(["table", str(out)]) == 0
    assert "| **small** | linear probe |" in capsys.readouterr().out
