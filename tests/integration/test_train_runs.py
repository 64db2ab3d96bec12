"""Runs as a user starts them: in processes of their own, killed, resumed, out of disk, misconfigured."""

import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from mmd2v_process import run_mmd2v, start_ranks
from training_runs import make_data, write_config
from waiting import LONG, free_port, holding, wait_until

from mmd2v.train.checkpoints.folders import complete_checkpoints
from mmd2v.train.metrics import read_metrics

STEPS = 40
EVERY = 5
REPORT_EVERY = 3  # no divisor of EVERY: an interval ends at a checkpoint too
REPORTED = [step for step in range(1, STEPS + 1) if step % REPORT_EVERY == 0 or step % EVERY == 0]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
MMD2V = [sys.executable, "-m", "mmd2v"]

# Dropout and drop path: the resumed run must also draw the random numbers of the uninterrupted one.
NOISY = [{"kind": "separate", "drop_path": 0.2}, {"kind": "shared", "dropout": 0.2}]


def _mmd2v(*arguments: object, **options) -> subprocess.CompletedProcess[str]:
    return run_mmd2v(arguments, env=ENVIRONMENT, **options)


def _losses(run_dir: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in read_metrics(run_dir / "metrics.jsonl") if "loss" in record}


def _exact(run_dir: Path) -> list[dict[str, float]]:
    """Every record without what depends on the clock and the machine."""
    clock = ("throughput", "time/", "memory")
    records = read_metrics(run_dir / "metrics.jsonl")
    return [{name: value for name, value in r.items() if not name.startswith(clock)} for r in records]


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def config(data, tmp_path_factory) -> Path:
    return write_config(
        tmp_path_factory.mktemp("runs") / "whole.yaml",
        data,
        steps=STEPS,
        data__workers=1,
        data__eval={"shards": str(data / "test")},
        evaluation__at_start=True,
        model__layers=NOISY,
        engine__micro_batch_size=4,
        checkpoint__every=EVERY,
        logging__tensorboard=True,
        logging__every=REPORT_EVERY,
    )


@pytest.fixture(scope="module")
def whole(config) -> Path:
    """Run directory of an uninterrupted run."""
    result = _mmd2v("train", config)
    assert result.returncode == 0, result.stderr
    run_dir = Path(yaml.safe_load(config.read_text())["run_dir"])
    (run_dir / "output.txt").write_text(result.stdout + result.stderr)
    return run_dir


@pytest.mark.parametrize(
    "engine", [{"precision": "bf16", "zero_stage": 1}, {"zero_stage": 3, "zero3_persistence_threshold": 0}]
)
def test_untrained_model_is_evaluated_in_every_mode_of_the_engine(data, tmp_path, engine):
    config = write_config(
        tmp_path / "run.yaml",
        data,
        steps=1,
        data__eval={"shards": str(data / "test")},
        evaluation__at_start=True,
        # Its batch norms learn, and take no mixture of dtypes.
        model__encoders__image={"kind": "timm", "name": "test_resnet", "frozen": False},
        **{f"engine__{name}": value for name, value in engine.items()},
    )
    result = _mmd2v("train", config)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("recall") == 2


# ------------------------------------------------------------------------------------ a run's traces


def test_run_directory_holds_everything(whole):
    assert {"config.yaml", "environment.json", "metrics.jsonl", "tensorboard", "checkpoints"} <= set(_names(whole))
    assert _names(whole / "checkpoints") == [f"step-{STEPS - EVERY:06d}", f"step-{STEPS:06d}"]
    assert "/" not in (whole / "environment.json").read_text()  # nothing of this machine


def test_output_is_lines_without_noise(whole):
    lines = (whole / "output.txt").read_text().splitlines()
    assert lines[1].startswith("kernels on cpu in float32: expert_mlp segmented (on cpu)")
    assert lines[2] == "optimiser: torch.optim.AdamW (fused), named in the config"
    assert "4 images × 2 accumulation = 8 images a step" in lines[0]
    steps = [line for line in lines if line.startswith("step ") and "samples/s" in line]
    assert len(steps) == len(REPORTED)
    for part in ("loss ", "contrastive ", "cls_regression/image ", "lr ", "data ", "GB", "ETA"):
        assert part in steps[0]
    recall = [line for line in lines if "recall" in line]
    assert len(recall) == 2 and all("image→text R@1/5/10" in line and "(chance " in line for line in recall)
    assert len(lines) <= len(REPORTED) + 7


