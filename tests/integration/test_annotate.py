"""Stored outputs of teachers: a run that replays them is the run with the teachers, and anything else is noticed."""

import contextlib
import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from training_runs import make_data, run_config, write_config
from waiting import holding, wait_until

from mmd2v.config.load import load_config
from mmd2v.errors import UserError
from mmd2v.train.metrics import read_metrics

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
from harness import run_distributed_test

MICRO = 8
"""Images of a training step, and of the annotating teacher's forward pass: kernels round by the size of a batch, so
that only with equal ones the losses are equal to the last bit."""
STEPS = 15  # of 8 images: two and a half epochs of 48
EPOCHS = 8
"""Of the command that is killed on the way."""
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
SMALL_BERT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three shards of 16 images with two captions each, teachers, and the config of a run of 2.5 epochs."""
    from transformers import BertConfig, BertModel

    from mmd2v.cli import data

    folder = make_data(tmp_path_factory.mktemp("annotate"))
    arguments = ["--count", 48, "--size", 32, "--seed", 5, "--captions", 2, "--shard-size", 16]
    assert data.main(["synth", "--out", str(folder / "shards"), *map(str, arguments)]) == 0
    torch.manual_seed(1)
    BertModel(BertConfig(vocab_size=2000, max_position_embeddings=32, **SMALL_BERT)).save_pretrained(folder / "bert")
    write_config(folder / "run.yaml", folder, steps=STEPS, engine__batch_size=MICRO, **_data(folder))
    return folder


def _data(folder: Path) -> dict[str, object]:
    return {"data__train": {"shards": str(folder / "shards")}, "data__shuffle_shards": 2}


def _annotate(config, out: Path, **options) -> str:
    from mmd2v.train.annotate import Options, annotate

    return annotate(config, Options(out, **{"batch_size": MICRO, **options}))


def _train(config, resume: str | None = None) -> tuple[list[float], str]:
    """Losses of all steps, and what was said."""
    from mmd2v.train.loop import train

    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        train(config, resume)
    return _losses(config), said.getvalue()


def _losses(config) -> list[float]:
    return [record["loss"] for record in read_metrics(Path(config.run_dir) / "metrics.jsonl") if "loss" in record]


def _config(folder: Path, name: str, *overrides: object, file: str = "run.yaml"):
    return load_config(folder / file, ["--run_dir", str(folder / "runs" / name), *map(str, overrides)])


def _files(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


@contextlib.contextmanager
def _no_teacher_is_built():
    """Fail when a teacher's model is loaded."""
    from mmd2v.models import teachers

    def refuse(*arguments: object) -> None:
        raise AssertionError("a teacher was built")

    with pytest.MonkeyPatch.context() as patch:
        for kind in teachers.TEACHERS:
            patch.setitem(teachers.TEACHERS, kind, refuse)
        yield


# --------------------------------------------------------------------------------- live and replayed runs


def _live_and_replayed(folder: Path) -> dict[str, object]:
    """Runs with the teacher and with its stored outputs, in one process."""
    from mmd2v.train import annotate

    torch.set_num_threads(1)
    found: dict[str, object] = {}
    out = folder / "out"
    with pytest.MonkeyPatch.context() as patch:
        copies: list[object] = []
        make = annotate.DeviceCopy
        patch.setattr(annotate, "DeviceCopy", lambda *arguments: copies.append(make(*arguments)) or copies[-1])
        found["summary"] = _annotate(_config(folder, "unused"), out)
        found["copies"] = len(copies)
    found["files"] = list(_files(out))
    found["live"], _ = _train(_config(folder, "live", "--checkpoint.every", 5))
    replay = ["--teachers.resnet.outputs", out]
    with _no_teacher_is_built():
        found["replayed"], found["said"] = _train(_config(folder, "replayed", *replay))
        found["workers"], _ = _train(_config(folder, "workers", *replay, "--data.workers", 2))
        # Half of the run with the teacher, then on from its checkpoint with what is stored.
        middle = str(folder / "runs" / "live" / "checkpoints" / "step-000010")
        found["resumed"], _ = _train(_config(folder, "resumed", *replay), middle)
    # The default batch of the command is another one, and so is the rounding.
    other = folder / "other"
    _annotate(_config(folder, "unused"), other, batch_size=128)
    name = "resnet/epoch-0001/shard-000001.safetensors"
    found["one batch"], found["other batch"] = (load_file(path / name)["cls"].numpy() for path in (out, other))
    found["other batch, losses"], _ = _train(_config(folder, "other", "--teachers.resnet.outputs", other))
    _annotate(_config(folder, "unused"), folder / "whole", batch_size=1, epochs=EPOCHS)
    found["again"] = _annotate(_config(folder, "unused"), out)
    return found


