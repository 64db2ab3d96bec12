"""Train every config with every seed and make one table of them.

    python benchmarks/method/run_table.py --runs a.yaml b.yaml --seeds 0 1 2 --baseline a \
        --work /tmp/table --out benchmarks/results/NAME [-- --any.config.key VALUE …]

A row of the table is named after its config's file. Each run is ``mmd2v train CONFIG --seed S --run_dir
WORK/ROW-sS --resume auto`` in a process of its own, what stands behind ``--`` added; its output goes to
WORK/ROW-sS.log and its result to WORK/ROW-sS.result.json. Interrupted? The same command goes on: finished runs are not
started again, the others continue from their newest checkpoint.

A run of one modality has no recall between images and texts: ``--measure`` measures its export after training, and
with ``--untrained`` the students that the rows start from. ``--measure knn --train DIR --test DIR`` is ``mmd2v eval
knn`` of the pooled vector, ``--measure pairs --pairs FILE --limit N`` is ``mmd2v eval pairs`` with mean pooling.

Writes NAME.csv (a row a run), NAME.json (conditions and numbers) and NAME.md (means, intervals, differences).
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import tyro
import yaml
from measure import Measurement
from table import (
    RunResult,
    conditions,
    difference_table,
    sampling_note,
    summary_table,
    write_csv,
)
from untrained import export_untrained

from mmd2v.config.load import load_config
from mmd2v.errors import UserError, disk_message, unknown_name
from mmd2v.export import export
from mmd2v.files import check_output, write_json, write_text
from mmd2v.progress import duration
from mmd2v.train.metrics import METRICS_FILE, read_metrics

PREFIX = "evaluation/"
_STEP_SECONDS = "time/step(s)"
_LAST_LINES = 5
_UNTRAINED = ", untrained"


@dataclass(frozen=True)
class Options:
    """Train every config with every seed and make one table; overrides of the configs follow behind --."""

    runs: tuple[Path, ...]
    """Configs, a row each."""
    out: Path
    """Path of the results without ending."""
    work: Path
    """Folder of the runs, their logs and results."""
    seeds: tuple[int, ...] = (0,)
    """Seeds, a run each."""
    baseline: str | None = None
    """Row that the others are compared with, seed by seed."""
    scale: str | None = None
    """One of the configs' `scales`, such as mini."""
    jobs: int = 1
    """Runs at the same time; each gets its share of the cores."""
    launcher: str | None = None
    """Command in front of `train`, for example "deepspeed --num_accelerators 2 --module mmd2v"; by default mmd2v."""
    measure: Literal["knn", "pairs"] | None = None
    """Measurement of each run's export, for runs of one modality; by default the runs' own recall is taken."""
    train: Path | None = None
    """knn: the memory bank, as `mmd2v eval knn` reads it."""
    test: Path | None = None
    """knn: images to classify."""
    k: int = 10
    """knn: neighbours that vote."""
    pairs: Path | None = None
    """pairs: file of labelled pairs."""
    limit: int = 25_000
    """pairs: positive pairs used, the first of the file."""
    untrained: bool = False
    """Measure the students before training too (with the first seed)."""
    note: tuple[str, ...] = ()
    """What else a reader of the numbers must know, such as how the data was chosen; a sentence each."""


@dataclass(frozen=True)
class Job:
    """One run."""

    row: str
    seed: int
    command: tuple[str, ...]
    work: Path
    inputs: str
    """Hash of config, overrides and measurement: a result of other ones is not taken for this run's."""
    measure: Measurement | None = None
    """What is measured after training; None where the run measures itself."""
    untrained: Callable[[Path], None] | None = None
    """Writes the export of a row that is not trained."""

    @property
    def name(self) -> str:
        """ROW-sSEED"""
        return f"{self.row}-s{self.seed}"

    @property
    def run_dir(self) -> Path:
        return self.work / self.name

    @property
    def log(self) -> Path:
        return self.work / f"{self.name}.log"

    @property
    def result(self) -> Path:
        return self.work / f"{self.name}.result.json"

    @property
    def export(self) -> Path:
        return self.work / f"{self.name}.export"


