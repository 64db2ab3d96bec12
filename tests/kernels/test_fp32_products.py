"""The CPU paths of rank_count and cosine_topk in many small blocks, where they give up, and what their passes find."""

import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mmd2v_kernels import (
    cosine_topk,
    cosine_topk_segmented,
    count_ahead,
    cpu_scans,
    fp32_products,
    rank_count_segmented,
)
from mmd2v_kernels.retrieval_order import exact_dot, exact_pairs

LIBRARIES = dict(fp32_products._LIBRARIES)


@pytest.fixture(autouse=True, params=["compiled", "numpy"])
def loops(request, monkeypatch):
    """Both forms of the loops, whichever was installed."""
    if request.param == "numpy":
        monkeypatch.setattr(cpu_scans, "_library", lambda: None)
    elif not cpu_scans.available():
        pytest.skip("the package was installed without a C compiler")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    for module in (rank_count_segmented, cosine_topk_segmented):
        monkeypatch.setattr(module, "BLOCK", 16 * 40)
        monkeypatch.setattr(module, "BLOCK_COLUMNS", 40)
        monkeypatch.setattr(module, "PIECE", 8)


def by(path, monkeypatch, call):
    monkeypatch.setenv("MMD2V_KERNELS", f"rank_count={path},cosine_topk={path}")
    return call()


def embeddings(n, m, width, dtype):
    torch.manual_seed(0)
    queries, bank = (F.normalize(torch.randn(rows, width), dim=1).to(dtype) for rows in (n, m))
    bank[m - m // 2 :] = bank[: m // 2].clone()
    queries[n // 3] = bank[m // 3] = 0
    return queries, bank, torch.stack([torch.arange(n), torch.arange(n) * 7 % m], 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("n", "m"), [(50, 130), (1, 300), (70, 3), (17, 41)])
def test_counts_in_blocks_are_those_of_float64(n, m, dtype, monkeypatch):
    problem = embeddings(n, m, 33, dtype)
    found, exact = (by(path, monkeypatch, lambda: count_ahead(*problem)) for path in ("segmented", "reference"))
    assert torch.equal(found.row, exact.row) and torch.equal(found.column, exact.column)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("n", "m", "k"), [(50, 130, 3), (3, 300, 100), (20, 41, 41), (5, 90, 50)])
@pytest.mark.parametrize("filtered", [False, True])
def test_nearest_in_blocks_are_those_of_float64(n, m, k, filtered, dtype, monkeypatch):
    queries, bank, _ = embeddings(n, m, 33, dtype)
    allowed = torch.arange(m) % 5 > 0 if filtered else None
    k = min(k, m if allowed is None else int(allowed.sum()))
    found, exact = (
        by(path, monkeypatch, lambda: cosine_topk(queries, bank, k, allowed_M=allowed))
        for path in ("segmented", "reference")
    )
    assert torch.equal(found[1], exact[1]) and torch.equal(found[0], exact[0])
    assert allowed is None or bool(allowed[found[1]].all())


@pytest.mark.parametrize("k", [1, 10, 100, 300])
def test_no_size_of_a_bank_leaves_the_fast_path(k, monkeypatch):
    """Random rows have few candidates beyond the k best, however many or few blocks of scores there are."""
    for name in ("BLOCK", "BLOCK_COLUMNS", "PIECE"):  # of the usual size
        monkeypatch.setattr(cosine_topk_segmented, name, getattr(fp32_products, name))
    monkeypatch.setattr(sys.modules["mmd2v_kernels.cosine_topk"], "_float64_topk", None)
    torch.manual_seed(0)
    for m in (k, k + 1, 400, 3000):
        queries, bank = (F.normalize(torch.randn(rows, 32), dim=1) for rows in (150, max(m, k)))
        _, index = cosine_topk(queries, bank, k)
        assert torch.equal(index[:20], (queries[:20].double() @ bank.double().T).topk(k).indices)


def test_a_filter_is_a_smaller_bank(monkeypatch):
    queries, bank, _ = embeddings(9, 50, 16, torch.float32)
    allowed = torch.arange(50) % 3 > 0
    kept = allowed.nonzero()[:, 0]
    scores, index = cosine_topk(queries, bank[kept], 4)
    found = cosine_topk(queries, bank, 4, allowed_M=allowed)
    assert torch.equal(found[0], scores) and torch.equal(found[1], kept[index])
    with pytest.raises(ValueError, match=r"k: expected 1\.\.33 \(the rows of the bank that may be found\), found 34"):
        cosine_topk(queries, bank, 34, allowed_M=allowed)
    with pytest.raises(ValueError, match=r"allowed_M: expected bool \[50\]"):
        cosine_topk(queries, bank, 4, allowed_M=allowed[1:])


def test_too_many_close_pairs_are_counted_in_float64(monkeypatch):
    monkeypatch.setattr(rank_count_segmented, "_FEW_CLOSE", 10)
    asked = []
    count = rank_count_segmented.count_sides

    def watched(*arguments):
        *before, in_float64, row_best = arguments
        return count(*before, lambda *block: (asked.append(block), in_float64(*block)), row_best)

    monkeypatch.setattr(rank_count_segmented, "count_sides", watched)
    rows = torch.full((60, 16), 0.25)
    own = torch.arange(60)
    found = count_ahead(rows, rows.clone(), torch.stack([own, own], 1))
    assert asked
    assert found.row[:2].sum(0).tolist() == own.tolist() and (found.row.sum(0) == 59).all()


def test_scores_beyond_fp32_are_left_to_float64(monkeypatch):
    queries, bank, positives = embeddings(9, 20, 16, torch.float32)
    queries, bank = queries * 1e25, bank * 1e25
    assert fp32_products.error_of_fp32(queries, bank) is None
    found, exact = (
        by(path, monkeypatch, lambda: count_ahead(queries, bank, positives)) for path in ("segmented", "reference")
    )
    assert torch.equal(found.row, exact.row)
    found, exact = (by(path, monkeypatch, lambda: cosine_topk(queries, bank, 3)) for path in ("segmented", "reference"))
    assert torch.equal(found[1], exact[1])


def test_autocast_does_not_round_the_operands(monkeypatch):
    queries, bank, positives = embeddings(40, 60, 64, torch.float32)
    exact = by("reference", monkeypatch, lambda: count_ahead(queries, bank, positives))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = by("segmented", monkeypatch, lambda: count_ahead(queries, bank, positives))
    assert torch.equal(found.row, exact.row)


def test_rounded_operands_are_an_obstacle(monkeypatch):
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
    assert "round" in fp32_products.obstacle(torch.zeros(1, 1))


def test_the_bound_covers_fp32_products():
    torch.manual_seed(0)
    for width in (1, 7, 768):
        queries, bank = torch.randn(30, width), torch.randn(40, width)
        pairs = torch.cartesian_prod(torch.arange(30), torch.arange(40))
        exact = exact_pairs(queries, bank, pairs[:, 0], pairs[:, 1]).view(30, 40)
        error = ((queries @ bank.t()).double() - exact).abs()
        assert (error <= fp32_products.error_of_fp32(queries, bank)[:, None]).all()


@pytest.mark.parametrize("few", [0.0, 1.0])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 8), (130, 2500), (3, 4097)])
def test_what_a_pass_finds(rows, columns, few, monkeypatch):
    monkeypatch.setattr(fp32_products, "_FEW", few)
    scores = np.random.default_rng(0).normal(size=(rows, columns)).astype(np.float32)
    for shape in ((rows, 1), (1, columns)):
        low = np.random.default_rng(1).normal(size=shape).astype(np.float32)
        high = low + np.float32(0.1)
        found = fp32_products.find_above(scores, low, high)
        assert found.row_r.tolist() == (scores > high).sum(1).tolist()
        assert found.column_m.tolist() == (scores > high).sum(0).tolist()
        close = np.nonzero((scores >= low) & (scores <= high))
        assert found.rows.tolist() == close[0].tolist() and found.columns.tolist() == close[1].tolist()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 2, 96, 97, 100, 768])
