"""The job script: what it says, how it quotes, how it behaves with pretended SLURM commands, and what is refused."""

import os
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from waiting import LONG, wait_until

from mmd2v.cli import launch
from mmd2v.cli.main import main
from mmd2v.errors import UserError
from mmd2v.launch.job import Job, Resources, check_job, seconds_of
from mmd2v.launch.slurm import check_not_active, script_of, submit, what_to_know, write_script

HOSTILE = "a b'c\"d$(touch gone)`e`;#%&*é"
CONFIG = {
    "name": "small",
    "run_dir": "runs/small",
    "steps": 1,
    "data": {
        "train": {"shards": "shards"},
        "image": {"size": 32},
        "tokenizer": {"path": "tokenizer.json", "max_length": 24},
    },
    "model": {
        "width": 32,
        "heads": 4,
        "encoders": {"image": {"kind": "patch", "patch_size": 8}, "text": {"kind": "tokens"}},
        "layers": [{"kind": "shared"}],
    },
    "objectives": [{"kind": "contrastive"}],
    "engine": {"batch_size": 8},
}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A working directory with the config of a run, ``small.yaml``."""
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text(yaml.safe_dump(CONFIG))
    return tmp_path


def make_job(folder: Path, **changes) -> Job:
    values = {
        "name": "small-0",
        "run_dir": folder / "run",
        "folder": folder,
        "python": "/venv/bin/python",
        "config": folder / "small.yaml",
        "arguments": (),
        "resources": Resources(nodes=2, gpus_per_node=4),
    }
    return Job(**{**values, **changes})


def directives(text: str) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")]
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


# ------------------------------------------------------------------------------------- what it says


def test_directives(folder):
    said = directives(script_of(make_job(folder)))
    assert said["nodes"] == "2" and said["ntasks-per-node"] == said["gpus-per-node"] == "4"
    assert said["signal"] == "USR1@120" and said["open-mode"] == "append" and said["requeue"] == ""
    assert said["output"] == f"{folder}/run/slurm-%j.log" and said["chdir"] == str(folder)
    assert said["dependency"] == "singleton"
    assert not {"partition", "account", "qos", "time", "constraint", "cpus-per-task"} & set(said)


def test_directives_of_everything_that_can_be_asked(folder):
    asked = {"partition": "gpu", "account": "a", "qos": "long", "constraint": "a100&fast", "time": "1-00:00:00"}
    asked |= {"reservation": "maintenance", "exclude": "bad7,bad9", "mem": "200G"}
    resources = Resources(nodes=1, gpus_per_node=0, ranks_per_node=3, cpus_per_task=6, signal_seconds=60, **asked)
    text = script_of(make_job(folder, resources=resources))
    said = directives(text)
    assert {name: said[name] for name in asked} == {**asked, "constraint": "a100\\&fast"}
    assert "gpus-per-node" not in said and said["ntasks-per-node"] == "3" and said["signal"] == "USR1@60"
    # srun takes it from nowhere else.
    nodes = "$SLURM_JOB_NUM_NODES"
    srun = f'srun --nodes="{nodes}" --ntasks="$(({nodes[1:]} * 3))" --ntasks-per-node=3 '
    srun += "--kill-on-bad-exit=0 --wait=60 --cpus-per-task=6"
    assert f'\nto_the_end {srun} "${{mmd2v[@]}}" train ' in text


def test_per_cent_in_a_folder_is_no_pattern_of_slurm(folder):
    said = directives(script_of(make_job(folder, run_dir=folder / "50%j")))
    assert said["output"] == f"{folder}/50%%j/slurm-%j.log"


def test_check_comes_before_training_and_can_be_left_out(folder):
    text = script_of(make_job(folder))
    assert 0 < text.index('"${mmd2v[@]}" doctor --node') < text.index('"${mmd2v[@]}" train')
    assert "doctor" not in script_of(make_job(folder, check=False))


def test_container_runs_its_own_python_with_the_folders_it_needs(folder):
    text = script_of(make_job(folder, container="docker://me/mmd2v:1", python="python3"))
    line = next(line for line in text.splitlines() if line.startswith("mmd2v=("))
    binds = f"--bind={folder} --bind={folder / 'run'}"
    assert line == f'mmd2v=("$container" exec --nv {binds} --pwd={folder} docker://me/mmd2v:1 python3 -m mmd2v)'
    assert "export PATH" not in text
    cpu = make_job(folder, container="docker://x", resources=Resources(1, 0))
    assert "--nv" not in script_of(cpu)


# -------------------------------------------------------------------------- what is wrong is said at once


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nodes": 0}, "--nodes: found 0; expected at least 1"),
        ({"gpus_per_node": -1}, "--gpus-per-node: found -1; expected at least 0"),
        ({"cpus_per_task": 0}, "--cpus-per-task: found 0"),
        ({"ranks_per_node": 0}, "--ranks-per-node: found 0"),
        ({"ranks_per_node": 2}, "--ranks-per-node: found 2 beside --gpus-per-node 4; a rank has a GPU of its own"),
        ({"signal_seconds": 70_000}, "--signal-seconds: found 70000; expected at most 65535"),
        ({"time": "2"}, "--time: 2 is 120 s, and --signal-seconds would end the run 120 s before"),
        ({"time": "soon"}, r"--time: found 'soon'; expected minutes or \[days-\]hours"),
        ({"mem": "lots"}, "--mem: found 'lots'; expected a node's memory such as 200G"),
        ({"exclude": "a b"}, "--exclude: found 'a b'; expected one word"),
        ({"partition": "a b"}, "--partition: found 'a b'; expected one word"),
        ({"account": ""}, "--account: found ''"),
        ({"qos": "a\n#SBATCH --nodes=99"}, "--qos: found"),
    ],
)
def test_resources_that_cannot_be(folder, changes, message):
    with pytest.raises(UserError, match=message):
        check_job(make_job(folder, resources=replace(make_job(folder).resources, **changes)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run_dir": Path("/a\nsrun rm")}, "run_dir: found a line break"),
        ({"run_dir": Path("/a\\b")}, "run_dir: found a backslash"),
        ({"name": "a\rb"}, "name: found a line break"),
        ({"arguments": ("--name", "a\nb")}, "the overrides: found a line break"),
        ({"setup": Path("/nowhere/modules.sh")}, "--setup: /nowhere/modules.sh is no file"),
        ({"container": "/nowhere/image.sif"}, "--container: /nowhere/image.sif does not exist"),
        ({"container": "docker://a", "run_dir": Path("/a:b")}, "--container: /a:b has a comma or a colon"),
    ],
)
def test_jobs_that_cannot_be(folder, changes, message):
    with pytest.raises(UserError, match=message):
        script_of(make_job(folder, **changes))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("90:30", 5430),
        ("2:00:00", 7200),
        ("1-0", 86400),
        ("1-1:30", 91800),
        ("2-03:04:05", 183845),
        ("UNLIMITED", None),
    ],
)
def test_times(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["slurm", "absent.yaml", "--nodes", "1", "--gpus-per-node", "1"], "config file 'absent.yaml' does not exist"),
        (["slurm", "small.yaml", "--nodes", "3", "--gpus-per-node", "1"], "8 images cannot be divided by 3 ranks"),
        (["slurm", "small.yaml", "--nodes", "1", "--gpus-per-node", "1", "--engine.bach_size", "4"], "batch_size"),
        (["slurm", "small.yaml", "--node", "1", "--gpus-per-node", "1"], "Did you mean '--nodes'"),
        (["slurm", "small.yaml", "--nodes", "1", "--gpus-per-node", "1", "--resume", "gone"], "folder 'gone' does not"),
        (["slrm"], "unknown name 'slrm'. Did you mean 'slurm'?"),
    ],
)
def test_mistakes_come_out_before_anything_is_written(folder, capsys, arguments, message):
    assert main(["launch", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["small.yaml"]


def test_pipeline_is_one_job_in_its_own_folder(folder):
    Path("two.yaml").write_text(
        yaml.safe_dump({"run_dir": "runs/two", "stages": {"one": {"config": "small.yaml"}, "other": {"config": "x"}}})
    )
    assert main(["launch", "slurm", "two.yaml", "--nodes", "2", "--gpus-per-node", "1", "--no-submit"]) == 0
    assert f"{folder}/two.yaml --resume auto\n" in Path("runs/two/job.sbatch").read_text()


# ------------------------------------------------------------------- how it behaves, SLURM being pretended


@pytest.fixture
def pretended(folder) -> dict[str, str]:
    """An environment in which srun notes its arguments in ``srun.log`` and ends as $STATUS says, and so on.

    srun ends once there is the file $UNTIL.
    """
    programs = folder / "programs"
    programs.mkdir()
    texts = {
        "srun": 'printf "%s\\0" "$@" >>srun.log; printf "\\n" >>srun.log\n'
        'until [ -z "$UNTIL" ] || [ -e "$UNTIL" ]; do sleep 0.02; done; exit "${STATUS:-0}"',
        "scontrol": 'echo "$@" >>scontrol.log; exit "${SCONTROL_STATUS:-0}"',
        "squeue": 'echo "$@" >>squeue.log; [ -z "$QUEUED" ] || echo "$QUEUED"; exit "${SQUEUE_STATUS:-0}"',
        "sbatch": 'env >sbatch.env; echo "$@" >>sbatch.log; echo "${SAID:-17}"; echo "$REFUSED" >&2; [ -z "$REFUSED" ]',
    }
    for name, text in texts.items():
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2"}
    return {"PATH": f"{programs}:{os.environ['PATH']}", **job}


def run_script(job: Job, environ: dict[str, str], **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(write_script(job))],
        env={**environ, **more},
        cwd=job.folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=LONG,
    )


def words(line: str) -> list[str]:
    return line.split("\0")[:-1]


def test_every_argument_arrives_as_it_was_given(folder, pretended):
    config = folder / HOSTILE / "c d.yaml"
    arguments = ("--name", HOSTILE, "--data.train.shards", "$HOME/{0..3}.tar", "--scale", "")
    job = make_job(folder, run_dir=folder / HOSTILE, config=config, arguments=arguments, check=False)
    done = run_script(job, pretended)
    assert done.returncode == 0, done.stderr
    ran = words((folder / "srun.log").read_text())
    own = ["--kill-on-bad-exit=0", "--wait=60", job.python, "-m", "mmd2v", "train", str(config)]
    assert ran == ["--nodes=2", "--ntasks=8", "--ntasks-per-node=4", *own, "--resume", "auto", *arguments]
    assert not (folder / "gone").exists()


@pytest.mark.parametrize(
    ("status", "requeued"), [(0, False), (1, False), (2, False), (69, False), (75, True), (138, True), (143, False)]
)
def test_only_a_run_that_wants_to_go_on_is_queued_again(folder, pretended, status, requeued):
    done = run_script(make_job(folder, check=False), pretended, STATUS=str(status))
    assert done.returncode == status
    log = folder / "scontrol.log"
    assert (log.read_text() == "requeue 17\n") if requeued else not log.exists()
    assert ("queued again" in done.stdout) == requeued
    assert ("submit it again with: sbatch" in done.stdout) == (status != 0 and not requeued)


def test_job_that_cannot_be_queued_again_says_how_to_go_on(folder, pretended):
    done = run_script(make_job(folder, check=False), pretended, STATUS="75", SCONTROL_STATUS="1")
    assert done.returncode == 75
    assert f"could not be queued again; to go on: sbatch {folder}/run/job.sbatch" in done.stdout


def test_notice_during_the_check_queues_the_job_again(folder, pretended):
    done = run_script(make_job(folder), pretended, STATUS="138")
    assert done.returncode == 138 and (folder / "scontrol.log").read_text() == "requeue 17\n"
    assert "the check failed" not in done.stdout
    assert len((folder / "srun.log").read_text().splitlines()) == 1


def test_failed_check_keeps_training_from_starting(folder, pretended):
    done = run_script(make_job(folder), pretended, STATUS="1")
    assert done.returncode == 1 and "the check failed and training was not started" in done.stdout
    calls = (folder / "srun.log").read_text().splitlines()
    assert len(calls) == 1 and words(calls[0])[8:10] == ["doctor", "--node"]


def test_check_and_training_when_all_is_well(folder, pretended):
    assert run_script(make_job(folder), pretended).returncode == 0
    calls = [words(call) for call in (folder / "srun.log").read_text().splitlines()]
    assert [call[8] for call in calls] == ["doctor", "train"]
    assert calls[0][9:] == ["--node", "--run-dir", f"{folder}/run", "--gpus", "4"]
    # The check once a node, the run once a GPU, on as many nodes as this start has.
    tasks = [["--ntasks=2", "--ntasks-per-node=1"], ["--ntasks=8", "--ntasks-per-node=4"]]
    assert [call[1:3] for call in calls] == tasks
    run_script(make_job(folder), pretended, SLURM_JOB_NUM_NODES="1")
    calls = [words(call) for call in (folder / "srun.log").read_text().splitlines()[2:]]
    assert [call[:2] for call in calls] == [["--nodes=1", "--ntasks=1"], ["--nodes=1", "--ntasks=4"]]


@pytest.mark.parametrize(("sign", "requeued"), [(signal.SIGTERM, False), (signal.SIGUSR1, True)])
def test_shell_waits_for_the_ranks_whatever_signal_comes(folder, pretended, sign, requeued):
    """SIGTERM to the shell means that SLURM ends the job and knows what follows; a user's scancel is such a one."""
    script = write_script(make_job(folder, check=False))
    environ = {**pretended, "STATUS": "75", "UNTIL": "enough"}
    shell = subprocess.Popen(["bash", script], env=environ, cwd=folder, stdout=subprocess.PIPE, text=True)
    wait_until((folder / "srun.log").exists)
    for _ in range(3):
        shell.send_signal(sign)
        time.sleep(0.1)
    assert shell.poll() is None  # it outlives them
    (folder / "enough").touch()
    said = shell.communicate(timeout=LONG)[0]
    assert shell.returncode == 75
    assert (folder / "scontrol.log").exists() == requeued
    assert ("queued again" in said) == requeued and ("decides what follows" in said) != requeued