def _alone(folder: Path) -> tuple[dict[str, object], dict[str, str], dict[str, object]]:
    """Everything that one rank does, in one process: each has to import a lot."""
    return _live_and_replayed(folder), _misfits(folder), _other_teachers(folder)


@pytest.fixture(scope="module")
def alone(folder) -> tuple[dict[str, object], dict[str, str], dict[str, object]]:
    return run_distributed_test(_alone, 1, args=(folder,))[0]


@pytest.fixture(scope="module")
def runs(alone) -> dict[str, object]:
    return alone[0]


@pytest.fixture(scope="module")
def said(alone) -> dict[str, str]:
    return alone[1]


@pytest.fixture(scope="module")
def others(alone) -> dict[str, object]:
    return alone[2]


def test_replayed_losses_are_those_of_the_teacher_to_the_last_bit(runs):
    assert len(runs["live"]) == STEPS and runs["live"] == runs["replayed"] == runs["workers"]


def test_resumed_in_the_middle_with_stored_outputs(runs):
    assert runs["resumed"] == runs["live"][10:]


def test_with_another_batch_only_the_rounding_differs(runs):
    assert runs["other batch"] == pytest.approx(runs["one batch"], rel=1e-5, abs=1e-6)
    assert runs["other batch, losses"][:3] == pytest.approx(runs["live"][:3], rel=1e-5)
    # Adam's first steps make much of little; what it makes of it stays small.
    assert runs["other batch, losses"] == pytest.approx(runs["live"], rel=2e-3)


def test_what_is_stored_is_what_the_run_reads(runs):
    # Half of the third epoch: 24 images, shuffled over two shards of 16.
    whole = [f"resnet/epoch-{epoch:04d}/shard-{shard:06d}.safetensors" for epoch in range(2) for shard in range(3)]
    assert runs["files"][: len(whole) + 1] == ["resnet/annotation.json", *whole]
    assert len(runs["files"]) == len(whole) + 1 + 2
    assert "wrote 8 files" in runs["summary"] and "all files were there already" in runs["again"]


def test_all_shards_are_copied_on_one_stream(runs):
    assert runs["copies"] == 1


def test_one_line_says_that_a_teacher_is_replayed(runs, folder):
    lines = [line for line in runs["said"].splitlines() if line.startswith("teacher")]
    assert lines == [f"teacher resnet: replayed from {folder / 'out'} (3 epochs)"]


# ------------------------------------------------------------------------------------------- two ranks


