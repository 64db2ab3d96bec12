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
    fast_products,
    numpy_scans,
    rank_count_segmented,
)
from mmd2v_kernels.cpu_scans import BANK_PANEL, QUERY_PANEL
from mmd2v_kernels.retrieval_order import exact_dot, exact_pairs

SMALL = {"BLOCK_COLUMNS": 48, "PIECE_COLUMNS": 16, "STRIP_FP32": 8, "STRIP_INT16": 8, "ENOUGH_QUERIES": 1}
USUAL = {name: getattr(fast_products, name) for name in SMALL}


@pytest.fixture(autouse=True, params=["int16", "compiled", "numpy"])
def loops(request, monkeypatch):
    """All forms of products and loops, whichever would be chosen here."""
    if request.param == "numpy":
        monkeypatch.setattr(cpu_scans, "_library", lambda: None)
        return request.param
    if not cpu_scans.available():
        pytest.skip("the package was installed without a C compiler")
    if request.param == "int16" and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("the processor has no AVX2")
    monkeypatch.setattr(cpu_scans, "multiplies_int16_faster", lambda: request.param == "int16")
    return request.param


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    for name, value in SMALL.items():
        monkeypatch.setattr(fast_products, name, value)
    for module in (rank_count_segmented, cosine_topk_segmented):
        monkeypatch.setattr(module, "AT_ONCE", 24)
    monkeypatch.setattr(numpy_scans, "_PIECE", 4)


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
    for name, value in USUAL.items():
        monkeypatch.setattr(fast_products, name, value)
    monkeypatch.setattr(fast_products, "ENOUGH_QUERIES", 1)
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
    assert fast_products.choose_products(queries, bank) is None
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


@pytest.mark.parametrize(("n", "m"), [(5, 300), (50, 130), (1, 40)])
def test_threads_do_not_change_what_is_found(n, m, monkeypatch):
    """Fewer strips than threads are cut into parts of the bank."""
    queries, bank, positives = embeddings(n, m, 40, torch.float32)
    exact = (
        by("reference", monkeypatch, lambda: cosine_topk(queries, bank, 7)),
        by("reference", monkeypatch, lambda: count_ahead(queries, bank, positives)),
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        nearest = by("segmented", monkeypatch, lambda: cosine_topk(queries, bank, 7))
        counts = by("segmented", monkeypatch, lambda: count_ahead(queries, bank, positives))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(nearest, exact[0], strict=True))
    assert torch.equal(counts.row, exact[1].row) and torch.equal(counts.column, exact[1].column)


def test_equal_bank_rows_beyond_what_is_kept_are_left_to_float64(monkeypatch):
    monkeypatch.setattr(cosine_topk_segmented, "_KEPT", 10)
    queries, bank = F.normalize(torch.randn(11, 20), dim=1), torch.full((700, 20), 0.25)
    found, exact = (by(path, monkeypatch, lambda: cosine_topk(queries, bank, 2)) for path in ("segmented", "reference"))
    assert torch.equal(found[1], exact[1]) and torch.equal(found[0], exact[0])
    assert found[1].tolist() == [[0, 1]] * 11


def kinds_of_rows(width):
    """Directions at random, of one sign (large sums), of one column (which 16 bits cut off), short, long and 0."""
    rows = [F.normalize(torch.randn(60, width), dim=1), torch.full((3, width), -1.0), torch.eye(width)[:4] * 3]
    rows += [torch.randn(8, width) * 10.0 ** torch.randint(-15, 15, (8, 1)), torch.zeros(2, width)]
    return torch.cat(rows)


@pytest.mark.parametrize("width", [1, 7, 64, 768, 4099])
def test_the_bound_covers_the_products(width):
    torch.manual_seed(0)
    queries, bank = kinds_of_rows(width), kinds_of_rows(width)[:50]
    for some in (queries, queries[:60], queries[60:65]):
        for of_bank in (bank, kinds_of_rows(width)[60:64]):
            products = fast_products.choose_products(some, of_bank)
            exact = exact_pairs(some, of_bank, *torch.cartesian_prod(*map(torch.arange, (len(some), len(of_bank)))).T)
            exact = exact.view(len(some), len(of_bank)).numpy()
            out = np.empty(exact.size, dtype=np.float32)
            ready, rows = products.ready(range(len(of_bank))), slice(0, len(some))
            found = products.scores(rows, ready, slice(0, len(of_bank)), out)
            assert (np.abs(found - exact) <= products.error_N[:, None]).all()


