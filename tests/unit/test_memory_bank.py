"""The bank of teacher CLS and the loss against it: order, what counts, false negatives, state, dense references."""

import errno
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from run_checkpoints import ALONE, FOUND
from small import StubTokenizer, random_batch, small_config

from mmd2v.config.training import CheckpointConfig
from mmd2v.data.annotation_record import Annotation
from mmd2v.distributed.buffers import average_buffers
from mmd2v.errors import UserError
from mmd2v.models.student import build_student
from mmd2v.models.teachers import Targets
from mmd2v.models.teachers.replay import ReplayTeacher
from mmd2v.objectives import build_objectives, memory_bank
from mmd2v.objectives.memory_bank import UNKNOWN, MemoryBank, sample_numbers
from mmd2v.train.checkpoints import saving
from mmd2v.train.checkpoints.writer import CheckpointWriter
from mmd2v.train.rank_state import load_rank_state, rank_file, save_rank_state


class StubTeacher:
    def __init__(self, width: int, modality: str) -> None:
        self.width, self.modality = width, modality


def build(teacher=None, **term):
    teacher = teacher or StubTeacher(7, "image")
    term = {"kind": "contrastive_target", "teacher": "t", "bank_size": 10, **term}
    config = small_config(objectives=[term], teachers={"t": {"name": "timm:resnet10t"}})
    student = build_student(config, StubTokenizer()).eval()
    return student, build_objectives(config, student, {"t": teacher})


def steps(count, captions=1, seed=0, weights=None, rows=4):
    """Batches of four samples with ids of their own and the teacher's CLS."""
    random = torch.Generator().manual_seed(seed)
    for step in range(count):
        batch = random_batch(captions=captions, seed=step)
        ids = tuple(f"step{step}-{i}" for i in range(4))
        yield replace(batch, sample_ids=ids, weights=weights), torch.randn(rows, 7, generator=random)


def dense(query, keys, ids, own, bank, scale):
    """Plain float64 InfoNCE: query i has the positive keys[own[i]]; ``bank`` is a list of (id, row)."""
    query, keys = F.normalize(query.double(), dim=-1), F.normalize(keys.double(), dim=-1)
    total = 0.0
    for i in range(len(query)):
        positive = scale * query[i] @ keys[own[i]]
        negatives = [scale * query[i] @ keys[j] for j in range(len(keys)) if ids[j] != ids[own[i]]]
        negatives += [scale * query[i] @ row.double() for name, row in bank if name != ids[own[i]]]
        total = total + torch.stack([positive, *negatives]).logsumexp(0) - positive
    return total / len(query)


