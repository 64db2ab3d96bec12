"""Recall, chance level and table, against numbers worked out by hand and by the original implementations."""

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file

from mmd2v.errors import UserError
from mmd2v.evaluation.chance import chance_recall
from mmd2v.evaluation.retrieval import retrieval_metrics
from mmd2v.report.recall_table import chance_row, recall_table


@pytest.mark.parametrize(("candidates", "positives", "k"), [(6, 1, 2), (7, 3, 1), (7, 3, 2), (5, 4, 3), (4, 1, 9)])
def test_chance_is_the_mean_over_all_rankings(candidates, positives, k):
    rankings = list(itertools.permutations(range(candidates)))
    hits = sum(any(item < positives for item in ranking[:k]) for ranking in rankings)
    assert chance_recall(candidates, [positives], k) == pytest.approx(hits / len(rankings))


def test_chance_of_the_public_sets_in_percent():
    assert [round(100 * chance_recall(5000, [1] * 25010, k), 2) for k in (1, 5, 10)] == [0.02, 0.1, 0.2]
    assert [round(100 * chance_recall(5000, [5] * 1000, k), 1) for k in (1, 5, 10)] == [0.1, 0.5, 1.0]


def test_chance_averages_over_queries():
    mixed = chance_recall(10, [1, 3], 2)
    assert mixed == pytest.approx((chance_recall(10, [1], 2) + chance_recall(10, [3], 2)) / 2)


def unit(*rows: tuple[float, ...]) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.tensor(rows, dtype=torch.float32), dim=1)


def test_metrics_by_hand():
    images = unit((1, 0), (0, 1), (1, 1))
    texts = unit((1, 0.1), (0.1, 1), (1, 0), (-1, 0.1))
    # Caption 0 → image 0 (right), 1 → image 2 (the second nearest), 2 → image 0 (right), 3 → image 1 (right).
    metrics = retrieval_metrics(images, texts, torch.tensor([0, 2, 0, 1]))
    assert metrics["t2i_R@1"] == 0.75 and metrics["t2i_R@5"] == 1.0
    assert metrics["t2i_median_rank"] == 1.0
    # Image 0 finds caption 2; image 1 finds captions 1, 0, 3 (its own, at 0.0995 like caption 0, but later); image 2
    # finds captions 0 and 1 at one score, its own being the later.
    assert metrics["i2t_R@1"] == pytest.approx(1 / 3) and metrics["i2t_R@5"] == 1.0
    assert metrics["i2t_median_rank"] == 2.0
    assert metrics["images"] == 3 and metrics["captions"] == 4


def test_metrics_equal_the_original_implementations(shared):
    tensors = load_file(shared / "golden" / "retrieval.safetensors")
    golden = json.loads((shared / "golden" / "retrieval.json").read_text())
    metrics = retrieval_metrics(tensors["image_emb"], tensors["text_emb"], tensors["text_image_index"])
    for name, value in golden["results"]["clip_benchmark"].items():
        assert metrics[name] == pytest.approx(value, abs=1e-6)
    assert not [name for name in metrics if name.endswith(("_worst", "_best"))]
    tied = retrieval_metrics(tensors["ties/image_emb"], tensors["ties/text_emb"], tensors["text_image_index"])
    for name, (worst, best) in golden["ties"]["bounds_[worst,best]_over_tie_orders"].items():
        assert (tied[f"{name}_worst"], tied[f"{name}_best"]) == pytest.approx((worst, best), abs=1e-6)
        assert worst <= tied[name] + 1e-7 and tied[name] <= best + 1e-7


def test_a_collapsed_encoder_is_at_chance_and_says_so():
    metrics = retrieval_metrics(torch.ones(20, 4) / 2, torch.ones(20, 4) / 2, torch.arange(20))
    assert metrics["t2i_R@1"] == metrics["chance_t2i_R@1"] == 0.05
    assert (metrics["t2i_R@1_worst"], metrics["t2i_R@1_best"]) == (0.0, 1.0)


def test_an_image_without_caption_is_a_candidate_but_no_query():
    images = unit((1, 0), (1, 0.01))
    metrics = retrieval_metrics(images, unit((1, 0.02)), torch.tensor([0]))
    assert metrics["t2i_R@1"] == 0.0 and metrics["i2t_R@1"] == 1.0 and metrics["images"] == 2


@pytest.mark.parametrize(
    ("images", "texts", "index", "message"),
    [
        (unit((1, 0)), torch.tensor([[float("nan"), 0]]), [0], "NaN or infinity"),
        (unit((1, 0)), unit((1, 0)), [1], "captions name images 1..1, but there are images 0..0"),
        (unit((1, 0)), unit((1, 0)), [0, 0], "image indices for 1 captions"),
        (unit((1, 0)), unit((1, 0, 0)), [0], "3 wide, but the bank is 2 wide"),
        (torch.zeros(0, 2), torch.zeros(0, 2), [], "found 0 and 0"),
    ],
)
def test_bad_input_is_refused(images, texts, index, message):
    with pytest.raises(UserError, match=message):
        retrieval_metrics(images, texts, torch.tensor(index, dtype=torch.int64))


def test_table_is_aligned_and_in_percent():
    metrics = {f"{d}_R@{k}": v for d in ("i2t", "t2i") for k, v in ((1, 0.0002), (5, 0.5), (10, 1.0))}
    table = recall_table({"chance": {**metrics, "t2i_R@5": 0.125}, "student †": {"i2t_R@1": 0.31724}})
    lines = table.splitlines()
    assert len({len(line) for line in lines[1:]}) == 1
    assert lines[2].split() == ["chance", "0.02", "50.00", "100.00", "0.02", "12.50", "100.00"]
    assert lines[3].split() == ["student", "†", "31.72", *"–––––"]
    assert lines[1].split() == ["R@1", "R@5", "R@10"] * 2


def test_chance_row_takes_the_chance_levels():
    assert chance_row({"i2t_R@1": 0.5, "chance_i2t_R@1": 0.1}) == {"i2t_R@1": 0.1}