def test_start_from_another_run_only_until_there_is_an_own_checkpoint(folder, pretended):
    other = folder / "other run"
    job = make_job(folder, check=False, start_from=str(other), run_dir=folder / "r [1] n")
    run_script(job, pretended)
    (job.run_dir / "checkpoints" / "step-000001").mkdir(parents=True)
    run_script(job, pretended)
    resumed = [words(call)[-1] for call in (folder / "srun.log").read_text().splitlines()]
    assert resumed == [str(other), "auto"]


def test_setup_file_is_sourced_and_its_failure_ends_the_job(folder, pretended):
    setup = folder / "my modules.sh"
    setup.write_text("export STATUS=3\n")
    job = make_job(folder, check=False, setup=setup)
    assert run_script(job, pretended).returncode == 3
    setup.write_text("false\n")
    done = run_script(job, pretended)
    assert done.returncode == 1 and f"the setup file failed: {setup}" in done.stdout


def test_container_is_named_when_nothing_can_run_it(folder, pretended):
    done = run_script(make_job(folder, check=False, container="docker://a"), pretended)
    assert done.returncode == 1 and "found neither apptainer nor singularity" in done.stdout


# ---------------------------------------------------------------------------------------- submitting


def test_submitting(folder, pretended, monkeypatch, capsys):
    for name, value in {**pretended, "SLURM_NTASKS": "9", "RANK": "0", "SLURM_CONF": "here", "MINE": "1"}.items():
        monkeypatch.setenv(name, value)
    arguments = ["--nodes", "2", "--gpus-per-node", "2", "--steps", "4", "--no-check", "--", "--optimizer.lr", "1e-3"]
    assert main(["launch", "slurm", "small.yaml", *arguments]) == 0
    said = capsys.readouterr().out
    script = folder / "runs/small/job.sbatch"
    for part in (
        "job 17: 2 × 2 = 4 ranks",
        f"tail -F {folder}/runs/small/slurm-17.log",
        "squeue --job 17",
        "scancel 17",
        "scancel --signal=USR1 17",
        f"sbatch {script}",
        "120 s before the time limit",
    ):
        assert part in said
    assert (folder / "sbatch.log").read_text() == f"--parsable {script}\n"
    assert f"train {folder}/small.yaml --resume auto --steps 4 --optimizer.lr 1e-3\n" in script.read_text()
    # The new job inherits what the user has set, and nothing of a job or launcher around.
    inherited = (folder / "sbatch.env").read_text()
    assert "MINE=1" in inherited and "SLURM_CONF=here" in inherited
    assert "SLURM_NTASKS" not in inherited and "SLURM_JOB_ID" not in inherited and "\nRANK=" not in inherited