def test_records_have_units_and_every_term(whole):
    records = [r for r in read_metrics(whole / "metrics.jsonl") if "loss" in r]
    assert {"loss/contrastive_loss", "loss/cls_regression_loss/text", "learning_rate", "gradient_norm"} <= set(
        records[0]
    )
    assert {"throughput(samples/s)", "time/data(%)", "time/eta(s)", "memory(GB)", "epoch"} <= set(records[0])
    assert records[-1]["epoch"] == pytest.approx(STEPS * 8 / 48)
    assert records[0]["loss"] == pytest.approx(sum(v for k, v in records[0].items() if k.startswith("loss/")), rel=1e-5)


# ------------------------------------------------------------------------------------ kill and resume


def _start_and_end(
    command: list[object], run_dir: Path, after: int, hold: int, sign: signal.Signals
) -> subprocess.Popen[str]:
    """Start a run and send ``sign`` to its process group, as a terminal does, once it has done step ``after``.

    And has a checkpoint, which is written beside the steps. After ``hold`` steps of its own it waits for the signal.
    """
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(
        [*MMD2V, *map(str, command)], env=ENVIRONMENT | holding(hold), start_new_session=True, **pipes
    )
    metrics = run_dir / "metrics.jsonl"

    def is_there() -> bool:
        assert process.poll() is None
        done = max(_losses(run_dir), default=0) if metrics.exists() else 0
        return done >= after and bool(complete_checkpoints(run_dir / "checkpoints"))

    try:
        wait_until(is_there)
    finally:
        os.killpg(process.pid, sign)
    return process


@pytest.fixture(scope="module")
def killed(config) -> Path:
    """Run directory of the same run, ended by SIGKILL in the middle."""
    run_dir = config.parent / "runs" / "killed"
    process = _start_and_end(["train", config, "--run_dir", run_dir], run_dir, EVERY + 1, 20, signal.SIGKILL)
    process.communicate()
    return run_dir


def test_killed_run_continues_as_if_nothing_had_happened(config, whole, killed):
    seen = _losses(killed)
    assert EVERY < max(seen) < STEPS
    refused = _mmd2v("train", config, "--run_dir", killed)
    assert refused.returncode == 2
    assert "already holds a run with a checkpoint" in refused.stderr and "--resume auto" in refused.stderr

    # Once more, by Ctrl-C this time: it says where the run stands.
    resume = ["train", config, "--run_dir", killed, "--resume", "auto"]
    process = _start_and_end(resume, killed, max(seen) + 2, 16, signal.SIGINT)
    _, errors = process.communicate(timeout=LONG)
    assert process.returncode == 130, errors
    assert errors.startswith("interrupted after step ") and len(errors.splitlines()) == 1, errors
    assert "the last checkpoint is" in errors and errors.endswith("continue with --resume auto\n")

    # What a kill in the middle of a save leaves.
    (killed / "checkpoints" / ".step-000099.tmp").mkdir()
    resumed = _mmd2v(*resume)
    assert resumed.returncode == 0, resumed.stderr
    assert "continuing from" in resumed.stdout
    assert sorted(_losses(killed)) == REPORTED
    assert _exact(killed) == _exact(whole)  # to the last bit: losses, norms, recall, and each once
    assert _names(killed / "checkpoints") == _names(whole / "checkpoints")


# ----------------------------------------------------------------------------- what can go wrong


