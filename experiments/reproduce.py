"""Runs rows of the table, each in its own process, and renders one page of all results.

    python -m experiments.reproduce --list
    python -m experiments.reproduce --rows omniglot-5w1s omniglot-5w1s-order1 --data-dir data/omniglot --hours 12
    python -m experiments.reproduce --rows 'images-5w1s*' --image-dir my_pictures.zip --steps 5000 --seeds 0 1 2
    python -m experiments.reproduce --render-only --results results

The same command resumes: finished runs are skipped. Beside the runs, the work directory gets `index.html`, which needs
no other file, `table.md`, and pictures of the accuracy over inner steps.
"""

import dataclasses
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

from experiments.shared import command_line
from experiments.table import compare, page
from experiments.table.rows import Row, choose
from maml_jax import validation
from maml_jax.runs.files import read_json

GRACE = 600.0
"""Seconds from SIGTERM until a run is killed; it may compile a program before it saves."""
LAST_LINES = 8
"""Lines of a failed run's standard error in the report."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Reproduces rows of the table. Finished runs are skipped, so that the same command resumes."""

    rows: tuple[str, ...] = ("omniglot-*",)
    """Names of rows, or patterns such as 'omniglot-5w*'."""
    list: bool = False
    """Print all chosen rows with their commands, and exit."""
    data_dir: Path = Path("data/omniglot")
    """Where Omniglot is, for its rows."""
    image_dir: Path = Path("data/miniimagenet")
    """The folder or archive of images, for the rows of MiniImagenet and of any images."""
    steps: int | None = None
    """Meta-steps of each run; default: the full schedule."""
    hours: float | None = None
    """Time budget of this call. At its end the current run is saved and stopped, and the others are not started."""
    evaluation: Literal["transductive", "both"] = "both"
    """Evaluate with the queries of a task in one batch, or also inductively, each query alone: takes twice as long."""
    seeds: tuple[int, ...] = (0,)
    """Seeds; all rows run with the first seed, then all with the next."""
    workdir: Path = Path("runs/reproduce")
    """Where each run has its directory, ROW-seedS, and the page is written."""
    results: tuple[Path, ...] = ()
    """Further runs to show, or folders of runs, such as `results`."""
    render_only: bool = False
    """Run nothing; only render the existing results."""


class Job(NamedTuple):
    """One run of a row."""

    row: Row
    seed: int
    steps: int
    path: Path
    command: list[str]
    folder: Path
    """Folder of its data."""
    labels: tuple[str, ...]
    """Wanted evaluations."""

    def __str__(self) -> str:
        return shlex.join(["python", *self.command[1:]])

    @property
    def finished(self) -> bool:
        """Whether its directory holds results of this row and seed, of this or a longer schedule, with all evaluations.

        For rows of any images, the folder of images must be the same, too.
        """
        run = compare.read(self.path)
        if run is None or run.results is None or run.row is not self.row or run.seed != self.seed:
            return False
        if not {*self.labels} <= {*run.results["test"]}:
            return False
        return run.steps >= self.steps and (self.row.data != "images" or self._folder_was() == self.folder)

    def _folder_was(self) -> Path | None:
        """Folder of the data of the finished run, which is in `run.json` only."""
        about = self.path / "run.json"
        return Path(read_json(about)["config"]["data_dir"]) if about.exists() else None


def folder(config: Config, row: Row) -> Path:
    """Folder of a row's data."""
    return config.data_dir if row.data == "omniglot" else config.image_dir


def command(config: Config, row: Row, seed: int) -> list[str]:
    """Command that runs a row."""
    options = {
        "row": row.name,
        **row.options,
        "data_dir": folder(config, row),
        "steps": config.steps or row.steps,
        "seed": seed,
        "workdir": config.workdir / f"{row.name}-seed{seed}",
        **({} if config.evaluation == "both" else {"evaluation": config.evaluation}),
    }
    flags = []
    for name, value in options.items():
        flags += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return [sys.executable, "-m", f"experiments.{row.experiment}", *flags]


def prepare(config: Config) -> tuple[Config, list[Job]]:
    """Checks the options, and lists the runs.

    Raises:
      ValueError, OSError: saying what is wrong and what to do.
    """
    rows = choose(config.rows)
    if not rows:
        raise ValueError("rows must name at least one row. --list prints all of them.")
    if config.steps is not None:
        validation.meta_steps("steps", config.steps)
    if config.hours is not None:
        validation.positive("hours", config.hours)
    validation.different("seeds", config.seeds)
    for seed in config.seeds:
        validation.seed("seeds", seed)
    for path in config.results:
        if not path.is_dir():
            raise ValueError(f"results: there is no folder {path}.")
    # Raises ValueError for damaged results.
    compare.find([*config.results, *([config.workdir] if config.workdir.is_dir() else [])])
    jobs = [
        Job(
            row,
            seed,
            config.steps or row.steps,
            config.workdir / f"{row.name}-seed{seed}",
            command(config, row, seed),
            folder(config, row),
            compare.labels(row, config.evaluation),
        )
        for seed in config.seeds
        for row in rows
    ]
    if not (config.render_only or config.list):
        for option, found, wanted in (
            ("data_dir", config.data_dir, [job for job in jobs if job.row.data == "omniglot"]),
            ("image_dir", config.image_dir, [job for job in jobs if job.row.data != "omniglot"]),
        ):
            if not found.exists() and not all(job.finished for job in wanted):
                fetch = f"; maml_jax.tasks.download.omniglot({str(found)!r}) fetches it" if option == "data_dir" else ""
                raise ValueError(f"{option}: {found} does not exist, and {wanted[0].row.name} needs it{fetch}.")
        config.workdir.mkdir(parents=True, exist_ok=True)
    return config, jobs


