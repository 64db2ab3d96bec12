"""Embeddings that go round the ranks give the losses and gradients of those that are gathered on all."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from harness import run_distributed_test
from training_runs import make_data, run_config

from mmd2v.distributed.collectives import all_gather_with_gradient, rank, world_size
from mmd2v.distributed.ring import RankRing
from mmd2v.train.loop import train
from mmd2v.train.metrics import read_metrics
from mmd2v_kernels import ContrastiveWeights, contrastive, ring_contrastive, ring_siglip, siglip

IMAGES, CAPTIONS, WIDTH = 150, 40, 6
"""Of a rank: two chunks of rows, the fewest of which is 128; some images have several captions and most none."""
CASES = [(loss, weighted) for loss in ("contrastive", "smoothed", "siglip") for weighted in (False, True)]


def _inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rank())
    image, text = (
        F.normalize(torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64), dim=1).requires_grad_()
        for rows in (IMAGES, CAPTIONS)
    )
    owner = torch.randint(IMAGES, (CAPTIONS,), generator=generator)
    return image, text, owner, (torch.rand(IMAGES, generator=generator) > 0.2).double()


def _by_ring(loss: str, weighted: bool, scale: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, list]:
    image, text, owner, seen = _inputs()
    weights = (seen, seen[owner]) if weighted else None
    if loss == "siglip":
        return ring_siglip(image, text, owner, scale, bias, CAPTIONS, RankRing(), weights, chunk=1), [image, text]
    smoothing = 0.1 if loss == "smoothed" else 0.0
    return ring_contrastive(image, text, owner, scale, RankRing(), smoothing, weights, chunk=1), [image, text]


def _gathered(loss: str, weighted: bool, scale: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, list]:
    image, text, owner, seen = _inputs()
    offset = rank() * IMAGES
    all_image, all_text, all_owner, all_seen = map(all_gather_with_gradient, (image, text, owner + offset, seen))
    if loss == "siglip":
        weights = (seen, all_seen[all_owner]) if weighted else None
        found = siglip(image, all_text, all_owner, offset, scale, bias, CAPTIONS, weights)
    else:
        weights = ContrastiveWeights(seen, seen[owner], all_seen, all_seen[all_owner]) if weighted else None
        rows = image, text, all_image, all_text
        smoothing = 0.1 if loss == "smoothed" else 0.0
        found = contrastive(*rows, owner + offset, all_owner, offset, scale, smoothing, weights)
    return found, [image, text]


def _on_rank() -> dict[str, list]:
    results: dict[str, list] = {"shifted": _shifted()}
    for name, form in (("ring", _by_ring), ("gathered", _gathered)):
        for case in CASES:
            scale = torch.tensor([12.0], dtype=torch.float64, requires_grad=True)
            bias = torch.tensor([-3.0], dtype=torch.float64, requires_grad=True)
            loss, rows = form(*case, scale, bias)
            (5 * loss).backward()
            scalars = [loss.detach(), scale.grad, torch.zeros(1) if bias.grad is None else bias.grad]
            results[f"{name}/{case}"] = [tensor.tolist() for tensor in [*(row.grad for row in rows), *scalars]]
            with torch.no_grad():
                assert torch.allclose(form(*case, scale, bias)[0], loss)
    return results


def _shifted() -> list[float]:
    """Two passes under way at once, of several tensors each."""
    ring, own = RankRing(), torch.full((3,), float(rank()))
    first, second = ring.shift([own, own + 10]), ring.shift([own + 20])
    return [float(tensor[0]) for tensor in [*first(), *second()]] + [float(ring.summed(own)[0])]


@pytest.fixture(scope="module", params=[1, 2, 3])
def ranks(request) -> list[dict[str, list]]:
    return run_distributed_test(_on_rank, request.param)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_ring_is_the_gathered_form(ranks, case):
    summed = {}
    for name in ("ring", "gathered"):
        each = [[torch.tensor(values, dtype=torch.float64) for values in one[f"{name}/{case}"]] for one in ranks]
        summed[name] = [sum(one[i] for one in each) for i in (2, 3, 4)]  # the loss, and what ranks average of scalars
    for ours, theirs in zip(summed["ring"], summed["gathered"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)  # weights of images are fp32
    for one in ranks:
        for pair in zip(one[f"ring/{case}"][:2], one[f"gathered/{case}"][:2], strict=True):
            ours, theirs = (torch.tensor(values, dtype=torch.float64) for values in pair)
            assert theirs.abs().max() > 1e-4
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7)


def test_tensors_come_from_the_rank_before_in_their_order(ranks):
    for number, one in enumerate(ranks):
        before = (number - 1) % len(ranks)
        assert one["shifted"] == [before, before + 10, before + 20, sum(range(len(ranks)))]


def _train(data: Path, folder: Path, kind: str) -> list[list[float]]:
    losses = []
    for exchange in ("gather", "ring"):
        levels = {"layers": [0], "label_smoothing": 0.1} if kind == "contrastive" else {}
        objectives = [{"kind": kind, "exchange": exchange, **levels}, {"kind": "cls_regression", "teacher": "resnet"}]
        config = run_config(
            folder / f"{kind}-{exchange}-{world_size()}.yaml",
            data,
            steps=3,
            objectives=objectives,
            engine__zero_stage=world_size(),
            optimizer__lr=5e-4,  # small steps: large ones make much of the last bit
        )
        train(config)
        losses.append([r["loss"] for r in read_metrics(Path(config.run_dir) / "metrics.jsonl") if "loss" in r])
    return losses


@pytest.mark.parametrize("kind", ["contrastive", "siglip"])
def test_training_takes_the_same_steps(kind, tmp_path):
    data = make_data(tmp_path / "data")
    (gathered, ring), _ = run_distributed_test(_train, 2, args=(data, tmp_path, kind))
    assert len(gathered) == 3 and ring == pytest.approx(gathered, rel=1e-4)  # Adam makes much of a gradient's last bits
