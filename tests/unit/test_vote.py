"""The ballot of every step: read one step later, the same on every rank."""

import sys
from pathlib import Path

import torch

from mmd2v.distributed.environment import World
from mmd2v.distributed.vote import Ballot, StepVote

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
from harness import run_distributed_test


def test_alone_a_ballot_is_read_a_step_later_too():
    vote = StepVote(World(0, 1, 0, torch.device("cpu"), "gloo"))
    assert vote.cast(1, stop=15, writing=True) is None
    assert vote.cast(2, due=True) == Ballot(1, stop=15, writing=True)
    assert vote.ask(3, stop=10) == Ballot(3, stop=10, due=True)
    assert vote.cast(4) is None  # none is open after it
    vote.close()


def _two_ranks() -> list[Ballot | None]:
    from mmd2v.distributed.collectives import rank, world_size

    own = rank()
    vote = StepVote(World(own, world_size(), own, torch.device("cpu"), "gloo"))
    found = [
        vote.cast(1, stop=10 if own == 0 else 0),
        vote.cast(2, writing=own == 1),
        vote.cast(3, stop=15 if own == 1 else 10, due=own == 0),
        vote.cast(4),
        vote.ask(5, writing=own == 0),
    ]
    found.append(vote.cast(6, stop=own))
    vote.close()
    again = StepVote(World(own, world_size(), own, torch.device("cpu"), "gloo"))  # a second run in the process
    found.append(again.ask(0, stop=own))
    again.close()
    return found


def test_ranks_read_the_largest_of_what_all_have_said_at_the_same_step():
    expected = [
        None,
        Ballot(1, stop=10),
        Ballot(2, writing=True),
        Ballot(3, stop=15, due=True),
        Ballot(5, writing=True),
        None,
        Ballot(0, stop=1),
    ]
    assert run_distributed_test(_two_ranks, 2) == [expected, expected]