def main(prepared: tuple[Config, list[Job]]) -> None:
    """Runs the jobs that are not finished, and renders. Exits with status 1 if a run failed."""
    config, jobs = prepared
    if config.list:
        for job in jobs:
            published = "" if job.row.published is None else f", published {page.interval(job.row.published)}"
            print(f"{job.row.name}{published}\n    {job}")
        return
    outcomes: dict[str, str] = {}
    if not config.render_only:
        with _terminated():
            try:
                outcomes = _run(jobs, config.hours, lambda: render(config))
            finally:
                render(config)
    else:
        render(config)
    for name, outcome in outcomes.items():
        print(f"{name}: {outcome}")
    print(f"Wrote {config.workdir / 'index.html'} with table.md and pictures beside it.")
    if any(outcome.startswith("failed") for outcome in outcomes.values()):
        raise SystemExit(1)


def render(config: Config) -> None:
    """Writes the page, the table, and the pictures of accuracy over inner steps."""
    rows = choose(config.rows)
    ours = compare.find([config.workdir]) if config.workdir.is_dir() else []
    others = compare.find(config.results)
    config.workdir.mkdir(parents=True, exist_ok=True)
    groups = compare.group(rows, [*ours, *others])
    strays = [run for run in [*ours, *others] if run.row is None]
    (config.workdir / "index.html").write_text(page.html(groups, strays), encoding="utf-8")
    (config.workdir / "table.md").write_text(page.markdown(groups), encoding="utf-8")
    for group in groups:
        if any(line.runs for line in group.lines):
            row = group.lines[0].row
            (config.workdir / f"inner-steps-{row.data}-{row.setting}.png").write_bytes(page.curves(group))


# Processes


def _run(jobs: list[Job], hours: float | None, after_each: Callable[[], None]) -> dict[str, str]:
    """Runs the jobs in turn; returns the outcome of each, by the name of its directory."""
    end = None if hours is None else time.monotonic() + 3600 * hours
    outcomes = {}
    for number, job in enumerate(jobs, 1):
        name = job.path.name
        if job.finished:
            outcomes[name] = "finished before"
            continue
        if end is not None and time.monotonic() >= end:
            outcomes[name] = "not run: the budget is over"
            continue
        print(f"[{number}/{len(jobs)}] {name}: {job}", flush=True)
        outcomes[name] = _one(job, end)
        print(f"[{number}/{len(jobs)}] {name}: {outcomes[name]}", flush=True)
        after_each()
    return outcomes


def _one(job: Job, end: float | None) -> str:
    """Runs a job until it exits or the time is over; returns the outcome."""
    errors = job.path.with_name(f"{job.path.name}.stderr.txt")
    with open(errors, "w") as file:
        # A session of its own: Ctrl-C reaches this process alone, which then passes on one signal, not two.
        process = subprocess.Popen(job.command, stderr=file, start_new_session=True)
        try:
            process.wait(None if end is None else max(0.0, end - time.monotonic()))
            stopped = False
        except subprocess.TimeoutExpired:
            _stop(process)
            stopped = True
        except BaseException:
            print(f"{job.path.name}: stopping; the run saves its state.", flush=True)
            _stop(process)
            raise
    lines = errors.read_text(errors="replace").strip().splitlines()
    if not lines:
        errors.unlink()
    if process.returncode == 0:
        return "finished"
    if stopped and process.returncode == -signal.SIGKILL:
        return f"failed: it did not exit within {GRACE:g} s of SIGTERM when the budget was over, and was killed"
    if stopped and process.returncode in (128 + signal.SIGTERM, -signal.SIGTERM):
        trained = run.trained if (run := compare.read(job.path)) else 0
        stop = f"stopped after {trained:,} of {job.steps:,} meta-steps: the budget is over. The same command resumes"
        only = f"--rows {job.row.name} --seeds {job.seed} --steps {trained}"
        evaluate = f"; {only} evaluates it as it is, unless its outer rate falls over the meta-steps"
        return stop + (evaluate if trained else "")
    return "\n  ".join([f"failed with status {process.returncode}:", *lines[-LAST_LINES:], f"(full output: {errors})"])


def _stop(process: subprocess.Popen) -> None:
    """Stops a run, which saves on SIGTERM. It is killed if it takes longer than GRACE, or at a second Ctrl-C."""
    process.terminate()
    try:
        process.wait(GRACE)
    except BaseException as error:
        process.kill()
        process.wait()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise


@contextmanager
def _terminated() -> Iterator[None]:
    """Raises SystemExit at SIGTERM and SIGHUP within the block, so that the current run is stopped too."""

    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    before = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}  # Under nohup.
    for number in before:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    command_line.run(Config, prepare, main)
