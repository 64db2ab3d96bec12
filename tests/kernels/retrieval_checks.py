"""Checks of the retrieval kernels for `device_checks`: equal to the last bit to the exact definition on the CPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.nn.functional as F

from mmd2v_kernels import Best, best_positives, cosine_topk, count_ahead

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")

Check = Callable[[torch.dtype], None]


@contextmanager
def path(name: str) -> Iterator[None]:
    os.environ["MMD2V_KERNELS"] = f"rank_count={name},cosine_topk={name}"
    try:
        yield
    finally:
        del os.environ["MMD2V_KERNELS"]


@contextmanager
def sizes(**changed: int) -> Iterator[None]:
    """In the interpreter, pieces so small that tiny shapes have several; on a GPU those that are shipped."""
    from mmd2v_kernels import cosine_topk_triton, rank_count_triton

    modules = (cosine_topk_triton, rank_count_triton)
    shipped = [module.SIZES for module in modules]
    small = {"rows": 32, "columns": 32, "depth": 16} if INTERPRETED else {}
    own = ({"bin": 4, "reserve": 4, "maxima": 640, "block": 100}, {"launch_rows": 64, "listed": 1000})
    for module, size, pieces in zip(modules, shipped, own, strict=True):
        wanted = small | (pieces if INTERPRETED else {}) | changed
        module.SIZES = replace(size, **{name: n for name, n in wanted.items() if hasattr(size, name)})
    try:
        yield
    finally:
        for module, size in zip(modules, shipped, strict=True):
            module.SIZES = size


def embeddings(n: int, m: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Unit rows with what is hard: equal rows, rows one unit in the last place apart, zero rows, many positives."""
    queries, bank = (F.normalize(torch.randn(rows, width), dim=1).to(dtype) for rows in (n, m))
    third = m // 3
    bank[third : third + third // 2] = bank[: third // 2]
    bank[m - third :] = bank[:third]
    bank[m - third :, 0] = (bank[:third, 0].float() * (1 + torch.finfo(dtype).eps)).to(dtype)
    if n > 3 and m > 3:
        queries[1], queries[2], bank[2] = queries[3], 0, 0
    own = torch.arange(n)
    positives = torch.stack([own, own * 7 % m], 1)
    return queries, bank, torch.cat([positives, positives[: n // 2], torch.stack([own, own * 5 % m], 1)[::2]])


def same_counts(queries: torch.Tensor, bank: torch.Tensor, positives: torch.Tensor, repeats: int = 1) -> None:
    with path("reference"):
        expected = count_ahead(queries, bank, positives)
    for _ in range(repeats):
        with path("triton"):
            found = count_ahead(queries.to(DEVICE), bank.to(DEVICE), positives.to(DEVICE))
        assert torch.equal(found.row.cpu(), expected.row), "rows"
        assert torch.equal(found.column.cpu(), expected.column), "columns"


def same_nearest(
    queries: torch.Tensor,
    bank: torch.Tensor,
    k: int,
    allowed: torch.Tensor | None = None,
    repeats: int = 1,
    bank_on: torch.device = DEVICE,
) -> None:
    with path("reference"):
        scores, index = cosine_topk(queries, bank, k, allowed_M=allowed)
    for _ in range(repeats):
        with path("triton"):
            found = cosine_topk(queries.to(DEVICE), bank.to(bank_on), k, allowed_M=allowed)
        assert torch.equal(found[1].cpu(), index), "index"
        assert torch.equal(found[0].cpu(), scores), "scores"


def check_counts(n: int, m: int, width: int, **changed: int) -> Check:
    def check(dtype: torch.dtype) -> None:
        with sizes(**changed):
            same_counts(*embeddings(n, m, width, dtype))

    return check


def check_nearest(n: int, m: int, width: int, k: int, filtered: bool = False, **changed: int) -> Check:
    def check(dtype: torch.dtype) -> None:
        queries, bank, _ = embeddings(n, m, width, dtype)
        allowed = torch.arange(m) % 3 > 0 if filtered else None
        with sizes(**changed):
            same_nearest(queries, bank, k, allowed)

    return check


def check_collapsed(dtype: torch.dtype) -> None:
    """All pairs tie: the list runs over, and every query has too many candidates."""
    rows = torch.full((70, 16), 0.25, dtype=dtype)
    own = torch.arange(70)
    with sizes(listed=8):
        same_counts(rows, rows.clone(), torch.stack([own, own], 1))
        same_nearest(rows, rows.clone(), 3)


def check_scales(dtype: torch.dtype) -> None:
    """Rows far from unit norm, and of norms that differ widely: the error bound follows them."""
    queries, bank, positives = embeddings(20, 40, 24, dtype)
    for left, right in ((200.0, 1.0), (1.0, 3e-3), (30.0, 0.03)):
        spread = torch.logspace(-1, 1, 20)[:, None]
        with sizes():
            same_counts((queries.float() * left * spread).to(dtype), (bank.float() * right).to(dtype), positives)
            same_nearest((queries.float() * left * spread).to(dtype), (bank.float() * right).to(dtype), 3)


def check_refused(dtype: torch.dtype) -> None:
    """NaN and infinity on either side are named, not ranked."""
    for value in (float("nan"), float("inf"), -float("inf")):
        for side, name in ((0, "queries"), (1, "bank")):
            matrices = list(embeddings(5, 9, 24, dtype)[:2])
            matrices[side][4, 3] = value
            matrices = [matrix.to(DEVICE) for matrix in matrices]
            calls = (
                lambda own=matrices: count_ahead(*own, torch.zeros(1, 2, dtype=torch.int64, device=DEVICE)),
                lambda own=matrices: cosine_topk(*own, 2),
            )
            for call in calls:
                try:
                    with path("triton"), sizes():
                        call()
                except ValueError as error:
                    assert f"{name}: 1 of" in str(error), error
                else:
                    raise AssertionError(f"{name} with {value}: expected ValueError")


def check_no_positives(dtype: torch.dtype) -> None:
    queries, bank, _ = embeddings(9, 11, 24, dtype)
    with sizes():
        same_counts(queries, bank, torch.zeros(0, 2, dtype=torch.int64))


def check_ranges(dtype: torch.dtype) -> None:
    """What two ranges of rows contribute adds up to the whole."""
    queries, bank, positives = (tensor.to(DEVICE) for tensor in embeddings(50, 60, 24, dtype))
    with path("triton"), sizes():
        parts = [count_ahead(queries, bank, positives, rows=rows) for rows in ((0, 17), (17, 50))]
        whole = count_ahead(queries, bank, positives)
    for side in (0, 1):
        assert torch.equal(parts[0][side] + parts[1][side], whole[side])


def check_parts(dtype: torch.dtype) -> None:
    """What two parts of a bank contribute, against the best positives of both, is the whole."""
    queries, bank, positives = (tensor.to(DEVICE) for tensor in embeddings(50, 60, 24, dtype))
    with path("triton"), sizes():
        whole = count_ahead(queries, bank, positives)
        both, rows, columns = best_positives(queries, bank, positives), 0, []
        for first, last in ((0, 23), (23, 60)):
            own = positives[(positives[:, 1] >= first) & (positives[:, 1] < last)]
            own = own - torch.tensor([0, first], device=DEVICE)
            best = Best(both.score, both.index - first)
            part = count_ahead(queries, bank[first:last], own, row_best=best)
            rows = rows + part.row
            columns.append(part.column)
    assert torch.equal(rows, whole.row) and torch.equal(torch.cat(columns, 1), whole.column)


def check_mixed(dtype: torch.dtype) -> None:
    """Queries of one dtype, a bank of another."""
    queries, bank, positives = embeddings(20, 40, 24, torch.float32)
    with sizes():
        same_counts(queries, bank.to(dtype), positives)
        same_nearest(queries, bank.to(dtype), 4)


def check_repeated(dtype: torch.dtype) -> None:
    rows, width = (40, 24) if INTERPRETED else (1500, 256)
    queries, bank, positives = embeddings(rows, 2 * rows, width, dtype)
    with sizes():
        same_counts(queries, bank, positives, repeats=2 if INTERPRETED else 20)
        same_nearest(queries, bank, 5, repeats=2 if INTERPRETED else 20)


def check_streamed(dtype: torch.dtype) -> None:
    """A bank in host memory is copied in blocks, the last one short."""
    queries, bank, _ = embeddings(50, 5000, 64, dtype)
    with sizes(copied=768):
        same_nearest(queries, bank, 7, repeats=20, bank_on=torch.device("cpu"))
        same_nearest(queries, bank, 7, torch.arange(5000) > 900, bank_on=torch.device("cpu"))


SLOW_IN_THE_INTERPRETER = ("repeated", "collapsed", "scales", "ranges", "cosine_topk/small", "filtered", "mixed")
"""Run there in fp32 alone."""


def all_checks(interpreted: bool) -> dict[str, Check]:
    found = {
        "rank_count/small": check_counts(70, 45, 33),
        "rank_count/whole_tiles": check_counts(64, 64, 32),
        "rank_count/one_row": check_counts(1, 40, 24),
        "rank_count/one_column": check_counts(40, 1, 24),
        "rank_count/list_runs_over": check_counts(70, 45, 24, listed=8),
        "rank_count/no_positives": check_no_positives,
        "rank_count/ranges": check_ranges,
        "rank_count/parts": check_parts,
        "cosine_topk/small": check_nearest(70, 145, 33, 5),
        "cosine_topk/filtered": check_nearest(20, 245, 32, 3, filtered=True),
        "cosine_topk/whole_bank": check_nearest(5, 9, 24, 9),
        "cosine_topk/one_row": check_nearest(1, 300, 24, 12),
        "cosine_topk/no_reserve": check_nearest(20, 200, 24, 3, reserve=0),
        "retrieval/collapsed": check_collapsed,
        "retrieval/scales": check_scales,
        "retrieval/refused": check_refused,
        "retrieval/mixed": check_mixed,
        "retrieval/repeated": check_repeated,
    }
    if not interpreted:
        found |= {
            "rank_count/shipped": check_counts(1000, 3001, 768),
            "rank_count/odd": check_counts(129, 4099, 770),
            "cosine_topk/shipped": check_nearest(300, 20_003, 768, 10),
            "cosine_topk/k_100": check_nearest(129, 20_000, 512, 100),
            "cosine_topk/k_128": check_nearest(40, 9_000, 768, 128, filtered=True),
            "cosine_topk/odd": check_nearest(127, 5_001, 770, 10, filtered=True),
            "cosine_topk/blocks": check_nearest(300, 10_003, 256, 10, block=4096, maxima=1 << 15),
            "cosine_topk/streamed": check_streamed,
        }
    return found
