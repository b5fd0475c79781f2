"""Groups the results of runs by row of the table, with published accuracies and paired differences."""

import json
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_origin, get_type_hints

import numpy as np

from experiments.table.rows import BY_NAME, DATA, METHODS, PUBLISHED, ROWS, SETTINGS, Published, Row, published
from maml_jax import evaluation
from maml_jax.evaluation import Difference, Protocol
from maml_jax.runs.files import WorkdirError, read_json
from maml_jax.runs.forms import ABSENT, check_form

TRANSDUCTIVE, INDUCTIVE, NEAREST, ENSEMBLE = "transductive", "inductive", "nearest neighbour", "ensemble"
"""Labels of the evaluations in `results.json`."""


PROTOCOL = {
    f"{name}?" if name in Protocol._field_defaults else name: str if get_origin(hint) is Literal else hint
    for name, hint in get_type_hints(Protocol).items()
}
SUMMARY = {"protocol": PROTOCOL | {"*": ABSENT}, "accuracy": [float], "half_width": [float], "correct?": [str]}
START = {"started?": str, "until?": str | None, "commit?": str | None, "hardware?": str}
RESULTS = {
    "row": str | None,
    "made_by": START | {"command": str, "finished": str, "earlier_starts?": [START]},
    "config": {"steps": int, "seed": int},
    "selected": {"by": str, "step": int},
    "test": {TRANSDUCTIVE: SUMMARY, "*": SUMMARY},
}
"""Form of the `results.json` of a few-shot run, and of its parts."""


class Run(NamedTuple):
    """One training, finished or not."""

    path: Path
    row: Row | None
    """Row of the table; None if the run belongs to no row."""
    seed: int
    trained: int
    """Number of meta-steps that the run has taken."""
    results: dict[str, Any] | None
    """Content of `results.json`; None before the first evaluation."""

    @property
    def steps(self) -> int:
        """Meta-steps of the evaluated training; 0 before the first evaluation."""
        return self.results["config"]["steps"] if self.results else 0

    @property
    def made_by(self) -> dict[str, Any]:
        """Provenance of the results, see `maml_jax.runs.provenance`."""
        assert self.results is not None
        return self.results["made_by"]

    def cost(self, label: str = "") -> str:
        """Describes the time, the hardware, the commit, the day and the evaluated model."""
        assert self.results is not None
        count, took, selected = len(starts(self.made_by)), hours(self.made_by), self.results["selected"]
        time = "time not recorded" if took is None else f"{took:.2f} hours{f' in {count} starts' * (count > 1)}"
        model = "the best models together" if label == ENSEMBLE else f"the model of meta-step {selected['step']:,}"
        hardware, commit = (over_starts(self.made_by, key) for key in ("hardware", "commit"))
        day = self.made_by["finished"][:10]
        return f"{time}, {hardware}, commit {commit}, {day}; {model}, selected: {selected['by']}"


