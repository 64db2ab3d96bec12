"""Contrastive objectives on two ranks are those of one: a bank in shards, sigmoid pairs, layers; and runs resume."""

import shutil
from pathlib import Path

import pytest
import torch
from harness import run_distributed_test
from training_runs import make_data, run_config

from mmd2v.distributed.collectives import barrier, rank, world_size
from mmd2v.errors import UserError
from mmd2v.objectives.memory_bank import MemoryBank
from mmd2v.train.loop import train
from mmd2v.train.metrics import read_metrics

STEPS = 5
TARGET = {"kind": "contrastive_target", "teacher": "resnet", "bank_size": 20}
OBJECTIVES = {
    "bank": [TARGET],
    "bank-alone": [{**TARGET, "in_batch": False, "bank_size": 64, "shared_head": True}],
    "siglip": [{"kind": "siglip"}],
    "layers": [{"kind": "contrastive", "layers": [0, 2], "dim": 16}],
}
CASES = [("bank", 0), ("bank", 3), ("bank-alone", 1), ("siglip", 3), ("layers", 2)]
RESUMED = [(1, "fp32"), (3, "bf16"), (0, "bf16_autocast")]

# ----------------------------------------------------------------------------------- a bank and its gradient

QUERIES, WIDTH, ROWS = 6, 5, 4


def _whole() -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Queries of all ranks and the new rows of three steps."""
    random = torch.Generator().manual_seed(0)
    queries = torch.randn(QUERIES, WIDTH, generator=random, dtype=torch.float64)
    return queries, [torch.randn(ROWS, WIDTH, generator=random, dtype=torch.float64) for _ in range(3)]


def _shard() -> dict:
    queries, steps = _whole()
    own = QUERIES // world_size()
    query = queries[rank() * own : (rank() + 1) * own].requires_grad_()
    owner = torch.arange(QUERIES)[rank() * own : (rank() + 1) * own] + 1
    bank = MemoryBank(10, WIDTH, torch.float64, "bank_size")
    found = []
    for step, rows in enumerate(steps):
        total = bank.logsumexp(query, owner)
        found.append((total.tolist(), torch.autograd.grad((total**2).sum(), query)[0].tolist()))
        bank.push(rows, torch.arange(ROWS) + step, torch.arange(ROWS) != 2)
    return {"found": found, "rows": len(bank.rows_KC)}


def test_a_sharded_bank_has_values_and_gradients_of_the_whole():
    ranks = run_distributed_test(_shard, 2)
    assert [result["rows"] for result in ranks] == [5, 5]
    queries, steps = _whole()
    owner, held = torch.arange(QUERIES) + 1, []
    for step, rows in enumerate(steps):
        values, gradients = (
            torch.tensor([row for result in ranks for row in result["found"][step][i]], dtype=torch.float64)
            for i in (0, 1)
        )
        if step == 0:
            assert (values < -1e8).all()
        else:
            queries.requires_grad_()
            bank, names = torch.stack([row for row, _ in held]), torch.tensor([name for _, name in held])
            hidden = (owner[:, None] == names) | (names < 0)
            expected = (queries @ bank.T).masked_fill(hidden, -torch.inf).logsumexp(dim=1)
            torch.testing.assert_close(values, expected, rtol=0, atol=1e-12)
            (gradient,) = torch.autograd.grad((expected**2).sum(), queries)
            torch.testing.assert_close(gradients, gradient, rtol=0, atol=1e-11)
        held += [(row, i + step if i != 2 else -1) for i, row in enumerate(rows)]
        held = held[-10:]


# --------------------------------------------------------------------------------------------- whole runs


def _losses(config) -> list[dict]:
    records = read_metrics(Path(config.run_dir) / "metrics.jsonl")
    return [
        {k: v for k, v in r.items() if k.startswith(("loss", "contrastive_target"))} for r in records if "loss" in r
    ]


def _train(data: Path, folder: Path) -> dict[str, list[dict]]:
    found = {}
    for name, stage in CASES:
        config = run_config(
            folder / f"{name}-world{world_size()}-stage{stage}.yaml",
            data,
            steps=STEPS,
            objectives=OBJECTIVES[name],
            engine__zero_stage=stage,
            engine__zero3_persistence_threshold=0,
            data__captions_per_image=2,
            # Adam makes whole steps of gradients that are rounding alone: small ones, so that the bound tells of us.
            optimizer__lr=1e-4,
        )
        train(config)
        found[f"{name}-{stage}"] = _losses(config)
    return found


def _resume(data: Path, folder: Path) -> list[tuple[list, list]]:
    """Losses of all steps, uninterrupted and after a resume at step 3 with the bank half full."""
    results = []
    for stage, precision in RESUMED:
        config = run_config(
            folder / f"stage{stage}-{precision}.yaml",
            data,
            steps=6,
            checkpoint__every=3,
            checkpoint__keep=3,
            objectives=[{**TARGET, "bank_size": 48}, {"kind": "contrastive", "layers": [1]}],
            optimizer__layer_decay=0.7,
            engine__zero_stage=stage,
            engine__precision=precision,
            engine__micro_batch_size=2,
        )
        run_dir, losses = Path(config.run_dir), []
        for resume in (None, "auto"):
            train(config, resume)
            barrier()
            losses.append(_losses(config))
            barrier()
            if rank() == 0 and resume is None:
                shutil.rmtree(run_dir / "checkpoints" / "step-000006")
            barrier()
        results.append((losses[0], losses[1]))
    return results


def _without_own_file(folder: Path, data: Path) -> str:
    """What a rank says when another rank's file is gone."""
    config = run_config(folder / "gone.yaml", data, steps=1, objectives=[TARGET])
    train(config)
    barrier()
    files = sorted((Path(config.run_dir) / "checkpoints" / "step-000001").glob("objectives_rank_*.safetensors"))
    assert [file.name for file in files] == [f"objectives_rank_{i:05d}.safetensors" for i in range(2)]
    barrier()
    if rank() == 0:
        files[1].unlink()
    barrier()
    try:
        train(config, "auto")
    except UserError as error:
        return str(error)
    return "nothing"


def _pair(data: Path, folder: Path) -> tuple[dict, list, str]:
    return _train(data, folder), _resume(data, folder), _without_own_file(folder, data)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory) -> dict[str, list[dict]]:
    return run_distributed_test(_train, 1, args=(data, tmp_path_factory.mktemp("alone")))[0]


@pytest.fixture(scope="module")
def pair(data, tmp_path_factory) -> list[tuple[dict, list, str]]:
    return run_distributed_test(_pair, 2, args=(data, tmp_path_factory.mktemp("pair")))


@pytest.mark.parametrize(("name", "stage"), CASES)
def test_two_ranks_have_the_losses_of_one(alone, pair, name, stage):
    one, two = alone[f"{name}-{stage}"], pair[0][0][f"{name}-{stage}"]
    assert len(one) == len(two) == STEPS
    for expected, found in zip(one, two, strict=True):
        assert found == pytest.approx(expected, abs=1e-6, rel=1e-6)


@pytest.mark.parametrize("case", range(len(RESUMED)), ids=[f"stage{s}-{p}" for s, p in RESUMED])
def test_a_resumed_run_repeats_the_losses_exactly(pair, case):
    whole, continued = pair[0][1][case]
    assert len(whole) == 6
    assert continued == whole
    assert [record["contrastive_target_bank(%)"] for record in whole][2] == 50


def test_a_rank_without_its_file_ends_all_with_one_message(pair):
    for _, _, message in pair:
        assert "no checkpoint of" in message
        assert "step-000001: objectives_rank_00001.safetensors is missing" in message
