"""A bank that another number of ranks wrote is dealt anew: the queue is that of a run which always had this many."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from small import StubTokenizer, small_config

from mmd2v.errors import UserError
from mmd2v.models.student import build_student
from mmd2v.objectives import build_objectives, memory_bank
from mmd2v.objectives.base import Objective
from mmd2v.objectives.memory_bank import MemoryBank
from mmd2v.train import rank_state
from mmd2v.train.rank_state import load_rank_state, rank_file

SIZE, WIDTH = 12, 3


class Ranks:
    """Makes this process play each of several ranks in turn."""

    def __init__(self, patch: pytest.MonkeyPatch, number: int) -> None:
        self.patch, self.number = patch, number

    def __iter__(self):
        for module in (memory_bank, rank_state):
            self.patch.setattr(module, "world_size", lambda: self.number)
        for one in range(self.number):
            for module in (memory_bank, rank_state):
                self.patch.setattr(module, "rank", lambda one=one: one)
            yield one


def _banks(ranks: Ranks) -> list[MemoryBank]:
    return [MemoryBank(SIZE, WIDTH, torch.float16, "bank_size") for _ in ranks]


def _push(ranks: Ranks, banks: list[MemoryBank], steps: list[int], seed: int = 0) -> None:
    random = torch.Generator().manual_seed(seed)
    for number in steps:
        rows = torch.randn(number, WIDTH, generator=random)
        owners, counts = torch.randint(1, 99, (number,), generator=random), torch.rand(number, generator=random) > 0.3
        for one in ranks:
            banks[one].push(rows, owners, counts)


def _equal(found: MemoryBank, expected: MemoryBank) -> bool:
    states = zip(found.state().values(), expected.state().values(), strict=True)
    return all(torch.equal(a, b) for a, b in states)


@settings(max_examples=40)
@given(
    st.sampled_from([1, 2, 3, 4, 6, 12]),
    st.sampled_from([1, 2, 3, 4, 6, 12]),
    st.lists(st.integers(1, 2 * SIZE), max_size=5),
    st.lists(st.integers(1, 2 * SIZE), max_size=3),
)
def test_the_queue_is_that_of_a_run_of_the_new_number_of_ranks(before, after, first, second):
    with pytest.MonkeyPatch.context() as patch:
        old, new = Ranks(patch, before), Ranks(patch, after)
        written, expected, found = _banks(old), _banks(new), _banks(new)
        _push(old, written, first)
        _push(new, expected, first)
        states = [bank.state() for bank in written]
        for one in new:
            found[one].load_state(found[one].dealt(states))
            assert _equal(found[one], expected[one])
        _push(new, found, second, seed=1)
        _push(new, expected, second, seed=1)
        assert all(_equal(a, b) for a, b in zip(found, expected, strict=True))


def _objectives(size: int = SIZE):
    config = small_config(
        teachers={"t": {"name": "timm:resnet10t"}},
        objectives=[{"kind": "contrastive"}, {"kind": "contrastive_target", "teacher": "t", "bank_size": size}],
    )

    class Teacher:
        modality, width = "image", WIDTH

    return build_objectives(config, build_student(config, StubTokenizer()), {"t": Teacher()})


def _bank(objectives) -> MemoryBank:
    return objectives.terms[1].bank


def _written(patch: pytest.MonkeyPatch, folder, number: int, steps: list[int]) -> None:
    ranks = Ranks(patch, number)
    written = [_objectives() for _ in ranks]
    _push(ranks, [_bank(one) for one in written], steps)
    for one in ranks:
        state = {name: value.clone() for name, value in written[one].rank_state().items()}
        save_file(state, rank_file(folder), {"ranks": str(number)})


@pytest.mark.parametrize("number", [1, 2, 4])
def test_state_goes_through_the_files_of_three_ranks(tmp_path, monkeypatch, number):
    _written(monkeypatch, tmp_path, 3, [5, 9])
    ranks = Ranks(monkeypatch, number)
    expected, found = _banks(ranks), [_objectives() for _ in ranks]
    _push(ranks, expected, [5, 9])
    for one in ranks:
        load_rank_state(found[one], tmp_path, 3)
        assert _equal(_bank(found[one]), expected[one])
    assert _bank(found[0]).inserted == 14


def test_states_that_cannot_be_dealt_are_refused(tmp_path, monkeypatch):
    _written(monkeypatch, tmp_path, 3, [5])
    for _ in Ranks(monkeypatch, 2):
        own = _objectives()
        with pytest.raises(UserError, match=r"bank_size: checkpoint \[6, 3\] float16 .*this run \[9, 3\]"):
            load_rank_state(_objectives(size=18), tmp_path, 3)
        for number in (1, 4):
            with pytest.raises(UserError, match=f"damaged: written by 3 ranks, expected {number}"):
                load_rank_state(own, tmp_path, number)
    last = rank_file(tmp_path, 2)
    with safe_open(last, framework="pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - a handle, no mapping
    save_file({**state, "1.inserted": state["1.inserted"] + 1}, last, {"ranks": "3"})
    with pytest.raises(UserError, match="its ranks wrote parts of different banks"):
        load_rank_state(own, tmp_path, 3)
    del state["1.owners"]
    save_file(state, last, {"ranks": "3"})
    with pytest.raises(UserError, match="the checkpoint holds no owners of the bank"):
        load_rank_state(own, tmp_path, 3)
    last.write_bytes(b"broken")
    with pytest.raises(UserError, match=r"objectives_rank_00002.safetensors: the checkpoint is damaged"):
        load_rank_state(own, tmp_path, 3)
    last.unlink()
    with pytest.raises(UserError, match=r"objectives_rank_00002.safetensors: missing; .* what rank 2 of"):
        load_rank_state(own, tmp_path, 3)


def test_every_objective_with_a_state_of_its_own_can_deal_it():
    from mmd2v.objectives import OBJECTIVES

    keeping = [kind for kind in OBJECTIVES.values() if kind.rank_state is not Objective.rank_state]
    assert keeping and all(kind.dealt_state is not Objective.dealt_state for kind in keeping)
