"""rank_count and cosine_topk against a stable argsort of a plain float64 score matrix."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmd2v_kernels import cosine_topk, count_ahead, rank_count
from mmd2v_kernels.retrieval_order import exact_dot, exact_pairs, product_error


@pytest.fixture(scope="module", autouse=True, params=["segmented", "reference"])
def path(request):
    """Both paths of the CPU give the same numbers, to the last bit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MMD2V_KERNELS", f"rank_count={request.param},cosine_topk={request.param}")
        yield request.param


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def plain_ranks(scores: np.ndarray, positives: np.ndarray) -> tuple[list[int], list[int]]:
    """The definition, one row at a time: sort by (score, lowest index), drop all positives but the best."""
    answer = []
    for matrix, pairs in ((scores, positives), (scores.T, positives[:, ::-1])):
        ranks = []
        for i, row in enumerate(matrix):
            own = {int(j) for r, j in pairs if r == i}
            order = np.argsort(-row, kind="stable")
            places = [place for place, j in enumerate(order) if j in own]
            ranks.append(places[0] if places else -1)
        answer.append(ranks)
    return answer[0], answer[1]


@st.composite
def problems(draw):
    """Small integer embeddings: every score is exact, ties, equal rows and zero rows are common."""
    n, m, d = draw(st.integers(1, 9)), draw(st.integers(1, 9)), draw(st.integers(1, 6))
    reach = draw(st.sampled_from((0, 1, 3)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from(DTYPES))
    queries = torch.randint(-reach, reach + 1, (n, d), generator=generator).to(dtype)
    bank = torch.randint(-reach, reach + 1, (m, d), generator=generator).to(dtype)
    p = draw(st.integers(0, n * m))
    pairs = torch.randperm(n * m, generator=generator)[:p]
    positives = torch.stack([pairs // m, pairs % m], 1)
    blocks = {"block_rows": draw(st.integers(1, 10)), "block_columns": draw(st.integers(1, 10))}
    return queries, bank, positives, blocks


@given(problems())
@settings(max_examples=300, deadline=None)
def test_rank_count_equals_a_stable_sort(problem):
    queries, bank, positives, blocks = problem
    rows, columns = rank_count(queries, bank, positives, **blocks)
    scores = queries.double().numpy() @ bank.double().numpy().T
    assert (rows.tolist(), columns.tolist()) == plain_ranks(scores, positives.numpy())
    assert rows.dtype == columns.dtype == torch.int64


@given(problems(), st.data())
@settings(max_examples=200, deadline=None)
def test_topk_equals_a_stable_sort(problem, data):
    queries, bank, _, blocks = problem
    k = data.draw(st.integers(1, len(bank)))
    found_scores, found = cosine_topk(queries, bank, k, **blocks)
    scores = queries.double().numpy() @ bank.double().numpy().T
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    assert found.tolist() == order.tolist()
    assert found_scores.tolist() == np.take_along_axis(scores, order, 1).tolist()


@given(problems(), st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_counts_of_row_ranges_add_up(problem, parts):
    queries, bank, positives, blocks = problem
    cuts = [len(queries) * i // parts for i in range(parts + 1)]
    partial = [count_ahead(queries, bank, positives, rows=r, **blocks) for r in itertools.pairwise(cuts)]
    whole = count_ahead(queries, bank, positives)
    for side in (0, 1):
        assert torch.equal(sum(part[side] for part in partial), whole[side])


@given(problems())
@settings(max_examples=100, deadline=None)
def test_tie_counts_bracket_every_order_of_ties(problem):
    queries, bank, positives, _ = problem
    counts = count_ahead(queries, bank, positives)
    scores = queries.double().numpy() @ bank.double().numpy().T
    for i, row in enumerate(scores):
        own = {int(c) for r, c in positives if r == i}
        others = [s for j, s in enumerate(row) if j not in own]
        best = max((row[j] for j in own), default=math.inf)
        assert counts.row[0, i] == sum(s > best for s in others)
        assert counts.row.sum(0)[i] == sum(s >= best for s in others)


def near_ties(n: int, m: int, d: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Unit rows, a third of the bank copied from other rows and a third one unit in the last place away."""
    generator = torch.Generator().manual_seed(3)
    queries = torch.nn.functional.normalize(torch.randn(n, d, generator=generator), dim=1)
    bank = torch.nn.functional.normalize(torch.randn(m, d, generator=generator), dim=1)
    third = m // 3
    bank[third : 2 * third] = bank[:third]
    bank[2 * third : 3 * third] = bank[:third]
    bank[2 * third : 3 * third, 0] = torch.nextafter(bank[:third, 0], torch.tensor(2.0))
    queries[1::2] = queries[0 : len(queries[1::2]) * 2 : 2]
    positives = torch.stack([torch.arange(n), torch.arange(n) * 7 % m], 1)
    return queries, bank, positives


@pytest.mark.parametrize(("n", "m", "d"), [(40, 60, 33), (130, 257, 96), (7, 31, 768)])
def test_equal_rows_tie_exactly_and_no_block_size_changes_a_rank(n, m, d):
    """A matrix product gives equal rows scores that differ in the last bit, depending on where a block ends."""
    queries, bank, positives = near_ties(n, m, d)
    pairs = torch.cartesian_prod(torch.arange(n), torch.arange(m))
    scores = exact_pairs(queries, bank, pairs[:, 0], pairs[:, 1]).view(n, m).numpy()
    third = m // 3
    assert (scores[:, :third] == scores[:, third : 2 * third]).all()
    expected = plain_ranks(scores, positives.numpy())
    order = np.argsort(-scores, axis=1, kind="stable")[:, :12]
    for blocks in ((1, 1), (3, 50), (16, 17), (1024, 4096)):
        if blocks == (1, 1) and n * m > 3000:
            continue
        rows, columns = rank_count(queries, bank, positives, block_rows=blocks[0], block_columns=blocks[1])
        assert (rows.tolist(), columns.tolist()) == expected
        _, index = cosine_topk(queries, bank, 12, block_rows=blocks[0], block_columns=blocks[1])
        assert index.tolist() == order.tolist()


def test_score_is_the_same_for_a_pair_alone_in_a_crowd_and_swapped():
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(50, 77, generator=generator), torch.randn(50, 77, generator=generator)
    together = exact_dot(left, right)
    assert together.tolist() == [exact_dot(left[i : i + 1], right[i : i + 1]).item() for i in range(50)]
    assert torch.equal(together, exact_dot(right, left))
    exact = [math.fsum(row) for row in (left.double() * right.double()).tolist()]
    assert together.tolist() == pytest.approx(exact, abs=1e-14)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_error_bound_covers_the_matrix_product(scale):
    generator = torch.Generator().manual_seed(1)
    queries, bank = torch.randn(64, 768, generator=generator) * scale, torch.randn(80, 768, generator=generator)
    pairs = torch.cartesian_prod(torch.arange(64), torch.arange(80))
    exact = exact_pairs(queries, bank, pairs[:, 0], pairs[:, 1]).view(64, 80)
    difference = (queries.double() @ bank.double().t() - exact).abs()
    assert (difference <= product_error(queries, bank)[:, None] / 3).all()


def test_a_collapsed_model_is_ranked_by_index_in_reasonable_time():
    queries = torch.full((600, 16), 0.25)
    own = torch.arange(600)
    rows, columns = rank_count(queries, queries.clone(), torch.stack([own, own], 1))
    assert rows.tolist() == columns.tolist() == list(range(600))
    _, index = cosine_topk(queries, queries.clone(), 3)
    assert (index == torch.arange(3)).all()
    counts = count_ahead(queries, queries.clone(), torch.stack([own, own], 1))
    assert (counts.row[0] == 0).all() and (counts.row.sum(0) == 599).all()


def test_without_positives_everything_is_minus_one():
    rows, columns = rank_count(torch.randn(3, 4), torch.randn(2, 4), torch.zeros(0, 2, dtype=torch.int64))
    assert rows.tolist() == [-1, -1, -1] and columns.tolist() == [-1, -1]


def test_pairs_given_twice_count_once():
    queries, bank, positives = near_ties(20, 24, 16)
    for a, b in zip(
        rank_count(queries, bank, positives), rank_count(queries, bank, positives.repeat(2, 1)), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("k", [0, -1, 5])
def test_k_outside_of_the_bank_is_refused(k):
    with pytest.raises(ValueError, match=r"k: expected 1\.\.4"):
        cosine_topk(torch.randn(3, 8), torch.randn(4, 8), k)


@pytest.mark.parametrize(
    ("queries", "bank", "positives", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 4), [[0, 0]], "3 wide, but the bank is 4 wide"),
        (torch.tensor([[float("nan")]]), torch.zeros(1, 1), [[0, 0]], "queries: 1 of 1 rows hold NaN"),
        (torch.zeros(1, 1), torch.tensor([[float("inf")]]), [[0, 0]], "bank: 1 of 1 rows"),
        (torch.zeros(0, 3), torch.zeros(2, 3), [[0, 0]], "queries: expected a matrix"),
        (torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3), [[0, 0]], "expected floating point"),
        (torch.zeros(2, 3), torch.zeros(2, 3), [[0, 2]], r"column indices span 2\.\.2, expected 0\.\.1"),
        (torch.zeros(2, 3), torch.zeros(2, 3), [[-1, 0]], r"row indices span -1\.\.-1"),
        (torch.zeros(2, 3), torch.zeros(2, 3), [0, 1], r"expected int64 \[P, 2\]"),
    ],
)
def test_bad_input_is_refused_with_a_reason(queries, bank, positives, message):
    with pytest.raises(ValueError, match=message):
        rank_count(queries, bank, torch.tensor(positives))


def test_recall_of_the_original_implementations(shared):
    """CLIP_benchmark's and BEiT-3's recall on 100 images with 5 to 7 captions; ties within their tie orders."""
    import json

    from safetensors.torch import load_file

    tensors = load_file(shared / "golden" / "retrieval.safetensors")
    golden = json.loads((shared / "golden" / "retrieval.json").read_text())
    positives = torch.stack([torch.arange(594), tensors["text_image_index"]], 1)

    t2i, i2t = rank_count(tensors["text_emb"], tensors["image_emb"], positives)
    for k in (1, 5, 10):
        for source in ("clip_benchmark", "beit3"):
            assert (i2t < k).double().mean().item() == pytest.approx(golden["results"][source][f"i2t_R@{k}"], abs=1e-6)
            assert (t2i < k).double().mean().item() == pytest.approx(golden["results"][source][f"t2i_R@{k}"], abs=1e-6)

    counts = count_ahead(tensors["ties/text_emb"], tensors["ties/image_emb"], positives)
    for name, count in (("t2i", counts.row), ("i2t", counts.column)):
        for k in (1, 5, 10):
            worst, best = golden["ties"]["bounds_[worst,best]_over_tie_orders"][f"{name}_R@{k}"]
            assert (count.sum(0) < k).double().mean().item() == pytest.approx(worst, abs=1e-7)
            assert (count[0] < k).double().mean().item() == pytest.approx(best, abs=1e-7)
            assert worst <= ((count[0] + count[1]) < k).double().mean().item() <= best

    own = torch.arange(80).repeat(2, 1).t()
    a, b = rank_count(tensors["pair/A"], tensors["pair/B"], own)
    for name, ranks in (("q=A", a), ("q=B", b)):
        for k in (1, 5):
            expected = golden["pair_retrieval"]["results"][f"{name}_R@{k}"]
            assert (ranks < k).double().mean().item() == pytest.approx(expected, abs=1e-6)
