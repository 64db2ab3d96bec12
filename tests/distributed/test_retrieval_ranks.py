"""`mmd2v eval retrieval` on several ranks: the numbers of one, errors on all, and no hang when one is lost."""

import io
import json
import os
import signal
import socket
import sys
import threading
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from export_samples import CAPTIONS, photo, small_export
from harness import run_distributed_test
from mmd2v_process import as_if_started, forked
from safetensors.torch import load_file
from waiting import LONG, free_port, wait_until

from mmd2v.cli.main import main
from mmd2v.distributed.collectives import rank
from mmd2v.distributed.processes import LOST_STATUS
from mmd2v.errors import ReportedByMainRank, UserError
from mmd2v.evaluation.bootstrap import Bootstrap
from mmd2v.evaluation.retrieval_run import HowMeasured, RetrievalData, evaluate_retrieval

IMAGES = 11
HOW = HowMeasured(device="cpu", bootstrap=Bootstrap(30), batch_size=3, workers=1)
PROMPT = 120.0  # seconds, where one is enough; a collective would wait for hours


class Tied:
    """Embeddings of whole numbers before they are scaled, so that many scores are equal."""

    name, width, device = "tied", 4, torch.device("cpu")
    fault = None

    def encode_image(self, images, batch_size=64):
        rows = torch.stack([image.double().mean((1, 2)) for image in images])
        rows = torch.cat([rows, rows.sum(1, keepdim=True)], dim=1) // 40 + 1
        if self.fault == rank():
            rows[0] = float("inf")
        return torch.nn.functional.normalize(rows.float(), dim=1)

    def encode_text(self, texts, batch_size=256):
        rows = torch.tensor([[len(text) % 5, len(text) % 3, len(text) % 2, 1.0] for text in texts])
        return torch.nn.functional.normalize(rows, dim=1)

    def preprocessing(self):
        return "whole"


def make(folder):
    captions = [["x" * (3 * i + j) for j in range(1, 2 + i % 4)] for i in range(IMAGES)]
    for i in range(IMAGES):
        photo(i).save(folder / f"{i}.png")
    rows = [{"image": f"{i}.png", "caption": own} for i, own in enumerate(captions)]
    (folder / "captions.json").write_text(json.dumps(rows))
    return folder / "captions.json"


def measure(path, dump=None, how=HOW, model=None, **data):
    found = evaluate_retrieval(model or Tied(), RetrievalData([str(path)], **data), how, dump=dump)
    return None if found is None else (found.record(), found.text())


@pytest.mark.parametrize(("ranks", "batch_size"), [(2, 3), (3, 2), (3, 8)])
def test_ranks_give_the_numbers_of_one(tmp_path, ranks, batch_size):
    """Four batches, the last one smaller; six on three; and fewer batches than ranks."""
    path, how = make(tmp_path), replace(HOW, batch_size=batch_size)
    alone = measure(path, tmp_path / "alone", how)
    results = run_distributed_test(measure, ranks, args=(str(path), str(tmp_path / "several"), how))
    assert results == [alone, *[None] * (ranks - 1)]
    assert "leave open" in alone[1]
    for name in ("ids.json", "positives.json", "result.json"):
        assert (tmp_path / "several" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    one, several = (load_file(tmp_path / name / "embeddings.safetensors") for name in ("alone", "several"))
    assert all(torch.equal(one[name], several[name]) for name in one)


def say_error(path, fault, data):
    model = Tied()
    model.fault = fault
    try:
        measure(path, model=model, **data)
    except UserError as error:
        return str(error), isinstance(error, ReportedByMainRank)
    return None


@pytest.mark.parametrize("kind", ["broken", "infinite", "count"])
def test_an_error_reaches_every_rank_and_is_told_once(tmp_path, kind):
    path = make(tmp_path)
    if kind == "broken":  # of the last rank
        (tmp_path / "10.png").write_bytes(b"no image")
    fault, data = (1 if kind == "infinite" else None), ({"expected": (12, None)} if kind == "count" else {})
    told = run_distributed_test(say_error, 2, args=(str(path), fault, data))
    assert [silent for _, silent in told] == [False, True]
    assert told[0][0] == told[1][0]
    message = {
        "broken": "rank 1: .*10.png: the image does not decode",
        "infinite": "2 of 11 image embeddings hold NaN or infinity",
        "count": "found 11 images, expected 12",
    }[kind]
    with pytest.raises(UserError, match=message):
        raise UserError(told[0][0])


def eval_of_an_export(arguments):
    printed = io.StringIO()
    with redirect_stdout(printed):
        assert main(["eval", "retrieval", *arguments, "--device", "cpu", "--batch-size", "4"]) == 0
    return printed.getvalue()


def test_the_command_with_an_export_and_its_cache(tmp_path):
    (tmp_path / "data").mkdir()
    path, export = make(tmp_path / "data"), small_export(tmp_path)
    words = " ".join(CAPTIONS).split()  # that its tokenizer knows
    rows = json.loads(path.read_text())
    for i, row in enumerate(rows):
        row["caption"] = [" ".join(words[(3 * i + j) % len(words) :][:4]) for j in range(1 + i % 3)]
    path.write_text(json.dumps(rows))
    arguments = [str(export), str(path), "--resamples", "10"]
    alone = eval_of_an_export(arguments)
    assert "11 images, 21 captions" in alone and "centre crop" in alone
    cached = [*arguments, "--cache", str(tmp_path / "cache")]
    assert run_distributed_test(eval_of_an_export, 2, args=(cached,)) == [alone, ""]
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert eval_of_an_export(cached) == alone
    assert len(list((tmp_path / "cache").iterdir())) == 1


# ----------------------------------------------------------------------------- a lost rank


class Waits(Tied):
    """On rank 1 the second batch never ends, as on a device that hangs; rank 0 waits for it."""

    batches = 0

    def encode_text(self, texts, batch_size=256):
        self.batches += 1
        if self.batches == 2:
            print("READY", flush=True)
            if rank() == 1:
                threading.Event().wait(2 * LONG)
        return super().encode_text(texts)


def rank_process(number, port, out, path):
    with open(out, "wb", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    place = {"RANK": number, "WORLD_SIZE": 2, "LOCAL_RANK": number, "LOCAL_WORLD_SIZE": 2}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    as_if_started({**os.environ, **{name: str(value) for name, value in place.items()}})
    measure(path, model=Waits())


@pytest.mark.parametrize("lost", [0, 1])
def test_a_killed_rank_ends_the_other_with_a_message(tmp_path, lost):
    path = make(tmp_path)
    port = free_port()
    outputs = [tmp_path / f"rank{number}" for number in (0, 1)]
    processes = [
        forked().Process(target=rank_process, args=(number, port, str(outputs[number]), str(path))) for number in (0, 1)
    ]
    for process in processes:
        process.start()
    try:
        wait_until(lambda: all("READY" in _told(o) for o in outputs), lambda: [_told(output) for output in outputs])
        os.kill(processes[lost].pid, signal.SIGKILL)
        processes[1 - lost].join(PROMPT)
        assert processes[1 - lost].exitcode == LOST_STATUS
        told = _told(outputs[1 - lost])
        assert f"error: rank {lost} (host {socket.gethostname()}, pid {processes[lost].pid}) died at step " in told
        assert "Traceback" not in told and "R@1" not in told
    finally:
        for process in processes:
            process.kill()
            process.join()


def _told(output: Path) -> str:
    return output.read_text() if output.exists() else ""
