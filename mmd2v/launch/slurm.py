"""The script of a SLURM job, and its submission."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path

from mmd2v.distributed.preemption import REQUEUE_STATUS
from mmd2v.errors import UserError
from mmd2v.files import write_text
from mmd2v.launch.job import Job, Resources, check_job

_UNANSWERED_STATUS = 128 + signal.SIGUSR1
"""What srun ends with when the notice ended a rank that was still starting."""

_OTHERS_SECONDS, _OTHERS_CHECK_SECONDS = 60, 180

_PLAIN = re.compile(r"[A-Za-z0-9_./:=@%+,-]")

# Of a job around this command, and of a launcher: the new job has its own. SLURM_CONF says where the cluster is.
_FOREIGN = ("SLURM_", "SBATCH_", "OMPI_", "PMI_", "MV2_", "TORCHELASTIC_")
_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
_KEPT = ("SLURM_CONF", "SLURM_CLUSTERS")

_TEMPLATE = """\
#!/bin/bash
# Written by `mmd2v launch slurm`. Submitted again, it goes on from the newest checkpoint:
#   sbatch {script}
{directives}

say() {{ printf '%s mmd2v job: %s\\n' "$(date '+%F %T')" "$*"; }}

# The shell outlives the signals that are meant for the ranks: it has to see how they end.
ended=""        # not empty once SLURM itself ends the job: scancel, the time limit, a requeue from outside
interrupted=""
trap 'ended=1 interrupted=1' TERM
trap 'interrupted=1' USR1

# Runs a command to its end, whatever signals come in between; its exit status is in `status`.
status=0
to_the_end() {{
    "$@" &
    local child=$!
    while :; do
        interrupted=""
        wait "$child"
        status=$?
        [ -n "$interrupted" ] || break
    done
}}

# {requeue_status}: the run was asked to stop, has saved, and wants to go on.
# {unanswered_status}: it was asked while it was starting, before it could answer, and has lost nothing but that.
finish() {{
    if [ "$status" -ne {requeue_status} ] && [ "$status" -ne {unanswered_status} ]; then
        [ "$status" -eq 0 ] || say "ended with status $status; submit it again with: sbatch "{script}
    elif [ -n "$ended" ]; then
        say "stopped; SLURM ended the job and decides what follows. To go on by hand: sbatch "{script}
    elif scontrol requeue "$SLURM_JOB_ID"; then
        say "stopped; the job is queued again and goes on from the newest checkpoint"
    else
        say "stopped, but the job could not be queued again; to go on: sbatch "{script}
    fi
    exit "$status"
}}
{setup}
mmd2v=({mmd2v})
{check}{resume}
say "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, start number $((${{SLURM_RESTART_COUNT:-0}} + 1))"
# The first rank to end does not take the others with it at once: they may be saving, or about to say who died.
to_the_end {ranks} "${{mmd2v[@]}}" train {train}
finish
"""

_SETUP = """
. {file} || {{ say "the setup file failed: "{file}; exit 1; }}
"""

_CONTAINER = """
container=$(command -v apptainer || command -v singularity) || {{
    say "found neither apptainer nor singularity"
    exit 1
}}
"""

_START_FROM = """\
# Until the run has a checkpoint of its own, it starts from another one.
resume=auto
[ -n "$(find {own} -maxdepth 1 -name 'step-*' -print -quit 2>/dev/null)" ] || resume={path}
"""

_CHECK = """
# A node that is not well is named before it stops a run of days.
to_the_end {nodes} "${{mmd2v[@]}}" doctor --node {doctor}
if [ "$status" -ne 0 ]; then
    [ -n "$ended" ] || [ "$status" -eq {unanswered_status} ] ||
        say "the check failed and training was not started; mmd2v launch slurm --no-check leaves it out"
    finish
fi
"""


def script_of(job: Job) -> str:
    """Return the text of the job's script. Raises UserError for what cannot be said in one."""
    check_job(job)
    resume = ""
    if job.start_from is not None:
        own = shlex.quote(str(job.run_dir / "checkpoints"))
        resume = _START_FROM.format(own=own, path=shlex.quote(job.start_from))
    train = [shlex.quote(str(job.config)), "--resume", '"$resume"' if resume else "auto"]
    train += [shlex.quote(argument) for argument in job.arguments]
    return _TEMPLATE.format(
        script=shlex.quote(str(job.script)),
        directives="\n".join(f"#SBATCH --{name}{value}" for name, value in _directives(job)),
        setup=_setup(job),
        ranks=_srun(job.resources, job.resources.tasks_per_node, _OTHERS_SECONDS),
        mmd2v=_mmd2v(job),
        resume=resume,
        check=_check(job) if job.check else "",
        train=" ".join(train),
        requeue_status=REQUEUE_STATUS,
        unanswered_status=_UNANSWERED_STATUS,
    )


def _check(job: Job) -> str:
    gpus = job.resources.gpus_per_node
    words = ["--run-dir", str(job.run_dir), *(["--gpus", str(gpus)] if gpus else [])]
    srun = _srun(job.resources, 1, _OTHERS_CHECK_SECONDS)
    return _CHECK.format(nodes=srun, doctor=shlex.join(words), unanswered_status=_UNANSWERED_STATUS)


def _srun(resources: Resources, tasks_per_node: int, others_seconds: int) -> str:
    """The words that start a command on every node; ``others_seconds`` is what is left to tasks once one has ended."""
    # The nodes are those of this start: `scontrol update` may have changed their number while the job waited.
    tasks = f'--nodes="$SLURM_JOB_NUM_NODES" --ntasks="$((SLURM_JOB_NUM_NODES * {tasks_per_node}))"'
    words = [f"--ntasks-per-node={tasks_per_node}", "--kill-on-bad-exit=0", f"--wait={others_seconds}"]
    if resources.cpus_per_task is not None:  # since SLURM 22.05, srun does not take it from the job
        words.append(f"--cpus-per-task={resources.cpus_per_task}")
    return f"srun {tasks} {shlex.join(words)}"