def _annotate_and_train_on_ranks(folder: Path) -> tuple[list[float], list[float], str]:
    torch.set_num_threads(1)
    _annotate(_config(folder, "unused"), folder / "by_two")
    short = ["--steps", 8]
    _annotate(_config(folder, "unused", *short), folder / "by_two_halves", batch_size=MICRO // 2)
    live, _ = _train(_config(folder, "two_live", *short))
    replay = ["--teachers.resnet.outputs", folder / "by_two_halves", "--data.workers", 1]
    with _no_teacher_is_built():
        replayed, said = _train(_config(folder, "two_replayed", *short, *replay))
    return live, replayed, said


def test_two_ranks(folder, runs):
    (live, replayed, said), (_, _, said_by_other) = run_distributed_test(
        _annotate_and_train_on_ranks, 2, args=(folder,)
    )
    assert len(live) == 8 and live == replayed
    assert "teacher resnet: replayed" in said and said_by_other == ""
    assert _files(folder / "by_two") == _files(folder / "out")


# -------------------------------------------------------------------------------- what does not fit


def _misfits(folder: Path) -> dict[str, str]:
    """What is said of stored outputs that are not this run's, by name of the case."""
    from mmd2v.config.batch_plan import plan_batches
    from mmd2v.train.dry_run import dry_run
    from mmd2v.train.replay import choose_sources

    torch.set_num_threads(1)
    out, said = folder / "out", {}

    def choose(name: str, *overrides: object) -> None:
        config = _config(folder, "unused", "--teachers.resnet.outputs", out, *overrides)
        plan = plan_batches(config, 1)
        sources = choose_sources(config, plan, config.steps, torch.device("cpu"))
        said[name] = sources["resnet"].said

    choose("fits")
    choose("flip", "--data.image.flip", 0)
    choose("seed", "--seed", 4)
    weights = load_file(folder / "teacher.safetensors")
    save_file({name: value + (name == "conv1.0.weight") for name, value in weights.items()}, folder / "w.safetensors")
    choose("weights", "--teachers.resnet.name", f"timm:test_resnet@{folder / 'w.safetensors'}")
    choose("steps", "--steps", 19)
    choose("fewer images", "--data.train.limit", 20, "--steps", 5)
    choose("one caption more", "--data.captions_per_image", 2)
    choose("other data", "--data.train.shards", folder / "train")
    choose("folder", "--teachers.resnet.outputs", folder / "outt")
    shutil.copytree(out / "resnet", folder / "renamed" / "resnets")
    choose("name", "--teachers.resnet.outputs", folder / "renamed")
    gaps = folder / "gaps"
    shutil.copytree(out, gaps)
    (gaps / "resnet" / "epoch-0001" / "shard-000002.safetensors").unlink()
    choose("gaps", "--teachers.resnet.outputs", gaps)
    # What a command leaves that was to store more samples than an earlier one, and was interrupted.
    interrupted = folder / "interrupted"
    shutil.copytree(out, interrupted)
    _keep_rows(interrupted / "resnet" / "epoch-0001" / "shard-000001.safetensors", 4)
    choose("interrupted", "--teachers.resnet.outputs", interrupted)
    path = interrupted / "resnet" / "epoch-0000" / "shard-000001.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    choose("cut", "--teachers.resnet.outputs", interrupted)
    mixed = '{sets: {a: {shards: "' + str(folder / "shards") + '"}}}'
    choose("mixture", "--data.train", mixed)

    def refused(name: str, action) -> None:
        try:
            action()
            said[name] = "went well"
        except UserError as error:
            said[name] = str(error)

    refused("annotate again", lambda: _annotate(_config(folder, "unused", "--data.image.flip", 0), out))
    refused("other dtype", lambda: _annotate(_config(folder, "unused"), out, dtype="bf16"))
    refused("unknown teacher", lambda: _annotate(_config(folder, "unused"), out, teachers=("resnett",)))
    refused("no epochs", lambda: _annotate(_config(folder, "unused"), out, epochs=0))
    refused("file", lambda: _annotate(_config(folder, "unused"), folder / "teacher.safetensors"))

    # A live run says why; the losses are then the teacher's.
    live, told = _train(_config(folder, "fallback", "--teachers.resnet.outputs", out, "--seed", 4, "--steps", 2))
    said["live run"], said["live run, losses"] = told, str(len(live))

    replaced = folder / "replaced"
    shutil.copytree(folder / "shards", replaced)
    for kind in ("", ".idx"):  # the samples of one shard under the name of another
        shutil.copyfile(folder / "shards" / f"shard-000000.tar{kind}", replaced / f"shard-000001.tar{kind}")
    own = ["--teachers.resnet.outputs", out, "--data.train.shards", replaced]
    for workers in (0, 1):
        config = _config(folder, f"replaced{workers}", *own, "--data.workers", workers)
        refused(f"replaced, {workers} workers", lambda config=config: _train(config))

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), _no_teacher_is_built():
        dry_run(_config(folder, "unused", "--teachers.resnet.outputs", out))
    said["dry run"] = printed.getvalue()
    return said