def _misadventures(base: str) -> dict[str, str]:
    """Several things a user can do wrong, in one process: what each says. ``base`` is a finished run's config."""
    from mmd2v.config.load import load_config
    from mmd2v.errors import UserError
    from mmd2v.train.loop import train

    said = {}

    def attempt(name: str, *overrides: str, resume: str | None = None) -> None:
        try:
            train(load_config(base, overrides), resume)
            said[name] = "went well"
        except UserError as error:
            said[name] = str(error)

    runs = Path(base).parent / "runs"
    steps = ["--data.workers", "0", "--logging.tensorboard", "false"]
    before = read_metrics(Path(base).parent / "runs" / "whole" / "metrics.jsonl")
    attempt("finished again", resume="auto")
    said["finished again"] += " with the same records" * (
        read_metrics(Path(base).parent / "runs" / "whole" / "metrics.jsonl") == before
    )
    attempt("no such checkpoint", resume=str(runs / "whale"))
    attempt("other architecture", "--model.width", "48", "--model.layers.1.kind", "mome", resume="auto")
    attempt("other heads", "--model.heads", "2", "--model.layers.0.norm", "post", resume="auto")
    attempt("other stream", "--seed", "4", "--data.train.limit", "40", "--data.tokenizer.max_length", "20",
            resume="auto")  # fmt: skip
    attempt("other stage", "--engine.zero_stage", "3", resume="auto")
    attempt("fp16", *steps, "--run_dir", str(runs / "fp16"), "--engine.precision", "fp16")
    attempt("batch", *steps, "--run_dir", str(runs / "batch"), "--engine.micro_batch_size", "3")
    attempt("no data", "--run_dir", str(runs / "data"), "--data.train.shards", str(runs / "absent"))
    attempt("diverged", *steps, "--run_dir", str(runs / "nan"), "--optimizer.lr", "1e30", "--optimizer.warmup", "0",
            "--optimizer.clip_norm", "null", "--checkpoint.every", "1")  # fmt: skip

    full = ["--run_dir", str(runs / "full"), *steps, "--evaluation.at_start", "false"]
    attempt("before the disk is full", *full, "--steps", "2")
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, unlimited[1]))  # less than a checkpoint, more than metrics
    attempt("disk full", *full, "--steps", "4", resume="auto")
    said["left by a full disk"] = " ".join(_names(runs / "full" / "checkpoints"))
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    attempt("disk free again", *full, "--steps", "4", resume="auto")

    back = str(runs / "full" / "checkpoints" / "step-000002")
    attempt("going back", *full, "--steps", "6", "--checkpoint.every", "1", "--checkpoint.keep", "2", resume=back)
    said["left by going back"] = " ".join(_names(runs / "full" / "checkpoints"))

    copy = runs / "damaged"
    shutil.copytree(runs / "full", copy)
    file = next((copy / "checkpoints" / "step-000006").glob("*_optim_states.pt"))
    file.write_bytes(file.read_bytes()[:1000])
    again = [*full[2:], "--run_dir", str(copy), "--steps", "8"]
    attempt("damaged, named", *again, resume=str(file.parent))
    attempt("damaged", *again, resume="auto")
    said["left by damage"] = " ".join(_names(copy / "checkpoints"))
    return said


@pytest.fixture(scope="module")
def said(config, whole) -> dict[str, str]:
    sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
    from harness import run_distributed_test

    return run_distributed_test(_misadventures, 1, args=(str(config),))[0]


def test_checkpoint_that_is_not_there(said):
    assert "--resume: folder" in said["no such checkpoint"] and "Did you mean 'whole'?" in said["no such checkpoint"]


def test_checkpoint_of_another_architecture(said):
    text = said["other architecture"]
    assert "the checkpoint is of another run than this config" in text
    assert "model.width: checkpoint 32, this run 48" in text
    assert 'model.layers.1.kind: checkpoint "shared", this run "mome"' in text
    assert "model.heads: checkpoint 4, this run 2" in said["other heads"]
    assert 'model.layers.0.norm: checkpoint "pre", this run "post"' in said["other heads"]
    assert "engine.zero_stage: checkpoint 1, this run 3" in said["other stage"]


def test_checkpoint_of_another_stream_of_samples(said):
    for line in (
        "seed: checkpoint 3, this run 4",
        "data.train (images): checkpoint 48, this run 40",
        "data.tokenizer.max_length: checkpoint 24, this run 20",
    ):
        assert line in said["other stream"]


def test_finished_run_is_not_evaluated_again(said):
    assert said["finished again"] == "went well with the same records"


def test_going_back_starts_a_branch_of_its_own(said):
    assert said["going back"] == "went well"
    assert said["left by going back"] == "abandoned-step-000004 step-000005 step-000006"


def test_run_that_cannot_start_leaves_nothing(said, config):
    assert "'fp16' needs CUDA" in said["fp16"]
    assert "engine.micro_batch_size: 3 does not divide" in said["batch"]
    assert "absent" in said["no data"]
    for name in ("fp16", "batch", "data"):
        assert not (config.parent / "runs" / name).exists()