# --------------------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize("in_batch", [True, False])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_losses_are_those_of_a_dense_float64_reference(in_batch, precision):
    student, objectives = build(in_batch=in_batch, bank_precision=precision)
    term, bank, half = objectives.terms[0], [], {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    for batch, cls in steps(5, captions=2):
        output = student(batch)
        losses = objectives(output, {"t": Targets(cls)}, batch)
        ids = list(batch.sample_ids)
        for modality in ("image", "text"):
            own = list(range(4)) if modality == "image" else batch.caption_image.tolist()
            query = term.heads[modality](output.pooled[modality])
            found = losses[f"contrastive_target_loss/{modality}"]
            if in_batch:
                expected = dense(query, cls, ids, own, bank, 1 / 0.07)
            else:  # one key a query: nothing else of the step is there
                rows = [
                    dense(row[None], cls[i : i + 1], ids[i : i + 1], [0], bank, 1 / 0.07)
                    for row, i in zip(query, own, strict=True)
                ]
                expected = sum(rows) / len(rows)
            torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
            ours, theirs = (
                torch.autograd.grad(x, output.pooled[modality], retain_graph=True)[0] for x in (found, expected)
            )
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
        bank = (bank + list(zip(ids, F.normalize(cls, dim=-1).to(half), strict=True)))[-10:]


def test_without_a_bank_it_is_infonce_over_the_batch():
    student, objectives = build(bank_size=0, modalities=["image"], temperature=0.1)
    (batch, cls), *_ = steps(1)
    output = student(batch)
    query = F.normalize(objectives.terms[0].heads["image"](output.pooled["image"]), dim=-1)
    expected = F.cross_entropy(query @ F.normalize(cls, dim=-1).T / 0.1, torch.arange(4))
    for _ in range(2):
        found = objectives(output, {"t": Targets(cls)}, batch)
        torch.testing.assert_close(found["contrastive_target_loss/image"], expected)
    assert objectives.metrics()["contrastive_target_bank(%)"] == 0


def test_a_text_teacher_gives_a_target_a_caption():
    student, objectives = build(StubTeacher(7, "text"), shared_head=True)
    (batch, cls), *_ = steps(1, captions=2, rows=8)
    output, owner = student(batch), batch.caption_image
    losses = objectives(output, {"t": Targets(cls)}, batch)
    ids = [batch.sample_ids[i] for i in owner]
    head = objectives.terms[0].heads["shared"]
    for modality, rows in (("image", output.pooled["image"][owner]), ("text", output.pooled["text"])):
        # The other caption of the same image is no negative.
        expected = dense(head(rows), cls, ids, list(range(8)), [], 1 / 0.07)
        torch.testing.assert_close(
            losses[f"contrastive_target_loss/{modality}"].double(), expected, rtol=1e-5, atol=1e-6
        )


def test_the_own_sample_in_the_bank_is_no_negative():
    student, objectives = build(modalities=["image"])
    (batch, cls), *_ = steps(1)
    first, second = (objectives(student(batch), {"t": Targets(cls)}, batch)["loss"] for _ in range(2))
    # The others of the step are there twice now, its own vector is not.
    assert second > first
    query = objectives.terms[0].heads["image"](student(batch).pooled["image"])
    bank = list(zip(batch.sample_ids, F.normalize(cls, dim=-1).half(), strict=True))
    expected = dense(query, cls, list(batch.sample_ids), list(range(4)), bank, 1 / 0.07)
    torch.testing.assert_close(second.double(), expected, rtol=1e-5, atol=1e-6)


def test_samples_without_ids_are_told_apart_within_the_step_alone():
    student, objectives = build(modalities=["image"])
    (batch, cls), *_ = steps(1)
    with_ids = objectives(student(batch), {"t": Targets(cls)}, batch)["loss"]
    other_student, others = build(modalities=["image"])
    batch = replace(batch, sample_ids=())
    torch.testing.assert_close(others(other_student(batch), {"t": Targets(cls)}, batch)["loss"], with_ids)
    assert others.terms[0].bank.owners_K.unique().tolist() == [UNKNOWN]


def test_damaged_samples_are_neither_query_nor_negative():
    weights = torch.tensor([1.0, 0.0, 1.0, 1.0])
    student, objectives = build(modalities=["text"])
    bank, kept = [], [0, 2, 3]
    for batch, cls in steps(3, weights=weights):
        output = student(batch)
        found = objectives(output, {"t": Targets(cls)}, batch)["loss"]
        ids = [batch.sample_ids[i] for i in kept]
        query = objectives.terms[0].heads["text"](output.pooled["text"])[kept]
        expected = dense(query, cls[kept], ids, [0, 1, 2], [row for row in bank if row], 1 / 0.07) * 3 / 4
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
        rows = zip(batch.sample_ids, F.normalize(cls, dim=-1).half(), weights, strict=True)
        bank = (bank + [(name, row) if weight else None for name, row, weight in rows])[-10:]


def test_the_gradient_goes_to_the_student_alone_and_the_temperature_is_clamped():
    student, objectives = build()
    (batch, cls), *_ = steps(1)
    cls.requires_grad_()
    objectives(student(batch), {"t": Targets(cls)}, batch)["loss"].backward()
    assert cls.grad is None
    term = objectives.terms[0]
    assert term.log_scale.grad.abs() > 0 and student.layers[0].mlp["image"].fc1.weight.grad is not None
    with torch.no_grad():
        term.log_scale.fill_(9.0)
    assert objectives.metrics()["contrastive_target_scale"].item() == pytest.approx(100)


def test_stored_outputs_of_a_teacher_serve_as_its_own(monkeypatch):
    student, objectives = build()
    (batch, cls), *_ = steps(1)
    annotation = object.__new__(Annotation)
    for name, value in {"width": 7, "tokens": None}.items():
        object.__setattr__(annotation, name, value)
    config = small_config(teachers={"t": {"name": "timm:resnet10t"}}).teachers["t"]
    replayed = ReplayTeacher("t", config, annotation)
    batch = replace(batch, teacher_outputs={"t": cls.half()})
    found = objectives(student(batch), {"t": replayed(batch)}, batch)["loss"]
    other_student, others = build(replayed)
    torch.testing.assert_close(found, others(other_student(batch), {"t": Targets(cls.half().float())}, batch)["loss"])


def test_evaluation_leaves_the_bank_alone():
    student, objectives = build()
    (batch, cls), *_ = steps(1)
    objectives.eval()(student(batch), {"t": Targets(cls)}, batch)
    assert objectives.terms[0].bank.inserted == 0


def test_terms_that_cannot_be():
    with pytest.raises(ValidationError, match="found 0 without `in_batch`"):
        build(bank_size=0, in_batch=False)
    student, objectives = build()
    batch = replace(random_batch(), mean_over=3.5)
    with pytest.raises(UserError, match=r"contrastive_target: the ranks must have equally many samples"):
        objectives(student(batch), {"t": Targets(torch.randn(4, 7))}, batch)


# --------------------------------------------------------------------------------------------- the queue


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("size", [4, 8, 12, 20])
def test_the_queue_holds_the_newest_rows_however_many_ranks_share_it(monkeypatch, ranks, size):
    monkeypatch.setattr(memory_bank, "world_size", lambda: ranks)
    banks = [MemoryBank(size, 1, torch.float16, "x") for _ in range(ranks)]
    rows = 0
    for new in (4, 8, 4, 16, 8, 4, 4, 4):
        values = torch.arange(rows, rows + new)
        for number, bank in enumerate(banks):
            monkeypatch.setattr(memory_bank, "rank", lambda number=number: number)
            bank.push(values[:, None].float(), values, values % 5 != 0)
        rows += new
        held = [int(row) for bank in banks for row in bank.rows_KC[:, 0]]
        newest = [value for value in range(rows) if value >= rows - size]
        counted = sorted(int(row) for bank in banks for row in bank.rows_KC[bank.counts_K, 0])
        assert counted == [value for value in newest if value % 5]
        assert set(newest) <= set(held)


def test_a_row_that_is_not_finite_takes_its_place_and_never_counts():
    bank = MemoryBank(4, 2, torch.float32, "here")
    rows = torch.tensor([[1.0, 2.0], [float("nan"), 1.0], [3.0, float("inf")]])
    bank.push(rows, torch.arange(3), torch.tensor([True, True, True]))
    assert bank.counts_K.tolist() == [True, False, False, False]
    assert bank.rows_KC.isfinite().all() and bank.inserted == 3


def test_ranks_have_equally_many_places(monkeypatch):
    monkeypatch.setattr(memory_bank, "world_size", lambda: 3)
    with pytest.raises(UserError, match=r"bank_size: found 10, expected a multiple of the 3 ranks, such as 9"):
        build()


def test_sample_numbers_are_positive_and_do_not_depend_on_the_process():
    numbers = sample_numbers(random_batch())
    assert numbers.dtype == torch.int64 and (numbers > UNKNOWN).all() and len(numbers.unique()) == 4
    assert sample_numbers(random_batch()).tolist() == numbers.tolist()
    assert numbers[0].item() == 7261679073387372761  # of "s0", by hashlib alone


# --------------------------------------------------------------------------------------------- its state


def test_the_bank_is_part_of_no_module_state():
    _, objectives = build()
    assert not list(objectives.buffers())
    assert not any("bank" in name for name in objectives.state_dict())
    bank = objectives.terms[0].bank
    bank.push(torch.ones(4, 7), torch.arange(4), torch.ones(4, dtype=torch.bool))
    objectives.to(torch.float64)
    average_buffers(objectives)
    assert bank.rows_KC.dtype == torch.float16 and bank.counts_K.sum() == 4


def test_state_goes_through_a_file(tmp_path):
    student, objectives = build()
    _, twin = build()
    batches = list(steps(5))
    for batch, cls in batches[:2]:
        objectives(student(batch), {"t": Targets(cls)}, batch)
    save_rank_state(objectives, CheckpointWriter(tmp_path, None))
    load_rank_state(twin, tmp_path)
    for batch, cls in batches[2:]:
        pair = [terms(student(batch), {"t": Targets(cls)}, batch)["loss"].item() for terms in (objectives, twin)]
        assert pair[0] == pair[1]


def test_state_that_does_not_fit(tmp_path):
    _, objectives = build()
    with pytest.raises(UserError, match=r"objectives_rank_00000.safetensors: missing; the checkpoint lacks"):
        load_rank_state(objectives, tmp_path)
    save_rank_state(objectives, CheckpointWriter(tmp_path, None))
    with pytest.raises(
        UserError, match=r"bank_size: checkpoint \[10, 7\] float16 .rows of a rank., this run \[12, 7\]"
    ):
        load_rank_state(build(bank_size=12)[1], tmp_path)
    with pytest.raises(UserError, match=r"this run .* bfloat16"):
        load_rank_state(build(bank_precision="bf16")[1], tmp_path)
    rank_file(tmp_path).write_bytes(b"broken")
    with pytest.raises(UserError, match="the checkpoint is damaged"):
        load_rank_state(objectives, tmp_path)


def test_a_state_that_cannot_be_written_leaves_no_checkpoint(tmp_path, monkeypatch):
    def full(objectives, writer):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(saving, "_write", lambda engine, writer: None)
    monkeypatch.setattr(saving, "save_rank_state", full)
    engine = SimpleNamespace(module=SimpleNamespace(objectives=None))
    checkpointer = saving.Checkpointer(tmp_path, CheckpointConfig(), ALONE)
    checkpointer.save(engine, FOUND)
    with pytest.raises(UserError, match=r"could not be written \(rank 0: the disk is full"):
        checkpointer.finish()
    assert not list((tmp_path / "checkpoints").iterdir())


def test_objectives_that_keep_nothing_write_nothing(tmp_path):
    config = small_config()
    objectives = build_objectives(config, build_student(config, StubTokenizer()), {})
    save_rank_state(objectives, CheckpointWriter(tmp_path, None))
    assert not list(tmp_path.iterdir())
    load_rank_state(objectives, tmp_path)
