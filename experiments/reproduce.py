"""Runs the few-shot experiments of the results table, each in a new process, and renders one page of all results.

    python -m experiments.reproduce --list
    python -m experiments.reproduce --rows omniglot-5w1s omniglot-5w1s-order1 --data-dir data/omniglot --hours 12
    python -m experiments.reproduce --rows 'images-5w1s*' --image-dir my_pictures.zip --steps 5000 --seeds 0 1 2
    python -m experiments.reproduce --render-only --results results

The same command resumes: it skips finished runs. It writes the runs, `index.html` (a self-contained page), `table.md`,
and plots of the accuracy over inner steps to the work directory.
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

from experiments.shared import command_line, option_checks
from experiments.shared.command_line import DefaultInHelp
from experiments.table import compare, page
from experiments.table.rows import Row, choose
from maml_jax import validation
from maml_jax.runs.files import read_json, write_file

GRACE = 600.0
"""Seconds between SIGTERM and SIGKILL. A run may have to finish a compilation before it saves."""
LAST_LINES = 8
"""Number of lines of a failed run's standard error that are printed."""


@dataclasses.dataclass(frozen=True)
class Config:
    """A row of the table is one experiment with its options. The same command resumes: it skips finished runs."""

    rows: tuple[str, ...] = ("omniglot-*",)
    """Names of rows, or patterns such as 'omniglot-5w*'."""
    list: bool = False
    """Print the chosen rows with their commands, and exit."""
    data_dir: Path = Path("data/omniglot")
    """Folder of Omniglot, for the rows of Omniglot."""
    image_dir: Path = Path("data/miniimagenet")
    """Folder or archive of images, for the rows of MiniImagenet and of your own images."""
    steps: DefaultInHelp[int | None] = None
    """Meta-steps of each run, in rows of the fast recipe of its second phase. Default: the full schedule of the row."""
    hours: DefaultInHelp[float | None] = None
    """Time budget of the command. When the time is over, the current run saves and stops. Default: no limit."""
    evaluation: Literal["transductive", "both"] = "both"
    """'transductive': the queries of a task form one batch; 'both': also evaluate each query alone (inductive)."""
    seeds: tuple[int, ...] = (0,)
    """Seeds. All rows run with the first seed, then all rows with the next seed."""
    workdir: Path = Path("runs/reproduce")
    """Directory of the page and of the run directories ROW-seedNUMBER."""
    results: DefaultInHelp[tuple[Path, ...]] = ()
    """Further runs to show on the page, or folders of runs such as results/. Default: none."""
    render_only: bool = False
    """Only render the existing results."""


class Job(NamedTuple):
    """One run of a row."""

    row: Row
    seed: int
    steps: int
    path: Path
    command: list[str]
    folder: Path
    """Folder of the data."""
    labels: tuple[str, ...]
    """Labels of the evaluations that the results must have."""

    def __str__(self) -> str:
        return shlex.join(["python", *self.command[1:]])

    @property
    def finished(self) -> bool:
        """Whether the directory holds results of this row and seed, with enough meta-steps and all evaluations.

        For a row of your own images, the results must be from the same folder of images.
        """
        run = compare.read(self.path)
        if run is None or run.results is None or run.row is not self.row or run.seed != self.seed:
            return False
        if not {*self.labels} <= {*run.results["test"]}:
            return False
        return run.steps >= self.steps and (self.row.data != "images" or self._folder_was() == self.folder)

    def _folder_was(self) -> Path | None:
        """Returns the data folder of the run in the directory; None if the directory has no `run.json`."""
        about = self.path / "run.json"
        return Path(read_json(about)["config"]["data_dir"]) if about.exists() else None


def folder(config: Config, row: Row) -> Path:
    """Returns the folder of a row's data."""
    return config.data_dir if row.data == "omniglot" else config.image_dir