def main(argv: Sequence[str]) -> int:
    """Run what is missing, then write the table of what is there; 1 if a run failed."""
    own, extra = split_extra(argv)
    options = tyro.cli(Options, args=own, description=__doc__)
    jobs = plan(options, extra)
    for ending in (".csv", ".json", ".md"):
        check_output("--out", with_ending(options.out, ending))
    missing = [job for job in jobs if finished(job) is None]
    print(f"{len(jobs)} runs, {len(jobs) - len(missing)} of them finished before", flush=True)
    failed = run_all(missing, options.jobs)
    results = [result for job in jobs if (result := finished(job)) is not None]
    if results:
        write_table(options, extra, results, unfinished=[job.name for job in jobs if finished(job) is None])
    for message in failed:
        print(f"error: {message}", file=sys.stderr)
    return 1 if failed else 0


def split_extra(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return (own arguments, overrides behind ``--``)."""
    place = list(argv).index("--") if "--" in argv else len(argv)
    return list(argv[:place]), list(argv[place + 1 :])


def plan(options: Options, extra: Sequence[str]) -> list[Job]:
    """Return the runs, seed by seed, so that an interrupted table has all rows first.

    Raises UserError for options that make no table and for configs that do not load.
    """
    rows = {path.stem: path for path in options.runs}
    if len(rows) < len(options.runs):
        raise UserError("--runs: two configs have one file name, and the rows are named after it")
    if len(set(options.seeds)) < len(options.seeds) or not options.seeds:
        raise UserError(f"--seeds: found {list(options.seeds)}, expected different ones, at least one")
    if options.jobs < 1:
        raise UserError(f"--jobs: found {options.jobs}, expected at least 1")
    if options.baseline is not None and options.baseline not in rows:
        raise unknown_name("--baseline", options.baseline, rows)
    launcher = [sys.executable, "-m", "mmd2v"] if options.launcher is None else shlex.split(options.launcher)
    measure = measurement(options)
    hashed = [*extra, measure.words()] if measure else extra
    jobs = []
    for seed in options.seeds:
        for row, config in rows.items():
            own = ["--seed", str(seed), "--run_dir", str(options.work / f"{row}-s{seed}")]
            # A mistake should not come out after hours of other runs.
            load_config(config, [*own, *extra], options.scale)
            scale = [] if options.scale is None else ["--scale", options.scale]
            command = (*launcher, "train", str(config), *own, "--resume", "auto", *scale, *extra)
            inputs = _hash(config, hashed, options.scale)
            jobs.append(Job(row, seed, command, options.work, inputs, measure))
            if options.untrained and seed == options.seeds[0]:
                untrained = partial(export_untrained, config, [*own, *extra], scale=options.scale)
                jobs.append(Job(row + _UNTRAINED, seed, (), options.work, inputs, measure, untrained))
    return jobs


def measurement(options: Options) -> Measurement | None:
    """Return what is measured after training. Raises UserError for options that do not go together."""
    needed = {None: (), "knn": ("train", "test"), "pairs": ("pairs",)}[options.measure]
    for name in ("train", "test", "pairs"):
        given = getattr(options, name) is not None
        if given != (name in needed):
            kind = f"--measure {options.measure}" if options.measure else "no --measure"
            raise UserError(f"--{name}: {'found' if given else 'missing'} with {kind}")
    if options.measure is None:
        if options.untrained:
            raise UserError("--untrained: expected --measure, for recall is measured by runs alone")
        return None
    files = tuple(getattr(options, name) for name in needed)
    count = options.k if options.measure == "knn" else options.limit
    return Measurement(options.measure, files, count, threads_each(options.jobs))


def finished(job: Job) -> RunResult | None:
    """Return the result of an earlier start. Raises UserError where it is of another config or other overrides."""
    if not job.result.exists():
        return None
    try:
        found = json.loads(job.result.read_text(encoding="utf-8"))
        inputs, result = found.pop("inputs"), RunResult(**found)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{job.result}: not a result of this script ({error}); remove it to run again") from None
    if inputs != job.inputs:
        raise UserError(
            f"{job.result}: the config or the overrides have changed since, or the measurement; remove it and "
            f"{job.run_dir}, or name another --work"
        )
    return result


def run_all(jobs: Sequence[Job], at_once: int) -> list[str]:
    """Run the jobs; return a message for each that failed. An interruption ends the processes that are running."""
    if not jobs:
        return []
    running = Running()
    with ThreadPoolExecutor(at_once) as threads:
        futures = [threads.submit(run, job, running, at_once) for job in jobs]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        except BaseException:
            for future in futures:
                future.cancel()
            running.end()
            raise
    return [message for future in futures if (message := future.result()) is not None]


class Running:
    """The processes under way."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._processes: set[subprocess.Popen] = set()
        self._ended = False

    def call(self, command: Sequence[str], **options: Any) -> int:
        """Run a command and return its exit status."""
        with self._lock:
            if self._ended:
                return -1
            process = subprocess.Popen(command, **options)
            self._processes.add(process)
        status = process.wait()
        with self._lock:
            self._processes.discard(process)
        return status

    def end(self) -> None:
        """Ask all to end, and let no other start."""
        with self._lock:
            self._ended = True
            for process in self._processes:
                process.terminate()


def run(job: Job, running: Running, at_once: int) -> str | None:
    """Run one job and write its result; return what went wrong, or None."""
    job.work.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads_each(at_once))}
    resumed = job.run_dir.exists()
    print(f"{job.name}: {'continues' if resumed else 'starts'}, output in {job.log}", flush=True)
    start = time.monotonic()
    if job.untrained is None:
        with open(job.log, "ab") as log:
            try:
                status = running.call(
                    job.command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment
                )
            except OSError as error:
                return f"{job.name}: {job.command[0]} cannot be started: {error.strerror or error}"
        if status != 0:
            last = job.log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LAST_LINES:]
            return f"{job.name}: ended with status {status}; {job.log} ends:\n  " + "\n  ".join(last)
    try:
        result = read_result(job) if job.measure is None else measured_result(job, job.measure)
    except UserError as error:
        return f"{job.name}: {error}"
    write_json(job.result, {**result._asdict(), "inputs": job.inputs})
    recall = ", ".join(f"{key} {100 * result.recall[key]:.1f}" for key in list(result.recall)[:1])
    print(f"{job.name}: finished in {duration(time.monotonic() - start)}, {recall}", flush=True)
    return None