def _keep_rows(path: Path, rows: int) -> None:
    """Cut a file of stored outputs down to its first samples."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file({name: tensor[:rows].clone() for name, tensor in load_file(path).items()}, path, metadata)


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("flip", "data.image.flip differs: stored 0.5, now 0"),
        ("seed", "seed differs: stored 3, now 4"),
        ("weights", "the teacher's weights (sha256 of their files) differs: stored "),
        ("steps", "the run reads 4 epochs, and of epoch 2 (the first is 0) 1 of 3 shards are missing, such as shard-"),
        ("other data", "such as shard-000000"),
        ("folder", "there is no such folder. Did you mean 'out'?"),
        ("name", "it holds nothing of a teacher 'resnet', found ['resnets']. Did you mean 'resnets'?"),
        ("gaps", "of epoch 1 (the first is 0) 1 of 3 shards are missing, such as shard-000002"),
        ("interrupted", "shard shard-000001: stored 4 samples, now 16"),
        ("cut", "shard-000001.safetensors is damaged or of another annotation; annotate again"),
        ("mixture", "it holds nothing of data.train.sets.a, found data.train.shards"),
    ],
)
def test_a_teacher_runs_where_its_outputs_are_not_the_runs(said, case, reason):
    if case == "other data":  # it has one shard of 48 images under the name of one of 16
        reason = "shard shard-000000: stored 16 samples, now 48"
    assert said[case].startswith("teacher resnet: live, because ") and reason in said[case]


def test_what_changes_nothing_for_the_teacher_is_replayed(said):
    for case in ("fits", "fewer images", "one caption more"):
        assert said[case].startswith("teacher resnet: replayed from "), said[case]


def test_a_live_run_says_why(said, folder):
    because = f"teacher resnet: live, because {folder / 'out'}: seed differs: stored 3, now 4"
    assert because in said["live run"].splitlines() and said["live run, losses"] == "2"


def test_a_replaced_shard_is_an_error(said):
    for workers in (0, 1):
        text = said[f"replaced, {workers} workers"]
        assert "shard-000001.tar: sample '" in text and "the shard was replaced" in text


def test_a_folder_of_other_outputs_is_refused(said, folder, runs):
    assert (
        "resnet holds outputs of other settings: data.image.flip differs: stored 0.5, now 0" in said["annotate again"]
    )
    assert 'other settings: dtype differs: stored "fp32", now "bf16"' in said["other dtype"]
    assert "--teacher: unknown name 'resnett'. Did you mean 'resnet'?" in said["unknown teacher"]
    assert said["no epochs"] == "--epochs: found 0, expected at least 1"
    assert said["file"].startswith("--out: ") and "is a file, expected a folder" in said["file"]
    assert list(_files(folder / "out")) == runs["files"]


def test_dry_run_says_it_and_loads_no_teacher(said, folder):
    assert f"teacher resnet: replayed from {folder / 'out'} (3 epochs)" in said["dry run"]
    assert "forward, backward and update in" in said["dry run"] and "cls_regression_loss" in said["dry run"]


# ------------------------------------------------------------------------------- kinds of teachers, damage


def _other_teachers(folder: Path) -> dict[str, object]:
    from mmd2v.config.batch_plan import plan_batches
    from mmd2v.data.stream import train_loader
    from mmd2v.data.tokenizers import load_tokenizer
    from mmd2v.models.teachers import build_teachers
    from mmd2v.train.replay import choose_sources

    torch.set_num_threads(1)
    found: dict[str, object] = {}

    def both(name: str, config_file: str, *overrides: object, teachers: tuple[str, ...], **options) -> None:
        """Store, train live and replayed; then compare a batch's targets."""
        out = folder / f"out_{name}"
        _annotate(_config(folder, "unused", *overrides, file=config_file), out, **options)
        found[f"{name}: files"] = [path for path in _files(out) if path.endswith(".safetensors")]
        found[f"{name}: live"], _ = _train(_config(folder, f"{name}_live", *overrides, file=config_file))
        replay = [part for teacher in teachers for part in (f"--teachers.{teacher}.outputs", out)]
        with _no_teacher_is_built():
            config = _config(folder, f"{name}_replayed", *overrides, *replay, file=config_file)
            found[f"{name}: replayed"], found[f"{name}: said"] = _train(config)

    # A teacher of text and one of images; each sample has two captions.
    text = {"name": f"hf:{folder / 'bert'}", "modality": "text", "precision": "fp32", "pooling": "mean"}
    resnet = run_config(folder / "plain.yaml", folder).teachers["resnet"].model_dump(exclude_none=True)
    objectives = [
        {"kind": "cls_regression", "teacher": "bert"},
        {"kind": "cls_regression", "teacher": "resnet", "loss": "cosine"},
    ]
    changes = {"teachers": {"bert": text, "resnet": resnet}, "objectives": objectives, "steps": 8, **_data(folder)}
    write_config(folder / "text.yaml", folder, **changes)
    both("one", "text.yaml", teachers=("bert", "resnet"))
    whole = ["--data.captions_per_image", 2, "--data.image.flip", 0, "--data.image.crop_scale", "[1, 1]"]
    both("all", "text.yaml", *whole, teachers=("bert", "resnet"))

    # Text alone in the student: with the teacher's outputs stored, no image is read.
    only_text = {
        "model__encoders": {"text": {"kind": "tokens"}},
        "objectives": [{"kind": "cls_regression", "teacher": "resnet", "modalities": ["text"]}],
        "steps": 8,
    }
    write_config(folder / "only_text.yaml", folder, **only_text, **_data(folder))
    both("only_text", "only_text.yaml", teachers=("resnet",))

    # A mixture, whose sets are at different epochs: of 80 samples, b gives 40 of its 20.
    mixed = {"a": {"shards": str(folder / "shards")}, "b": {"shards": str(folder / "train"), "limit": 20}}
    write_config(folder / "mixed.yaml", folder, data__train={"sets": mixed}, steps=10)
    both("mixture", "mixed.yaml", teachers=("resnet",))

    # Damaged samples: an image that does not decode.
    damaged = folder / "damaged"
    damaged.mkdir()
    for path in sorted((folder / "shards").glob("*.tar")):
        _copy_with_a_broken_image(path, damaged / path.name, path.name == "shard-000001.tar")
    both("damage", "run.yaml", "--data.train.shards", damaged, "--data.damage.limit", 0.1, "--steps", 12,
         teachers=("resnet",))  # fmt: skip
    out = folder / "out_damage" / "resnet" / "epoch-0000" / "shard-000001.safetensors"
    found["damage: ids"] = load_file(out)["ids"].tolist()

    # Tokens, in half the bytes.
    out = folder / "out_tokens"
    _annotate(_config(folder, "unused"), out, tokens=True, dtype="bf16", epochs=1)
    config = _config(folder, "unused", "--teachers.resnet.outputs", out, "--steps", 6)
    sources = choose_sources(config, plan_batches(config, 1), 6, torch.device("cpu"))
    stored = sources["resnet"].stored
    tokenizer = load_tokenizer(config.data.tokenizer)
    loader = train_loader(
        config.data, seed=3, tokenizer=tokenizer, rank=0, world_size=1, micro_batch_size=8, outputs=[stored]
    )
    batch = next(iter(loader))
    live = build_teachers(config, torch.device("cpu"))["resnet"](batch)
    replayed = build_teachers(config, torch.device("cpu"), None, {"resnet": stored.annotation})["resnet"](batch)
    found["tokens"] = [
        [tensor.float().numpy() for tensor in pair]
        for pair in ((live.cls_BD, replayed.cls_BD), (live.tokens_BTD, replayed.tokens_BTD))
    ]
    try:
        _annotate(_config(folder, "unused", file="text.yaml"), folder / "out_text_tokens", tokens=True)
    except UserError as error:
        found["text tokens"] = str(error)
    return found