def _directives(job: Job) -> list[tuple[str, str]]:
    """Options of sbatch with their values, ``=`` included."""
    resources = job.resources
    values: dict[str, object] = {
        "job-name": job.name,
        "nodes": resources.nodes,
        "ntasks-per-node": resources.tasks_per_node,
        "gpus-per-node": resources.gpus_per_node or None,
        "cpus-per-task": resources.cpus_per_task,
        "partition": resources.partition,
        "account": resources.account,
        "qos": resources.qos,
        "constraint": resources.constraint,
        "reservation": resources.reservation,
        "exclude": resources.exclude,
        "mem": resources.mem,
        "time": resources.time,
        "chdir": job.folder,
        "output": str(job.run_dir).replace("%", "%%") + "/" + job.log().name,
        "open-mode": "append",
        "signal": f"USR1@{resources.signal_seconds}",  # to the ranks, not to this shell
        # Of jobs of this name and user one runs at a time: two would write into one run.
        "dependency": "singleton",
    }
    given = [(name, f"={_escaped(str(value))}") for name, value in values.items() if value is not None]
    return [*given, ("requeue", "")]


def _escaped(value: str) -> str:
    """A value as sbatch reads it from the script: a backslash before anything that could mean something."""
    return "".join(c if _PLAIN.fullmatch(c) or not c.isascii() else f"\\{c}" for c in value)


def _setup(job: Job) -> str:
    text = "" if job.setup is None else _SETUP.format(file=shlex.quote(str(job.setup)))
    if job.container is None:
        # Programs beside the interpreter: ninja, which compiles DeepSpeed's operators.
        return f'{text}\nexport PATH={shlex.quote(str(Path(job.python).parent))}:"$PATH"\n'
    return text + _CONTAINER.format()


def _mmd2v(job: Job) -> str:
    """The words of the array that runs one rank's command; those of a container in front."""
    words = [job.python, "-m", "mmd2v"]
    if job.container is None:
        return shlex.join(words)
    binds = [f"--bind={folder}" for folder in job.folders]
    gpus = ["--nv"] if job.resources.gpus_per_node else []
    rest = ["exec", *gpus, *binds, f"--pwd={job.folder}", job.container, *words]
    return f'"$container" {shlex.join(rest)}'


def write_script(job: Job) -> Path:
    """Write the job's script into its run directory and return its path. Raises UserError, OSError."""
    text = script_of(job)
    write_text(job.script, text)
    job.script.chmod(0o755)
    return job.script


def check_not_active(job: Job, environ: Mapping[str, str] | None = None) -> None:
    """Raise UserError when a job of this user runs or waits for the same run directory.

    Two would write into one run. Jobs know one another by their names, which the run directory is part of. Silent where
    squeue is not there or not answered: the job's own `singleton` still lets one run at a time.
    """
    environ = os.environ if environ is None else environ
    squeue = shutil.which("squeue", path=environ.get("PATH"))
    if squeue is None:
        return
    command = [squeue, "--me", "--noheader", f"--name={job.name}", "--format=%A %T"]
    done = subprocess.run(command, env=_own(environ), capture_output=True, text=True, check=False, errors="replace")
    active = [line.split() for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []
    if active:
        number, state = active[0][0], active[0][-1]
        raise UserError(
            f"run_dir: job {number} ({state}) has {job.run_dir} already; follow it with: tail -F "
            f"{shlex.quote(str(job.log(number)))}; or end it first: scancel {number}"
        )


def submit(script: Path, environ: Mapping[str, str] | None = None) -> str:
    """Hand the script to sbatch and return the job's number. Raises UserError with what sbatch says."""
    environ = os.environ if environ is None else environ
    sbatch = shutil.which("sbatch", path=environ.get("PATH"))
    if sbatch is None:
        raise UserError(
            f"sbatch: not found; submit from a login node of a SLURM cluster: sbatch {shlex.quote(str(script))}"
        )
    command = [sbatch, "--parsable", str(script)]
    done = subprocess.run(command, env=_own(environ), capture_output=True, text=True, check=False, errors="replace")
    if done.returncode != 0:
        raise UserError(f"sbatch refused {script}: {done.stderr.strip() or f'exit status {done.returncode}'}")
    return done.stdout.strip().partition(";")[0]  # a cluster's name may follow


def _own(environ: Mapping[str, str]) -> dict[str, str]:
    """What the new job and SLURM's commands may know of this environment."""
    return {name: value for name, value in environ.items() if name in _KEPT or not _is_foreign(name)}


def _is_foreign(name: str) -> bool:
    return name.startswith(_FOREIGN) or name in _RANKS


def what_to_know(job: Job, number: str) -> str:
    """What a person who submitted job ``number`` may want to type next."""
    resources = job.resources
    log, script = shlex.quote(str(job.log(number))), shlex.quote(str(job.script))
    return "\n".join(
        [
            f"job {number}: {resources.nodes} × {resources.tasks_per_node} = {resources.ranks} ranks",
            f"  follow     tail -F {log}",
            f"             squeue --job {number}",
            f"  cancel     scancel {number}",
            f"  interrupt  scancel --signal=USR1 {number}   (it saves, and queues itself again)",
            f"  go on      sbatch {script}   (any time later, from the newest checkpoint)",
            f"When the cluster takes the nodes back, and {resources.signal_seconds} s before the time limit, every "
            "rank finishes its step and saves; the job queues itself again under the same number and goes on from "
            "there. A cancelled or failed job does not.",
        ]
    )