def test_run_that_a_job_has_already_is_not_submitted_again(folder, pretended):
    job = make_job(folder)
    with pytest.raises(UserError, match=r"run_dir: job 16 \(RUNNING\) has .*/run already; .*: scancel 16"):
        check_not_active(job, {**pretended, "QUEUED": "16 RUNNING"})
    assert f"--name={job.name} " in (folder / "squeue.log").read_text()
    check_not_active(job, pretended)
    # What squeue says when it fails is no job; sbatch will say what is wrong.
    check_not_active(job, {**pretended, "QUEUED": "error: no controller", "SQUEUE_STATUS": "1"})


def test_second_submission_leaves_the_first_ones_script(folder, pretended, monkeypatch, capsys):
    for name, value in pretended.items():
        monkeypatch.setenv(name, value)
    first = ["launch", "slurm", "small.yaml", "--nodes", "2", "--gpus-per-node", "2"]
    assert main(first) == 0
    script = (folder / "runs/small/job.sbatch").read_text()
    monkeypatch.setenv("QUEUED", "17 PENDING")
    assert main([*first, "--steps", "4"]) == 2
    assert "job 17 (PENDING) has" in capsys.readouterr().err
    assert (folder / "runs/small/job.sbatch").read_text() == script
    assert len((folder / "sbatch.log").read_text().splitlines()) == 1