def test_exact_pairs_fold_in_the_order_of_one_pair(width, dtype):
    from mmd2v_kernels.retrieval_order import exact_dot

    torch.manual_seed(0)
    queries, bank = torch.randn(20, width).to(dtype), torch.randn(30, width).to(dtype)
    rows, columns = torch.randint(0, 20, (2500,)), torch.randint(0, 30, (2500,))
    assert torch.equal(exact_pairs(queries, bank, rows, columns), exact_dot(queries[rows], bank[columns]))
    assert math.isfinite(exact_pairs(queries, bank, rows[:1], columns[:1]).item())


@pytest.mark.parametrize("width", [1, 2, 3, 4, 7, 8, 12, 33, 64, 96, 100, 512, 768, 1001])
def test_exact_scores_of_pairs_are_the_folded_sum_to_the_last_bit(width):
    torch.manual_seed(0)
    queries, bank = torch.randn(40, width), torch.randn(30, width) * 10.0 ** torch.randint(-20, 18, (30, 1))
    rows, columns = torch.randint(40, (3000,)), torch.randint(30, (3000,))
    assert torch.equal(exact_pairs(queries, bank, rows, columns), exact_dot(queries[rows], bank[columns]))
    assert len(exact_pairs(queries, bank, rows[:0], columns[:0])) == 0


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1.0, 1e15])
def test_norms_are_bounded_from_above(scale):
    torch.manual_seed(0)
    rows = scale * torch.randn(50, 300)
    rows[3] = 0
    exact, bound = rows.double().norm(dim=1), fp32_products._norms(rows)
    assert (bound >= exact).all() and (bound <= 1.001 * exact + 1e-17).all()


def test_the_faster_library_multiplies_from_the_third_product_on(monkeypatch):
    """Both say the same within the bound; each is tried twice."""
    called = []
    calls = {name: lambda *a, name=name, call=call: (called.append(name), call(*a)) for name, call in LIBRARIES.items()}
    monkeypatch.setattr(fp32_products, "_LIBRARIES", calls)
    monkeypatch.setattr(fp32_products, "_TELLING", 1)
    monkeypatch.setattr(fp32_products, "_pace", {})
    clock = iter([0, 1, 0, 2, 0, 1, 0, 2, *[0] * 20])  # torch takes 1 s and numpy 2
    monkeypatch.setattr(fp32_products, "perf_counter", lambda: next(clock))
    queries, bank = torch.randn(20, 64), torch.randn(30, 64)
    exact, error = queries.double() @ bank.double().T, fp32_products.error_of_fp32(queries, bank)
    for _ in range(6):
        found = fp32_products.product(queries, bank, torch.empty(600))
        assert ((found - exact).abs() <= error[:, None]).all()
    assert called == ["torch", "numpy", "torch", "numpy", "torch", "torch"]
