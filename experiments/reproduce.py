"""Runs any or all rows of the table, each in a process of its own, and renders one page of what there is.

    python -m experiments.reproduce --list
    python -m experiments.reproduce --rows omniglot-5w1s omniglot-5w1s-order1 --data-dir data/omniglot --hours 12
    python -m experiments.reproduce --rows 'images-5w1s*' --image-dir my_pictures.zip --steps 5000 --seeds 0 1 2
    python -m experiments.reproduce --render-only --results results --readme README.md

The same command again goes on: what is finished is skipped. Beside the runs, the work directory gets `index.html`,
which needs no other file, `table.md`, and accuracy over inner steps as pictures.
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
"""Seconds from SIGTERM until a run is killed: it may be compiling before it saves."""
LAST_LINES = 8
"""Of a failed run's standard error, to be told."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Reproduces rows of the table. What is finished is skipped, so that the same command goes on."""

    rows: tuple[str, ...] = ("omniglot-*",)
    """Names of rows, or patterns such as 'omniglot-5w*'."""
    list: bool = False
    """Print all chosen rows with their commands, and end."""
    data_dir: Path = Path("data/omniglot")
    """Where Omniglot is, for its rows."""
    image_dir: Path = Path("data/miniimagenet")
    """The folder or archive of images, for the rows of MiniImagenet and of any images."""
    steps: int | None = None
    """Meta-steps of each run; default: the full schedule."""
    hours: float | None = None
    """Budget over all runs of this call. At its end the run under way is stopped, and the rest is left."""
    seen: Literal["together", "both"] = "both"
    """Evaluate each run with the queries of a task in one batch, or also one by one, which takes as long again."""
    seeds: tuple[int, ...] = (0,)
    """Seeds; all rows run with the first, then all with the next."""
    workdir: Path = Path("runs/reproduce")
    """Where each run has its directory, ROW-seedS, and the page is written."""
    results: tuple[Path, ...] = ()
    """Further runs to show, or folders of runs, such as results."""
    render_only: bool = False
    """Run nothing: only render what is there."""
    readme: Path | None = None
    """File whose marked region is written anew from the runs in --results."""


class Job(NamedTuple):
    """One run to be."""

    row: Row
    seed: int
    steps: int
    path: Path
    command: list[str]
    folder: Path
    """Of its data."""
    labels: tuple[str, ...]
    """Of the evaluations that are wanted."""

    def __str__(self) -> str:
        return shlex.join(["python", *self.command[1:]])

    @property
    def finished(self) -> bool:
        """Whether its directory holds results of this row, seed and schedule, or of a longer one, with all evaluations.

        Of any images, also whether it was this folder of them; other data sets are what they are, wherever they lie.
        """
        run = compare.read(self.path)
        if run is None or run.results is None or run.row is not self.row or run.seed != self.seed:
            return False
        if not {*self.labels} <= {*run.results["test"]}:
            return False
        return run.steps >= self.steps and (self.row.data != "images" or self._folder_was() == self.folder)

    def _folder_was(self) -> Path | None:
        """Where the data of the run in its directory were, which the results do not say."""
        about = self.path / "run.json"
        return Path(read_json(about)["config"]["data_dir"]) if about.exists() else None


def folder(config: Config, row: Row) -> Path:
    """Where a row's data is."""
    return config.data_dir if row.data == "omniglot" else config.image_dir


def command(config: Config, row: Row, seed: int) -> list[str]:
    """What runs a row."""
    options = {
        **row.options,
        "data_dir": folder(config, row),
        "steps": config.steps or row.steps,
        "seed": seed,
        "workdir": config.workdir / f"{row.name}-seed{seed}",
        **({} if config.seen == "both" else {"seen": config.seen}),
    }
    flags = []
    for name, value in options.items():
        flags += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return [sys.executable, "-m", f"experiments.{row.experiment}", *flags]


def prepare(config: Config) -> tuple[Config, list[Job]]:
    """Checks the options, and finds what is to be run.

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
    if config.readme is not None:
        if not config.results:
            raise ValueError("readme is written from the runs in --results: give a folder of runs there.")
        page.with_region(config.readme.read_text("utf-8"), "")
    compare.find([*config.results, *([config.workdir] if config.workdir.is_dir() else [])])  # None is damaged.
    jobs = [
        Job(
            row,
            seed,
            config.steps or row.steps,
            config.workdir / f"{row.name}-seed{seed}",
            command(config, row, seed),
            folder(config, row),
            compare.labels(row, config.seen),
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
    """Runs what is not finished, and renders. Ends with status 1 if a run failed."""
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
    """Writes the page, the table, the pictures of accuracy over inner steps, and the region of the README."""
    rows = choose(config.rows)
    ours = compare.find([config.workdir]) if config.workdir.is_dir() else []
    others = compare.find(config.results)
    config.workdir.mkdir(parents=True, exist_ok=True)
    groups = compare.group(rows, [*ours, *others])
    strays = [run for run in [*ours, *others] if run.row is None]
    (config.workdir / "index.html").write_text(page.html(groups, strays), encoding="utf-8")
    (config.workdir / "table.md").write_text(page.markdown(groups, config.workdir), encoding="utf-8")
    for group in groups:
        if any(line.runs for line in group.lines):
            row = group.lines[0].row
            (config.workdir / f"inner-steps-{row.data}-{row.setting}.png").write_bytes(page.curves(group))
    if config.readme is not None:
        content = page.markdown(compare.group([], others), config.readme.parent, unfinished=False)
        config.readme.write_text(page.with_region(config.readme.read_text("utf-8"), content), encoding="utf-8")


# Processes


def _run(jobs: list[Job], hours: float | None, after_each: Callable[[], None]) -> dict[str, str]:
    """Runs each in turn; returns what became of each, by the name of its directory."""
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
    """Runs one until it ends, or until the time is over; returns what became of it."""
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
            print(f"{job.path.name}: stops, and saves.", flush=True)
            _stop(process)
            raise
    told = errors.read_text(errors="replace").strip().splitlines()
    if not told:
        errors.unlink()
    if process.returncode == 0:
        return "finished"
    if stopped and process.returncode == -signal.SIGKILL:
        return f"failed: it did not end within {GRACE:g} s of SIGTERM when the budget was over, and was killed"
    if stopped and process.returncode in (128 + signal.SIGTERM, -signal.SIGTERM):
        trained = run.trained if (run := compare.read(job.path)) else 0
        what = f"stopped after {trained:,} of {job.steps:,} meta-steps: the budget is over. The same command goes on"
        only = f"--rows {job.row.name} --seeds {job.seed} --steps {trained}"
        evaluate = f"; with {only} it ends there and is evaluated, if nothing falls over all meta-steps"
        return what + (evaluate if trained else "")
    return "\n  ".join([f"failed with status {process.returncode}:", *told[-LAST_LINES:], f"(all of it: {errors})"])


def _stop(process: subprocess.Popen) -> None:
    """Ends a run, which saves on SIGTERM; a run that does not end in time, or at a second Ctrl-C, is killed."""
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
    """Within the block SIGTERM and SIGHUP raise SystemExit, so that the run under way is ended too."""

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