def starts(made_by: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the provenance of each start of a run, from first to last."""
    return [*made_by.get("earlier_starts", []), made_by]


def hours(made_by: dict[str, Any]) -> float | None:
    """Returns the hours of all starts of a run; None if a time is not recorded."""
    *earlier, last = starts(made_by)
    seconds = 0.0
    for start, end in [*((each, each.get("until")) for each in earlier), (last, last["finished"])]:
        if not (end and start.get("started")):
            return None
        seconds += (datetime.fromisoformat(end) - datetime.fromisoformat(start["started"])).total_seconds()
    return seconds / 3600


def over_starts(made_by: dict[str, Any], key: str) -> str:
    """Joins an entry of the provenance, such as 'hardware', over all starts: each may be on another machine."""
    return ", then ".join(dict.fromkeys(str(start.get(key)) for start in starts(made_by)))


def read(path: Path) -> Run | None:
    """Reads the run in a directory. Returns None if the directory holds no few-shot run.

    Raises:
      WorkdirError: if `results.json` or `run.json` of the directory is damaged, or has another form.
    """
    trained = _trained(path / "metrics.jsonl")
    if (path / "results.json").exists():
        content = read_json(path / "results.json")
        if "experiment" not in content:
            return None
        check_form(path / "results.json", content, RESULTS)
        config = content["config"]
        return Run(path, BY_NAME.get(content["row"]), config["seed"], max(trained, config["steps"]), content)
    if not (path / "run.json").exists():
        return None
    content = read_json(path / "run.json")
    check_form(path / "run.json", content, {"config": dict | None})
    config = content["config"] or {}
    if not isinstance(config.get("row"), str) or config["row"] not in BY_NAME:
        return None
    check_form(path / "run.json", content, {"config": {"seed": int}})
    return Run(path, BY_NAME[config["row"]], config["seed"], trained, None)


def find(folders: Iterable[Path]) -> list[Run]:
    """Finds the few-shot runs in folders. Each folder is a run directory or holds run directories."""
    found = []
    for folder in folders:
        alone = (folder / "results.json").exists() or (folder / "run.json").exists()
        for path in [folder] if alone else sorted(path for path in folder.iterdir() if path.is_dir()):
            found += [run] if (run := read(path)) else []
    return found


def _trained(metrics: Path) -> int:
    """Returns the last step in `metrics.jsonl`. The last line may be incomplete."""
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    for line in reversed(lines):
        try:
            row = json.loads(line)
            check_form(metrics, row, {"step": int})
            return row["step"]
        except (ValueError, RecursionError, WorkdirError):
            continue
    return 0


def labels(row: Row, evaluation: Literal["transductive", "both"] = "both") -> tuple[str, ...]:
    """Returns the labels of the evaluations of a row's run.

    With a normalisation other than 'batch' the two query modes are the same.
    """
    both = evaluation == "both" and row.options.get("normalisation", "batch") == "batch"
    return (TRANSDUCTIVE, *(INDUCTIVE,) * both, *(ENSEMBLE,) * row.options.get("ensemble", False))


class Number(NamedTuple):
    """A measured accuracy and the half width of its 95% interval over tasks, in per cent."""

    accuracy: float
    half_width: float
    inner_steps: int
    seed: int
    protocol: str


class Line(NamedTuple):
    """Results of one row with one schedule on one data set: a number for each seed."""

    row: Row
    label: str
    """Label of the evaluation in `results.json`."""
    runs: list[Run]
    """Evaluated runs with the same number of meta-steps, one for each seed. Empty if the row has no result yet."""
    trained: int
    """Largest number of meta-steps that a run of the row has taken."""

    @property
    def method(self) -> str:
        return NEAREST if self.label == NEAREST else self.row.method

    @property
    def title(self) -> str:
        return METHODS[self.method] + (", ensemble" if self.label == ENSEMBLE else "")

    @property
    def steps(self) -> int:
        return self.runs[0].steps if self.runs else 0

    @property
    def data(self) -> str:
        """Name of the data set of the evaluation."""
        return _data(self.runs[0])

    @property
    def published(self) -> Published | None:
        return published(self.row.data, self.row.setting, self.method)

    @property
    def inner_steps(self) -> int:
        return 0 if self.label == NEAREST else self.row.inner_steps

    def summaries(self, label: str | None = None) -> Iterator[tuple[Run, dict[str, Any]]]:
        """Yields each run that has this evaluation, or the evaluation `label`, with the summary of the evaluation."""
        for run in self.runs:
            test = (run.results or {})["test"]
            if (label or self.label) in test:
                yield run, test[label or self.label]

    def numbers(self, label: str | None = None) -> list[Number]:
        """Returns the accuracies by seed of this evaluation, or of the evaluation `label`."""
        at = self.inner_steps
        return [
            Number(found["accuracy"][at], found["half_width"][at], at, run.seed, str(Protocol(**found["protocol"])))
            for run, found in self.summaries(label)
        ]

    def inductive(self) -> list[Number]:
        """Returns the inductive accuracies by seed; empty if there are none."""
        if self.label in (NEAREST, ENSEMBLE):
            return []
        return self.numbers(INDUCTIVE if INDUCTIVE in labels(self.row) else TRANSDUCTIVE)

    def curve(self) -> dict[str, list[float]]:
        """Returns the mean accuracy over seeds after each number of inner steps, and its half width."""
        both = [[found[name] for _, found in self.summaries()] for name in ("accuracy", "half_width")]
        mean, half_width = (np.asarray(each, np.float64) for each in both)
        return {
            "accuracy": mean.mean(0).tolist(),
            "half_width": (np.sqrt(np.square(half_width).sum(0)) / len(half_width)).tolist(),
        }


class Paired(NamedTuple):
    """Difference of two lines on the same tasks."""

    first: Line
    second: Line
    seed: int
    difference: Difference


class Group(NamedTuple):
    """All lines of one data set and setting, with the published accuracies."""

    title: str
    lines: list[Line]
    """At least one for each row."""
    paired: list[Paired]
    others: dict[str, Published]
    """Published accuracies of methods that have no line."""


def group(rows: Sequence[Row], runs: Sequence[Run]) -> list[Group]:
    """Groups the given rows, and the rows of the given runs, by data set and setting."""
    shown = [row for row in ROWS if row in rows or any(run.row is row for run in runs)]
    groups = []
    for key in dict.fromkeys((row.data, row.setting) for row in shown):
        members = [row for row in shown if (row.data, row.setting) == key]
        lines = [line for row in members for line in _lines(row, runs)]
        names = sorted({line.data for line in lines if line.runs}) if key[0] == "images" else []
        title = f"{', '.join(names) or DATA[key[0]]}, {SETTINGS[key[1]]}"
        present = {line.method for line in lines}
        quoted = PUBLISHED.get(key, {})
        others = {name: quoted[name] for name in METHODS if name in quoted and name not in present}
        groups.append(Group(title, lines, list(_paired(lines)), others))
    return groups


def _lines(row: Row, runs: Sequence[Run]) -> Iterator[Line]:
    """Yields a line for each data set and schedule of a row, the longest schedule first."""
    trained = max((run.trained for run in runs if run.row is row), default=0)
    done = [run for run in runs if run.row is row and run.results]
    if not done:
        yield Line(row, TRANSDUCTIVE, [], trained)
    for data, steps in sorted({(_data(run), run.steps) for run in done}, key=lambda key: (-key[1], key[0])):
        same = _latest_by_seed([run for run in done if (_data(run), run.steps) == (data, steps)])
        yield Line(row, TRANSDUCTIVE, same, trained)
        for label in (ENSEMBLE, NEAREST):
            if having := [run for run in same if label in (run.results or {})["test"]]:
                yield Line(row, label, having, trained)


def _latest_by_seed(runs: Sequence[Run]) -> list[Run]:
    """Returns the latest run of each seed. A run may exist twice, for example in `runs/` and in `results/`."""
    latest: dict[int, Run] = {}
    for run in sorted(runs, key=lambda run: (run.results or {})["made_by"]["finished"]):
        latest[run.seed] = run
    return [latest[seed] for seed in sorted(latest)]


def _data(run: Run) -> str:
    return (run.results or {})["test"][TRANSDUCTIVE]["protocol"]["data"]


def _paired(lines: Sequence[Line]) -> Iterator[Paired]:
    """Yields the differences of second-order MAML and every other line with the same schedule and the same tasks.

    If a method has no line with a schedule of MAML, the longest schedules of the two are compared.
    """
    done = [line for line in lines if line.runs]
    mine = [line for line in done if line.method == "maml" and line.label == TRANSDUCTIVE]
    others = [line for line in done if line.title not in {line.title for line in mine}]
    paired = set()
    for first in mine:
        for second in others:
            if second.steps == first.steps:
                for pair in _on_the_same_tasks(first, second):
                    paired.add((second.data, second.title))
                    yield pair
    by_length = sorted(done, key=lambda line: line.steps)
    longest = {(line.data, line.title): line for line in by_length}
    first_of = {line.data: line for line in by_length if line in mine}
    for (data, title), second in longest.items():
        if data in first_of and second in others and (data, title) not in paired:
            yield from _on_the_same_tasks(first_of[data], second)


def _on_the_same_tasks(first: Line, second: Line) -> Iterator[Paired]:
    for run, ours in first.summaries():
        for other, theirs in second.summaries():
            known = "correct" in ours and "correct" in theirs
            if known and Protocol(**ours["protocol"]).same_tasks(Protocol(**theirs["protocol"])):
                difference = evaluation.difference(
                    evaluation.from_summary(ours),
                    evaluation.from_summary(theirs),
                    steps=(first.inner_steps, second.inner_steps),
                )
                yield Paired(first, second, run.seed, difference)