def _copy_with_a_broken_image(source: Path, target: Path, broken: bool) -> None:
    with tarfile.open(source) as old, tarfile.open(target, "w") as new:
        for member in old.getmembers():
            data = old.extractfile(member).read()
            if broken and not member.name.endswith((".json", ".txt")):
                data, broken = b"no image" * (len(data) // 8) + b"." * (len(data) % 8), False
            new.addfile(member, io.BytesIO(data))


def test_text_and_image_teachers_together(others):
    """Captions rotate from epoch to epoch: so do the rows of the teacher of text."""
    assert len(others["one: live"]) == 8 and others["one: live"] == others["one: replayed"]
    assert others["one: said"].count(": replayed from ") == 2
    assert sum(path.startswith("bert/epoch-0001/") for path in others["one: files"]) > 0


def test_what_is_the_same_in_every_epoch_is_stored_once(others):
    files = [f"{name}/epoch-any/shard-{shard:06d}.safetensors" for name in ("bert", "resnet") for shard in range(3)]
    assert sorted(others["all: files"]) == files
    assert len(others["all: live"]) == 8 and others["all: live"] == others["all: replayed"]
    assert others["all: said"].count("(one for every epoch)") == 2


def test_a_student_of_text_needs_no_image_any_more(others):
    assert len(others["only_text: live"]) == 8 and others["only_text: live"] == others["only_text: replayed"]


def test_sets_of_a_mixture_have_epochs_of_their_own(others):
    assert len(others["mixture: live"]) == 10 and others["mixture: live"] == others["mixture: replayed"]
    epochs = [{path.split("/")[2] for path in others["mixture: files"] if f"/{name}/" in path} for name in "ab"]
    assert epochs[0] == {"epoch-0000"} and {"epoch-0000", "epoch-0001"} <= epochs[1]


def test_damaged_samples_are_left_out_in_both(others):
    assert others["damage: ids"].count(0) == 1 and len(others["damage: ids"]) == 16
    assert len(others["damage: live"]) == 12 and others["damage: live"] == others["damage: replayed"]
    assert "image_undecodable 1)" in others["damage: said"]  # met in two epochs, counted once


def test_tokens_are_replayed_in_the_stored_precision(others):
    for live, replayed in others["tokens"]:
        assert torch.equal(torch.from_numpy(replayed), torch.from_numpy(live).bfloat16().float())
        assert len(live) == 8 and live.any()
    assert others["tokens"][1][0].ndim == 3
    assert "--tokens: teacher bert sees text" in others["text tokens"]


# ----------------------------------------------------------------------------------------------- kill


def test_killed_and_run_again_the_files_are_the_same(folder, runs):
    """By kill -9 in the middle; what was finished is not made again."""
    command = [sys.executable, "-m", "mmd2v", "data", "annotate", str(folder / "run.yaml"), "--batch-size", "1"]
    options = ["--epochs", str(EPOCHS), "--data.workers", "1", "--out"]
    killed, files = folder / "killed", 3 * EPOCHS
    quiet = {"env": ENVIRONMENT | holding(12), "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([*command, *options, str(killed)], start_new_session=True, **quiet)

    def is_there():
        assert process.poll() is None
        return len(list(killed.glob("resnet/epoch-*/shard-*.safetensors"))) >= 5

    try:
        wait_until(is_there)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    finished = {path: path.stat().st_mtime_ns for path in killed.rglob("*.safetensors") if ".tmp" not in str(path)}
    assert 5 <= len(finished) < files

    again = subprocess.run(
        [*command, *options, str(killed)], env=ENVIRONMENT, capture_output=True, text=True, check=True
    )
    assert f"wrote {files - len(finished)} files" in again.stdout and "samples" in again.stderr
    assert all(path.stat().st_mtime_ns == made for path, made in finished.items())
    assert _files(killed) == _files(folder / "whole") and len(_files(killed)) == files + 1
