"""Evaluation over several ranks: the numbers of one rank, uneven slices, errors that reach every rank."""

import contextlib
import io
from dataclasses import replace

import torch
from harness import run_distributed_test
from small import random_batch

from mmd2v.cli.main import main
from mmd2v.distributed.collectives import rank, world_size
from mmd2v.errors import ReportedByMainRank, UserError

IMAGES, BATCH = 11, 5


class Output:
    def __init__(self, embedding):
        self.embedding = embedding


class FakeStudent(torch.nn.Module):
    """Embeddings that depend on the content of a sample alone, with a mark when it runs in training mode."""

    calls = 0

    def forward(self, batch):
        FakeStudent.calls += 1
        assert not self.training
        images = batch.images.double().flatten(1)
        seeds = [int(row[0] * 256 + row[1]) for row in images.tolist()]
        image = torch.stack([torch.randn(8, generator=torch.Generator().manual_seed(s)) for s in seeds])
        noise = torch.stack(
            [torch.randn(8, generator=torch.Generator().manual_seed(s)) for s in batch.text_ids.tolist()]
        )
        text = image[batch.caption_image] + 1.5 * noise
        normalize = torch.nn.functional.normalize
        return Output({"image": normalize(image, dim=1), "text": normalize(text, dim=1)})


def samples():
    """All images; number 7 has the id of number 2."""
    batch = random_batch(IMAGES, captions=3, seed=4)
    ids = list(batch.sample_ids)
    ids[7] = ids[2]
    first = torch.cat([torch.zeros(1), batch.text_lengths.cumsum(0)[:-1]]).long()
    # One token a caption: enough for the fake, and easy to slice.
    return replace(
        batch, sample_ids=tuple(ids), text_ids=batch.text_ids[first] + 50 * torch.arange(len(first)).int(),
        text_lengths=torch.ones_like(batch.text_lengths),
    )  # fmt: skip


def loader(rank: int, world_size: int, failing: bool = False, images: int = IMAGES):
    whole = samples()
    first, last = rank * images // world_size, (rank + 1) * images // world_size
    for start in range(first, last, BATCH):
        rows = slice(start, min(start + BATCH, last))
        captions = slice(rows.start * 3, rows.stop * 3)
        if failing and rank == world_size - 1 and start > first:
            raise UserError("shard x: sample y: the image does not decode")
        yield replace(
            whole,
            images=whole.images[rows],
            text_ids=whole.text_ids[captions],
            text_lengths=whole.text_lengths[captions],
            caption_image=whole.caption_image[captions] - rows.start,
            sample_ids=whole.sample_ids[rows],
        )


def alone():
    from mmd2v.evaluation.retrieval import evaluate

    return evaluate(FakeStudent(), loader(0, 1))


def work() -> dict:
    """What each rank does."""
    from mmd2v.evaluation.retrieval import evaluate

    metrics = evaluate(FakeStudent().train(), loader(rank(), world_size()))
    calls = FakeStudent.calls
    errors = []
    for keywords, arguments in (({"failing": True}, {}), ({"images": 1}, {}), ({}, {"expected": (12, None)})):
        try:
            evaluate(FakeStudent(), loader(rank(), world_size(), **keywords), **arguments)
            errors.append(None)
        except UserError as error:
            errors.append((str(error), isinstance(error, ReportedByMainRank)))
    return {"metrics": metrics, "calls": calls, "errors": errors}


def eval_of_an_absent_export(folder: str) -> tuple[int, str]:
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed):
        status = main(["eval", "retrieval", f"{folder}/none", "--shards", folder, "--device", "cpu"])
    return status, printed.getvalue()


def test_one_rank_needs_no_process_group():
    metrics = alone()
    assert not torch.distributed.is_initialized()
    assert (metrics["images"], metrics["captions"], metrics["duplicate_images"]) == (10, 33, 1)
    assert 0 < metrics["i2t_R@1"] < 1


def test_two_ranks_give_the_same_numbers_and_the_same_errors():
    expected = alone()
    results = run_distributed_test(work, 2)
    for number, result in enumerate(results):
        assert result["metrics"] == expected
        # Rank 0 alone tells what all ranks know.
        assert [silent for _, silent in result["errors"]] == [number != 0] * 3
        unreadable, too_few, miscounted = (message for message, _ in result["errors"])
        assert unreadable == "shard x: sample y: the image does not decode"
        assert "fewer images than the 2 ranks" in too_few
        assert miscounted == "evaluation: found 10 images, expected 12"
    # Ranks run the same number of forward passes, as ZeRO-3 needs it.
    assert len({result["calls"] for result in results}) == 1


def test_an_error_of_eval_is_printed_once(tmp_path):
    (told, message), (silent, nothing) = run_distributed_test(eval_of_an_absent_export, 2, args=(str(tmp_path),))
    assert (told, silent, nothing) == (2, 2, "")
    assert message.startswith(f"error: model: no folder '{tmp_path}/none', expected one that `mmd2v export` wrote")
    assert message.count("\n") == 1