def unit_rows(*numbers, width=768):
    torch.manual_seed(0)
    return (F.normalize(torch.randn(rows, width), dim=1) for rows in numbers)


def test_of_unit_rows_the_bound_is_small():
    """Else most pairs would be scored twice."""
    assert fast_products.choose_products(*unit_rows(40, 50)).error_N.max() < 4e-4


def test_rows_that_16_bits_do_not_suit_are_multiplied_in_fp32(loops):
    queries, bank = unit_rows(40, 50)
    bank[7] *= 1e-14  # all of it is lost, which is little beside the others
    bank[9] = 0
    assert fast_products.choose_products(queries, bank).coarse == (loops == "int16")
    assert not fast_products.choose_products(queries, bank, precise=True).coarse
    for odd in (torch.eye(768)[:1], bank[:1] * 1e13, bank[:1] * 1e17):
        assert not fast_products.choose_products(queries, torch.cat([bank, odd])).coarse
        assert not fast_products.choose_products(torch.cat([queries, odd]), bank).coarse


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("place", ["row", "other row", "bank"])
def test_what_is_not_finite_is_told_by_every_process(value, place):
    """The queries that another process counts are the same on all: none may go on alone."""
    queries, bank, positives = embeddings(40, 60, 33, torch.float32)
    {"row": queries[3], "other row": queries[39], "bank": bank[5]}[place][2] = value
    with pytest.raises(ValueError, match=r"1 of (40|60) rows hold NaN or infinity"):
        count_ahead(queries, bank, positives, rows=(0, 20))
    with pytest.raises(ValueError, match=r"1 of (40|60) rows hold NaN or infinity"):
        cosine_topk(queries, bank, 3)


@pytest.mark.parametrize("of", ["pieces", "rows"])
def test_a_bank_that_gets_better_and_better_leaves_no_fast_path(of, monkeypatch):
    """As one sorted by class does for the queries of the last one."""
    for name, value in USUAL.items():
        monkeypatch.setattr(fast_products, name, value)
    monkeypatch.setattr(fast_products, "ENOUGH_QUERIES", 1)
    monkeypatch.setattr(sys.modules["mmd2v_kernels.cosine_topk"], "_float64_topk", None)
    queries, noise = unit_rows(1, 9000, width=64)
    better = torch.arange(9000) // (1500 if of == "pieces" else 1) / 9000
    bank = F.normalize(better[:, None] * queries + 0.05 * noise, dim=1)
    queries = F.normalize(queries + 0.01 * torch.randn(300, 64), dim=1)
    _, index = cosine_topk(queries, bank, 10)
    assert torch.equal(index[:20], (queries[:20].double() @ bank.double().T).topk(10).indices)


def test_close_scores_of_coarse_products_are_found_by_precise_ones(loops, monkeypatch):
    """Cosines so close together that 16 bits cannot tell most from a threshold, but fp32 can."""
    asked = []
    choose = fast_products.choose_products

    def watched(queries, bank, precise=False):
        asked.append(precise)
        return choose(queries, bank, precise)

    for module in (rank_count_segmented, cosine_topk_segmented):
        monkeypatch.setattr(module, "choose_products", watched)
    monkeypatch.setattr(rank_count_segmented, "_FEW_CLOSE", 1)
    direction, noise = unit_rows(1, 300, width=64)
    bank = F.normalize(direction + 0.01 * noise, dim=1)
    queries, own = bank[:40].clone(), torch.arange(40)
    found, exact = (
        by(path, monkeypatch, lambda: count_ahead(queries, bank, torch.stack([own, own + 40], 1)))
        for path in ("segmented", "reference")
    )
    assert torch.equal(found.row, exact.row) and torch.equal(found.column, exact.column)
    assert any(asked) == (loops == "int16")
    asked.clear()
    found, exact = (by(path, monkeypatch, lambda: cosine_topk(queries, bank, 1)) for path in ("segmented", "reference"))
    assert torch.equal(found[1], exact[1])