def test_loss_that_is_not_finite_ends_the_run_before_it_is_saved(said, config):
    assert "became" in said["diverged"] and "on rank(s) 0" in said["diverged"]
    assert complete_checkpoints(config.parent / "runs" / "nan" / "checkpoints") == []


def test_full_disk_keeps_the_checkpoint_before(said):
    assert said["before the disk is full"] == "went well"
    assert "step-000004: the checkpoint could not be written (rank 0: the disk is full" in said["disk full"]
    assert "the newest checkpoint is still" in said["disk full"]
    assert said["left by a full disk"] == "step-000002"
    assert said["disk free again"] == "went well"


def test_full_disk_while_exporting_is_one_line(whole, tmp_path):
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    command = [*MMD2V, "export", str(whole), "--out", str(tmp_path / "export")]
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=LONG, preexec_fn=limit)
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 1, result.stderr
    assert list(tmp_path.iterdir()) == []


def test_damaged_checkpoint_that_is_named_is_refused(said):
    assert "damaged/checkpoints/step-000006: the checkpoint is damaged" in said["damaged, named"]
    assert "_optim_states.pt has 1,000 bytes instead of" in said["damaged, named"]


def test_damaged_checkpoint_is_left_for_the_one_before(said):
    assert said["damaged"] == "went well"
    assert said["left by damage"] == "abandoned-step-000004 damaged-step-000006 step-000005 step-000008"


# --------------------------------------------------------------------------------- launcher, dry run


def test_two_processes_under_the_deepspeed_launcher(config, whole):
    launcher = Path(sys.executable).with_name("deepspeed")
    run_dir = config.parent / "runs" / "launched"
    port = free_port()
    command = [launcher, "--num_accelerators", 2, "--master_port", port, "--module", "mmd2v", "train", config]
    overrides = [
        "--run_dir",
        run_dir,
        "--steps",
        4,
        "--engine.zero_stage",
        2,
        "--logging.every",
        1,
        "--evaluation.at_start",
        "false",
    ]
    result = subprocess.run(
        list(map(str, [*command, *overrides])),
        env={**ENVIRONMENT, "DS_ACCELERATOR": "cpu", "PATH": f"{launcher.parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
        timeout=LONG,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    assert '"ranks": 2' in (run_dir / "environment.json").read_text()
    assert sorted(_losses(run_dir)) == [1, 2, 3, 4]
    assert len([line for line in result.stdout.splitlines() if line.startswith("step 1/4 ")]) == 1
    assert len(list((run_dir / "checkpoints" / "step-000004").glob("*_optim_states.pt"))) == 2


def test_error_that_all_ranks_see_is_printed_once(config, data):
    teacher = ["--teachers.resnet.name", f"timm:test_resnett@{data / 'teacher.safetensors'}"]
    for wrong, message in (["--optimizr.lr", 1], "unknown key"), (teacher, "test_resnett"):
        arguments = ["train", config, "--run_dir", config.parent / "runs" / "wrong", *wrong]
        statuses, errors = _two_ranks(arguments)
        assert statuses == [2, 2], errors
        assert message in errors[0] and errors[0].startswith("error: ") and errors[1] == "", errors


def _two_ranks(arguments: list[object]) -> tuple[list[int], list[str]]:
    """Exit statuses and error output of two ranks without a launcher, which would mix what they say."""
    processes = start_ranks(arguments, env=ENVIRONMENT, ranks=2)
    return [process.wait() for process in processes], [process.output()[1] for process in processes]


def test_dry_run_prints_and_touches_nothing(config, tmp_path):
    before = sorted(config.parent.rglob("*"))
    missing = ["--data.train.shards", str(tmp_path / "absent"), "--run_dir", str(tmp_path / "run")]
    result = _mmd2v("train", config, "--dry-run", *missing, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for part in (
        "micro_batch_size: 4",
        "1 rank × 4 images × 2 accumulation = 8 images a step",
        "data.train: size unknown",
        f"{STEPS} steps = {STEPS * 8} images",
        "encoders.image",
        "teachers.resnet",
        "optimiser: torch.optim.AdamW (fused)",
        "contrastive_loss",
        "forward, backward and update in",
    ):
        assert part in result.stdout
    assert list(tmp_path.iterdir()) == []
    assert sorted(config.parent.rglob("*")) == before
