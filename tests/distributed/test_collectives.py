"""Collectives over two processes against what one process computes, gradients included."""

import pytest
import torch
from harness import run_distributed_test

from mmd2v.distributed import collectives
from mmd2v.distributed.coordination import from_main_rank, on_every_rank
from mmd2v.errors import ReportedByMainRank, UserError

WORLD = 2
ROWS = 3


def _rows() -> torch.Tensor:
    return torch.randn(WORLD * ROWS, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _loss(everything: torch.Tensor, own: torch.Tensor, offset: int) -> torch.Tensor:
    """A contrastive loss: own rows against all rows, mean over own rows."""
    logits = own @ everything.t()
    return torch.nn.functional.cross_entropy(logits, torch.arange(offset, offset + len(own)))


def _refuse() -> None:
    raise UserError("no such folder")


def _refuse_on(ranks: tuple[int, ...]) -> int:
    if collectives.rank() in ranks:
        raise UserError("no such teacher")
    return 7


def _raised(ranks: tuple[int, ...]) -> tuple[str, str]:
    try:
        return str(on_every_rank(lambda: _refuse_on(ranks))), ""
    except UserError as error:
        return type(error).__name__, str(error)


def _on_rank() -> dict:
    rank = collectives.rank()
    own = _rows()[rank * ROWS : (rank + 1) * ROWS].clone().requires_grad_()
    gathered = collectives.all_gather_with_gradient(own)
    loss = _loss(gathered, own, rank * ROWS)
    loss.backward()
    try:
        from_main_rank(_refuse)
        raised = ""
    except UserError as error:
        raised = type(error).__name__
    return {
        "gathered": gathered.detach().tolist(),
        "loss": float(loss.detach()),
        "gradient": own.grad.tolist(),
        "integers": collectives.all_gather_with_gradient(torch.tensor([rank, 7])).tolist(),
        "variable": collectives.gather_variable(torch.full((2 * rank, 2), float(rank))).tolist(),
        "flags": collectives.gather_variable(torch.tensor([rank == 0] * (2 - rank))).tolist(),
        "broadcast": collectives.broadcast_object({"from": rank}),
        "objects": collectives.gather_objects(f"rank {rank}"),
        "mean": collectives.mean_over_ranks(torch.tensor([float(rank)])).tolist(),
        "decision": from_main_rank(lambda: f"by {collectives.rank()}"),
        "raised": raised,
        "agreed": [_raised(()), _raised((0, 1)), _raised((1,))],
    }


@pytest.fixture(scope="module")
def ranks() -> list[dict]:
    return run_distributed_test(_on_rank, WORLD)


def test_gathering_has_the_gradient_of_one_process(ranks):
    rows = _rows().requires_grad_()
    loss = _loss(rows, rows, 0)
    loss.backward()
    assert sum(r["loss"] for r in ranks) / WORLD == pytest.approx(loss.item(), abs=1e-12)
    # DeepSpeed averages over ranks what the ranks' backward passes give.
    gradient = torch.tensor([row for r in ranks for row in r["gradient"]], dtype=torch.float64) / WORLD
    torch.testing.assert_close(gradient, rows.grad, rtol=0, atol=1e-12)
    for r in ranks:
        assert r["gathered"] == rows.tolist()
        assert r["integers"] == [0, 7, 1, 7]


def test_uneven_and_empty_parts_are_joined_in_rank_order(ranks):
    for r in ranks:
        assert r["variable"] == [[1.0, 1.0], [1.0, 1.0]]
        assert r["flags"] == [True, True, False]


def test_objects_and_decisions(ranks):
    for r in ranks:
        assert r["broadcast"] == {"from": 0}
        assert r["objects"] == ["rank 0", "rank 1"]
        assert r["mean"] == [0.5]
        assert r["decision"] == "by 0"


def test_error_of_the_main_rank_reaches_all_and_is_told_once(ranks):
    assert [r["raised"] for r in ranks] == ["UserError", ReportedByMainRank.__name__]


def test_error_of_any_rank_is_told_once_by_the_main_rank(ranks):
    for r, name in zip(ranks, ("UserError", "ReportedByMainRank"), strict=True):
        assert r["agreed"] == [("7", ""), (name, "no such teacher"), (name, "rank 1: no such teacher")]


def test_everything_is_the_identity_alone():
    x = torch.randn(3, 2, requires_grad=True)
    assert collectives.world_size() == 1
    assert collectives.rank() == 0
    assert collectives.all_gather_with_gradient(x) is x
    assert collectives.gather_variable(x) is x
    assert collectives.mean_over_ranks(x) is x
    assert collectives.broadcast_object("a") == "a"
    assert collectives.gather_objects("a") == ["a"]
    collectives.barrier()


def _fail_on_rank_one() -> None:
    if collectives.rank() == 1:
        raise RuntimeError("the reason")
    collectives.barrier()


def test_harness_tells_which_rank_failed_and_why():
    with pytest.raises(pytest.fail.Exception, match=r"(?s)rank 1:.*RuntimeError: the reason"):
        run_distributed_test(_fail_on_rank_one, WORLD)