def command(config: Config, row: Row, seed: int) -> list[str]:
    """Returns the command that runs a row."""
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
      ValueError: if an option is not allowed, or the data of a row are missing.
      OSError: if existing results are damaged, or the work directory cannot be written.
    """
    rows = choose(config.rows)
    if not rows:
        raise ValueError(
            "rows must have at least one name or pattern, but got none. --list --rows '*' prints all rows."
        )
    if config.steps is not None:
        option_checks.meta_steps("steps", config.steps)
    if config.hours is not None:
        validation.positive("hours", config.hours)
    option_checks.different("seeds", config.seeds)
    for seed in config.seeds:
        option_checks.seed("seeds", seed)
    for path in config.results:
        if not path.is_dir():
            raise ValueError(f"results must be folders that exist, but {path} does not.")
    # Raises WorkdirError for damaged results.
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
                fetch = f" maml_jax.tasks.download.omniglot({str(found)!r}) downloads Omniglot."
                raise ValueError(
                    f"{option}: {found} does not exist, but the row {wanted[0].row.name} needs this folder."
                    + (fetch if option == "data_dir" else "")
                )
        config.workdir.mkdir(parents=True, exist_ok=True)
    return config, jobs


def main(prepared: tuple[Config, list[Job]]) -> None:
    """Runs the jobs that are not finished, and renders the page. Exits with status 1 if a run failed."""
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
    print(f"Wrote {config.workdir / 'index.html'}, with table.md and plots in the same folder.")
    if any(outcome.startswith("failed") for outcome in outcomes.values()):
        raise SystemExit(1)


def render(config: Config) -> None:
    """Writes the page, the table, and plots of the accuracy over inner steps."""
    rows = choose(config.rows)
    ours = compare.find([config.workdir]) if config.workdir.is_dir() else []
    others = compare.find(config.results)
    config.workdir.mkdir(parents=True, exist_ok=True)
    groups = compare.group(rows, [*ours, *others])
    without_row = [run for run in [*ours, *others] if run.row is None]
    for name, text in (("index.html", page.html(groups, without_row)), ("table.md", page.markdown(groups))):
        write_file(config.workdir / name, text.encode("utf-8", "backslashreplace"))  # Paths may not be UTF-8.
    for group in groups:
        if any(line.runs for line in group.lines):
            row = group.lines[0].row
            (config.workdir / f"inner-steps-{row.data}-{row.setting}.png").write_bytes(page.curves(group))


# Processes


def _run(jobs: list[Job], hours: float | None, after_each: Callable[[], None]) -> dict[str, str]:
    """Runs the jobs one after another. Returns their outcomes by the names of their directories."""
    end = None if hours is None else time.monotonic() + 3600 * hours
    outcomes: dict[str, str] = {}
    unusable: dict[Path, str] = {}  # For each folder of data that a run refused, the name of the run.
    for number, job in enumerate(jobs, 1):
        name = job.path.name
        if job.finished:
            outcomes[name] = "finished before"
            continue
        if end is not None and time.monotonic() >= end:
            outcomes[name] = "not run: the budget is over"
            continue
        if job.folder in unusable:
            outcomes[name] = f"not run: {unusable[job.folder]} could not use {job.folder}"
            continue
        print(f"[{number}/{len(jobs)}] {name}: {job}", flush=True)
        outcomes[name] = _one(job, end)
        print(f"[{number}/{len(jobs)}] {name}: {outcomes[name]}", flush=True)
        error, _, _ = outcomes[name].rpartition("(full output: ")
        if error.startswith("failed with status 2") and str(job.folder) in error:
            unusable[job.folder] = name
        after_each()
    return outcomes


def _one(job: Job, end: float | None) -> str:
    """Runs a job until it exits or the time budget is over. Returns the outcome."""
    errors = job.path.with_name(f"{job.path.name}.stderr.txt")
    with open(errors, "w") as file:
        # In a new session the run does not get Ctrl-C. Only this process gets Ctrl-C, and sends one SIGTERM to the run.
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
        return f"failed: the run did not exit within {GRACE:g} s of SIGTERM at the end of the budget, and was killed"
    if stopped and process.returncode in (128 + signal.SIGTERM, -signal.SIGTERM):
        trained = run.trained if (run := compare.read(job.path)) else 0
        stop = f"stopped after {trained:,} of {job.steps:,} meta-steps: the budget is over. The same command resumes"
        # If the outer rate falls, a run with fewer steps is another training.
        evaluate = f"; with --rows {job.row.name} --seeds {job.seed} --steps {trained} it evaluates the stopped model"
        return stop + (f"{evaluate}, unless the outer rate falls" if trained else "")
    return "\n  ".join([f"failed with status {process.returncode}:", *lines[-LAST_LINES:], f"(full output: {errors})"])


def _stop(process: subprocess.Popen) -> None:
    """Stops a run with SIGTERM, at which the run saves. Kills the run after GRACE seconds, or at a second Ctrl-C."""
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
    # A signal that is ignored, as SIGHUP under nohup, stays ignored.
    before = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    command_line.run(Config, prepare, main)