def test_without_submission_the_job_is_written_and_printed(folder, pretended, monkeypatch, capsys):
    monkeypatch.setenv("PATH", pretended["PATH"])
    assert main(["launch", "slurm", "small.yaml", "--nodes", "1", "--gpus-per-node", "2", "--no-submit"]) == 0
    script = folder / "runs/small/job.sbatch"
    assert script.read_text() in capsys.readouterr().out
    assert script.stat().st_mode & 0o100 and not (folder / "sbatch.log").exists()


def test_jobs_of_one_run_share_a_name_and_those_of_others_do_not(folder):
    def name(*overrides: str) -> str:
        return launch.describe_job(launch.Slurm("small.yaml", 1, 1), overrides).name

    assert name() == name("--optimizer.lr", "1e-3") != name("--run_dir", "elsewhere")
    assert name("--name", "a, b'c/é").startswith("a-b-c-")


def test_what_sbatch_says_is_told(folder, pretended):
    script = write_script(make_job(folder))
    with pytest.raises(UserError, match=r"sbatch refused .*job\.sbatch: Invalid partition name specified"):
        submit(script, {**pretended, "REFUSED": "Invalid partition name specified"})
    assert submit(script, {**pretended, "SAID": "18;cluster"}) == "18"


def test_missing_sbatch_is_named(folder, tmp_path):
    with pytest.raises(UserError, match="sbatch: not found; submit from a login node"):
        submit(write_script(make_job(folder)), {"PATH": str(tmp_path)})


def test_advice_can_be_pasted_into_a_shell(folder):
    said = what_to_know(make_job(folder, run_dir=folder / "a b"), "17")
    assert f"tail -F '{folder}/a b/slurm-17.log'" in said