def test_where_numpys_threads_cannot_be_held_one_product_follows_the_other(monkeypatch):
    monkeypatch.setattr(fast_products, "_limits_threads", lambda: False)
    queries, bank, _ = embeddings(50, 130, 33, torch.float32)
    products = fast_products.choose_products(queries, bank, precise=True)
    with products.alone():
        assert products.threads() == 1
    found, exact = (by(path, monkeypatch, lambda: cosine_topk(queries, bank, 3)) for path in ("segmented", "reference"))
    assert torch.equal(found[1], exact[1])


@pytest.mark.parametrize("width", [1, 2, 33])
@pytest.mark.parametrize(("rows", "panel"), [(1, QUERY_PANEL), (4, QUERY_PANEL), (33, BANK_PANEL), (16, BANK_PANEL)])
def test_rounded_rows_are_theirs_in_panels_and_what_was_lost_is_measured(rows, panel, width):
    if not cpu_scans.available():
        pytest.skip("only the compiled loops round")
    matrix = np.random.default_rng(0).normal(size=(rows, width)).astype(np.float32)
    rounded = cpu_scans.Rounded.empty(rows, width, panel, values=True)
    rounded.values[:] = 77
    cpu_scans.quantise(matrix, panel, rounded, 0)
    panels = (
        rounded.values.reshape(-1, (width + 1) // 2, panel, 2).transpose(0, 2, 1, 3).reshape(len(rounded.scale), -1)
    )
    back = panels[:rows, :width] * rounded.scale[:rows, None].astype(np.float64)
    assert not panels[rows:].any() and not panels[:, width:].any()
    np.testing.assert_allclose(rounded.lost, np.linalg.norm(matrix - back, axis=1), rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(rounded.norm, np.linalg.norm(matrix.astype(np.float64), axis=1), rtol=1e-12)


@pytest.mark.parametrize("columns", [1, 31, 255, 256, 300, 2048])
@pytest.mark.parametrize("k", [1, 3, 100])
def test_a_pass_keeps_what_may_be_among_the_best(columns, k):
    find_best = cpu_scans.find_best if cpu_scans.available() else numpy_scans.find_best
    generator = np.random.default_rng(0)
    error = np.full(9, 0.01)
    best = np.full((9, k), -np.inf, dtype=np.float32)
    seen = np.empty((9, 0), dtype=np.float32)
    for _ in range(3):
        scores = generator.normal(size=(9, columns)).astype(np.float32)
        scores[2] = -np.inf  # left out
        row, column, score = find_best(scores, error, best, scores.size)
        assert (scores[row, column] == score).all() and (np.diff(row) >= 0).all() and (row != 2).all()
        assert len(np.unique(row.astype(np.int64) * columns + column)) == len(row)
        seen = np.concatenate([seen, scores], axis=1)
        kth = -np.sort(-seen, axis=1)[:, k - 1] if seen.shape[1] >= k else np.full(9, -np.inf)
        for r in set(range(9)) - {2}:
            assert set(np.flatnonzero(scores[r] >= kth[r] - 0.02)) <= set(column[row == r])
            assert best[r, -1] == kth[r]
    assert find_best(np.zeros((9, columns), dtype=np.float32), error, np.full((9, k), -np.inf, np.float32), 0) is None


@pytest.mark.parametrize("few", [0.0, 1.0])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 8), (130, 2500), (3, 4097)])
def test_what_a_pass_finds(rows, columns, few, monkeypatch):
    monkeypatch.setattr(numpy_scans, "_FEW", few)
    scores = np.random.default_rng(0).normal(size=(rows, columns)).astype(np.float32)
    for shape in ((rows, 1), (1, columns)):
        low = np.random.default_rng(1).normal(size=shape).astype(np.float32)
        high = low + np.float32(0.1)
        found = numpy_scans.find_above(scores, low, high)
        assert found.row_r.tolist() == (scores > high).sum(1).tolist()
        assert found.column_m.tolist() == (scores > high).sum(0).tolist()
        close = np.nonzero((scores >= low) & (scores <= high))
        assert found.rows.tolist() == close[0].tolist() and found.columns.tolist() == close[1].tolist()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 2, 96, 97, 100, 768])
def test_exact_pairs_fold_in_the_order_of_one_pair(width, dtype):
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
    exact, bound = rows.double().norm(dim=1), fast_products._norms(rows)
    assert (bound >= exact).all() and (bound <= 1.001 * exact + 1e-17).all()