def threads_each(at_once: int) -> int:
    """Return the cores one of ``at_once`` runs may use."""
    return max(1, len(os.sched_getaffinity(0)) // at_once)


def read_result(job: Job) -> RunResult:
    """Read the last recall of a finished run, its training time and its parameters. Raises UserError for none."""
    path = job.run_dir / METRICS_FILE
    records = read_metrics(path) if path.exists() else []
    evaluated = [record for record in records if any(_is_recall(key) for key in record)]
    if not evaluated:
        raise UserError(f"{path}: holds no recall ({PREFIX}i2t_R@1 and its like); does the config name data.eval?")
    last = evaluated[-1]
    return RunResult(
        row=job.row,
        seed=job.seed,
        steps=last["step"],
        recall={key.removeprefix(PREFIX): value for key, value in last.items() if _is_recall(key)},
        images=last.get(f"{PREFIX}images"),
        captions=last.get(f"{PREFIX}captions"),
        minutes=train_minutes(records),
        **parameter_counts(job.run_dir),
    )


def measured_result(job: Job, measure: Measurement) -> RunResult:
    """Export a finished run, or the student it would start from, and measure that."""
    shutil.rmtree(job.export, ignore_errors=True)  # of a measurement that was interrupted
    if job.untrained is not None:
        job.untrained(job.export)
        records = []
    else:
        export(job.run_dir, job.export)
        records = read_metrics(job.run_dir / METRICS_FILE)
    found = measure(job.export)
    shutil.rmtree(job.export)
    return RunResult(
        row=job.row,
        seed=job.seed,
        steps=records[-1]["step"] if records else 0,
        recall=found.numbers,
        images=None,
        captions=None,
        minutes=train_minutes(records),
        **parameter_counts(job.run_dir),
        queries=found.queries,
    )


def _is_recall(key: str) -> bool:
    name = key.removeprefix(PREFIX)
    return key.startswith(PREFIX) and "_R@" in name and name.rpartition("@")[2].isdigit() and "chance" not in name


def train_minutes(records: Sequence[Mapping[str, Any]]) -> float:
    """Return the time of all training steps; of a resumed run those of every part, evaluation left out."""
    seconds, before = 0.0, 0
    for record in records:
        if _STEP_SECONDS in record:
            seconds += record[_STEP_SECONDS] * (record["step"] - before)
            before = record["step"]
    return seconds / 60


def parameter_counts(run_dir: Path) -> dict[str, int | None]:
    """Return the parameters that the newest checkpoint lists: of the student, and trainable ones of everything."""
    manifests = sorted(
        run_dir.glob("checkpoints/step-*/mmd2v.json"), key=lambda path: int(path.parent.name.removeprefix("step-"))
    )
    if not manifests:
        return {"student_parameters": None, "trainable_parameters": None}
    student = trainable = 0
    for name, (shape, group) in json.loads(manifests[-1].read_text(encoding="utf-8"))["parameters"].items():
        count = 1
        for size in shape:
            count *= size
        student += 0 if name.startswith("objectives.") else count
        trainable += count if group is not None else 0
    return {"student_parameters": student, "trainable_parameters": trainable}


def write_table(options: Options, extra: Sequence[str], results: list[RunResult], unfinished: list[str]) -> None:
    """Write the three files and print the table."""
    rows = [path.stem + ending for path in options.runs for ending in ("", _UNTRAINED)]
    results = sorted(results, key=lambda result: (rows.index(result.row), result.seed))
    measure = measurement(options)
    text = [
        f"# {options.out.name}",
        summary_table(results, measure.title() if measure else "Recall"),
        sampling_note(results),
    ]
    trained = [result for result in results if not result.row.endswith(_UNTRAINED)]
    if options.baseline is not None and len({result.row for result in trained}) > 1:
        text.append(difference_table(trained, options.baseline))
    text += options.note
    if unfinished:
        text.append(f"Not finished: {', '.join(unfinished)}.")
    write_csv(with_ending(options.out, ".csv"), results)
    scale = [] if options.scale is None else ["--scale", options.scale]
    command = ["train", "CONFIG", "--seed", "SEED", "--run_dir", "RUN", "--resume", "auto", *scale, *extra]
    launcher = shlex.split(options.launcher) if options.launcher else ["mmd2v"]
    settings = {
        **({} if measure is None else {"measurement": measure.words()}),
        "configs": {path.name: _hash(path, (), options.scale) for path in options.runs},
        "seeds": list(options.seeds),
        "baseline": options.baseline,
        "runs at the same time": options.jobs,
        "threads a run": threads_each(options.jobs),
        "notes": list(options.note),
        "unfinished": unfinished,
    }
    write_json(with_ending(options.out, ".json"), conditions([*launcher, *command], settings, results))
    write_text(with_ending(options.out, ".md"), "\n\n".join(text) + "\n")
    print("\n\n".join(text))


def with_ending(out: Path, ending: str) -> Path:
    """Append an ending: a name may hold dots."""
    return out.with_name(out.name + ending)


def _hash(config: Path, extra: Sequence[str], scale: str | None) -> str:
    """Hash a config with its bases, the file of its scale and the overrides."""
    digest = hashlib.sha256(json.dumps([*extra, *([] if scale is None else [scale])]).encode())
    path: Path | None = config
    while path is not None:
        content = path.read_bytes()
        digest.update(content)
        data = yaml.safe_load(content) or {}
        file = ((data.get("scales") or {}).get(scale) or {}).get("file")
        if file is not None:
            digest.update((path.parent / file).read_bytes())
        base = data.get("base")
        path = path.parent / os.path.expandvars(base) if base else None
    return digest.hexdigest()[:16]


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: {error.filename or 'a file could not be read or written'}: {disk_message(error)}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on")
